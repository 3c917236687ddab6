"""`lipprep verify`: every kind of damage is found, named, and mended by doing what the finding says."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.records import commit, read_entries, read_header
from lipprep.pipeline.verify import verify
from lipprep.pipeline.verify_chunk import read_chunk
from lipprep.pipeline.verify_deep import picture_fault
from lipprep.stages.align import mean_face
from lipprep.stages.lock import LOCK
from lipprep.stages.shard.codec import encode_mouth, npy_bytes
from lipprep.stages.shard.index import Shard, load_index, plain_digest, read_index, save_index
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.shard.writer import TarWriter

FIRST, SECOND = "train-00000.tar", "train-00001.tar"
FIRST_RECORD, SECOND_RECORD = "train-00000.jsonl", "train-00001.jsonl"


def command(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    """A folder with the corpus, two windows of each video, and all that is made of them; `older` with other words."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(corpus, folder / "videos")
    with contextlib.chdir(folder):
        for duration, out in ((0.4, "older"), (0.3, "shards")):
            lines = [
                f"{p.relative_to(corpus).as_posix()},{p.parts[-3]},{p.parts[-2]},{start},8,{duration}"
                for p in sorted(corpus.rglob("*.mp4"))
                for start in (0, 6)
            ]
            Path("clips.csv").write_text("\n".join(["video,word,split,start,num_frames,duration", *lines]))
            command("manifest", "csv", "clips.csv", "--root", "videos", "-o", "manifests/m.jsonl")
            command("landmarks", "-j", 1)
            command("shards", "-j", 1, "-o", out)
        command("crops", "-j", 1)
    return folder


@pytest.fixture
def data(built, tmp_path, monkeypatch) -> Path:
    """A copy of it to spoil; the working folder."""
    folder = shutil.copytree(built, tmp_path / "data")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def shards(data) -> Path:
    return Path("shards")


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar")) if p.is_file()}


def found(folder: Path, *, deep: bool = False) -> set[tuple[str, str, str | None]]:
    return {(f.kind, f.file, f.key) for f in verify(folder, deep=deep).findings}


def key_of(tar: Path, position: int) -> str:
    return read_entries(tar)[position]["key"]


def last_key(tar: Path) -> str:
    """The key of the last clip, whether or not the tar is whole."""
    return json.loads(tar.with_suffix(".jsonl").read_bytes().splitlines()[-1])["key"]


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def rebuild(tar: Path, keep: Callable[[str], bool]) -> None:
    """The tar with only some of its members, its record as it was."""
    with TarMembers(tar) as old:
        members = {name: old.read(name) for name in old if keep(name)}
    with TarWriter(tar) as out:
        for name, payload in members.items():
            out.add(name, payload)
        out.close()
        out.publish()


def rewrite(tar: Path, *, member: dict | None = None, entry: dict | None = None, header: dict | None = None) -> None:
    """Make a tar and its record again, sound in themselves: with members (by extension) and fields (of the first
    clip, and of the record's header) replaced."""
    entries, old_header = read_entries(tar), read_header(tar)
    with TarMembers(tar) as old:
        members = [{e: old.read(f"{entry['key']}.{e}") for e in entry["members"]} for entry in entries]
    members[0] |= member or {}
    entries[0] |= entry or {}
    with TarWriter(tar) as out:
        for line, mine in zip(entries, members, strict=True):
            content = b"".join(mine.values())
            line |= {"offset": out.offset, "crc32": zlib.crc32(content)}
            if "digest" in line:
                line["digest"] = hashlib.sha256(content).hexdigest()
            for extension, payload in mine.items():
                out.add(f"{line['key']}.{extension}", payload)
        end = out.offset
        out.close()
        commit(out, {**old_header, **(header or {}), "parts": {}, "end": end}, entries)


def reindex(folder: Path, **fields: object) -> None:
    """Write the index that fits the records, but for `fields`."""
    shards, offsets = [], {}
    for old in read_index(folder)[0].shards:
        header, entries = read_header(folder / old.name), read_entries(folder / old.name)
        shards.append(Shard(old.name, old.split, len(entries), **header["tar"]))
        offsets[old.name] = [*(e["offset"] for e in entries), header["end"]]
    fitting = {
        "shards": tuple(shards),
        "offsets": offsets,
        "fingerprint": hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
    }
    save_index(folder, dataclasses.replace(read_index(folder)[0], **{**fitting, **fields}))


