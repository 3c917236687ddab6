"""One tar and its record, each read once and held against each other."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.record_form import Header, decode_entries
from lipprep.pipeline.records import LONGEST_HEADER, record_path, root_class, unseal
from lipprep.pipeline.verify_tar import Found, Members, TarReader, Walked, open_plain, walk
from lipprep.stages.atomic import fetched
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable

_LONGEST_MESSAGE = 1000  # characters: what is quoted in one may be of any length


@dataclass(frozen=True)
class Finding:
    """One problem: the file, the clip where it is one clip's, a short name of its kind, what it is, what to do."""

    file: str
    key: str | None
    kind: str
    message: str
    remedy: str


@dataclass
class Findings:
    """The problems of one folder or tar; `again` says how to make anew what is missing: "run `...` again"."""

    again: str
    listed: list[Finding] = field(default_factory=list)

    def add(
        self,
        kind: str,
        file: str,
        message: str,
        *,
        key: str | None = None,
        remove: Sequence[str] = (),
        remedy: str | None = None,
    ) -> None:
        """List one; the remedy, unless given, is to remove the files `remove` and what `again` says."""
        first = f"remove {' and '.join(map(printable, remove))} and " if remove else ""
        remedy = remedy or f"{first}{self.again}"
        self.listed.append(
            Finding(printable(file), key and printable(key), kind, printable(message, _LONGEST_MESSAGE), remedy)
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """What is compared of a clip's line in a record; `source` names its video's content, where that is known."""

    key: str
    failure: str | None
    members: tuple[str, ...] = ()
    crc32: int = 0
    sha256: str | None = None
    offset: int = 0
    num_frames: int | None = None
    source: str | None = None


Visit = Callable[[str, Members, Entry | None], None]


@dataclass
class Chunk:
    """What was found of one tar and its record.

    `header` is None where the record is not usable. `bytes` and `sha256` are the tar's own; `bytes` is None
    where it could not be read, `sha256` also where it is longer than expected or nothing is known of it.
    `keys`, and of the clips that are ok `samples` and `offsets` (samples + 1,) int64, are the record's, or
    without one those found in the tar; `failures` counts the others by class. After a deep look `pixels` has a
    digest of each clip's crops, and `videos` a clip of each video by its name and, where known, its content.
    """

    name: str
    findings: Findings
    header: dict | None = None
    bytes: int | None = None
    sha256: str | None = None
    keys: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    samples: int = 0
    failures: Counter = field(default_factory=Counter)
    pixels: dict[str, bytes] = field(default_factory=dict)
    videos: dict[tuple[str, str | None], str] = field(default_factory=dict)

    @property
    def record(self) -> str:
        return record_path(Path(self.name)).name


def read_record(tar: Path | RemotePath, findings: Findings) -> tuple[Header | None, list[Entry]]:
    """The header and the clips of the record of `tar`; None and none where it is not usable.

    With a finding, unless there is none.
    """
    path = record_path(tar)
    try:
        with fetched(path) as local, open_plain(local) as file:
            header = unseal(file.readline(LONGEST_HEADER))
            lines = hashlib.sha256()
            entries = [_entry(line) for line in _lines(file, lines)]
        if lines.hexdigest() != header["entries"]["sha256"]:
            raise UserError("its lines are not those that its header was written for")
        return header, entries
    except FileNotFoundError:
        pass  # whether it should be there, the folder tells
    except OSError as error:
        if isinstance(tar, RemotePath):  # the disk here did not take the copy
            raise
        message = f"the record cannot be read: {error.strerror or error}"
        findings.add("unreadable", path.name, message, remove=[path.name])
    except UserError as error:
        findings.add("bad_record", path.name, f"the record is damaged ({error})", remove=[path.name])
    return None, []


def read_record_header(tar: Path | RemotePath) -> Header | None:
    """The header of the record of `tar`; None where it is not usable."""
    try:
        with open_plain(record_path(tar)) as file:
            return unseal(file.readline(LONGEST_HEADER))
    except (OSError, UserError):
        return None


def _lines(file: BinaryIO, digest: "hashlib._Hash") -> Iterator[bytes]:
    while line := file.readline(LONGEST_HEADER):
        digest.update(line)
        yield line


def _entry(line: bytes) -> Entry:
    (plain,) = decode_entries(line)
    video = (plain["source"] or {}).get("sha256")
    if plain["status"] != "ok":
        return Entry(plain["key"], root_class(plain), source=video)
    return Entry(
        plain["key"],
        None,
        tuple(plain["members"]),
        plain["crc32"],
        plain.get("digest"),
        plain["offset"],
        plain["figures"]["num_frames"],
        video,
    )


def read_chunk(
    tar: Path | RemotePath, again: str, expected: int = 0, *, keep: Collection[str] = (), visit: Visit | None = None
) -> Chunk:
    """Read a tar and its record and list where they do not agree, clip by clip.

    Whether the tar as a whole is the one of its record is not judged here: its size and sha256 are returned,
    to be held against the index as well. `again` is that of the findings. `expected` is the size in bytes by
    the index, 0 where it has none. `visit` is called for each clip in the tar with its key, its members (those
    with an extension in `keep`) and what the record says of it.
    """
    try:
        return _read_chunk(tar, again, expected, keep, visit)
    except MemoryError:
        chunk = Chunk(tar.name, Findings(again))
        remedy = "verify it with fewer --workers, or without --deep, which decodes nothing"
        chunk.findings.add("unreadable", tar.name, "the memory does not suffice to read it", remedy=remedy)
        return chunk


def _read_chunk(tar: Path | RemotePath, again: str, expected: int, keep: Collection[str], visit: Visit | None) -> Chunk:
    chunk = Chunk(tar.name, Findings(again))
    chunk.header, entries = read_record(tar, chunk.findings)
    wanted = {e.key: e for e in entries if e.failure is None}
    if chunk.header is not None:
        chunk.keys, chunk.samples = [e.key for e in entries], len(wanted)
        chunk.failures = Counter(e.failure for e in entries if e.failure is not None)
        _check_counts(chunk)
        chunk.offsets = np.array([*(e.offset for e in wanted.values()), chunk.header["end"]], np.int64)
    try:
        with fetched(tar) as local, open_plain(local) as file:
            reader = TarReader(file, max(expected, chunk.header["tar"]["bytes"] if chunk.header else 0))
            places = [e.offset for e in wanted.values()]
            known = visit and (lambda key, members: visit(key, members, wanted.get(key)))
            sha256 = any(e.sha256 for e in wanted.values())
            walked = walk(reader, places, sha256=sha256, keep=keep, visit=known)
            reader.feed(reader.size - reader.position)
    except FileNotFoundError:
        return chunk  # whether it should be there, the folder tells
    except OSError as error:
        if isinstance(tar, RemotePath):  # the disk here did not take the copy
            raise
        message = f"the tar cannot be read: {error.strerror or error}"
        chunk.findings.add("unreadable", tar.name, message, remove=[tar.name])
        return chunk
    chunk.bytes, chunk.sha256 = reader.length, reader.digest()
    for name, reason in walked.unsafe:
        message = f"its member {name} {reason}: no tar of lipprep's"
        chunk.findings.add("unsafe_member", tar.name, message, remove=[tar.name])
    if chunk.header is not None:
        _compare(chunk, wanted, walked)
    else:
        chunk.keys, chunk.samples = [f.key for f in walked.clips], len(walked.clips)
        chunk.offsets = np.array([*(f.offset for f in walked.clips), walked.end], np.int64)
        for offset in walked.broken:
            message = f"at byte {offset} stands no header of a member"
            chunk.findings.add("damaged_tar", tar.name, message, remove=[tar.name])
    return chunk


def _check_counts(chunk: Chunk) -> None:
    told, lines = chunk.header["counts"], {k: n for k, n in {"ok": chunk.samples, **chunk.failures}.items() if n}
    if chunk.header["planned"] != len(chunk.keys) or told != lines:
        message = f"its header counts {chunk.header['planned']} clips, {told}, its lines {lines}"
        chunk.findings.add("counts", chunk.record, message, remove=[chunk.record])


def _compare(chunk: Chunk, wanted: dict[str, Entry], walked: Walked) -> None:
    """List where the clips in a tar are not those of its record."""

    def add(kind: str, message: str, key: str | None = None) -> None:
        chunk.findings.add(kind, chunk.name, message, key=key, remove=[chunk.name])

    by_key: dict[str, Found] = {}
    for clip in walked.clips:
        if by_key.setdefault(clip.key, clip) is not clip:
            add("duplicate_key", "the clip stands in this tar twice", clip.key)
    # chunk.offsets: (samples + 1,)
    for entry, last in zip(wanted.values(), chunk.offsets[1:], strict=True):
        clip = by_key.pop(entry.key, None)
        if any(entry.offset <= offset < last for offset in walked.broken):
            add("damaged_clip", "a member's header is damaged, or the member is cut off", entry.key)
        elif clip is None:
            add("missing_clip", "the record has the clip, the tar does not", entry.key)
        elif tuple(clip.members) != entry.members:
            message = f"its members are {', '.join(clip.members)}, the record has {', '.join(entry.members)}"
            add("missing_member" if len(clip.members) < len(entry.members) else "members", message, entry.key)
        elif clip.crc32 != entry.crc32 or (entry.sha256 and clip.sha256.hexdigest() != entry.sha256):
            add("damaged_clip", "its bytes are not those of the record", entry.key)
    for key in by_key:
        add("extra_clip", "the tar has the clip, the record does not", key)
    moved = next((f for f in walked.clips if f.key in wanted and f.offset != wanted[f.key].offset), None)
    if moved is not None:
        message = f"from this clip on, clips stand elsewhere than the record says (byte {moved.offset})"
        add("offsets", message, moved.key)
    elif len(walked.clips) == len(wanted) > 0 and not walked.broken and walked.end != chunk.header["end"]:
        add("offsets", f"the last member ends at byte {walked.end}, the record says {chunk.header['end']}")
