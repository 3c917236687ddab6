"""Files that anybody may have made: looked at before they are opened, and read no further than makes sense."""

import re
import stat
from pathlib import Path
from typing import Any

from lipprep.io.errors import UserError

MAX_ECHO = 300  # characters of a value that a message quotes


def printable(value: object, limit: int | None = None) -> str:
    r"""`value` as text for a message: one line, in which no file name can speak to the terminal.

    Control characters, line breaks, invisible marks and bytes that are no text are escaped, and what is longer than
    `limit` characters loses its middle.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    text = str(value) if limit is None else shortened(str(value), limit)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """Return `text`, less its middle where it has more than `limit` characters: the end of a message is its remedy.

    >>> shortened("a" * 1000 + "b", 9)
    'aaaaaa ... (992 characters left out) ... aab'
    """
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]} ... ({len(text) - limit} characters left out) ... {text[head - limit :]}"


def markdown(value: object) -> str:
    r"""`value` as Markdown that shows it as it is: what others wrote marks nothing up, and links nowhere.

    >>> markdown("<b>*so* www.x.org")
    '\\<b\\>\\*so\\* www\\.x.org'
    """
    # An underscore within a word marks nothing up, and names are full of them.
    marks = r"[\\`*{}\[\]<>()#!|~&$@^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\."
    return re.sub(marks, r"\\\g<0>", printable(value))


def cell(value: object) -> object:
    """`value` for a cell of a table for people: a text that spreadsheets would run as a formula begins with a quote.

    As OWASP advises against CSV injection. Numbers stay numbers.

    >>> cell("=1+1"), cell(-1)
    ("'=1+1", -1)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


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
    """Raise ValueError for YAML that is more than it seems: `*alias`, `!tag`, `${interpolation}`, or deeply nested.

    Aliases of aliases grow a few lines to any size, tags choose what is made of a value, and interpolations can read
    the environment. YAMLError where `text` is no YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"the alias *{printable(event.anchor, MAX_ECHO)} is not read: write the value itself")
        if (tag := getattr(event, "tag", None)) is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"the tag {printable(shown, MAX_ECHO)} is not read: write the value without it")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise UserError("settings with ${...} in them are not read: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 20:
            raise UserError("it is nested more than 20 deep")


def parse_settings(text: str) -> dict[str, Any]:
    """Parse a YAML (or JSON) mapping to plain containers.

    Raises ValueError where it is none, or `check_yaml` refuses it, or a value cannot be made of what is written.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        check_yaml(text)
        plain = OmegaConf.create(text)
        if OmegaConf.is_dict(plain):
            return OmegaConf.to_container(plain, throw_on_missing=True)
    except UserError:
        raise
    # Numbers such as 0x_ or of 5,000 digits raise whatever Python's conversion does.
    except (OmegaConfBaseException, YAMLError, ValueError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"it is no readable YAML: {printable('; '.join(lines[:3]), MAX_ECHO)}") from error
    except AssertionError:  # of OmegaConf, at what is neither a mapping, a list nor a text
        pass
    raise UserError("it is no mapping of settings")
