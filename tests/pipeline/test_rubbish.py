"""More than 500 files that are no sound video, read one by one and as a corpus."""

import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lipprep.stages.failures import ClipFailure
from lipprep.stages.video import MAX_FRAMES, probe, read_frames

SEED = 7
# Of every container that is read: suffix, codec, pixel format.
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mov": ("mpeg4", "yuv420p"),
    "m4v": ("libx264", "yuv420p"),
    "mkv": ("libx264", "yuv420p"),
    "webm": ("libvpx", "yuv420p"),
    "avi": ("mjpeg", "yuvj420p"),
    "mpg": ("mpeg1video", "yuv420p"),
    "mpeg": ("mpeg2video", "yuv420p"),
    "ts": ("libx264", "yuv420p"),
    "flv": ("flv", "yuv420p"),
    "wmv": ("msmpeg4v3", "yuv420p"),
    "ogg": ("libvpx", "yuv420p"),
    "mp4.hevc": ("libx265", "yuv420p"),
    "mkv.ffv1": ("ffv1", "gray"),
    "mkv.vp9": ("libvpx-vp9", "yuv420p"),
    "avi.raw": ("rawvideo", "yuv420p"),
}
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and limits are POSIX's")


def write_video(path: Path, kind: str, *, count=8, size=(64, 48), fps=25, sound=False, options=None) -> bytes:
    codec, pixels = KINDS[kind]
    rng = np.random.default_rng(SEED)
    form = {"mpg": "mpeg", "mpeg": "mpeg", "ts": "mpegts", "wmv": "asf", "mkv": "matroska", "m4v": "mp4"}
    suffix = kind.partition(".")[0]
    with av.open(str(path), "w", format=form.get(suffix, suffix), options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(10**6))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if codec == "libx264":
            stream.options = {"x264-params": "threads=1:keyint=8", "preset": "ultrafast"}
        if codec == "libx265":
            stream.options = {"x265-params": "pools=none:log-level=none", "preset": "ultrafast"}
        if sound:
            voice = container.add_stream("pcm_s16le" if suffix == "avi" else "aac", rate=16000, layout="mono")
        large = size[0] > 4000  # noise of that size takes seconds
        texture = np.full(size[::-1], 90, np.uint8) if large else rng.integers(0, 255, size[::-1], np.uint8)
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, n, 1), format="gray").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(voice.encode(silence))
            container.mux(voice.encode())
    return path.read_bytes()


