"""The manifest: one line a clip, and the chunk that each clip is worked on, stored and retried with."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import msgspec

from lipprep.io.errors import UserError
from lipprep.stages.atomic import check_own, replacing
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.codec import most_frames
from lipprep.stages.shard.index import SPLITS, check_labels
from lipprep.stages.untrusted import check_file, printable

MANIFEST_VERSION = 1
CHUNK_SIZE = 512  # clips: about a minute of landmarks, 34 MB of JPEG strips
MAX_FRAMES = most_frames("npy", 96)  # of a window, 29,127: more than a clip of crops can have at the usual size
MAX_TRACKED = 100_000  # frames of a stretch in which faces are followed
MAX_START = 10**9  # frames: over a year of video
MAX_CHUNK = 10**6
_MAX_SECONDS = 1e9
MAX_LINE = 1 << 20  # bytes of a clip's line
_BLOCK = 1 << 24  # bytes of a manifest that are read at once
_MAX_HEADER = 1 << 24  # bytes of the first line, which lists the words
STRETCH = 30.0  # seconds of a long video whose clips stay together, so that no frame is decoded twice


class Clip(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One clip: a whole video, or a window of one. A struct, of which a million fit into 300 MB.

    `video` is a path below the manifest's root, with forward slashes. `start` (frames at the manifest's fps,
    may be negative) and `num_frames` are given for a window. `word_start` and `word_end` are seconds from the
    clip's first frame; `duration` is the word's, in seconds, as the source says. `tracked_from` and `tracked_to` are
    the frames [from, to) in which the faces of a stretch are followed where that is more than its clips see: others of
    its clips were filtered out, and landmarks depend on where tracking began. `rough`: the word's times are guesses.
    """

    key: str
    video: str
    split: str
    word: str
    label: int
    chunk: int
    start: int | None = None
    num_frames: int | None = None
    word_start: float | None = None
    word_end: float | None = None
    duration: float | None = None
    speaker: str | None = None
    tracked_from: int | None = None
    tracked_to: int | None = None
    rough: bool | None = None


@dataclass(frozen=True)
class Manifest:
    """The clips of a corpus.

    `root` is the absolute folder, or the one in a store, that videos lie below; `fps` is the clips' frame rate.
    `filtered` is the condition that its clips are those of another manifest by, None for one that was listed.
    """

    path: Path
    root: Path | RemotePath
    fps: float
    seed: int
    chunk_size: int
    labels: tuple[str, ...]
    clips: tuple[Clip, ...]
    filtered: str | None = None

    @property
    def name(self) -> str:
        """The file's stem, which names the folder of its artefacts and its data set."""
        return self.path.stem

    def chunks(self) -> dict[tuple[str, int], list[Clip]]:
        """The clips of each chunk, by (split, number), in the manifest's order."""
        return self._chunks

    @cached_property
    def _chunks(self) -> dict[tuple[str, int], list[Clip]]:
        chunks: dict[tuple[str, int], list[Clip]] = {}
        for clip in self.clips:
            chunks.setdefault((clip.split, clip.chunk), []).append(clip)
        return dict(sorted(chunks.items(), key=lambda item: (SPLITS.index(item[0][0]), item[0][1])))


def chunk_name(split: str, number: int) -> str:
    """What a chunk's files are called, without their ending.

    >>> chunk_name("train", 7)
    'train-00007'
    """
    return f"{split}-{number:05d}"


_PLAIN_VIDEO = re.compile(r"([A-Za-z0-9_@-]+(?:/[A-Za-z0-9_@-]+)*)\.[A-Za-z0-9]+")  # nothing to look into


def clip_key(video: str, start: int | None = None) -> str:
    """The key of a clip: its path without the ending, and the first frame of a window.

    Bytes outside [A-Za-z0-9_/@-] are percent-encoded (a dot would end a WebDataset key) and no part starts
    with two underscores (WebDataset skips such names).

    >>> clip_key("s1/bbaf 2n.mpg", 12)
    's1/bbaf%202n@12'
    """
    if (plain := _PLAIN_VIDEO.fullmatch(video)) and "__" not in video:
        return plain[1] if start is None else f"{plain[1]}@{start}"
    path = PurePosixPath(video)
    raw = os.fsencode(str(path.with_suffix(""))).decode("latin-1")
    encoded = re.sub(r"[^A-Za-z0-9_/@-]", lambda m: f"%{ord(m[0]):02X}", raw)
    encoded = re.sub(r"(^|/)__", r"\1%5F_", encoded)
    return encoded if start is None else f"{encoded}@{start}"


