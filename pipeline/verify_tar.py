"""The clips in a tar, walked over block by block while the whole of it is hashed.

`tarfile.open` follows whatever a header claims: a long name, a sparse map, a size of terabytes. So the blocks are
walked here, each parsed by `tarfile`, and no claim is believed beyond what lipprep writes. Nothing is extracted.
"""

import bisect
import hashlib
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lipprep.stages.remote import RemotePath

_PIECE = 1 << 20  # bytes read at once
_LONGEST_NAME = 1 << 16  # bytes: paths are of 4096 at most, three times that when percent-encoded
MOST_KEPT = 1 << 28  # bytes of a clip that are taken into memory to decode: 20 minutes of crops

Members = dict[str, bytes]  # of one clip, by extension


@dataclass
class Found:
    """A clip as it stands in the tar: its members in a row, and the digests of their bytes."""

    key: str
    offset: int
    members: list[str] = field(default_factory=list)
    crc32: int = 0
    sha256: "hashlib._Hash | None" = None

    def update(self, data: bytes) -> None:
        """Take in the next bytes of its members."""
        self.crc32 = zlib.crc32(data, self.crc32)
        if self.sha256 is not None:
            self.sha256.update(data)


@dataclass
class Walked:
    """What stands in a tar: its clips, the bytes where a header is damaged, members that lipprep never writes
    (name, why), and where the last member ends."""

    clips: list[Found] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    unsafe: list[tuple[str, str]] = field(default_factory=list)
    end: int = 0


def open_plain(path: Path | RemotePath) -> BinaryIO:
    """Open a plain file to read; OSError for anything else: to open a FIFO would wait for its writer."""
    if path.is_symlink() and not path.exists():
        raise OSError("it is a link to nothing")
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no plain file")
    return path.open("rb")


class TarReader:
    """A file that is hashed while it is read, up to the size that it had when it was opened.

    Given a `limit` in bytes, a longer file is read no further; given 0, what need not be read is passed over.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._hashing = limit > 0
        self.length = os.fstat(file.fileno()).st_size
        self.size = min(self.length, limit) if limit else self.length
        self.position = 0
        self._sha256 = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self.size - self.position))
        self._sha256.update(data)
        self.position += len(data)
        if len(data) < count:  # the end, also where another process has cut the file meanwhile
            self.size = self.position
        return data

    def feed(self, count: int, clip: Found | None = None) -> None:
        """Go on by `count` bytes, which are `clip`'s, without keeping them."""
        if not self._hashing:
            count = min(count, self.size - self.position)
            self._file.seek(count, os.SEEK_CUR)
            self.position += count
            return
        while count > 0 and (piece := self.read(min(count, _PIECE))):
            count -= len(piece)
            if clip is not None:
                clip.update(piece)

    def digest(self) -> str | None:
        """The sha256 of the whole file; None where not all of it was read."""
        return self._sha256.hexdigest() if self._hashing and self.position == self.length else None


def walk(
    reader: TarReader,
    places: Iterable[int],
    *,
    sha256: bool = False,
    keep: Collection[str] = (),
    visit: Callable[[str, Members], None] | None = None,
) -> Walked:
    """Walk over a tar. `visit` is called with the key of each clip and its members whose extensions are in `keep`,
    MOST_KEPT bytes of them at most: the rest is hashed and not kept.

    `places` are the bytes where clips should stand: after a damaged header the walk goes on at the next of them.
    With `sha256` the digest of that name is made of each clip, too.
    """
    places = sorted(places)
    walked = Walked()
    members: Members = {}

    def leave() -> None:
        if visit is not None and walked.clips:
            visit(walked.clips[-1].key, dict(members))
        members.clear()

    while reader.position < reader.size:
        offset = reader.position
        try:
            info = _next_member(reader)
        except tarfile.TarError as error:
            if not isinstance(error, tarfile.EOFHeaderError):
                walked.broken.append(offset)
            after = bisect.bisect_left(places, reader.position)
            if after == len(places) or places[after] >= reader.size:
                break
            reader.feed(places[after] - reader.position)
            continue
        padding = -info.size % tarfile.BLOCKSIZE
        if reason := _unsafe(info):
            walked.unsafe.append((info.name, reason))
            reader.feed(info.size + padding)
            continue
        key, _, extension = info.name.partition(".")
        if not walked.clips or walked.clips[-1].key != key:
            leave()
            walked.clips.append(Found(key, offset, sha256=hashlib.sha256() if sha256 else None))
        clip = walked.clips[-1]
        clip.members.append(extension)
        if extension in keep and sum(map(len, members.values())) + info.size <= MOST_KEPT:
            members[extension] = reader.read(info.size)
            clip.update(members[extension])
        else:
            reader.feed(info.size, clip)
        reader.feed(padding)
        walked.end = reader.position
    leave()
    return walked


def _next_member(reader: TarReader) -> tarfile.TarInfo:
    """The next header and the long name before it. Raises tarfile.TarError where there is none."""
    info = tarfile.TarInfo.frombuf(reader.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        if not 0 <= info.size <= _LONGEST_NAME:
            raise tarfile.InvalidHeaderError("a name of absurd length")
        name = reader.read(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        reader.feed(-info.size % tarfile.BLOCKSIZE)
        info = tarfile.TarInfo.frombuf(reader.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        info.name = name
    if not 0 <= info.size <= reader.size - reader.position:
        raise tarfile.InvalidHeaderError("a member beyond the file's end")
    return info


def _unsafe(info: tarfile.TarInfo) -> str:
    """Why a member is none that lipprep writes; nothing where it is one."""
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name:
        return "would be unpacked outside of its folder"
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "is a link, a device or of another special type"
    return ""
