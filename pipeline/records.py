"""The record beside each tar: what was made, from what, and why a clip is missing. It is the commit.

A tar without its record, or of another size than its record says, does not exist. A record holds its own
sha256, so that no flipped bit in it goes unseen.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

from lipprep.stages.atomic import fsync_folder, replacing
from lipprep.stages.shard.writer import TarWriter

RECORD_VERSION = 3
LONGEST_HEADER = 1 << 24  # bytes of a header; a line without an end takes no more memory
# Other versions of these may give other bytes for the same clip.
_PACKAGES = ("ai-edge-litert", "av", "numpy", "opencv-python")


def record_path(tar: Path) -> Path:
    """The record of a tar stands beside it."""
    return tar.with_suffix(".jsonl")


@cache
def cpu_kind() -> str:
    """The CPU's model, as far as the system tells; bytes are the same on one kind only."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def package_versions() -> dict[str, str]:
    """The versions of the packages that the bytes depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@cache
def maker(device: str = "cpu") -> str:
    """A short name for this kind of CPU or device with these packages; it stays with a clip that is copied."""
    kind = json.dumps([cpu_kind() if device == "cpu" else device, package_versions()], sort_keys=True)
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def _sealed(header: dict) -> bytes:
    """The header's line, with a digest of itself at the end."""
    body = json.dumps(header, allow_nan=False)
    return json.dumps({**header, "check": hashlib.sha256(body.encode()).hexdigest()}).encode() + b"\n"


def commit(tar: TarWriter, header: dict, entries: Sequence[dict]) -> dict:
    """Publish a tar, which is closed, and then its record; return the record's header.

    The header's `parts` are the seconds that were spent beside the clips' own; theirs are added.

    Both are whole on the disk before the old ones are touched: a disk that is full costs nothing. Then the old
    record goes first: at no moment does a record stand beside a tar that it does not describe.
    """
    lines = b"".join(json.dumps(e, allow_nan=False).encode() + b"\n" for e in entries)
    counts = Counter("ok" if e["status"] == "ok" else root_class(e) for e in entries)
    header = {
        "lipprep_record": RECORD_VERSION,
        **header,
        "planned": len(entries),
        "counts": dict(sorted(counts.items())),
        "parts": _total_parts(header["parts"], entries),
        "entries": {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()},
        "tar": {"bytes": tar.bytes, "sha256": tar.sha256},
        "makers": sorted({e["maker"] for e in entries}),
        "packages": package_versions(),
        "cpu": cpu_kind(),
    }
    with replacing(record_path(tar.path)) as file:
        file.write(_sealed(header) + lines)
        file.flush()
        uncommit(tar.path)
        tar.publish()
    return header


def _total_parts(parts: Mapping[str, float], entries: Sequence[dict]) -> dict[str, float]:
    total = Counter(parts)
    for entry in entries:
        total.update(entry["parts"])
    return {part: round(seconds, 6) for part, seconds in total.most_common()}


def uncommit(tar: Path) -> None:
    """Remove the record of a tar, which then does not exist any more."""
    path = record_path(tar)
    if path.exists():
        path.unlink()
        fsync_folder(path.parent)


def root_class(entry: dict) -> str:
    """The class of the failure that a clip is missing for, in whichever stage it happened."""
    return entry["upstream"]["class"] if entry["class"] == "upstream" else entry["class"]


def unseal(line: bytes) -> dict | None:
    """The header in a record's first line, without its digest; None where the two do not agree."""
    try:
        header = json.loads(line)
        del header["check"]
        return header if _sealed(header) == line and header["lipprep_record"] == RECORD_VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _valid(line: bytes, tar: Path) -> dict | None:
    """The header in a record's first line, if it is sound and record and tar both have the sizes that it says."""
    header = unseal(line)
    try:
        whole = len(line) + header["entries"]["bytes"] == record_path(tar).stat().st_size
        return header if whole and tar.stat().st_size == header["tar"]["bytes"] else None
    except (OSError, KeyError, TypeError):
        return None


def _open(tar: Path) -> BinaryIO:
    path = record_path(tar)
    if not path.is_file():  # a pipe of that name would hang
        raise FileNotFoundError(path)
    return path.open("rb")


def read_header(tar: Path) -> dict | None:
    """The header of the record of `tar`; None where the two are not committed together."""
    try:
        with _open(tar) as file:
            return _valid(file.readline(LONGEST_HEADER), tar)
    except OSError:
        return None


def read_entries(tar: Path) -> list[dict]:
    """The clips' lines of the record of `tar`; none where it is not committed or the record is damaged."""
    try:
        with _open(tar) as file:
            header = _valid(file.readline(LONGEST_HEADER), tar)
            if header is None:
                return []
            lines = file.read()
    except OSError:
        return []
    if hashlib.sha256(lines).hexdigest() != header["entries"]["sha256"]:
        return []
    return [json.loads(line) for line in lines.splitlines()]


def add_counts(headers: Iterable[dict]) -> Counter:
    """The clips of several chunks by class, `ok` among them."""
    total: Counter = Counter()
    for header in headers:
        assert sum(header["counts"].values()) == header["planned"]
        total.update(header["counts"])
    return total
