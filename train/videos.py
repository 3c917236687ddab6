"""Which videos are meant. Imports nothing slow, so that a store at fault is told at once."""

from collections.abc import Iterable
from pathlib import Path

from lipprep.stages.remote import RemotePath

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
                raise ValueError(f"{path} holds no videos (files called {' '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found
