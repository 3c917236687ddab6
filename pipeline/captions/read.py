"""A file of timings, of any of the kinds that are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.aligners import parse_json
from lipprep.pipeline.captions.subtitles import parse_srt, parse_vtt
from lipprep.pipeline.captions.tables import parse_align, parse_ctm
from lipprep.pipeline.captions.textgrid import parse_textgrid
from lipprep.pipeline.captions.timing import Timing
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import check_file, printable

_MAX_BYTES = 1 << 24  # of a file: days of subtitles
_LARGE = {".ctm": 1 << 26, ".json": 1 << 26}  # a million words of many videos; with every phone, ten hours
_PARSERS: dict[str, Callable[[str], list[Timing]]] = {".align": parse_align, ".vtt": parse_vtt, ".srt": parse_srt}
_OF_TIERS: dict[str, Callable[[str, str | None], list[Timing]]] = {".textgrid": parse_textgrid, ".json": parse_json}
# Where a video has several, what was aligned comes before what was recognised or is for readers.
SUFFIXES = (".textgrid", ".align", ".ctm", ".json", ".vtt", ".srt")


@dataclass(frozen=True)
class TimingFile:
    """The words of a file: under None those of one video, or (CTM) under the name of each; `fallback` is the encoding
    that it was read in where it is no Unicode.
    """

    words: dict[str | None, list[Timing]]
    fallback: str | None = None


def read_timings(path: Path | RemotePath, *, tier: str | None = None) -> TimingFile:
    """Read a file of timings by its ending (SUFFIXES). Raises ValueError, naming file and line, for any other file."""
    suffix = path.suffix.lower()
    content = check_file(path, "timing file", limit=_LARGE.get(suffix, _MAX_BYTES)).read_bytes()
    try:
        text, fallback = decode(content)
        if not text.strip():
            raise UserError("it is empty")
        if suffix == ".ctm":
            return TimingFile(dict(parse_ctm(text)), fallback)
        words = _OF_TIERS[suffix](text, tier) if suffix in _OF_TIERS else _PARSERS[suffix](text)
        return TimingFile({None: words}, fallback)
    except ValueError as error:
        raise type(error)(f"{printable(path)}: {error}") from error


def decode(content: bytes) -> tuple[str, str | None]:
    r"""The text of a file, with \n between its lines, and "cp1252" where it is not Unicode but may be that.

    UTF-8, and UTF-16 with a byte order mark, which Praat writes. Raises ValueError for what is no text.
    """
    fallback = None
    try:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = content.decode("utf-16")
        else:
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                text, fallback = content.decode("cp1252"), "cp1252"
    except UnicodeDecodeError as error:
        raise UserError(f"it is no text in UTF-8, UTF-16 or cp1252 ({error.reason}): save it as UTF-8") from None
    if "\0" in text:
        raise UserError("it is no text in UTF-8, UTF-16 with a byte order mark, or cp1252: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n"), fallback
