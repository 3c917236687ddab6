"""Corpora to manifests: LRW, folders of words, GRID, CSV."""

import csv
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_ISDIR

import msgspec

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.tables import parse_align
from lipprep.pipeline.deal import deal
from lipprep.pipeline.manifest import (
    CHUNK_SIZE,
    SPLITS,
    Clip,
    Manifest,
    check_clip,
    check_video_path,
    clip_key,
)
from lipprep.pipeline.splits import draw_splits
from lipprep.stages.remote import REQUESTS, RemotePath, place
from lipprep.stages.shard.index import check_labels
from lipprep.stages.untrusted import MAX_ECHO, check_file, is_file, printable, read_text

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FPS = 25.0  # of LRW and GRID, and of every model trained on them
LRW_SECONDS = 29 / FPS  # length of an LRW clip; the word lies in its middle
GRID_FRAMES = 29  # as LRW's clips, so that one network reads both
_MAX_TEXT = 1 << 24  # bytes of a label file or an alignment
_MAX_SECONDS = 3600.0  # of a word: more is no duration


class Row(msgspec.Struct, frozen=True, gc=False):
    """A clip as its source gives it: no label, key or chunk yet; `split` None asks for a seeded one."""

    video: str
    word: str
    split: str | None = None
    key: str | None = None
    start: int | None = None
    num_frames: int | None = None
    word_start: float | None = None
    word_end: float | None = None
    duration: float | None = None
    speaker: str | None = None
    rough: bool | None = None


Folder = Path | RemotePath


def _folders(folder: Folder) -> list[Folder]:
    if isinstance(folder, RemotePath):
        return [folder / name for name, found in folder.entries().items() if name[0] != "." and S_ISDIR(found.st_mode)]
    return sorted(Path(e.path) for e in os.scandir(folder) if not e.name.startswith(".") and _leads_on(e))