def check_video_path(video: str) -> None:
    """Raise ValueError where a manifest's path could leave the root it is relative to, or is no file's name.

    What the path names may well be a link to another place: corpora are often folders of links.
    """
    if _PLAIN_VIDEO.fullmatch(video):
        return
    parts = video.split("/")
    if not parts[0] or ".." in parts or "\\" in video or ":" in parts[0] or video == ".":
        raise UserError(f"video {video!r} is no path below the root: use forward slashes, no drive and no '..'")
    if "" in parts or "." in parts:
        clean = PurePosixPath(video).as_posix()
        raise UserError(f"video {video!r}: write {clean!r}, for two names of one file could be in two splits")
    try:
        named = b"\0" not in os.fsencode(video)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise UserError(f"video {video!r} holds characters that no file's name can have")


def stretch(clip: Clip, fps: float) -> tuple[str, int]:
    """What is decoded and tracked together: a video, or a stretch of STRETCH seconds of a long one."""
    return clip.video, max(clip.start or 0, 0) // round(STRETCH * fps)


def save_manifest(manifest: Manifest) -> None:
    """Write the manifest atomically, its root relative to its folder where they share one.

    Raises UserError where another file than a manifest has that name.
    """
    check_own(manifest.path, b'"lipprep_manifest"')
    header = {
        "lipprep_manifest": MANIFEST_VERSION,
        "root": _relative(manifest.root, manifest.path.resolve().parent),
        "fps": manifest.fps,
        "seed": manifest.seed,
        "chunk_size": manifest.chunk_size,
        "labels": list(manifest.labels),
        **({} if manifest.filtered is None else {"filtered": manifest.filtered}),
    }
    with replacing(manifest.path) as file:
        file.write(json.dumps(header).encode("ascii") + b"\n")
        encode = msgspec.json.Encoder().encode
        for clip in manifest.clips:
            try:
                line = encode(clip)
            except UnicodeEncodeError:
                line = b"\xff"
            # ASCII alone: names of files need not be UTF-8, and their stray bytes come back only so.
            if not line.isascii():
                known = {n: v for n, v in msgspec.structs.asdict(clip).items() if v is not None}
                line = json.dumps(known, separators=(",", ":")).encode("ascii")
            file.write(line + b"\n")


def _relative(root: Path | RemotePath, folder: Path) -> str:
    if isinstance(root, RemotePath):
        return str(root)
    try:
        return Path(os.path.relpath(root, folder)).as_posix()
    except ValueError:  # another drive
        return root.as_posix()


_TYPES = {
    "key": str, "video": str, "split": str, "word": str, "label": int, "chunk": int, "start": int,
    "num_frames": int, "word_start": float, "word_end": float, "duration": float, "speaker": str,
    "tracked_from": int, "tracked_to": int, "rough": bool,
}  # fmt: skip
_KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false"}


def _parse(row: object, labels: Sequence[str]) -> Clip:
    if not isinstance(row, dict):
        raise UserError("not a JSON object")
    for name, value in row.items():
        kind = _TYPES.get(name)
        if kind is None:
            raise UserError(f"unknown field {name!r} (known: {', '.join(_TYPES)})")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{name} is {value!r}, expected {_KINDS[kind]}")
    try:
        clip = Clip(**{n: float(v) if _TYPES[n] is float and abs(v) < _MAX_SECONDS else v for n, v in row.items()})
    except TypeError as error:
        raise UserError(f"fields are missing: {error}") from None
    check_clip(clip, labels)
    return clip