def follow(folder: Path, *, deep: bool = False) -> None:
    """Do what the findings say, to the letter: remove what they name, then run what they name."""
    commands = set()
    for finding in verify(folder, deep=deep).findings:
        remove, again = re.fullmatch(r"(?:remove (.+?) and )?run `lipprep (.+)` again", finding.remedy).groups()
        commands.add(again)
        for name in remove.split(" and ") if remove else []:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for again in commands:
        command(*shlex.split(again), "-j", 1)


# Each spoils a folder of shards and says what must be found.


def a_bit_of_a_clip(folder):
    flip(folder / FIRST, read_entries(folder / FIRST)[1]["offset"] + 2000)
    return {("damaged_clip", FIRST, key_of(folder / FIRST, 1)), ("checksum", FIRST, None)}


def a_bit_of_a_tar_header(folder):
    flip(folder / FIRST, read_entries(folder / FIRST)[0]["offset"] + 20)
    return {("damaged_clip", FIRST, key_of(folder / FIRST, 0)), ("checksum", FIRST, None)}


def a_bit_of_padding(folder):
    flip(folder / FIRST, -1)
    return {("checksum", FIRST, None)}


def a_bit_of_a_record_header(folder):
    flip(folder / FIRST_RECORD, 40)
    return {("bad_record", FIRST_RECORD, None)}


def a_bit_of_a_record_line(folder):
    flip(folder / FIRST_RECORD, -30)
    return {("bad_record", FIRST_RECORD, None)}


def a_bit_of_the_index(folder):
    flip(folder / "index.json", 300)
    return {("bad_index", "index.json", None)}


def a_bit_of_the_offsets(folder):
    flip(folder / "index.npz", 200)
    return {("bad_offsets", "index.npz", None)}


def a_tar_cut_between_members(folder):
    path = folder / FIRST
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[-1].offset
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    return {("size", FIRST, None), ("missing_member", FIRST, last_key(path))}


def a_tar_cut_between_clips(folder):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[: read_entries(path)[-1]["offset"]])
    return {("size", FIRST, None), ("missing_clip", FIRST, last_key(path))}


def a_tar_cut_inside_a_member(folder):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[: read_entries(path)[-1]["offset"] + 1500])
    return {("size", FIRST, None), ("damaged_clip", FIRST, last_key(path))}


def a_member_missing(folder):
    key = key_of(folder / FIRST, 0)
    rebuild(folder / FIRST, lambda name: name != f"{key}.json")
    return {("missing_member", FIRST, key)}


def a_clip_missing(folder):
    key = key_of(folder / FIRST, 0)
    rebuild(folder / FIRST, lambda name: not name.startswith(key))
    return {("missing_clip", FIRST, key)}


def an_empty_tar(folder):
    (folder / FIRST).write_bytes(b"")
    return {("size", FIRST, None)}


def a_missing_tar(folder):
    (folder / FIRST).unlink()
    return {("missing_tar", FIRST, None)}


def a_missing_record(folder):
    (folder / FIRST_RECORD).unlink()
    return {("missing_record", FIRST_RECORD, None)}


def a_missing_tar_and_record(folder):
    (folder / FIRST).unlink()
    (folder / FIRST_RECORD).unlink()
    return {("missing_tar", FIRST, None)}


def an_older_tar(folder):
    shutil.copy(Path("older") / FIRST, folder)
    return {("checksum", FIRST, None), ("damaged_clip", FIRST, key_of(folder / FIRST, 0))}


def an_older_tar_and_record(folder):
    shutil.copy(Path("older") / FIRST, folder)
    shutil.copy(Path("older") / FIRST_RECORD, folder)
    return {("swapped", FIRST, None)}


def an_older_record(folder):
    shutil.copy(Path("older") / FIRST_RECORD, folder)
    return {("other_record", FIRST_RECORD, None)}


def an_older_index(folder):
    shutil.copy(Path("older") / "index.json", folder)
    return {("swapped", FIRST, None)}


def an_empty_index(folder):
    (folder / "index.json").write_text("{}")
    return {("bad_index", "index.json", None)}


def no_index(folder):
    (folder / "index.json").unlink()
    return {("no_index", "index.json", None)}


def no_offsets(folder):
    (folder / "index.npz").unlink()
    return {("bad_offsets", "index.npz", None)}


