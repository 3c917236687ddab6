"""The schema of a record's lines. A digest tells damage; only the schema tells that values are what readers expect."""

import json
import math
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta

from lipprep.io.errors import UserError
from lipprep.stages.failures import FAILURES

RECORD_VERSION = 3
RECORDED_NUMBERS = (
    "num_frames", "face_share", "max_faces", "face_size", "jitter", "rotation", "centre_x", "centre_y", "scale",
    "outside", "brightness", "black", "frozen", "sharpness", "movement", "jump",
)  # fmt: skip
RECORDED_TEXTS = ("face", "look", "motion")

_Count = Annotated[int, Meta(ge=0, lt=1 << 62)]  # beyond any disk, and below any int64
# JSON's 1 and 1.0 stay what they are: a clip's line that is copied keeps its bytes.
_Seconds = Annotated[int, Meta(ge=0, le=10**12)] | Annotated[float, Meta(ge=0, le=1e12)]


class _Stored(TypedDict):
    bytes: _Count
    sha256: str


_Class = Literal[tuple(FAILURES)]


class Header(TypedDict):
    """The header of a record, as docs/formats.md has it, without its digest."""

    lipprep_record: Literal[RECORD_VERSION]
    dataset: str
    stage: str
    version: int
    fps: int | float
    parameters: dict[str, Any]
    rows: dict[str, str]
    sources: str | None
    fingerprint: str | None
    content: NotRequired[str]
    absent: NotRequired[list[str]]
    failed: NotRequired[str]
    attempt: str
    computed: _Count
    end: _Count
    parts: dict[str, _Seconds]
    planned: _Count
    counts: dict[Literal["ok", *FAILURES], _Count]
    entries: _Stored
    tar: _Stored
    makers: list[str]
    packages: dict[str, str]
    cpu: str


class _File(TypedDict):
    """Size of a source, its time of change or (in a store) its tag, and the digest of its content."""

    size: int
    mtime_ns: NotRequired[int]
    etag: NotRequired[str | None]
    sha256: NotRequired[str | None]


class _Source(_File):
    sha256: str | None
    archive: NotRequired[_File | None]


_Upstream = TypedDict("_Upstream", {"stage": Literal["landmarks", "crops"], "class": _Class})
_Figures = TypedDict(
    "_Figures",
    dict.fromkeys(RECORDED_NUMBERS, int | float | None) | dict.fromkeys(RECORDED_TEXTS, str | None),
    total=False,
)
# A clip's line: what a failed one has is `class`, `message` and `upstream`, and a sound one `members` and what follows.
Entry = TypedDict(
    "Entry",
    {
        "key": str,
        "status": Literal["ok", "failed"],
        "class": NotRequired[_Class],
        "message": NotRequired[str],
        "upstream": NotRequired[_Upstream],
        "source": _Source | None,
        "inputs": str,
        "parts": dict[str, _Seconds],
        "maker": str,
        "figures": _Figures,
        "members": NotRequired[list[str]],
        "crc32": NotRequired[_Count],
        "digest": NotRequired[str],
        "offset": NotRequired[_Count],
    },
)

_header = msgspec.json.Decoder(Header)
_entry = msgspec.json.Decoder(Entry)


def decode_header(line: bytes) -> Header:
    """Decode the first line of a record. Raises UserError where it is not of the schema."""
    try:
        try:
            header = _header.decode(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # paths that are no UTF-8 have stray surrogates, which only Python's json reads
            header = msgspec.convert(json.loads(line, parse_constant=_finite, parse_float=_finite), Header)
    except (ValueError, RecursionError) as error:
        raise UserError(f"its first line is of a wrong form: {error}") from error
    if sum(header["counts"].values()) != header["planned"] or not header["planned"]:
        raise UserError("its first line is of a wrong form: its counts are not those of the clips that it plans")
    if header["sources"] is not None and not {"content", "absent", "failed"} <= header.keys():
        raise UserError("its first line is of a wrong form: it lacks what it was made from")
    return header


def decode_entries(lines: bytes) -> list[Entry]:
    """Decode clips' lines of a record. Raises UserError where one is not of the schema."""
    try:
        entries = _entry.decode_lines(lines)
    except (ValueError, RecursionError) as error:
        raise UserError(f"what it says of a clip is of a wrong form: {error}") from error
    for entry in entries:
        if not _is_whole(entry):
            raise UserError(f"what it says of clip {entry['key']} is of a wrong form: fields are missing")
    return entries


def _is_whole(entry: Entry) -> bool:
    if entry["status"] == "ok":
        frames = entry["figures"].get("num_frames")
        return type(frames) is int and frames > 0 and "members" in entry and "offset" in entry and "crc32" in entry
    if "class" not in entry or "message" not in entry:
        return False
    return entry["class"] != "upstream" or "upstream" in entry


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise UserError(f"{text} is no number")
    return number