def _leads_on(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead in a circle
        return False


def _videos(folder: Folder, suffixes: Container[str] = VIDEO_SUFFIXES) -> list[Folder]:
    if isinstance(folder, RemotePath):
        names = (name for name in folder.entries() if name[0] != "." and Path(name).suffix.lower() in suffixes)
        return [folder / name for name in names]
    return sorted(
        Path(e.path)
        for e in os.scandir(folder)
        if not e.name.startswith(".") and Path(e.name).suffix.lower() in suffixes
    )


def _below(root: Folder, video: Folder) -> str:
    return video.relative_to(root).as_posix()


def lrw_duration(text: str) -> float | None:
    """The word's duration in seconds from LRW's .txt: the line `Duration: 0.45 seconds`, found by its name.

    None where there is none, or no duration that a word can have.

    >>> lrw_duration("Channel: BBC One HD \\nDuration: 0.45 seconds ")
    0.45
    """
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "duration":
            try:
                seconds = float(value.split()[0])
            except (ValueError, IndexError):
                return None
            return seconds if 0 <= seconds < _MAX_SECONDS else None
    return None


def _texts(read: Callable[[Folder], str], paths: Sequence[Folder]) -> Iterable[str]:
    """What `read` gives of each path; of those in a store, many are read at a time."""
    if not paths or not isinstance(paths[0], RemotePath):
        return map(read, paths)
    with ThreadPoolExecutor(REQUESTS) as threads:
        return list(threads.map(read, paths))


def _beginning(path: Folder) -> str:
    """The first 64 KiB of a text; nothing of what is no file."""
    try:
        if isinstance(path, RemotePath):
            return path.read_range(0, 1 << 16).decode(errors="replace")
        if not is_file(path):
            return ""
        with path.open("rb") as file:
            return file.read(1 << 16).decode(errors="replace")
    except OSError:
        return ""


def lrw(
    root: Folder,
    words: set[str] | None = None,
    *,
    suffixes: Container[str] = VIDEO_SUFFIXES,
    annotations: Folder | None = None,
) -> Iterator[Row]:
    """ROOT/WORD/{train,val,test}/WORD_00001.mp4, each with a .txt that gives the word's duration (LRW).

    Files of the endings `suffixes` are listed. The .txt may lie apart: below `annotations`, in the same folders.
    """
    for folder in _folders(root):
        if words is not None and folder.name not in words:
            continue
        for split in ("train", "val", "test"):
            if not (folder / split).is_dir():
                continue
            videos = _videos(folder / split, suffixes)
            beside = folder / split if annotations is None else annotations / folder.name / split
            texts = _texts(_beginning, [beside / f"{video.stem}.txt" for video in videos])
            for video, text in zip(videos, texts, strict=True):
                duration = lrw_duration(text)
                half = None if duration is None else duration / 2
                yield Row(
                    video=_below(root, video),
                    word=folder.name,
                    split=split,
                    word_start=None if half is None else round(LRW_SECONDS / 2 - half, 6),
                    word_end=None if half is None else round(LRW_SECONDS / 2 + half, 6),
                    duration=duration,
                )


def folders(root: Folder, words: set[str] | None = None) -> Iterator[Row]:
    """ROOT/word/{train,val,test}/video.mp4, or ROOT/word/video.mp4 with a seeded split."""
    for folder in _folders(root):
        if words is not None and folder.name not in words:
            continue
        for video in _videos(folder):
            yield Row(video=_below(root, video), word=folder.name)
        for split in ("train", "val", "test"):
            if (folder / split).is_dir():
                for video in _videos(folder / split):
                    yield Row(video=_below(root, video), word=folder.name, split=split)


def grid(root: Folder, words: set[str] | None = None, *, unseen_speakers: Iterable[str] = ()) -> Iterator[Row]:
    """ROOT/video/SPEAKER/CODE.mpg with ROOT/align/SPEAKER/CODE.align (GRID): a 29-frame window a word.

    The window is centred on the word and may reach beyond the video. Silence (sil, sp) is no word. The
    sentences of `unseen_speakers` get the split `unseen`. Raises ValueError where the layout is another, an
    alignment is missing or garbled, or a speaker is not there.
    """
    unseen = set(unseen_speakers)
    if not (root / "video").is_dir() or not (root / "align").is_dir():
        raise UserError(f"{printable(root)} has no folders video/ and align/: GRID is ROOT/video/SPEAKER/CODE.mpg")
    read = partial(read_text, what="alignment", limit=_MAX_TEXT)
    speakers = _folders(root / "video")
    if missing := unseen - {s.name for s in speakers}:
        raise UserError(f"no speaker {', '.join(sorted(missing))} below {root / 'video'}")
    for speaker in speakers:
        videos = _videos(speaker)
        aligns = [root / "align" / speaker.name / f"{video.stem}.align" for video in videos]
        for video, align, text in zip(videos, aligns, _texts(read, aligns), strict=True):
            try:
                timings = parse_align(text)
            except ValueError as error:
                raise UserError(f"{printable(align)}, {error}") from None
            split = "unseen" if speaker.name in unseen else None
            for said in timings:
                if said.word in ("sil", "sp") or (words is not None and said.word not in words):
                    continue
                yield window(_below(root, video), said.word, said.start, said.end, split=split, speaker=speaker.name)


def window(
    video: str,
    word: str,
    start: float,
    end: float,
    *,
    split: str | None = None,
    speaker: str | None = None,
    rough: bool = False,
) -> Row:
    """A clip of 29 frames centred on a word that is said from `start` to `end` seconds, which is not cut short.

    `rough`: these times are guesses.
    """
    begin, finish = round(start * FPS, 6), round(end * FPS, 6)  # frames; without what floats add to halves of them
    first = round((begin + finish) / 2 - GRID_FRAMES / 2)
    return Row(
        video=video,
        word=word,
        split=split,
        start=first,
        num_frames=GRID_FRAMES,
        word_start=round((begin - first) / FPS, 6),
        word_end=round((finish - first) / FPS, 6),
        duration=round((finish - begin) / FPS, 6),
        speaker=speaker,
        rough=rough or None,
    )


_CSV = {
    "key": str, "video": str, "split": sys.intern, "word": sys.intern, "start": int, "num_frames": int,
    "word_start": float, "word_end": float, "duration": float, "speaker": sys.intern,
}  # fmt: skip
_DEALT = {"label", "chunk"}  # columns of a manifest that are made anew


def read_csv(path: Path, words: set[str] | None = None) -> Iterator[Row]:
    """A CSV with a column a manifest field: `video` and `word`, the others where known.

    `label` and `chunk` are made anew. Raises ValueError, naming the line, for what cannot be read.
    """
    name = printable(check_file(path, "table"))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            columns = next(rows, [])
            if not {"video", "word"} <= set(columns):
                raise UserError(f"{name} needs the columns video and word (others: {', '.join(_CSV)})")
            if unknown := set(columns) - set(_CSV) - _DEALT:
                raise UserError(f"{name} has unknown columns {printable(', '.join(sorted(unknown)), MAX_ECHO)}")
            known = [(n, column, _CSV[column]) for n, column in enumerate(columns) if column in _CSV]
            for cells in rows:
                if not cells:
                    continue
                try:
                    if len(cells) > len(columns):
                        raise UserError(f"{len(cells)} cells below {len(columns)} columns")
                    fields = {c: kind(text) for n, c, kind in known if n < len(cells) and (text := cells[n].strip())}
                    if "video" not in fields or "word" not in fields:
                        raise UserError("video or word is empty")
                except ValueError as error:
                    raise UserError(f"{name}, line {rows.line_num}: {printable(error, MAX_ECHO)}") from None
                # ./a and a are one file, and must be one name.
                if "./" in fields["video"] or "//" in fields["video"]:
                    fields["video"] = PurePosixPath(fields["video"]).as_posix()
                if words is None or fields["word"] in words:
                    yield Row(**fields)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"the table {name} is no CSV in UTF-8: {error}") from error


