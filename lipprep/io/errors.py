"""The exception for what a user can mend, and the log for faults of lipprep itself."""

import contextlib
import os
import tempfile
import time
import traceback
from pathlib import Path

DEBUG = "LIPPREP_DEBUG"  # set to 1, also for worker processes: tracebacks are printed, too
LOG = "internal-errors.log"
_MAX_LOG = 1 << 24  # bytes: where every clip of a corpus fails by the same fault, thousands of tracebacks suffice


class UserError(ValueError):
    """Bad input, or a setting that cannot work: the message names the cause and the remedy.

    Commands print the message alone. Every other exception is an internal error, whose traceback goes to a log.
    A ValueError, so that callers of the Python API can catch it without knowing this class.
    """


def debugging() -> bool:
    """Return whether tracebacks are wanted on the terminal (`--debug`, or LIPPREP_DEBUG=1)."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def log_internal_error(error: BaseException, what: str, folder: Path | None = None) -> Path | None:
    """Append the traceback of `error` to `folder`/internal-errors.log and return the log's path.

    `what` says what was worked on: a command, or the key of a clip. Without a folder, or where nothing can be
    written there, the log is a new file below TMPDIR. Returns None where that cannot be written either.
    """
    trace = "".join(traceback.format_exception(error))
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n{trace}\n"
    if folder is not None:
        path = folder / LOG
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Processes append at the same time: each in one write.
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if os.fstat(file).st_size < _MAX_LOG:
                    os.write(file, text.encode(errors="backslashreplace"))
                return path
            finally:
                os.close(file)
    try:
        file, name = tempfile.mkstemp(prefix="lipprep-", suffix=".log")
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(text)
        return Path(name)
    except OSError:
        return None