def _sound(clip: Clip, labels: Sequence[str]) -> bool:
    """Whether all is well with a clip, told at a look; where it is not, `check_clip` says whether and why."""
    video = _PLAIN_VIDEO.fullmatch(clip.video)
    if video is None or "__" in clip.key:
        return False
    if clip.start is None:
        key, whole = video[1], clip.num_frames is None
    else:
        key = f"{video[1]}@{clip.start}"
        whole = 0 < (clip.num_frames or 0) <= MAX_FRAMES and -clip.num_frames < clip.start <= MAX_START
    return (
        whole
        and clip.tracked_from is clip.tracked_to is None
        and clip.key == key
        and clip.split in SPLITS
        and 0 <= clip.label < len(labels)
        and labels[clip.label] == clip.word
        and 0 <= clip.chunk < MAX_CHUNK
        and (clip.duration is None or 0 <= clip.duration <= _MAX_SECONDS)
        and (clip.word_start is None or -_MAX_SECONDS <= clip.word_start <= _MAX_SECONDS)
        and (clip.word_end is None or -_MAX_SECONDS <= clip.word_end <= _MAX_SECONDS)
    )


def check_clip(clip: Clip, labels: Sequence[str]) -> None:
    """Raise ValueError, saying why, for a clip that no manifest may hold."""
    if _sound(clip, labels):
        return
    check_video_path(clip.video)
    if clip.split not in SPLITS:
        raise UserError(f"unknown split {clip.split!r} (known: {', '.join(SPLITS)})")
    if not 0 <= clip.label < len(labels) or labels[clip.label] != clip.word:
        raise UserError(f"label {clip.label} and word {clip.word!r} do not agree with the header's labels")
    if (clip.start is None) != (clip.num_frames is None) or (clip.num_frames is not None and clip.num_frames < 1):
        raise UserError("a window has both start and num_frames, and at least one frame")
    if clip.start is not None and not -clip.num_frames < clip.start <= MAX_START:
        raise UserError(f"the window of {clip.num_frames} frames from frame {clip.start} on sees nothing of a video")
    if (clip.num_frames or 0) > MAX_FRAMES:
        raise UserError(
            f"a window of {clip.num_frames} frames is longer than {MAX_FRAMES}, which is what fits into a clip: "
            "cut it into several"
        )
    if clip.tracked_from is not None or clip.tracked_to is not None:
        first, last = clip.tracked_from, clip.tracked_to
        if clip.start is None or None in (first, last) or not 0 <= first < last <= min(first, MAX_START) + MAX_TRACKED:
            raise UserError(f"tracked_from {first} and tracked_to {last} are no frames round those of a window")
    for name in ("word_start", "word_end", "duration"):
        value = getattr(clip, name)
        # Compared, not converted: a whole number may be larger than any float. Not a number compares to none.
        if value is not None and not (0 if name == "duration" else -_MAX_SECONDS) <= value <= _MAX_SECONDS:
            raise UserError(f"{name} is {value}, expected seconds")
    if not 0 <= clip.chunk < MAX_CHUNK or re.search(r"[^A-Za-z0-9_/@%-]|^/|(^|/)__|(^|/)(/|$)", clip.key):
        raise UserError(f"key {clip.key!r} or chunk {clip.chunk} is not of the form that manifests have")


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(limit := _MAX_HEADER if number == 1 else MAX_LINE)
            if not line:
                return
            try:
                if len(line) == limit:
                    raise UserError(f"it is longer than {limit} bytes")
                if line.strip():
                    yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{printable(path)}, line {number} is no JSON ({_short(error)})") from error


def _header(header: object) -> tuple[tuple[str, ...], float, int, int, Path]:
    """Labels, fps, seed, chunk size and root of a manifest's first line; ValueError names what is wrong."""
    if not isinstance(header, dict) or header.get("lipprep_manifest") != MANIFEST_VERSION:
        raise UserError(
            f"no manifest of version {MANIFEST_VERSION}: its first line must have "
            f'"lipprep_manifest": {MANIFEST_VERSION}'
        )
    labels, fps, root = header.get("labels"), header.get("fps"), header.get("root")
    numbers = [header.get(name) for name in ("seed", "chunk_size")]
    if not isinstance(labels, list) or {type(w) for w in labels} != {str} or len(set(labels)) < len(labels):
        wrong = "labels, which are distinct words"
    elif type(fps) not in (int, float) or not 1 <= fps <= 1000:
        wrong = f"fps ({fps!r}), frames a second from 1 to 1000"
    elif any(type(number) is not int for number in numbers):
        wrong = "seed or chunk_size, whole numbers"
    elif not isinstance(root, str) or "\0" in root or not root:
        wrong = "root, the folder of its videos"
    else:
        check_labels(labels)
        return tuple(labels), float(fps), *numbers, place(root)
    raise UserError(f"its header lacks or misstates {wrong}")


