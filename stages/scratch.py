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

_STALE = 7 * 86400.0  # seconds


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


@cache
def _sweep(mine: Path) -> None:
    """Remove, once, what processes that were killed long ago have left and nobody came back for."""
    for left in [*mine.glob("*/.*.tmp"), *mine.glob("*/copy-*")]:
        with contextlib.suppress(OSError):  # another process is faster
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