def relative_to(base: Folder, root: Folder, rows: Iterable[Row]) -> list[Row]:
    """Rows below `root` with their videos' paths from `base` on; ValueError where it is not `root` or above it."""
    try:
        if type(base) is not type(root):
            raise ValueError
        prefix = root.resolve().relative_to(base.resolve())
    except ValueError:
        raise UserError(f"--root {base} is neither {root} nor a folder above it") from None
    return [msgspec.structs.replace(row, video=(prefix / row.video).as_posix()) for row in rows]


def read_labels(path: Path) -> tuple[str, ...]:
    """A label file: one word a line, its line number the label. Raises ValueError for an empty or doubled one."""
    text = read_text(path, "label file", limit=_MAX_TEXT)
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels or len(set(labels)) != len(labels):
        raise UserError(f"label file {printable(path)} is empty or names a word twice")
    return labels


def make_manifest(
    path: Path,
    rows: Iterable[Row],
    *,
    root: Folder,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    chunk_size: int = CHUNK_SIZE,
    fps: float = FPS,
    split_by: str = "speaker",
) -> Manifest:
    """A manifest of `rows`: keys, labels (the sorted words, unless given), splits where they have none, chunks.

    Raises ValueError where there are no rows, a word is in no label, two clips have one key, a split is
    unknown, or a video is in two splits.
    """
    rows = draw_splits(rows, seed=seed, by=split_by).rows
    if not rows:
        raise UserError(f"no clips found below {printable(root)}: `lipprep manifest --help` shows the layouts")
    labels = tuple(labels) if labels is not None else tuple(sorted({r.word for r in rows}))
    check_labels(list(labels))
    number = {word: n for n, word in enumerate(labels)}
    clips: dict[str, Clip] = {}
    splits: dict[str, str] = {}
    for row in rows:
        check_video_path(row.video)
        if row.word not in number:
            raise UserError(f"the word {row.word!r} ({row.video!r}) is not in the label file")
        if row.split not in SPLITS:
            raise UserError(f"{row.video!r}: unknown split {row.split!r} (known: {', '.join(SPLITS)})")
        if splits.setdefault(row.video, row.split) != row.split:
            raise UserError(f"{row.video!r} is in splits {splits[row.video]} and {row.split}: splits share no video")
        key = row.key or clip_key(row.video, row.start)
        if key in clips:
            raise UserError(
                f"two clips have the key {key!r} ({clips[key].video!r}, {row.video!r}): rename one of the videos"
            )
        clip = Clip(
            key=key,
            video=row.video,
            split=row.split,
            word=row.word,
            label=number[row.word],
            chunk=0,
            start=row.start,
            num_frames=row.num_frames,
            word_start=row.word_start,
            word_end=row.word_end,
            duration=row.duration,
            speaker=row.speaker,
            rough=row.rough,
        )
        try:
            check_clip(clip, labels)
        except ValueError as error:
            raise UserError(f"{row.video!r}: {error}") from None
        clips[key] = clip
    dealt = deal(clips.values(), seed=seed, chunk_size=chunk_size, fps=fps)
    return Manifest(Path(path), place(root).resolve(), fps, seed, chunk_size, labels, tuple(dealt))
