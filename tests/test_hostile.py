"""Files made to do harm: each is refused with a reason, before memory is spent and without running anything.

What could fill the memory is read by this file itself, as a script in another process with little to fill.
"""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

GIGABYTE = 1 << 30
posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX's")


class Run:
    """Pickles as a call, made when the pickle is read."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def npy(shape: str, dtype: str = "|u1", body: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def hole(path: Path, size: int) -> Path:
    with put(path, b"").open("r+b") as file:
        file.truncate(size)
    return path


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(path: Path, *, bomb: str | None = None, size: int = 1 << 29, **members: bytes) -> Path:
    """A zip of `members`, and of `bomb`, a member of `size` zeros that takes a two-hundredth of them or less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if bomb:
            with archive.open(bomb, "w", force_zip64=True) as member:
                member.write(npy(f"({size},)"))
                for _ in range(size >> 24):
                    member.write(bytes(1 << 24))
    return path


def jpeg(width: int, height: int, *, before: bytes = b"") -> bytes:
    """A strip of two small frames whose header claims another size."""
    from lipprep.stages.shard.codec import encode_mouth

    content = bytearray(encode_mouth(np.zeros((2, 96, 96), np.uint8))[1])
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    content[2:2] = before
    return bytes(content)


def lists_in_an_array(count: int) -> bytes:
    """An npy of objects that holds a list of `count` empty ones."""
    file = io.BytesIO()
    np.save(file, np.array([None], object), allow_pickle=True)
    content = file.getvalue()
    return content[: content.index(b"\x80", 10)] + b"\x80\x04](" + b"]" * count + b"e."


def landmark_file(folder: Path, kind: str, content: bytes | Path) -> tuple[Path, str]:
    if isinstance(content, bytes):
        put(folder / f"WORD.{kind}", content)
    return folder, "WORD"


def png_video(path: Path, width: int, height: int) -> Path:
    """A video of one black PNG, a thousandth of its size."""
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(1 + width)) for _ in range(height)) + rows.flush()
    picture = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", body),
        (b"IEND", b""),
    ):
        picture += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        (first, *_) = stream.encode(av.VideoFrame(64, 48, "rgb24"))
        packet = av.Packet(picture)
        packet.pts = packet.dts = 0
        packet.time_base, packet.stream, packet.is_keyframe = first.time_base, stream, True
        container.mux(packet)
    return path


def sample_slice(folder: Path, data: bytes) -> tuple:
    path = put(folder / "train-00000.tar", data)
    return path, np.array([0, len(data)]), range(1)


