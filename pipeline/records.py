"""The record beside each tar: what was made, from what, and why a clip is missing. It is the commit.

A tar without its record, or of another size than its record says, does not exist. A record holds its own
sha256, so that no flipped bit in it goes unseen.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import BinaryIO

from lipprep.io.errors import UserError
from lipprep.pipeline.record_form import RECORD_VERSION, Entry, Header, decode_entries, decode_header
from lipprep.stages.atomic import fsync_folder, replacing
from lipprep.stages.remote import REQUESTS, RemotePath, RemoteStat
from lipprep.stages.shard.writer import TarWriter

LONGEST_HEADER = 1 << 24  # bytes of a header; a line without an end takes no more memory
# Other versions of these may give other bytes for the same clip.
_USUAL_HEADER = 1 << 14  # bytes that most headers fit into
_PACKAGES = ("ai-edge-litert", "av", "numpy", "opencv-python")


def record_path(tar: Path | RemotePath) -> Path | RemotePath:
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
    """A short name for this kind of CPU or torch device with these packages; it stays with a clip that is copied."""
    kind, packages = cpu_kind(), package_versions()
    if device != "cpu":
        import torch

        there = torch.device(device)
        kind = torch.cuda.get_device_name(there) if there.type == "cuda" else there.type
        packages = {**packages, "torch": torch.__version__}
    return hashlib.sha256(json.dumps([kind, packages], sort_keys=True).encode()).hexdigest()[:8]


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
    header = {
        "lipprep_record": RECORD_VERSION,
        **header,
        "planned": len(entries),
        "counts": count_classes(entries),
        "parts": _total_parts(header["parts"], entries),
        "entries": {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()},
        "tar": {"bytes": tar.bytes, "sha256": tar.sha256},
        "makers": sorted({e["maker"] for e in entries}),
        "packages": package_versions(),
        "cpu": cpu_kind(),
    }
    with replacing(record_path(tar.path), tar.scratch) as file:
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


def uncommit(tar: Path | RemotePath) -> None:
    """Remove the record of a tar, which then does not exist any more."""
    path = record_path(tar)
    if path.exists():
        path.unlink()
        fsync_folder(path.parent)


def count_classes(entries: Iterable[Mapping]) -> dict[str, int]:
    """Count clips by class, `ok` among them, in the order of the classes' names."""
    counts = Counter("ok" if e["status"] == "ok" else root_class(e) for e in entries)
    return dict(sorted(counts.items()))


def root_class(entry: Mapping) -> str:
    """The class of the failure that a clip is missing for, in whichever stage it happened."""
    return entry["upstream"]["class"] if entry["class"] == "upstream" else entry["class"]


def unseal(line: bytes) -> Header:
    """Decode the header in a record's first line. Raises UserError where it was changed, or is not of the schema."""
    body, _, check = line.rpartition(b', "check": ')
    if check != b'"%s"}\n' % hashlib.sha256(body + b"}").hexdigest().encode():
        raise UserError(f"its first line was changed since it was written, or is not of version {RECORD_VERSION}")
    return decode_header(line)


def _valid(line: bytes, record: int, tar: int) -> Header | None:
    """The header in a record's first line, if it is sound, and record and tar have the sizes that it says, in bytes."""
    try:
        header = unseal(line)
    except UserError:
        return None
    whole = len(line) + header["entries"]["bytes"] == record
    return header if whole and tar == header["tar"]["bytes"] else None


def first_line(record: Path | RemotePath) -> bytes:
    """Return the first line of a record, of at most 16 MiB. Raises OSError where there is none."""
    if isinstance(record, RemotePath):
        return _first_line(record, record.stat())
    with _open(record) as file:
        return file.readline(LONGEST_HEADER)


def _open(path: Path | RemotePath) -> BinaryIO:
    if not isinstance(path, RemotePath) and not path.is_file():  # a pipe of that name would hang
        raise FileNotFoundError(path)
    return path.open("rb")


def _read(tar: Path | RemotePath, *, entries: bool) -> tuple[Header, bytes] | None:
    """The header of the record of `tar` and, if asked for, what follows it; None where they are not committed."""
    try:
        size = tar.stat().st_size
        with _open(record_path(tar)) as file:
            line = file.readline(LONGEST_HEADER)
            header = _valid(line, file.seek(0, os.SEEK_END), size)
            if header is None or not entries:
                return header and (header, b"")
            file.seek(len(line))
            return header, file.read()
    except OSError:
        return None