def the_index_of_another_data_set(folder):
    reindex(folder, dataset="other")
    return {("other_dataset", "index.json", None)}


def an_index_with_another_crop_size(folder):
    reindex(folder, parameters={**read_index(folder)[0].parameters, "crop_size": 88})
    return {("parameters", "index.json", None)}


def an_index_with_other_failures(folder):
    reindex(folder, failures={"train": {"no_face": 1}})
    return {("failures", "index.json", None)}


def an_index_with_another_fingerprint(folder):
    reindex(folder, fingerprint="0" * 64)
    return {("fingerprint", "index.json", None)}


def an_index_with_another_split(folder):
    first, *rest = load_index(folder).shards
    reindex(folder, shards=(dataclasses.replace(first, split="val"), *rest))
    return {("wrong_split", "index.json", None)}


def an_index_with_other_offsets(folder):
    offsets = dict(load_index(folder).offsets)
    reindex(folder, offsets={**offsets, FIRST: offsets[FIRST] + [0, 512, 0]})
    return {("offsets", "index.npz", None)}


def an_index_spelt_otherwise(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace('"jpeg"', '"\\u006apeg"'))
    return {("bad_index", "index.json", None)}


def a_shard_with_the_clips_of_another(folder):
    shutil.copy(folder / FIRST, folder / SECOND)
    shutil.copy(folder / FIRST_RECORD, folder / SECOND_RECORD)
    keys = [e["key"] for e in read_entries(folder / FIRST)]
    return {("swapped", SECOND, None), *(("duplicate_key", SECOND, key) for key in keys)}


def a_clip_in_two_shards_and_in_the_index(folder):
    key = key_of(folder / FIRST, 0)
    rewrite(folder / SECOND, entry={"key": key})
    reindex(folder)
    return {("duplicate_key", SECOND, key)}


def a_shard_that_is_in_no_index(folder):
    shutil.copy(folder / FIRST, folder / "train-00099.tar")
    shutil.copy(folder / FIRST_RECORD, folder / "train-00099.jsonl")
    return {("unknown_tar", "train-00099.tar", None), ("duplicate_key", "train-00099.tar", key_of(folder / FIRST, 0))}


def a_record_without_a_tar(folder):
    shutil.copy(folder / FIRST_RECORD, folder / "train-00099.jsonl")
    return {("missing_tar", "train-00099.tar", None)}


def a_tar_that_is_nobodys(folder):
    shutil.copy(folder / FIRST, folder / "train-77777.tar")
    return {("unknown_tar", "train-77777.tar", None)}


def a_folder_in_place_of_a_tar(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()
    return {("unreadable", FIRST, None)}


def a_folder_in_place_of_a_record(folder):
    (folder / FIRST_RECORD).unlink()
    (folder / FIRST_RECORD).mkdir()
    return {("unreadable", FIRST_RECORD, None)}


def a_folder_in_place_of_the_index(folder):
    (folder / "index.json").unlink()
    (folder / "index.json").mkdir()
    return {("bad_index", "index.json", None)}


def a_fifo_in_place_of_a_tar(folder):
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)
    return {("unreadable", FIRST, None)}


def a_link_to_itself(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)
    return {("unreadable", FIRST, None)}


def a_record_of_other_parameters(folder):
    parameters = {**read_header(folder / FIRST)["parameters"], "quality": 80}
    rewrite(folder / FIRST, header={"parameters": parameters})
    reindex(folder)
    return {("parameters", FIRST_RECORD, None)}


def a_record_of_another_data_set(folder):
    rewrite(folder / FIRST, header={"dataset": "other"})
    reindex(folder)
    return {("other_dataset", FIRST_RECORD, None)}


CHEAP = [
    a_bit_of_a_clip, a_bit_of_a_tar_header, a_bit_of_padding, a_bit_of_a_record_header, a_bit_of_a_record_line,
    a_bit_of_the_index, a_bit_of_the_offsets, a_tar_cut_between_members, a_tar_cut_between_clips,
    a_tar_cut_inside_a_member, a_member_missing, a_clip_missing, an_empty_tar, a_missing_tar, a_missing_record,
    a_missing_tar_and_record, an_older_tar, an_older_tar_and_record, an_older_record, an_older_index, an_empty_index,
    no_index, no_offsets, the_index_of_another_data_set, an_index_with_another_crop_size,
    an_index_with_other_failures, an_index_with_another_fingerprint, an_index_with_another_split,
    an_index_with_other_offsets, an_index_spelt_otherwise, a_shard_with_the_clips_of_another,
    a_clip_in_two_shards_and_in_the_index, a_shard_that_is_in_no_index, a_record_without_a_tar,
    a_tar_that_is_nobodys, a_folder_in_place_of_a_tar, a_folder_in_place_of_a_record,
    a_folder_in_place_of_the_index, a_fifo_in_place_of_a_tar, a_link_to_itself, a_record_of_other_parameters,
    a_record_of_another_data_set,
]  # fmt: skip


