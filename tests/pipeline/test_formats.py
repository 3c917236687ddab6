"""docs/formats.md suffices to write shards and read records with the standard library, and names every field."""

import dataclasses
import hashlib
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from lipprep.pipeline.accounts import Report
from lipprep.pipeline.manifest import Clip
from lipprep.pipeline.verify import verify
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.failures import FAILURES
from lipprep.stages.shard.index import load_index
from lipprep.train.checkpoint import Checkpoint


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sealed(header: dict) -> bytes:
    return json.dumps({**header, "check": sha256(json.dumps(header).encode())}).encode() + b"\n"


def npy(descr: str, shape: tuple[int, ...], data: bytes) -> bytes:
    head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def write_shard(folder: Path, split: str, words: list[str], draws: random.Random) -> tuple[dict, list[int]]:
    """A shard of a clip of 5 frames a word, and its record; what the index says of it, and its offsets."""
    file, entries = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, word in enumerate(words):
            key = f"{word}/{split}/{word}_{number:05d}"
            sample = {"label": ["no", "yes"].index(word), "word": word, "num_frames": 5, "split": split}
            sample |= dict.fromkeys(["word_start", "word_end", "duration", "speaker"])
            members = {"mouth.npy": npy("|u1", (5, 32, 32), draws.randbytes(5120)), "json": json.dumps(sample).encode()}
            entry = {"key": key, "status": "ok", "source": None, "inputs": "", "parts": {}, "maker": "", "crc32": 0}
            entries.append(entry | {"members": list(members), "offset": tar.offset, "figures": {"num_frames": 5}})
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
                entries[-1]["crc32"] = zlib.crc32(payload, entries[-1]["crc32"])
        end = tar.offset
    tar_bytes = file.getvalue()
    lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
    header = {"lipprep_record": 3, "dataset": "mine", "stage": "shards", "version": 1, "fps": 25.0}
    header |= {"parameters": {"profile": "unaligned", "crop_size": 32, "codec": "npy"}, "planned": len(words)}
    header |= {"rows": {}, "sources": None, "fingerprint": None, "attempt": "1", "computed": len(words), "parts": {}}
    header |= {"makers": [""], "packages": {}, "cpu": "any"}
    header |= {"counts": {"ok": len(words)}, "entries": {"bytes": len(lines), "sha256": sha256(lines)}, "end": end}
    about = {"bytes": len(tar_bytes), "sha256": sha256(tar_bytes)}
    (folder / f"{split}-00000.tar").write_bytes(tar_bytes)
    (folder / f"{split}-00000.jsonl").write_bytes(sealed({**header, "tar": about}) + lines)
    shard = {"name": f"{split}-00000.tar", "split": split, "samples": len(words), **about}
    return shard, [*(entry["offset"] for entry in entries), end]


def test_shards_written_by_the_book_are_sound(tmp_path):
    draws, written = random.Random(0), {}
    for split, words in (("train", ["no", "yes", "no"]), ("test", ["yes"])):
        shard, offsets = write_shard(tmp_path, split, words, draws)
        written[split] = shard, npy("<i8", (len(offsets),), struct.pack(f"<{len(offsets)}q", *offsets))
    with zipfile.ZipFile(tmp_path / "index.npz", "w", zipfile.ZIP_STORED) as archive:
        for shard, array in written.values():
            archive.writestr(f"{shard['name']}.npy", array)
    index = {"lipprep_index": 3, "dataset": "mine"}
    index["fingerprint"] = sha256("".join(shard["sha256"] for shard, _ in written.values()).encode())
    index |= {"labels": ["no", "yes"], "fps": 25.0}
    index["parameters"] = {"profile": "unaligned", "crop_size": 32, "codec": "npy"}
    index |= {"failures": {}, "shards": [shard for shard, _ in written.values()]}
    index["offsets_sha256"] = sha256((tmp_path / "index.npz").read_bytes())
    index["sha256"] = sha256(json.dumps(index).encode())
    (tmp_path / "index.json").write_text(json.dumps(index))
    found = verify(tmp_path)
    assert (found.findings, found.clips, found.shards) == ([], 4, 2)
    assert load_index(tmp_path).offsets["test-00000.tar"].tolist()[0] == 0


def test_records_and_the_index_are_what_the_book_says(chain):
    chain()
    starts = {}
    for tar in sorted(Path("shards").glob("*.tar")):
        line, _, lines = tar.with_suffix(".jsonl").read_bytes().partition(b"\n")
        header, content = json.loads(line), tar.read_bytes()
        check = header.pop("check")
        assert (header["lipprep_record"], header["stage"], header["dataset"]) == (3, "shards", "m")
        assert check == sha256(json.dumps(header).encode())
        assert header["entries"] == {"bytes": len(lines), "sha256": sha256(lines)}
        assert header["tar"] == {"bytes": len(content), "sha256": sha256(content)}
        entries = [json.loads(entry) for entry in lines.splitlines()]
        assert header["counts"] == {"ok": len(entries)} and header["planned"] == len(entries)
        starts[tar.name] = [entry["offset"] for entry in entries] + [header["end"]]
        with tarfile.open(tar) as archive:
            for entry in entries:
                names = [f"{entry['key']}.{extension}" for extension in entry["members"]]
                first, sample = map(archive.getmember, names)
                assert first.offset == entry["offset"] and (first.mtime, first.mode) == (0, 0o644)
                crc32 = zlib.crc32(archive.extractfile(first).read())
                assert zlib.crc32(archive.extractfile(sample).read(), crc32) == entry["crc32"]
    index = json.loads(Path("shards/index.json").read_text())
    digest = index.pop("sha256")
    assert digest == sha256(json.dumps(index).encode()) and index["lipprep_index"] == 3
    assert index["offsets_sha256"] == sha256(Path("shards/index.npz").read_bytes())
    digests = "".join(shard["sha256"] for shard in index["shards"])
    assert index["fingerprint"] == sha256(digests.encode())
    with zipfile.ZipFile("shards/index.npz") as archive:
        for shard in index["shards"]:
            numbers = archive.read(f"{shard['name']}.npy")[-8 * (shard["samples"] + 1) :]
            assert list(struct.unpack(f"<{shard['samples'] + 1}q", numbers)) == starts[shard["name"]]


def test_the_book_names_every_field(chain):
    chain()
    names = {*FAILURES, *(f.name for f in dataclasses.fields(Checkpoint)), *Clip.__struct_fields__}
    names |= {f.name for f in dataclasses.fields(Wanted)} | {f.name for f in dataclasses.fields(Report)}
    for path in (Path("manifests/m.jsonl"), *Path().rglob("landmarks/*.jsonl"), *Path("shards").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            names |= set(line) | set(line.get("figures", {}))
    names |= set(json.loads(Path("shards/index.json").read_text()))
    book = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    assert names - set(re.findall(r"`(\w+)`", book)) == set()
