"""The files that clips are made from, and how a changed one is noticed.

Size and time of change are looked at before every run. What a clip is made from is its file's content: a file
that was only touched or copied costs a look, not the work again.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path, PurePosixPath

from lipprep.stages.atomic import fetched
from lipprep.stages.remote import REQUESTS, RemotePath, place, signature
from lipprep.stages.shard.reader import read_range
from lipprep.stages.untrusted import check_file

_WHOLE = 64 << 20  # bytes: larger files are sampled, or a stretch of a long video would cost as much as its landmarks
_BLOCK = 1 << 20
_CHUNK = 1 << 14  # videos that are looked at again: those of a chunk, for why it is stale


def digest(value: object) -> str:
    """The sha256 of a value of plain containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def file_digest(path: Path | RemotePath) -> str:
    """The sha256 of a file. Raises ValueError for what is none."""
    path = check_file(place(path), "file")
    if isinstance(path, RemotePath) and path.stat().st_size <= _WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with fetched(path) as local, local.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path | RemotePath) -> str | None:
    """What tells a file's content from another's; None where it cannot be read.

    Its sha256; of a file over 64 MiB, that of its size and of 64 blocks of 1 MiB, evenly spread.
    """
    try:
        if (size := path.stat().st_size) <= _WHOLE:
            return file_digest(path)
        content = hashlib.sha256(str(size).encode())
        blocks = _WHOLE // _BLOCK
        for n in range(blocks):
            start = n * (size - _BLOCK) // (blocks - 1)
            content.update(read_range(path, start, start + _BLOCK))
        return f"sampled-{content.hexdigest()}"
    except (OSError, ValueError):
        return None


def read_through(path: Path | RemotePath) -> None:
    """Read a file so that whoever reads it next need not wait for the disk. A large one is left to the system."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG((found := path.stat()).st_mode) and found.st_size <= _WHOLE:
            with path.open("rb", buffering=0) as file:
                while file.read(_BLOCK):
                    pass


def archive_name(video: str) -> str:
    """The name of a video's landmark file in an archive: its path without the ending."""
    return PurePosixPath(video).with_suffix("").as_posix()


def source_files(root: Path | RemotePath, video: str, archive: str | None) -> dict[str, Path | None]:
    """The files that a video's clips are made from: the video and, with an archive, its landmark file there."""
    files: dict[str, Path | None] = {"video": root / video}
    if archive is not None:
        from lipprep.stages.landmarks.archive import archive_file

        files["archive"] = archive_file(Path(archive), archive_name(video))
    return files


def file_stat(path: Path | RemotePath | None) -> dict | None:
    """Size and time of change of a regular file, or size and tag; None for any other: opening a pipe would hang."""
    try:
        found = path and path.stat()
    except (OSError, ValueError):
        return None
    return signature(found) if found and stat.S_ISREG(found.st_mode) else None


Look = Callable[[str], dict | None]


def looking(root: Path | RemotePath) -> Look:
    """A function that gives `file_stat` of very many videos below `root`, by their paths from there.

    A store is asked once for all of them, when the first is looked for, and a web server for each.
    """
    if isinstance(root, RemotePath) and not root.lists:
        return lru_cache(_CHUNK)(lambda video: file_stat(root / video))
    if isinstance(root, RemotePath):
        listing = cache(root.files_below)

        def listed(video: str) -> dict | None:
            found = listing().get(video)
            return found and signature(found)

        return listed
    folder = str(root)

    def look(video: str) -> dict | None:
        try:
            found = os.stat(f"{folder}/{video}")  # noqa: PTH116 (a path takes as long to make as to look at)
        except (OSError, ValueError):
            return None
        return signature(found) if stat.S_ISREG(found.st_mode) else None

    return look


def source_stat(root: Path | RemotePath, video: str, archive: str | None, look: Look | None = None) -> dict | None:
    """Size and time of change of a video, and under `archive` of its landmark file; None where the video is missing.

    `look` is a way to look at videos that is there already.
    """
    found = file_stat(root / video) if look is None else look(video)
    if found is None or archive is None:
        return found
    return {**found, "archive": file_stat(source_files(root, video, archive)["archive"])}


def source_content(
    root: Path | RemotePath, video: str | RemotePath, archive: str | None, known: Iterable[dict] = ()
) -> dict | None:
    """The same with the `sha256` of each file's content; that of a source in `known` with the same size and time."""
    found = source_stat(root, video, archive)
    if found is None:
        return None
    for source in known:
        if without_content(source) == found and source["sha256"] is not None:
            return source
    for name, path in source_files(root, video, archive).items():
        part = found if name == "video" else found[name]
        if part is not None:
            part["sha256"] = content_digest(path)
    return found


def without_content(source: dict) -> dict:
    """Size and time of change alone, as `source_stat` gives them."""
    return {k: without_content(v) if isinstance(v, dict) else v for k, v in source.items() if k != "sha256"}


def content(source: dict | None) -> dict | None:
    """What a source's content is told by, whenever the file was written."""
    if source is None:
        return None
    return {k: content(v) if isinstance(v, dict) else v for k, v in source.items() if k not in ("mtime_ns", "etag")}


def sources_digest(videos: Iterable[str], root: Path | RemotePath, archive: str | None, look: Look) -> str:
    """A digest of size and time of all sources of a chunk: a replaced one makes the chunk stale."""
    videos = list(videos)
    stat_of = partial(source_stat, root, archive=archive, look=look)
    if isinstance(root, RemotePath) and not root.lists:
        with ThreadPoolExecutor(REQUESTS) as threads:
            return digest(list(zip(videos, threads.map(stat_of, videos), strict=True)))
    return digest(list(zip(videos, map(stat_of, videos), strict=True)))