def test_sound_folders_give_no_finding(built, monkeypatch):
    monkeypatch.chdir(built)
    for folder in ("shards", "work/m/landmarks", "work/m/crops"):
        verified = verify(Path(folder), workers=2)
        assert verified.findings == [] and verified.stage == Path(folder).name
        assert (verified.clips, verified.shards) == (24, len(bytes_of(Path(folder))))
        assert verified.bytes == sum(p.stat().st_size for p in Path(folder).glob("*.tar"))


def test_failed_clips_are_no_finding(data):
    for video in (*Path("videos").glob("*/val/*.mp4"), Path("videos/ABOUT/train/ABOUT_00001.mp4")):
        video.write_bytes(b"rubbish")
    np.save("face.npy", mean_face() * 1.1)
    command("landmarks", "-j", 1, "--max-failures", "100%")
    for flags in (["--mean-face", "face.npy"], ["--profile", "unaligned", "--codec", "npy"]):
        command("shards", "-j", 1, "--max-failures", "100%", "--replace", *flags)
        assert found(Path("shards"), deep=True) == set()
        assert verify(Path("shards")).clips == 18


@pytest.mark.parametrize("spoil", CHEAP, ids=lambda f: f.__name__)
def test_damage_is_found_and_mended_by_its_remedy(shards, spoil):
    whole = bytes_of(shards)
    expected = spoil(shards)
    assert expected and expected <= found(shards)
    follow(shards)
    assert found(shards) == set()
    assert bytes_of(shards) == whole


def test_all_damage_is_found_in_one_run(shards):
    expected = set()
    for spoil in (a_bit_of_a_clip, an_empty_index):
        expected |= spoil(shards)
    for n, name in enumerate(sorted(set(bytes_of(shards)) - {FIRST})):
        tar = shards / name
        if n == 0:
            tar.unlink()
            expected.add(("missing_tar", name, None))
        elif n == 1:
            flip(tar.with_suffix(".jsonl"), 50)
            expected.add(("bad_record", f"{tar.stem}.jsonl", None))
        else:
            tar.write_bytes(tar.read_bytes()[:-512])
            expected.add(("size", name, None))
    assert expected <= found(shards)


@pytest.mark.parametrize(("folder", "flips"), [("shards", 150), ("work/m/landmarks", 50)])
def test_a_bit_flipped_anywhere_is_found(data, folder, flips):
    rng = random.Random(f"{folder} 0")
    # The card is text for people, and may be changed by them.
    files = sorted(p for p in Path(folder).iterdir() if not p.name.startswith(".") and p.name != "README.md")
    assert len(files) == len(bytes_of(Path(folder))) * 2 + (2 if folder == "shards" else 0)
    for n in range(flips):
        path = files[n % len(files)]
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, place, bit)
        assert path.stem in {Path(f.file).stem for f in verify(Path(folder)).findings}, (path, place, bit)
        flip(path, place, bit)
    assert found(Path(folder)) == set()


def test_artefacts_of_other_stages_are_mended_too(data):
    for folder in (Path("work/m/landmarks"), Path("work/m/crops")):
        whole = bytes_of(folder)
        a_bit_of_a_clip(folder)
        (folder / SECOND).unlink()
        (folder / SECOND_RECORD).unlink()
        expected = {("checksum", FIRST, None), ("missing_tar", SECOND, None)}
        assert expected <= found(folder)
        follow(folder)
        assert bytes_of(folder) == whole and found(folder) == set()
    assert json.loads(command("shards", "-j", 1, "--json").stdout)["chunks_made"] == 0


