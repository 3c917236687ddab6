"""One run at a time in a folder: two that make the same chunks would only be in each other's way.

Of a folder in a store, runs on other machines are not seen: stores have no locks.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lipprep.stages.remote import RemotePath, scratch
from lipprep.stages.untrusted import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_PATIENCE = 3.0  # seconds: a process that was just killed holds its locks until the system has cleared it away


def _take(file: TextIO, kind: int, folder: Path | RemotePath) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.seek(0)
                raise ValueError(
                    f"another run (process {printable(file.read(100).strip() or 'unknown')}) is at work in {folder}: "
                    "wait for it, or stop it first"
                ) from error
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return


@contextlib.contextmanager
def alone_in(folder: Path | RemotePath, *, shared: bool = False, part: str = "") -> Iterator[None]:
    """Hold `folder`'s lock; `shared` with others who only read there. The system frees it when the process ends.

    A `part` of the folder's work has a lock of its own, and shares the folder with other parts. Raises ValueError
    where another process makes something there (or reads, unless `shared`). Where the file system knows no locks there
    are none.
    """
    there = scratch(folder) if isinstance(folder, RemotePath) else folder
    if part:
        there.mkdir(parents=True, exist_ok=True)
        (there / LOCK).touch()
        with _hold(there / LOCK, folder, shared=True), _hold(there / f"{LOCK}-{part}", folder, shared=False):
            yield
        return
    if shared and not (there / LOCK).exists():  # nothing was made there by anybody
        yield
        return
    if not shared:
        there.mkdir(parents=True, exist_ok=True)
    with _hold(there / LOCK, folder, shared=shared):
        yield


@contextlib.contextmanager
def _hold(path: Path, folder: Path | RemotePath, *, shared: bool) -> Iterator[None]:
    with path.open("r" if shared else "a+", errors="replace") as file:
        if fcntl is not None:
            _take(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder)
        if not shared:
            with contextlib.suppress(OSError):  # a courtesy; the disk may be full
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
        yield
