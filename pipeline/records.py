"""The record beside each tar: what was made, from what, and why a clip is missing. It is the commit.

A tar without its record, or of another size than its record says, does not exist.
"""

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from lipprep.stages.atomic import fsync_folder, write_text
from lipprep.stages.shard.writer import TarWriter

RECORD_VERSION = 1
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


def commit(tar: TarWriter, header: dict, entries: Sequence[dict]) -> dict:
    """Publish a tar and then its record; return the record's header.

    The old record goes first: at no moment does a record stand beside a tar that it does not describe.
    """
    tar.close()
    path = record_path(tar.path)
    lines = [json.dumps(e, allow_nan=False) + "\n" for e in entries]
    counts = Counter("ok" if e["status"] == "ok" else root_class(e) for e in entries)
    header = {
        "lipprep_record": RECORD_VERSION,
        **header,
        "planned": len(entries),
        "counts": dict(sorted(counts.items())),
        "entries_bytes": sum(map(len, lines)),
        "tar": {"bytes": tar.bytes, "sha256": tar.sha256},
        "packages": package_versions(),
        "cpu": cpu_kind(),
    }
    uncommit(tar.path)
    tar.publish()
    write_text(path, json.dumps(header, allow_nan=False) + "\n" + "".join(lines))
    return header


def uncommit(tar: Path) -> None:
    """Remove the record of a tar, which then does not exist any more."""
    path = record_path(tar)
    if path.exists():
        path.unlink()
        fsync_folder(path.parent)


def root_class(entry: dict) -> str:
    """The class of the failure that a clip is missing for, in whichever stage it happened."""
    return entry["upstream"]["class"] if entry["class"] == "upstream" else entry["class"]


def _valid(line: str, tar: Path) -> dict | None:
    """The header in a record's first line, if record and tar both have the sizes that it says."""
    try:
        header = json.loads(line)
        whole = len(line.encode()) + header["entries_bytes"] == record_path(tar).stat().st_size
        known = header["lipprep_record"] == RECORD_VERSION
        return header if known and whole and tar.stat().st_size == header["tar"]["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_header(tar: Path) -> dict | None:
    """The header of the record of `tar`; None where the two are not committed together."""
    try:
        with record_path(tar).open(encoding="utf-8", newline="") as file:
            return _valid(file.readline(), tar)
    except (OSError, ValueError):
        return None


def read_entries(tar: Path) -> list[dict]:
    """The clips' lines of the record of `tar`; none where it is not committed or the record is damaged."""
    try:
        with record_path(tar).open(encoding="utf-8", newline="") as file:
            return [json.loads(line) for line in file] if _valid(file.readline(), tar) else []
    except (OSError, ValueError):
        return []


def add_counts(headers: Iterable[dict]) -> Counter:
    """The clips of several chunks by class, `ok` among them."""
    total: Counter = Counter()
    for header in headers:
        assert sum(header["counts"].values()) == header["planned"]
        total.update(header["counts"])
    return total