def test_hostile_tars_are_named_and_cost_nothing(shards):
    def member(name: str, **fields: object) -> bytes:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        return info.tobuf(tarfile.GNU_FORMAT)

    zeros = bytes(1024)
    hostile = {
        "absolute": member("/etc/passwd.json") + zeros,
        "above": member("a/../../b.json") + zeros,
        "link": member("a.json", type=tarfile.SYMTYPE, linkname="/etc") + zeros,
        "sparse": member("a.json", type=tarfile.GNUTYPE_SPARSE, size=1 << 40) + zeros,
        "huge": member("a.json", size=1 << 60) + zeros,
        "negative": bytes(124) + zeros,
        "long": member("a", type=tarfile.GNUTYPE_LONGNAME, size=1 << 50) + zeros,
        "pax": member("a", type=tarfile.XHDTYPE, size=1 << 50) + zeros,
    }
    tars = dict(zip((*hostile, "holes"), sorted(path.name for path in shards.glob("*.tar")), strict=False))
    for record in shards.glob("*.jsonl"):
        record.unlink()
    for name, content in hostile.items():
        (shards / tars[name]).write_bytes(content)
    with (shards / tars["holes"]).open("wb") as file:
        file.write(member("a.json", size=1 << 40))
        file.truncate(1 << 40)  # a terabyte that takes no room
    result = found(shards)
    assert {("unsafe_member", tars[name], None) for name in ("absolute", "above", "link")} <= result
    assert {("damaged_tar", tars[name], None) for name in ("sparse", "huge", "long", "pax")} <= result
    assert set(tars.values()) <= {file for _, file, _ in result}
    assert all(("size", tar, None) in result for tar in tars.values())


def test_whatever_lies_in_a_folder_ends_in_findings(tmp_path):
    rng = random.Random(0)
    for n in range(200):
        name = f"{rng.choice(['train', 'val', 'x', '..'])}-{n % 50:05d}.{rng.choice(['tar', 'jsonl', 'json', 'npz'])}"
        (tmp_path / name).write_bytes(rng.choice([b"", b"{}\n", b"[[[[", b"\x00" * 2000, rng.randbytes(3000)]))
    deep = b'{"lipprep_record": 3, "check": ' + b"[" * 100_000
    (tmp_path / "val-00060.jsonl").write_bytes(deep)
    (tmp_path / "val-00060.tar").write_bytes(b"")
    (tmp_path / "train-99999999999.jsonl").write_bytes(b"{}")
    for content in (b"{}", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"lipprep_index": 2}', b"1" * 5000):
        (tmp_path / "index.json").write_bytes(content)
        (tmp_path / "index.npz").write_bytes(content)
        result = command("verify", tmp_path, "--json", code=1)
        report = json.loads(result.stdout)
        assert ("bad_index" in report["kinds"]) and len(report["findings"]) == sum(report["kinds"].values())
    command("verify", tmp_path, "--deep", "-j", 1, code=1)


def test_sealed_nonsense_ends_in_findings(shards):
    """Records and an index whose digests fit, and whose values are of any kind."""
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        2**70,
        1e308,
        float("nan"),
        "",
        "..",
        "\ud800",
        "a\n\x1b[0m",
        [],
        {},
        [[]],
        {"a": 1},
        FIRST,
    ]

    def places(value: object, path: tuple = ()) -> list[tuple]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path, *(p for name, part in inner for p in places(part, (*path, name)))]

    def spoilt(text: str | bytes) -> dict:
        plain = json.loads(text)
        *above, last = rng.choice([p for p in places(plain) if p])
        part = plain
        for name in above:
            part = part[name]
        part[last] = rng.choice(values)
        return plain

    record, index = shards / FIRST_RECORD, shards / "index.json"
    header, *lines = record.read_bytes().splitlines(keepends=True)
    text, found = index.read_text(), 0
    for n in range(100):
        entries = b"".join([*lines[:-1], json.dumps(spoilt(lines[-1])).encode() + b"\n"])
        told = {"bytes": len(entries), "sha256": hashlib.sha256(entries).hexdigest()}
        plain = {k: v for k, v in {**spoilt(header), "entries": told}.items() if k != "check"}
        check = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
        record.write_bytes(json.dumps({**plain, "check": check}).encode() + b"\n" + entries)
        plain = {k: v for k, v in spoilt(text).items() if k != "sha256"}
        index.write_text(json.dumps({**plain, "sha256": plain_digest(plain)}))
        done = CliRunner().invoke(main, ["verify", "-j", "1", *(["--json"] if n % 2 else [])], catch_exceptions=False)
        assert done.exit_code in (0, 1) and done.stdout.encode()
        found += done.exit_code
    assert found > 90  # a word for another, or seconds and versions that nobody holds against anything, may be all