def load_manifest(path: Path, *, root: Path | RemotePath | None = None) -> Manifest:
    """Read and check a manifest; `root` overrides where its videos lie.

    Raises ValueError, naming the line, for anything that is not a well-formed manifest: another version, an
    unknown split, a key twice, a path outside the root, a video in two splits.
    """
    path = Path(path)
    try:
        check_file(path, "manifest")
    except ValueError as error:
        raise UserError(f"{error}: `lipprep manifest --help` shows how to make one") from error
    _, header = next(_lines(path), (1, None))
    try:
        labels, fps, seed, size, stored = _header(header)
        filtered = header.get("filtered")
        if filtered is not None and not isinstance(filtered, str):
            raise UserError("its header misstates filtered, the condition that its clips were chosen by")
    except ValueError as error:
        raise UserError(f"{printable(path)}: {_short(error)}") from None
    clips = _read_quickly(path, labels)
    if clips is None:
        clips = _read_with_care(path, labels)
    if not clips:
        raise UserError(f"{printable(path)} lists no clips")
    try:
        root = (place(root) if root is not None else _beside(path, stored)).resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a stray byte, or links that lead in a circle
        raise UserError(f"{printable(path)}: its root cannot be found: {printable(error)}") from error
    return Manifest(path, root, fps, seed, size, labels, tuple(clips), filtered)


def _beside(path: Path, stored: Path | RemotePath) -> Path | RemotePath:
    return stored if isinstance(stored, RemotePath) else path.resolve().parent / stored


def _read_quickly(path: Path, labels: Sequence[str]) -> list[Clip] | None:
    """The clips of a manifest with which all is well; None where it must be read with care to say what is not."""
    decoder = msgspec.json.Decoder(Clip)
    clips: list[Clip] = []
    with path.open("rb") as file:
        file.readline(_MAX_HEADER)
        rest = b""
        try:
            while block := file.read(_BLOCK):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    clips += decoder.decode_lines(whole)
                elif len(rest) > MAX_LINE:
                    return None
            clips += decoder.decode_lines(rest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
    if not all(_sound(clip, labels) for clip in clips):
        try:
            for clip in clips:
                check_clip(clip, labels)
        except ValueError:
            return None
    split_of: dict[str, str] = {}
    for clip in clips:
        if split_of.setdefault(clip.video, clip.split) != clip.split:
            return None
    return clips if len({clip.key for clip in clips}) == len(clips) else None


def _read_with_care(path: Path, labels: Sequence[str]) -> list[Clip]:
    """The same line by line; ValueError names the first with which something is wrong."""
    clips: list[Clip] = []
    keys: dict[str, int] = {}
    split_of: dict[str, str] = {}
    for number, row in itertools.islice(_lines(path), 1, None):
        try:
            clip = _parse(row, labels)
            if clip.key in keys:
                raise UserError(f"key {clip.key!r} stands already in line {keys[clip.key]}")
            if split_of.setdefault(clip.video, clip.split) != clip.split:
                raise UserError(f"video {clip.video!r} is in split {split_of[clip.video]} too: splits share no video")
        except ValueError as error:
            raise UserError(f"{printable(path)}, line {number}: {_short(error)}") from None
        keys[clip.key] = number
        clips.append(clip)
    return clips


def _short(error: Exception) -> str:
    return printable(error, 1000)


def find_manifest(folder: Path = Path("manifests")) -> Path:
    """The only manifest in `folder`; ValueError where there is none or several, naming them."""
    found = sorted(folder.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"there is no manifest in {folder}/: make one (`lipprep manifest lrw ROOT -o manifests/lrw.jsonl`) "
            "or name one with -m"
        )
    raise UserError(f"{folder}/ holds several manifests, choose one with -m: {', '.join(map(str, found))}")


def groups(clips: Iterable[Clip], fps: float) -> Iterator[tuple[str, list[Clip]]]:
    """Runs of neighbouring clips of one stretch of a video, as `deal` put them: (video, clips)."""
    for (video, _), members in itertools.groupby(clips, key=lambda c: stretch(c, fps)):
        yield video, list(members)