def tar_of(*members: tuple[str, bytes], **fields: object) -> bytes:
    """A tar whose members have other header fields than they should."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def sample_of(strip: bytes, fields: bytes) -> bytes:
    """A sample as it stands in a shard, without the blocks that close a tar."""
    size = sum(512 + -(-len(content) // 512) * 512 for content in (strip, fields))
    return tar_of(("a.mouth.jpg", strip), ("a.json", fields))[:size]


def sparse(size: int) -> bytes:
    """A tar with one json that is a hole of `size` bytes (GNU's old form)."""
    header = bytearray(tar_of(("a.json", b""), type=tarfile.GNUTYPE_SPARSE)[:512])
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def claiming(kind: bytes, size: int) -> bytes:
    """The header of a member of `size` bytes, and nothing of them."""
    header = bytearray(tar_of(("a", b""), type=kind)[:512])
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def hollow_index(folder: Path, size: int = 1 << 29, *, hole: bool = True) -> Path:
    """A folder of shards whose index.npz unpacks to `size` bytes, and whose index.json says that it should be so.

    The tar is a hole of the size that so many samples have, or not even that.
    """
    import hashlib

    from lipprep.stages.shard.index import Index, Shard, plain_digest, save_index

    samples = min(size // 8, 10**7)
    with put(folder / "train-00000.tar", b"").open("r+b") as tar:
        tar.truncate(2048 * samples if hole else 1024)
    shard = Shard("train-00000.tar", "train", samples, 2048 * samples, "0" * 64)
    parameters = {"profile": "lrw2021", "crop_size": 96}
    offsets = {shard.name: np.array([0, 1024])}
    save_index(folder, Index("d", "f", ("a",), 25.0, parameters, {}, (shard,), offsets))
    zipped(folder / "index.npz", bomb=f"{shard.name}.npy", size=size)
    plain = json.loads((folder / "index.json").read_text())
    plain["offsets_sha256"] = hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest()
    del plain["sha256"]
    put(folder / "index.json", json.dumps({**plain, "sha256": plain_digest(plain)}))
    return folder


def reading(folder: Path) -> dict[str, Callable[[], object]]:
    """What to read, by the name of the trap; everything but checkpoints."""
    from lipprep.pipeline.manifest import load_manifest
    from lipprep.pipeline.sources import read_csv
    from lipprep.pipeline.wanted import load_mean_face, read_wanted
    from lipprep.stages.landmarks.archive import read_archive, read_persons
    from lipprep.stages.shard.codec import decode_mouth
    from lipprep.stages.shard.index import load_index
    from lipprep.stages.shard.reader import TarMembers, read_samples
    from lipprep.stages.video import probe, read_frames

    def face(name: str, content: bytes) -> object:
        return load_mean_face(put(folder / name, content))

    def archive(kind: str, content: bytes) -> object:
        return read_archive(*landmark_file(folder / os.urandom(4).hex(), kind, content))

    def members(content: bytes) -> object:
        return TarMembers(put(folder / "a.tar", content))

    def samples(data: bytes) -> object:
        return read_samples(*sample_slice(folder, data))

    def manifest(*lines: str) -> object:
        return load_manifest(put(folder / "m.jsonl", "\n".join(lines)))

    marker = folder / "ran"
    objects = io.BytesIO()
    np.save(objects, np.array([Run(os.mkdir, str(marker))], object), allow_pickle=True)
    header = '{"lipprep_manifest": 1, "root": ".", "fps": 25, "seed": 0, "chunk_size": 1, "labels": ["a"]}'
    strip = jpeg(96, 192)
    aliases = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "mean face of petabytes": lambda: face("p.npy", npy("(1000000000000000,)")),
        "mean face of objects": lambda: face("o.npy", objects.getvalue()),
        "mean face, a zip": lambda: load_mean_face(zipped(folder / "z.npy", bomb="x.npy", size=1 << 20)),
        "mean face, its header nested": lambda: face("n.npy", npy("(" * 4000 + ")" * 4000)),
        "mean face of text": lambda: face("t.npy", npy("(68, 2)", "<U1", bytes(68 * 8))),
        "crops of petabytes": lambda: decode_mouth("mouth.npy", npy("(100000000000, 96, 96)")),
        "strip of 60,000 x 60,000": lambda: decode_mouth("mouth.jpg", jpeg(60_000, 60_000)),
        "strip of 30,000 x 30,000": lambda: decode_mouth("mouth.jpg", jpeg(30_000, 30_000)),
        "strip of no frames": lambda: decode_mouth("mouth.jpg", jpeg(96, 0)),
        "strip of half frames": lambda: decode_mouth("mouth.jpg", jpeg(96, 100)),
        # A decoder takes the second header for the first: FF 01 has no length.
        "strip with a hidden header": lambda: decode_mouth(
            "mouth.jpg", jpeg(96, 192, before=b"\xff\x01\xff\xc0\x00\x0b\x08\x75\x30\x75\x30\x01\x01\x11\x00")
        ),
        "strip, a PNG": lambda: decode_mouth("mouth.jpg", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "strip, cut": lambda: decode_mouth("mouth.jpg", strip[:40]),
        "landmarks that run": lambda: archive("pkl", pickle.dumps([Run(os.mkdir, str(marker))])),
        "landmarks in an npz that run": lambda: archive("npz", zipped_bytes(folder, objects.getvalue())),
        "landmarks of a million lists": lambda: archive("npz", zipped_bytes(folder, lists_in_an_array(6_000_000))),
        "landmarks of a million notes": lambda: archive("pkl", b"\x80\x04]" + b"\x94" * 6_000_000 + b"."),
        "landmarks, a bomb": lambda: read_archive(
            *landmark_file(folder / "b", "npz", zipped(folder / "b/WORD.npz", bomb="data.npy"))
        ),
        "landmarks of petabytes": lambda: archive("npz", zipped_bytes(folder, npy("(1000000000000000,)", "<f4"))),
        "landmarks with names": lambda: archive("npz", zipped_bytes(folder, b"", name="\x1b[2J" * 10_000)),
        "persons without end": lambda: read_persons(put(folder / "p.csv", '"' + "x" * 10**6)),
        "persons beyond number": lambda: read_persons(put(folder / "p.csv", "a/b,0\na/c," + "9" * 6000)),
        "tar with a name of terabytes": lambda: members(claiming(tarfile.GNUTYPE_LONGNAME, 1 << 43)),
        "tar with a header of terabytes": lambda: members(claiming(tarfile.XHDTYPE, 1 << 43)),
        "tar with a member of terabytes": lambda: members(claiming(tarfile.REGTYPE, 1 << 43)),
        "tar with a hole": lambda: members(sparse(1 << 43)),
        "tar with a link": lambda: members(tar_of(("a.json", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "tar with a device": lambda: members(tar_of(("a.json", b""), type=tarfile.CHRTYPE)),
        "sample with a hole": lambda: samples(sparse(1 << 38)[:512]),
        "sample, compressed": lambda: samples(zlib.compress(bytes(1 << 29), 1, wbits=31)),
        "sample, compressed in a header": lambda: samples(
            b"\x1f\x8b\x08" + tar_of(("a.json", b"{}"))[3:1024] + zlib.compress(bytes(1000), wbits=31)
        ),
        "sample with a name of terabytes": lambda: samples(claiming(tarfile.GNUTYPE_LONGNAME, 1 << 43)),
        "sample of half a gigabyte": lambda: read_samples(
            hole(folder / "train-00000.tar", 1 << 29), np.array([0, 1 << 29]), range(1)
        ),
        "samples of gigabytes": lambda: read_samples(
            hole(folder / "train-00000.tar", 16 << 28), np.arange(17) << 28, range(16)
        ),
        "sample of a terabyte": lambda: read_samples(
            put(folder / "train-00000.tar", b""), np.array([0, 1 << 40]), range(1)
        ),
        "json without end": lambda: samples(sample_of(strip, b"[" + b"[],[]," * 10**6 + b"1]")),
        "json nested": lambda: samples(sample_of(strip, b"[" * 10**5)),
        "index.npz, a bomb": lambda: load_index(hollow_index(folder / "shards")),
        "index.npz as large as its index says": lambda: load_index(hollow_index(folder / "shards", 8 * (10**7 + 1))),
        "index of shards that are not there": lambda: load_index(hollow_index(folder / "shards", hole=False)),
        "index.json without end": lambda: load_index(hole(folder / "endless/index.json", 8 * GIGABYTE).parent),
        "index.json of lists": lambda: load_index(put(folder / "l/index.json", "[" + "[]," * 5_000_000 + "1]").parent),
        "manifest nested": lambda: manifest(header, "[" * 10**5),
        "manifest, a header without end": lambda: manifest('{"labels": [' + '"a",' * 5 * 10**6),
        "manifest, a line without end": lambda: manifest(header, '{"key": "' + "a" * (2 << 20) + '"}'),
        "manifest, fps beyond floats": lambda: manifest(header.replace("25", "1" + "0" * 400)),
        "plan of aliases": lambda: read_wanted(put(folder / "plan.yaml", aliases)),
        "plan of the environment": lambda: read_wanted(put(folder / "plan.yaml", "detector: ${oc.env:PATH}")),
        "plan nested": lambda: read_wanted(put(folder / "plan.yaml", "[" * 10**5)),
        "plan that runs": lambda: read_wanted(
            put(folder / "plan.yaml", f"detector: !!python/object/apply:os.mkdir ['{marker}']")
        ),
        "table without end": lambda: list(read_csv(put(folder / "t.csv", 'video,word\n"' + "x" * 10**6))),
        "table of the letter NUL": lambda: checked(folder, "video,word\na\0.mp4,b\n"),
        "picture of a gigabyte": lambda: list(read_frames(png_video(folder / "v.avi", 15_000, 15_000))),
        "header of a gigabyte": lambda: probe(png_video(folder / "v.avi", 15_000, 15_000)),
    }


def checked(folder: Path, text: str) -> object:
    from lipprep.pipeline.sources import make_manifest, read_csv

    return make_manifest(folder / "m.jsonl", read_csv(put(folder / "t.csv", text)), root=folder)


def zipped_bytes(folder: Path, content: bytes, name: str = "data.npy") -> bytes:
    return zipped(folder / "made.zip", **{name: content}).read_bytes()


def checkpoints(folder: Path) -> dict[str, Callable[[], object]]:
    """Checkpoints to load, by the name of the trap."""
    import torch

    from lipprep.train.checkpoint import load_checkpoint

    def saved(state: object) -> object:
        torch.save(state, folder / "c.pt")
        return load_checkpoint(folder / "c.pt")

    def swapped(content: bytes) -> object:
        """A checkpoint of torch's, with another pickle inside."""
        torch.save({}, folder / "c.pt")
        with zipfile.ZipFile(folder / "c.pt") as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(folder / "d.pt", "w") as archive:
            for name, old_content in members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else old_content)
        return load_checkpoint(folder / "d.pt")

    def beside(name: str, *, first: bytes = b"") -> object:
        """A checkpoint of torch's, with a small pickle of plain data beside the large one."""
        torch.save({"x": list(range(10**6))}, folder / "c.pt")
        with zipfile.ZipFile(folder / "c.pt") as old, zipfile.ZipFile(folder / "d.pt", "w") as archive:
            archive.fp.write(first)
            archive.start_dir = archive.fp.tell()
            for info in old.infolist():
                archive.writestr(info.filename, old.read(info))
            if name:
                archive.writestr(name, b"N.")
        return load_checkpoint(folder / "d.pt")

    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]
    marker = folder / "ran"
    legacy = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "code": lambda: saved({"model": Run(os.mkdir, str(marker))}),
        "code by another name": lambda: swapped(b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x01x\x85R."),
        "another pickle beside its own": lambda: beside("c/x.pkl"),
        "its pickle twice": lambda: beside("c/DATA.PKL"),
        "a zip behind a pickle": lambda: beside("", first=b"\x80\x02N."),
        "a pickle beyond measure": lambda: swapped(b"\x80\x02" + b"N0" * (1 << 25) + b"N."),
        "a bare pickle": lambda: load_checkpoint(put(folder / "p.pt", pickle.dumps(Run(os.mkdir, str(marker))))),
        "the form before zips": lambda: load_checkpoint(put(folder / "l.pt", legacy.getvalue())),
        "many bytes by name": lambda: saved({"model": Run(bytearray, 8 * GIGABYTE)}),
        "a tensor by name": lambda: saved({"model": Run(torch.Tensor, 4 * GIGABYTE)}),
        "a bomb": lambda: load_checkpoint(zipped(folder / "b.pt", bomb="b/data/0", **{"b/data.pkl": b"N."})),
        "lists of lists": lambda: saved({"lipprep_checkpoint": 1, "config": doubled}),
        "a list in itself": lambda: swapped(b"\x80\x02]q\x00h\x00a."),
        "nested lists": lambda: swapped(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
        "frames without number": lambda: saved(
            {
                **{"lipprep_checkpoint": 1, "model": {}, "optimizer": {}, "config": {}, "labels": [], "dataset": ""},
                **{"step": 0, "epoch": 0, "batch": 0, "best": None, "fps": 1e300},
                "parameters": {"profile": "lrw2021", "crop_size": 96},
            }
        ),
    }


def in_little_memory(traps: Callable[[Path], dict[str, Callable[[], object]]], folder: Path) -> None:
    """Spring every trap, and print what became of it, with the memory that it took in bytes."""
    import resource

    cases = traps(folder)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIGABYTE,) * 2)
    unit = 1 if sys.platform == "darwin" else 1024
    told = {}
    for name, case in cases.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            case()
            outcome = ["nothing", ""]
        except ValueError as error:
            outcome = ["refused", str(error)]
        except BaseException:
            outcome = ["broken", traceback.format_exc(limit=-3)]
        took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
        told[name] = [*outcome, took]
    print(json.dumps(told))


def sprung(traps: str, folder: Path) -> dict[str, list]:
    command = [sys.executable, __file__, traps, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@posix
@pytest.mark.parametrize("traps", ["reading", "checkpoints"])
def test_what_could_fill_the_memory_is_refused(traps, tmp_path):
    outcomes = sprung(traps, tmp_path)
    assert {name: told for name, told in outcomes.items() if told[0] != "refused"} == {}
    assert {name: told for name, told in outcomes.items() if told[2] > GIGABYTE // 4} == {}
    assert {name: told for name, told in outcomes.items() if not told[1].isprintable() or len(told[1]) > 1500} == {}
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def deadline():
    """An end to a test that waits at a pipe, far beyond what it takes."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "device", "folder", "link in a circle", "nothing"])
def no_file(request, tmp_path) -> Path:
    path = tmp_path / "thing"
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "link in a circle":
            path.symlink_to(path)
    return path


@posix
def test_only_files_are_read(no_file, tmp_path, deadline):
    from lipprep.pipeline.manifest import load_manifest
    from lipprep.pipeline.sources import grid, lrw, read_csv, read_labels
    from lipprep.pipeline.wanted import load_mean_face, read_wanted
    from lipprep.stages.landmarks.archive import archive_file, read_archive, read_persons
    from lipprep.stages.shard.index import load_index
    from lipprep.stages.shard.reader import TarMembers
    from lipprep.stages.video import probe, read_frames
    from lipprep.train.checkpoint import find_checkpoint, load_checkpoint

    def moved(path: str) -> Path:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(no_file):
            (tmp_path / path).symlink_to(no_file)
        return tmp_path / path

    readers: list[Callable[[Path], object]] = [
        load_manifest, read_labels, read_persons, load_mean_face, load_checkpoint, find_checkpoint, TarMembers, probe,
        load_index, lambda p: list(read_csv(p)), lambda p: list(read_frames(p)),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(ValueError, match="thing"):
            read(no_file)
    if os.path.lexists(no_file):
        with pytest.raises(ValueError, match="plan"):
            read_wanted(moved("plan.yaml"))
    moved("archive/a.npz"), moved("archive/a.pkl")
    assert archive_file(tmp_path / "archive", "a") is None
    with pytest.raises(ValueError, match="no landmark file"):
        read_archive(tmp_path / "archive", "a")
    put(tmp_path / "lrw/WORD/train/WORD_1.mp4", "")
    moved("lrw/WORD/train/WORD_1.txt"), moved("lrw/LOOP")
    assert [row.duration for row in lrw(tmp_path / "lrw")] == [None]
    put(tmp_path / "grid/video/s1/a.mpg", "")
    moved("grid/align/s1/a.align")
    with pytest.raises(ValueError, match="alignment"):
        list(grid(tmp_path / "grid"))
    for name in ("index.json", "index.npz"):
        hollow_index(tmp_path / name, 1 << 20)
        (tmp_path / name / name).unlink()
        moved(f"{name}/{name}")
        with pytest.raises(ValueError, match=name):
            load_index(tmp_path / name)


@pytest.mark.parametrize(
    "video",
    [
        "/etc/passwd", "../x.mp4", "a/../../x.mp4", "a/..", "..", ".", "", "C:/x.mp4", "C:x.mp4", "a\\..\\x.mp4",
        "\\\\host\\x", "a\0.mp4", "http://host/x.mp4", "file:/x.mp4", "pipe:0", "concat:a.mp4|b.mp4", "./a.mp4",
        "a//b.mp4", "a/./b.mp4", "a/", "\ud800.mp4",
    ],
)  # fmt: skip
def test_paths_stay_below_their_root_and_have_one_name(video, tmp_path):
    from lipprep.pipeline.manifest import load_manifest

    header = {"lipprep_manifest": 1, "root": ".", "fps": 25, "seed": 0, "chunk_size": 1, "labels": ["a"]}
    row = {"key": "a", "video": video, "split": "train", "word": "a", "label": 0, "chunk": 0}
    put(tmp_path / "m.jsonl", f"{json.dumps(header)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: video"):
        load_manifest(tmp_path / "m.jsonl")


@posix
def test_links_below_the_root_may_lead_elsewhere(make_video, tmp_path):
    from lipprep.stages.video import read_frames

    make_video(tmp_path / "disk/v.mp4", [np.full((48, 64), 90, np.uint8)] * 3)
    (tmp_path / "corpus/word").mkdir(parents=True)
    (tmp_path / "corpus/word/v.mp4").symlink_to(tmp_path / "disk/v.mp4")
    assert len(list(read_frames(tmp_path / "corpus/word/v.mp4"))) == 3


@pytest.mark.parametrize("name", ["/tmp/absolute", "../../outside", "a/../../outside", "C:\\outside"])
def test_nothing_is_unpacked(name, tmp_path):
    from lipprep.stages.shard.codec import encode_mouth
    from lipprep.stages.shard.reader import TarMembers, read_samples

    strip = encode_mouth(np.zeros((2, 96, 96), np.uint8))[1]
    data = tar_of((f"{name}.mouth.jpg", strip), (f"{name}.json", b"{}"))
    (tmp_path / "in").mkdir()
    path = put(tmp_path / "in/a.tar", data)
    with TarMembers(path) as members:
        assert members.read(f"{name}.json") == b"{}"
    size = 1024 + 512 + -(-len(strip) // 512) * 512
    try:
        (sample,) = read_samples(path, np.array([0, size]), range(1))
        assert sample["key"] == name
    except ValueError as error:
        assert "a.tar" in str(error)  # no key of a manifest's begins like this
    assert list(tmp_path.rglob("*")) == [tmp_path / "in", path]
    assert not Path("/tmp/absolute.json").exists()


def test_a_long_list_of_words_is_no_file_name(lipprep_in, tmp_path):
    put(tmp_path / "v/WORD/train/1.mp4", "")
    words = ",".join(["WORD", *(f"WORD{n}" for n in range(500))])
    result = lipprep_in("manifest", "folders", "v", "-o", "m.jsonl", "--words", words)
    assert result.exit_code == 1 and "no clip of the words WORD0" in result.stderr


@pytest.fixture
def lipprep_in(tmp_path, monkeypatch):
    """Run one command in an empty folder."""
    from click.testing import CliRunner

    from lipprep.cli import main

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@posix
def test_no_name_speaks_to_the_terminal(lipprep_in, tmp_path):
    for name in ("\x1b[2J", "a\nError: b", "\u202egpj", os.fsdecode(b"\xff") if sys.platform == "linux" else "x"):
        put(tmp_path / f"v/word/{name}.mp4", "no video")
    assert lipprep_in("manifest", "folders", "v", "-o", "m.jsonl").exit_code == 0
    result = lipprep_in("manifest", "check", "-m", "m.jsonl")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 5
    assert result.stdout.isascii() and "\x1b" not in result.stdout and "\\x1b[2J" in result.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["\x1b[2J"]},
        {"labels": ["a\u202eb"]},
        {"parameters": {"profile": "\x1b[2J", "crop_size": 96}},
        {"parameters": {"profile": "lrw2021", "crop_size": 96, "detector": "\x1b[2J"}},
        {"failures": {"test": {"\x1b[2J": 1}}},
    ],
)
def test_no_word_of_an_index_speaks_to_the_terminal(change, tmp_path, change_index):
    from lipprep.stages.shard.index import read_index

    change_index(hollow_index(tmp_path, 1 << 20), **change)
    with pytest.raises(ValueError, match=r"index\.json is no usable index"):
        read_index(tmp_path)
    persian = "\u0645\u06cc\u200c\u0631\u0648\u0645"  # spelt with a joiner
    change_index(tmp_path, labels=[persian], parameters={"profile": "lrw2021", "crop_size": 96}, failures={})
    assert read_index(tmp_path)[0].labels == (persian,)


def test_no_warning_speaks_to_the_terminal(capsys):
    from lipprep.train.metrics import warn

    warn("two\nlines\x1b[2J")
    assert capsys.readouterr().err == "warning: two\nlines\\x1b[2J\n"


def test_a_large_picture_says_what_to_do(make_video, tmp_path):
    from lipprep.stages import video
    from lipprep.stages.failures import ClipFailure

    path = make_video(tmp_path / "v.mp4", [np.full((48, 64), 90, np.uint8)] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
        with pytest.raises(ClipFailure, match=r"64 x 48 pixels.*scale it down"):
            list(video.read_frames(path))


if __name__ == "__main__":
    in_little_memory({"reading": reading, "checkpoints": checkpoints}[sys.argv[1]], Path(sys.argv[2]))