def test_remedies_are_commands_that_can_be_run(data):
    landmarks = Path("work/m/landmarks")
    (landmarks / FIRST).unlink()
    (Path("shards") / FIRST).unlink()

    def remedies(folder: Path) -> set[str]:
        return {re.sub("^remove .*? and (?=run)", "", f.remedy) for f in verify(folder).findings}

    assert remedies(landmarks) == {"run `lipprep landmarks -m manifests/m.jsonl -w work` again"}
    assert remedies(Path("shards")) == {"run `lipprep shards -m manifests/m.jsonl -o shards` again"}
    moved = Path("shards").rename("my shards")
    assert remedies(moved) == {"run `lipprep shards -m manifests/m.jsonl -o 'my shards'` again"}
    for path in (*moved.glob("*.jsonl"), moved / "index.json"):
        path.unlink()
    unknown = " again (with the manifest and -w that it was made with)"
    assert remedies(moved) == {f"run `lipprep shards -o 'my shards'`{unknown}"}
    assert remedies(moved.rename("shards")) == {f"run `lipprep shards`{unknown}"}
    assert remedies(landmarks.rename("elsewhere")) == {f"run `lipprep landmarks`{unknown}"}


def test_copies_without_records_are_sound(shards):
    for path in shards.glob("*.jsonl"):
        path.unlink()
    names = list(bytes_of(shards))
    for deep in (False, True):
        verified = verify(shards, deep=deep)
        assert verified.findings == [] and verified.clips == 24
        assert verified.notes[0].startswith(f"{len(names)} tars have no record: they are as the index says")
    assert "sound" in command("verify").stdout
    flip(shards / FIRST, 2000)
    (shards / SECOND).write_bytes((shards / SECOND).read_bytes()[:-512])
    assert found(shards) == {("checksum", FIRST, None), ("size", SECOND, None)}


def test_no_tar_is_to_be_removed_for_want_of_a_record(shards):
    expected = a_missing_record(shards)
    (shards / "index.json").unlink()
    findings = verify(shards).findings
    assert expected <= {(f.kind, f.file, f.key) for f in findings}
    assert not any("remove" in f.remedy for f in findings)


def test_a_folder_that_a_run_is_at_work_in(shards, monkeypatch):
    monkeypatch.setattr("lipprep.stages.lock._PATIENCE", 0)
    with alone_in(shards):
        assert "at work in shards" in command("verify", code=1).stderr
    command("verify")
    (shards / LOCK).unlink()
    command("verify")
    assert not (shards / LOCK).exists()


def test_a_folder_with_nothing_to_verify(tmp_path):
    """Tars that are somebody else's are not to be removed."""
    for _ in range(2):
        (finding,) = verify(tmp_path).findings
        assert finding.kind == "empty"
        assert finding.remedy == "name the folder that holds the shards (or work/NAME/landmarks)"
        (tmp_path / "backup.tar").write_bytes(b"rubbish")


def test_an_index_of_any_size(shards):
    with (shards / "index.json").open("ab") as file:
        file.truncate(20 << 30)  # takes no room
    (finding,) = verify(shards).findings
    assert finding.kind == "bad_index" and "at most" in finding.message


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_names_of_any_bytes(shards):
    for name in (b"\xff\xfe.tar", b"a\nb.tar", b"\x1b[31m.tar", b"' and \".tar"):
        Path(os.fsdecode(os.path.join(b"shards", name))).write_bytes(b"rubbish")  # noqa: PTH118
    result = command("verify")
    assert "4 tars are not lipprep's" in result.stdout and "\x1b" not in result.stdout
    assert json.loads(command("verify", "--json").stdout)["kinds"] == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(shards):
    (shards / FIRST).chmod(0)
    assert ("unreadable", FIRST, None) in found(shards)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_folder_that_may_only_be_read(shards):
    (shards / LOCK).chmod(0o444)
    shards.chmod(0o555)
    assert found(shards) == set()
    shards.chmod(0o755)


