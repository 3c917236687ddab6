"""One run at a time in a folder: two that make the same chunks would only be in each other's way."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder`'s lock; the system frees it when the process ends, however it ends.

    Raises ValueError where another process holds it. Where the file system knows no locks there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ValueError(
                    f"another run (process {file.read(100).strip() or 'unknown'}) is at work in {folder}: wait for it, "
                    "or stop it first"
                ) from error
            except OSError:
                pass
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield
