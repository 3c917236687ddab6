"""Which videos are meant. Imports nothing slow, so that a store at fault is told at once."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePath

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable

SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"}


def find_videos(paths: Iterable[Path | RemotePath]) -> list[Path | RemotePath]:
    """The files among `paths`, and the videos anywhere below the folders among them, sorted.

    Raises ValueError for a folder without any, and RemoteError as stores do.
    """
    found = []
    for path in paths:
        if path.is_dir():
            below = map(path.__truediv__, path.files_below()) if isinstance(path, RemotePath) else path.rglob("*")
            inside = sorted(p for p in below if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path} holds no videos (files called {' '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found


def keyed_videos(paths: Iterable[Path | RemotePath]) -> dict[str, Path | RemotePath]:
    """The videos of `find_videos`, by their paths below the folder that was named, or their names, less the ending.

    In these keys, bytes that are no text are escaped. Raises ValueError where two would have one key, and what
    `find_videos` does.
    """
    keyed: dict[str, Path | RemotePath] = {}
    for path in paths:
        for video in find_videos([path]):
            below = PurePath(video.name) if video == path else video.relative_to(path)
            key = os.fsencode(below.with_suffix("").as_posix()).decode(errors="backslashreplace")
            if key in keyed:
                raise UserError(
                    f"{printable(keyed[key])} and {printable(video)} would both be called {printable(key)}: "
                    "rename one, or take them one at a time"
                )
            keyed[key] = video
    return keyed