def test_files_of_others_are_no_fault(shards):
    for name in (f".{FIRST}.123.tmp", "notes.jsonl", "train-99999.jsonl", "train-99998.tar"):
        (shards / name).write_bytes(b"mine")
    verified = verify(shards)
    assert verified.findings == [] and "1 tars are not lipprep's" in verified.notes[0]


def test_what_is_printed(shards):
    sound = command("verify").stdout
    assert re.search(r"shards: 24 clips in \d+ tars of shards, 0.\d+ GB read in .* GB/s\): sound", sound)
    for n in range(30):
        (shards / f"train-8{n:04}.tar").write_bytes(bytes(10240))
    printed = command("verify", "-j", 2, code=1).stdout
    assert "unknown_tar: 30" in printed and "... and 10 more" in printed and "train-80029" not in printed
    report = json.loads(command("verify", "--json", code=1).stdout)
    assert report["kinds"]["unknown_tar"] == 30 and {"clips", "shards", "bytes", "seconds", "notes"} <= set(report)
    assert set(report["findings"][0]) == {"file", "key", "kind", "message", "remedy"}
    Path("work/empty").mkdir()
    assert "empty: 1" in command("verify", "work/empty", code=1).stdout
    assert "there is no folder" in command("verify", "absent", code=1).stderr


# The deep look.


def jpeg(mouth_TSS: np.ndarray) -> bytes:
    return encode_mouth(mouth_TSS)[1]


