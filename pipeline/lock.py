"""One run at a time in a folder: two that make the same chunks would only be in each other's way.

Slices of one number of parts share a folder, for no two of them make the same chunk; those of another number wait.
Of a folder in a store, runs on other machines are not seen: stores have no locks.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lipprep.pipeline.plan import WHOLE, Slice
from lipprep.stages.remote import RemotePath
from lipprep.stages.scratch import scratch
from lipprep.stages.untrusted import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_PATIENCE = 3.0  # seconds: a process that was just killed holds its locks until the system has cleared it away


@contextlib.contextmanager
def alone_in(folder: Path | RemotePath, *, shared: bool = False, part: Slice = WHOLE) -> Iterator[None]:
    """Hold `folder`'s lock; `shared` with others who only read there. The system frees it when the process ends.

    A `part` shares the folder with other parts of as many. Raises ValueError, saying who, where another process makes
    something there (or reads, unless `shared` or a part). Where the file system knows no locks there are none.
    """
    there = scratch(folder) if isinstance(folder, RemotePath) else folder
    lock = there / LOCK
    if shared and not lock.exists():  # nothing was made there by anybody
        yield
        return
    if not shared:
        there.mkdir(parents=True, exist_ok=True)
    if part.whole:
        with _hold(lock, folder, shared=shared):
            if not shared:  # then nobody holds a part's
                for left in there.glob(f"{LOCK}-*"):
                    with contextlib.suppress(OSError):  # it does no harm
                        left.unlink()
            yield
        return
    lock.touch()
    mine = there / f"{LOCK}-{part.number}-of-{part.of}"
    with _hold(lock, folder, shared=True), _hold(mine, folder, says=f"slice {part}, "):
        # Each holds its own before it looks at the others': of two that begin at once, one at least sees the other.
        for other in there.glob(f"{LOCK}-*"):
            if not other.name.endswith(f"-of-{part.of}"):
                with _hold(other, folder, shared=True):
                    pass
        yield


@contextlib.contextmanager
def _hold(path: Path, folder: Path | RemotePath, *, shared: bool = False, says: str = "") -> Iterator[None]:
    with path.open("r" if shared else "a+", errors="replace") as file:
        deadline = time.monotonic() + _PATIENCE
        while not _take(file, shared=shared):
            if time.monotonic() > deadline:
                raise ValueError(f"another run ({_holder(path)}) is at work in {folder}: wait for it, or stop it first")
            time.sleep(0.1)
        if not shared:
            with contextlib.suppress(OSError):  # a courtesy; the disk may be full
                file.truncate(0)
                file.write(f"{says}process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield


def _take(file: TextIO, *, shared: bool) -> bool:
    """Whether the lock is ours now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _holder(path: Path) -> str:
    """Who holds a lock that cannot be had: what is written there tells of those alone who share it with nobody."""
    with path.open(errors="replace") as file:
        if not _take(file, shared=True):
            return printable(file.read(100).strip()) or "it has not said which"
        # Held by us, too, so that nobody removes the parts' meanwhile.
        for other in sorted(path.parent.glob(f"{LOCK}-*")):
            with other.open(errors="replace") as held:
                if not _take(held, shared=True):
                    return printable(held.read(100).strip())
    return "one that reads there, as the next stage and lipprep verify do"