def other_files() -> Iterator[tuple[str, bytes]]:
    """Files of other kinds, (suffix that they deserve, content)."""
    from PIL import Image

    pixels = Image.fromarray(np.random.default_rng(SEED).integers(0, 255, (48, 64, 3), np.uint8))
    for kind in ("png", "jpeg", "gif", "tiff", "bmp", "webp"):
        content = io.BytesIO()
        pixels.save(content, kind)
        yield kind, content.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("v.mp4", b"\0" * 1000)
    yield "zip", packed.getvalue()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("v.mp4"))
    yield "tar", packed.getvalue()
    yield "gz", zlib.compress(b"video", wbits=31)
    yield "pdf", b"%PDF-1.7\n1 0 obj <</Type/Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield "html", b"<!doctype html><video src='http://localhost/v.mp4'></video>"
    yield "txt", b"Channel: BBC One HD\nDuration: 0.45 seconds\n"
    yield "srt", b"1\n00:00:00,000 --> 00:00:01,000\nABOUT\n"
    yield "m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsound.ts\n#EXT-X-ENDLIST\n"
    yield "ffconcat", b"ffconcat version 1.0\nfile 'sound.mp4'\n"
    yield "mpd", b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>"
    yield "sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
    yield "json", b'{"lipprep_manifest": 1}'
    yield "exe", b"MZ" + bytes(200)
    yield "noise", random.Random(SEED).randbytes(5000)
    yield "zeros", bytes(5000)
    yield "newlines", b"\n" * 5000
    yield "empty", b""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The same file with a few of its bits flipped, cut short, or a stretch of it missing, doubled or zero."""
    copy = bytearray(content)
    # Headers and indices stand at the ends: half of all damage goes there.
    where = [rng.randrange(len(copy)) if rng.random() < 0.5 else rng.randrange(min(600, len(copy))) for _ in range(40)]
    kind = rng.choice(("flip", "flip", "flips", "cut", "cut", "missing", "zero", "double"))
    at, end = where[0], min(len(copy), where[0] + rng.randrange(1, 400))
    if kind.startswith("flip"):
        for n in where[: 1 if kind == "flip" else rng.randrange(2, 40)]:
            copy[n if rng.random() < 0.8 else -1 - n] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del copy[rng.randrange(len(copy)) :]
    elif kind == "missing":
        del copy[at:end]
    elif kind == "zero":
        copy[at:end] = bytes(end - at)
    else:
        copy[at:at] = copy[at:end]
    return bytes(copy)


def claim(content: bytes, **boxes: tuple[int, bytes]) -> bytes:
    """An mp4 whose boxes say something else: name=(offset behind the name, bytes)."""
    copy = bytearray(content)
    for name, (offset, value) in boxes.items():
        at = copy.index(name.encode()) + 4 + offset
        copy[at : at + len(value)] = value
    return bytes(copy)


def absurd(folder: Path, mp4: bytes) -> Iterator[tuple[str, bytes]]:
    """Videos that are sound, and odd; and headers that cannot be true."""
    make = folder / "made"
    for size in ((2, 2), (16, 16), (65, 49), (3000, 2), (2, 3000)):
        yield f"{size[0]}x{size[1]}.mkv", write_video(make, "mkv.ffv1", size=size, count=3)
    yield "1x1.mkv", write_video(make, "mkv.ffv1", size=(1, 1), count=30)
    yield "8k.mp4", write_video(make, "mp4", size=(7680, 4320), count=2)
    for fps in (10_000, Fraction(1, 1000), Fraction(24000, 1001)):
        yield f"{float(fps):g}fps-a.mkv", write_video(make, "mkv.ffv1", fps=fps)
        yield f"{float(fps):g}fps-b.mp4", write_video(make, "mp4", fps=fps)
    yield "0.001fps-c.avi", write_video(make, "avi", fps=Fraction(1, 1000))
    yield "one-frame.mp4", write_video(make, "mp4", count=1)
    yield "no-frame.mp4", claim(mp4, stsz=(8, bytes(4)))
    yield "sound-too.mp4", write_video(make, "mp4", sound=True)
    huge = struct.pack(">HH", 65535, 65535)
    yield "huge-entry.mp4", claim(mp4, avc1=(24, huge))
    yield "huge-track.mp4", claim(mp4, tkhd=(76, struct.pack(">II", 60_000 << 16, 0xFFFF_0000)))
    yield "years.mp4", claim(mp4, mdhd=(16, b"\x7f\xff\xff\xff"), mvhd=(16, b"\xff" * 4))
    yield "endless-frame.mp4", claim(mp4, stts=(8, struct.pack(">II", 8, 0x7FFF_FFFF)))
    yield "many-samples.mp4", claim(mp4, stsz=(4, struct.pack(">II", 1, 0xFFFF_FFFF)))
    yield "unknown-codec.mp4", mp4.replace(b"avc1", b"zzzz")
    yield "turned-by-7-degrees.mp4", claim(mp4, tkhd=(40, struct.pack(">4i", 65048, 7987, 0, -7987)))
    mpg = write_video(make, "mpg")
    yield "two-sizes.mpg", mpg + write_video(make, "mpg", size=(128, 96))
    yield "twice.mpg", mpg + mpg
    make.unlink()


def sound_alone(path: Path) -> bytes:
    with av.open(str(path), "w", format="mp4") as container:
        voice = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(voice.encode(silence))
        container.mux(voice.encode())
    return path.read_bytes()


NAMES = (
    "with space", " leading", "trailing ", "-dash", "--help", "'quote'", '"double"', "new\nline", "\r", "tab\t", "50%",
    "%s%d%n", "%00", "a;b", "$(touch ran)", "`ls`", "*", "?", "[x]", "{a,b}", "~", "#", "!", "&", "|", "<x>", "é",
    "\u202etxt", "口", "\x1b[2J\x1b[31m", "\x07", "\u2028", "..x", "x..", "con", "__x__", "@5", "a@5", "http:x",
    "n" * 250,
)  # fmt: skip


def special(folder: Path) -> int:
    """What a folder may hold that is no file; how many there are."""
    (folder / "folder.mp4").mkdir()
    (folder / "folder.mp4" / "inside.mp4").write_bytes(b"x")
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # paths of sockets are short
        listener.bind("socket.mp4")
    for name, target in {
        "zero": "/dev/zero", "full": "/dev/full", "tty": "/dev/tty", "loop": "loop.mp4", "dangling": "nowhere.mp4",
        "up": ".", "pipe-link": "pipe.mp4",
    }.items():  # fmt: skip
        (folder / f"{name}.mp4").symlink_to(target)
    closed = folder / "closed.mp4"
    closed.write_bytes(b"x" * 100)
    closed.chmod(0)
    return 11


def build(root: Path) -> int:
    """Lay out the corpus as ROOT/word/video, from the seed; how many entries it has."""
    rng = random.Random(SEED)
    count = 0

    def put(word: str, name: str, content: bytes) -> None:
        nonlocal count
        (root / word).mkdir(parents=True, exist_ok=True)
        (root / word / name).write_bytes(content)
        count += 1

    whole = {}
    root.mkdir()
    for kind in KINDS:
        whole[kind] = write_video(root / "made", kind)
        put("whole", f"{kind.replace('.', '-')}.{kind.partition('.')[0]}", whole[kind])
    whole["faststart"] = write_video(root / "made", "mp4", options={"movflags": "faststart"})
    for number in range(23 * len(whole)):
        kind = list(whole)[number % len(whole)]
        put("damaged", f"{number:03d}-{kind.replace('.', '-')}.mp4", damaged(whole[kind], rng))
    for suffix, content in other_files():
        for name in ("mp4", "avi"):
            put("other", f"{suffix}-as-{name}.{name}", content)
    for name, content in absurd(root, whole["mp4"]):
        put("absurd", name, content)
    put("absurd", "sound-alone.mp4", sound_alone(root / "made"))
    (root / "made").unlink()
    for number, name in enumerate(NAMES):
        put("named", f"{name}.mp4", whole["mp4"] if number % 2 else damaged(whole["mp4"], rng))
    if sys.platform == "linux":  # other systems take UTF-8 alone
        for name in (b"caf\xe9", b"\xff\xfe", b"a\xc3"):
            put("named", os.fsdecode(name + b".mp4"), whole["mp4"])
    (root / "special").mkdir()
    return count + special(root / "special")


@pytest.fixture(scope="module")
def rubbish(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rubbish") / "videos"
    assert build(root) >= 500
    return root


@pytest.fixture
def deadline():
    """An end to a test that waits at a pipe, far beyond what it takes."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def paths(root: Path) -> list[Path]:
    return sorted(path for word in root.iterdir() for path in word.iterdir())