def read_header(tar: Path | RemotePath) -> Header | None:
    """The header of the record of `tar`; None where the two are not committed together."""
    found = _read(tar, entries=False)
    return found and found[0]


def read_record(tar: Path | RemotePath) -> tuple[Header | None, list[Entry]]:
    """The header of the record of `tar` and the clips' lines.

    No header where the two are not committed together, no lines where these are damaged or not those that it counts.
    """
    header, lines = _read(tar, entries=True) or (None, b"")
    if header is None or hashlib.sha256(lines).hexdigest() != header["entries"]["sha256"]:
        return header, []
    try:
        entries = decode_entries(lines)
    except UserError:
        return header, []
    return header, entries if count_classes(entries) == header["counts"] else []


def read_entries(tar: Path | RemotePath) -> list[Entry]:
    """The clips' lines of the record of `tar`; none where it is not committed or the record is damaged."""
    return read_record(tar)[1]


def all_entries(tars: Sequence[Path | RemotePath]) -> Iterator[list[Entry]]:
    """The clips' lines of the records of several tars, one after another: those of all tars would fill the memory."""
    if not any(isinstance(tar, RemotePath) for tar in tars):
        yield from map(read_entries, tars)
        return
    with ThreadPoolExecutor(REQUESTS) as threads:
        waiting: deque[Future] = deque()
        for tar in tars:
            waiting.append(threads.submit(read_entries, tar))
            if len(waiting) == REQUESTS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_known: dict[RemotePath, tuple[RemoteStat, bytes]] = {}  # the first lines of records, and when they were so


class Headers:
    """The headers of very many tars of one folder.

    A store is asked for all of them when the first is wanted, by a listing and for the records that have changed since
    the last; what comes there later is not seen. On a disk each is read when it is wanted.
    """

    def __init__(self, folder: Path | RemotePath) -> None:
        self._folder = folder

    def __call__(self, tar: Path | RemotePath) -> Header | None:
        """What `read_header` gives."""
        if not isinstance(self._folder, RemotePath):
            return read_header(tar)
        size, line = self._tars.get(tar.name), self._lines.get(record_path(tar).name)
        return None if size is None or line is None else _valid(line, self._there[record_path(tar).name].st_size, size)

    def has_record(self, tar: Path | RemotePath) -> bool:
        """Whether a record stands beside `tar`, sound or not."""
        path = record_path(tar)
        return path.name in self._there if isinstance(self._folder, RemotePath) else path.exists()

    @cached_property
    def _there(self) -> dict[str, RemoteStat]:
        return {n: s for n, s in self._folder.entries().items() if stat.S_ISREG(s.st_mode)}

    @cached_property
    def _tars(self) -> dict[str, int]:
        return {n: s.st_size for n, s in self._there.items() if n.endswith(".tar")}

    @cached_property
    def _lines(self) -> dict[str, bytes]:
        """The first lines of the records that stand beside tars."""
        names = [name for tar in self._tars if (name := record_path(Path(tar)).name) in self._there]
        with ThreadPoolExecutor(REQUESTS) as threads:
            lines = threads.map(lambda name: _first_line(self._folder / name, self._there[name]), names)
            return dict(zip(names, lines, strict=True))


def _first_line(record: RemotePath, status: RemoteStat) -> bytes:
    before, line = _known.get(record, (None, b""))
    if before == status and status.etag is not None:
        return line
    try:
        for length in (_USUAL_HEADER, LONGEST_HEADER):
            line = b"".join(record.read_range(0, min(length, status.st_size)).partition(b"\n")[:2])
            if line.endswith(b"\n") or status.st_size <= length:
                break
    except FileNotFoundError:  # removed since it was listed
        return b""
    _known[record] = status, line
    return line


def add_counts(headers: Iterable[dict]) -> Counter:
    """The clips of several chunks by class, `ok` among them."""
    total: Counter = Counter()
    for header in headers:
        assert sum(header["counts"].values()) == header["planned"]
        total.update(header["counts"])
    return total
