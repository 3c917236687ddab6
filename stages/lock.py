"""A lock on a folder: the operating system holds it for a process, and frees it when that process ends.

Portable as far as a lock can be: where the file system or the operating system knows none, nobody is kept out.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from lipprep.io.errors import UserError
from lipprep.stages.untrusted import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lipprep.lock"
_PATIENCE = 3.0  # seconds: a process that was just killed holds its locks until the system has cleared it away


def holder_of(path: Path) -> str | None:
    """What the holder of a lock wrote there; "" where that is nothing, None where nobody keeps others from reading."""
    with path.open(errors="replace") as file:
        return None if take(file, shared=True) else printable(file.read(100).strip())


@contextlib.contextmanager
def hold(path: Path, refusal: Callable[[], str], *, shared: bool = False, says: str = "") -> Iterator[None]:
    """Hold the lock file `path`, alone or `shared` with others who share it.

    Who holds it alone writes `says`, the process and the machine there. Raises ValueError with what `refusal` gives
    where others do not let it go within seconds.
    """
    with path.open("r" if shared else "a+", errors="replace") as file:
        deadline = time.monotonic() + _PATIENCE
        while not take(file, shared=shared):
            if time.monotonic() > deadline:
                raise UserError(refusal())
            time.sleep(0.1)
        if not shared:
            with contextlib.suppress(OSError):  # a courtesy; the disk may be full
                file.truncate(0)
                file.write(f"{says}process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield


def take(file: TextIO, *, shared: bool) -> bool:
    """Whether the lock of an open file is ours now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