def texture(seed: int) -> np.ndarray:
    """A picture (96, 96) uint8 with edges, of its own seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12)).astype(np.uint8)
    return cv2.resize(noise, (96, 96), interpolation=cv2.INTER_CUBIC)


def moving(seed: int, frames: int = 8) -> np.ndarray:
    """Crops (T, 96, 96) uint8 that move by two pixels a frame."""
    return np.stack([np.roll(texture(seed), 2 * t, axis=0) for t in range(frames)])


def sample(**fields: object) -> dict[str, bytes]:
    plain = {
        "label": 0, "word": "ABOUT", "word_start": None, "word_end": None, "duration": 0.3, "speaker": None,
        "num_frames": 8, "split": "train",
    }  # fmt: skip
    return {"json": json.dumps({**plain, **fields}).encode()}


def claims(height: int, width: int) -> bytes:
    """A JPEG whose header says another size."""
    content = bytearray(jpeg(moving(0)))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


DEEP = {
    "black": {"mouth.jpg": jpeg(np.zeros((8, 96, 96), np.uint8))},
    "flat": {"mouth.jpg": jpeg(np.full((8, 96, 96), 128, np.uint8))},
    "frozen": {"mouth.jpg": jpeg(np.stack([texture(1)] * 8))},
    "shape": {"mouth.jpg": jpeg(moving(1, frames=7))},
    "shape ": {"mouth.jpg": jpeg(np.ascontiguousarray(moving(1)[:, :88, :88]))},
    "shape  ": sample(num_frames=9),
    "undecodable": {"mouth.jpg": jpeg(moving(1))[:100]},
    "undecodable ": {"mouth.jpg": claims(60000, 60000)},
    "undecodable  ": {"mouth.jpg": b""},
    "bad_json": {"json": b"{"},
    "bad_json ": {"json": b"[" * 50_000},
    "bad_json  ": sample(duration="0.3"),
    "bad_json   ": sample(word_end=float("inf")),
    "bad_label": sample(label=7),
    "bad_label ": sample(label=1),
    "wrong_split": sample(split="test"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_what_only_decoding_shows(shards, kind):
    tar = next(t for t in sorted(shards.glob("train-*.tar")) if key_of(t, 0).startswith("ABOUT"))
    rewrite(tar, member=DEEP[kind])
    reindex(shards)
    assert found(shards) == set()
    assert (kind.strip(), tar.name, key_of(tar, 0)) in found(shards, deep=True)


def test_a_sound_folder_stays_sound_when_decoded(data):
    for folder in ("shards", "work/m/landmarks", "work/m/crops"):
        assert found(Path(folder), deep=True) == set()
    assert "sound" in command("verify", "--deep", "-j", 1).stdout


def test_damage_that_decoding_shows_is_mended_by_its_remedy(shards):
    whole = bytes_of(shards)
    rewrite(shards / FIRST, member={"mouth.jpg": b"no picture"})
    reindex(shards)
    follow(shards, deep=True)
    assert bytes_of(shards) == whole and found(shards, deep=True) == set()


def test_clips_with_the_same_pixels(shards):
    for tar, split in ((FIRST, "train"), ("val-00000.tar", "val")):
        word = key_of(shards / tar, 0).split("/")[0]
        member = {"mouth.jpg": jpeg(moving(5)), **sample(split=split, word=word, label=int(word != "ABOUT"))}
        rewrite(shards / tar, member=member)
    reindex(shards)
    assert found(shards, deep=True) == {("duplicate_clip", "val-00000.tar", key_of(shards / "val-00000.tar", 0))}


def test_a_video_in_two_splits(shards):
    first, val = shards / FIRST, shards / "val-00000.tar"
    plain = {"size": 1, "mtime_ns": 1, "sha256": None}

    def leaks(key: str, ours: dict, theirs: dict) -> bool:
        rewrite(first, entry={"source": {**plain, **ours}})
        rewrite(val, entry={"source": {**plain, **theirs}, "key": key})
        reindex(shards)
        result = found(shards, deep=True)
        assert result in (set(), {("leakage", val.name, key)})
        return bool(result)

    name = key_of(first, 0).split("@")[0]
    assert leaks(f"{name}@99", {}, {})
    assert leaks(f"{name}@99", {"sha256": "a"}, {})
    assert not leaks(f"{name}@99", {"sha256": "a"}, {"sha256": "b"})
    assert leaks("other@99", {"sha256": "a"}, {"sha256": "a"})
    assert not leaks("other@99", {}, {})


def test_landmarks_that_are_none(data):
    folder = Path("work/m/landmarks")
    points = np.full((8, 68, 2), np.nan, np.float32)
    for array, kind in ((points, "no_landmarks"), (points.astype(np.float64), "shape"), (points[:, :5], "shape")):
        rewrite(folder / FIRST, member={"landmarks.npy": npy_bytes(array)})
        assert found(folder, deep=True) == {(kind, FIRST, key_of(folder / FIRST, 0))}


def test_what_a_clip_may_take_of_the_memory(shards):
    def member(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    with (shards / "train-99999.tar").open("wb") as file:
        for name, size in (("a.mouth.npy", 1 << 29), ("a.bin", 1 << 40)):
            file.write(member(name, size))
            file.truncate(file.tell() + size)  # takes no room
            file.seek(0, os.SEEK_END)
    (finding,) = [f for f in verify(shards, deep=True).findings if f.kind == "undecodable"]
    assert (finding.file, finding.key) == ("train-99999.tar", "a") and "256 MiB" in finding.message


def test_a_tar_that_the_memory_does_not_suffice_for(shards):
    def visit(*_: object) -> None:
        raise MemoryError

    (finding,) = read_chunk(shards / FIRST, "", visit=visit).findings.listed
    assert (finding.kind, finding.file) == ("unreadable", FIRST) and "--workers" in finding.remedy


def test_frames_that_are_repeated_are_not_frozen():
    film = moving(3, frames=29)
    ended = film.copy()
    ended[4:] = film[3]  # a window beyond its video's end
    slow = np.repeat(film[:4], 8, axis=0)[:29]  # 3 frames a second, shown at 25
    short = np.stack([film[0], film[0], film[1], film[1], film[1]])
    assert [picture_fault(crops) for crops in (ended, slow, short)] == [None, None, None]
    jumps = np.repeat(film[:3], 10, axis=0)
    kind, message = picture_fault(jumps)
    assert kind == "frozen" and message == "its 30 frames are (nearly) one and the same picture"
    assert picture_fault(np.stack([film[0]] * 5))[0] == "frozen"


def test_dark_footage_is_neither_black_nor_frozen():
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.2, 0.06):
        crops = np.round(moving(3, frames=29) * scale).astype(np.uint8)
        assert picture_fault(crops) is None
    lens_cap = np.clip(rng.normal(0, 1.5, (29, 96, 96)), 0, 255).astype(np.uint8)
    assert picture_fault(lens_cap)[0] == "black"
    still = np.stack([texture(3)] * 29)
    assert picture_fault(still)[0] == "frozen"
    still[10:] = np.roll(still[10:], 1, axis=1)  # the landmarks jumped by a pixel, once
    assert picture_fault(still)[0] == "frozen"
    assert picture_fault(np.repeat(moving(3, frames=10), 3, axis=0)) is None  # 8 frames a second, shown at 25
    assert picture_fault(still[:1]) is None