@posix
def test_every_file_is_read_or_refused_with_a_reason(rubbish, deadline):
    outcomes: Counter = Counter()
    files = paths(rubbish)
    assert len(files) >= 500
    for number, path in enumerate(files):
        for read in (probe, lambda p: list_shapes(read_frames(p, color=number % 3 == 0))):  # noqa: B023
            try:
                found = read(path)
            except ClipFailure as failure:
                outcomes[failure.kind] += 1
                message = str(failure)
                assert message.isprintable() and (path.name in message or not path.name.isprintable())
            else:
                outcomes["ok"] += 1
                assert not isinstance(found, tuple) or (found[1] <= MAX_FRAMES and len(found[0]) <= 1)
    assert {"ok", "unreadable", "truncated", "no_video", "too_long"} == set(outcomes)
    assert outcomes["ok"] > 200 < outcomes["truncated"] + outcomes["unreadable"]


# Runs a command, and adds the memory of its largest process, as the system counts it, to what it says.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, "-m", "lipprep", *sys.argv[1:]])
print("", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, sep="\\n", file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """One command as a user calls it, in a time after which something must be waiting for a pipe."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout, done.stderr[-4000:]
    assert not any(c in done.stdout + done.stderr for c in ("\x1b[2J", "\x07", "\u202e")), (
        "a name spoke to the terminal"
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stderr.splitlines()[-1]) * unit < 2 << 30
    return done


def accounted(folder: Path) -> Counter:
    """The clips of every record in a folder by class; none of them twice, and a member for each that is ok."""
    classes: Counter = Counter()
    keys = []
    for record in sorted(folder.glob("*.jsonl")):
        entries = [json.loads(line) for line in record.read_text().splitlines()[1:]]
        with tarfile.open(record.with_suffix(".tar")) as tar:
            stored = {name.partition(".")[0] for name in tar.getnames()}
        assert stored == {e["key"] for e in entries if e["status"] == "ok"}
        keys += [e["key"] for e in entries]
        classes.update("ok" if e["status"] == "ok" else e["class"] for e in entries)
        assert all(e["message"].isprintable() for e in entries if e["status"] != "ok")
    assert len(keys) == len(set(keys))
    return classes


@posix
def test_the_corpus_goes_through_every_command(rubbish, tmp_path):
    listed = run("manifest", "folders", rubbish, "-o", "manifests/m.jsonl", "--chunk-size", 64, cwd=tmp_path)
    planned = len((tmp_path / "manifests/m.jsonl").read_text().splitlines()) - 1
    assert planned >= 500 and f"{planned} clips" in listed.stdout
    checked = run("manifest", "check", "-j", 2, cwd=tmp_path, code=1)
    assert 100 < len(checked.stdout.splitlines()) < planned
    flags = ("-j", 2, "--max-failures", "100%")
    for stage, more in (
        ("landmarks", ()),
        ("crops", ("--profile", "fixed", "--crop-size", 32, "--box", "0,0,32,32")),
        ("shards", ()),
    ):
        run(stage, *flags, *more, cwd=tmp_path)
    counts = [accounted(tmp_path / folder) for folder in ("work/m/landmarks", "work/m/crops", "shards")]
    assert {sum(c.values()) for c in counts} == {planned}
    assert (
        counts[0]["no_face"] > 200 and counts[2]["ok"] > 200 and not {"crashed", "timeout"} & {*counts[0], *counts[2]}
    )
    for command in (("status",), ("failures",), ("verify", "shards")):
        run(*command, cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


def list_shapes(frames) -> tuple[set, int]:
    shapes, count = set(), 0
    for count, frame in enumerate(frames, 1):  # noqa: B007
        shapes.add(frame.shape)
    return shapes, count
