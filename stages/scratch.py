"""Where what goes to a store is written first, on the local disk."""

import contextlib
import getpass
import hashlib
import os
import shutil
import stat
import tempfile
import time
from functools import cache
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath

COPY = "copy-"  # how the names of folders with copies of remote files begin
_STALE = 7 * 86400.0  # seconds after which nobody comes back for an unfinished file
_STALE_COPY = 86400.0  # seconds: a copy serves for one chunk


def scratch(folder: RemotePath) -> Path:
    """The local folder where what goes to `folder` is written first, the same for all processes of one person.

    Below TMPDIR, or /tmp. Raises ValueError where another person has made it, or may write there: they could
    change what is uploaded.
    """
    mine = Path(tempfile.gettempdir()) / f"lipprep-{getattr(os, 'getuid', getpass.getuser)()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    found = mine.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise UserError(f"{mine} is not yours: set TMPDIR to a folder that is")
    if hasattr(os, "getuid") and found.st_mode & 0o022:
        raise UserError(f"others may write to {mine}: remove it, or set TMPDIR to another folder")
    _sweep(mine)
    local = mine / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    local.mkdir(exist_ok=True)
    return local


def local_scratch(folder: Path | RemotePath) -> Path:
    """Return where on a disk here is written what goes to `folder`: the folder itself unless it is in a store."""
    return scratch(folder) if isinstance(folder, RemotePath) else folder


@cache
def _sweep(mine: Path) -> None:
    """Remove, once, what processes that were killed long ago have left and nobody came back for."""
    # By age alone: a process of another container that shares this folder cannot be seen.
    for left in [*mine.glob("*/.*.tmp"), *mine.glob(f"*/{COPY}*")]:
        with contextlib.suppress(OSError):  # another process is faster
            age = time.time() - left.stat().st_mtime
            if left.is_dir() and age > _STALE_COPY:
                shutil.rmtree(left)
            elif age > _STALE:
                left.unlink()
