"""Files that anybody may have made: looked at before they are opened, and read no further than makes sense."""

import stat
from pathlib import Path

from lipprep.io.errors import UserError


def printable(value: object) -> str:
    r"""`value` as text for a message: one line, in which no file name can speak to the terminal.

    Control characters, line breaks, invisible marks and bytes that are no text are escaped.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def is_file(path: Path) -> bool:
    """Whether `path` is a file that ends; false also for a name that no file can have, or in a closed folder."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def check_file(path: Path, what: str, *, limit: int | None = None) -> Path:
    """Give `path` back if it is a file that ends, of at most `limit` bytes: what follows may open and read it.

    Raises ValueError, calling it `what`, where there is nothing, or a folder, a pipe or a device, on which reading
    could wait or go on for ever.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"there is no {what} {printable(path)}: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"the {what} {printable(path)} is no file but a folder, a pipe or a device")
    if limit is not None and status.st_size > limit:
        raise UserError(f"the {what} {printable(path)} has {status.st_size} bytes, at most {limit} are read")
    return path


def read_text(path: Path, what: str, *, limit: int) -> str:
    """The UTF-8 text of a file of at most `limit` bytes. Raises ValueError, calling it `what`, for any other file."""
    content = check_file(path, what, limit=limit).read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {printable(path)} is no UTF-8 text ({error}): save it as such") from error


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is more than it seems: `*alias`, `${interpolation}`, or nested without end.

    Aliases of aliases grow a few lines to any size; interpolations can read the environment. YAMLError where
    `text` is no YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"the alias *{printable(event.anchor)} is not read: write the value itself")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise UserError("settings with ${...} in them are not read: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 20:
            raise UserError("it is nested more than 20 deep")
