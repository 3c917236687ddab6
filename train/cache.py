"""A folder on the local disk that keeps what was read of remote shards, up to a size.

What is fetched are the blocks of the epoch's plan: neighbouring samples that are read together in every epoch. A file
holds one block, then the CRC-32 of each of its samples, then that of these: what is damaged or cut is fetched again.
Any number of processes may use a folder at once. The block that was used least recently goes first.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lipprep.stages.atomic import Output, disk_remedy, temporary_path
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.reader import read_range
from lipprep.train.epoch import BLOCK
from lipprep.train.metrics import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LARGEST = 64 << 20  # bytes of a block: the clips of a larger one are fetched by themselves, and not kept
_SMALLEST = 100_000_000  # bytes of a folder: a few batches
_DEFAULT = 50_000_000_000  # bytes, or a tenth of the disk
_LOCKS = 64  # for all blocks: two of one lock are fetched one after the other
_REQUESTS = 8  # at once
_ROOM = 0.9  # of the size, after blocks have gone: looking for them takes a while, and is not done for each block
_NAME = re.compile(r"\.?[0-9a-f]{64}(\..*\.tmp)?")  # of a block's file
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class _Block:
    """Neighbouring samples of a tar: its bytes from `offset` on, `starts` where they start in these, and the end."""

    name: str
    path: RemotePath
    offset: int
    starts: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.starts[-1]


@dataclass(frozen=True)
class RemoteShard:
    """A tar in a store, with its sha256 and its offsets (samples + 1,) int64, as the index has them."""

    path: RemotePath
    sha256: str
    offsets: np.ndarray

    def block(self, position: int) -> _Block:
        """The block that a sample belongs to."""
        first = position - position % BLOCK
        offset, *_ = ends = self.offsets[first : first + BLOCK + 1].tolist()
        # With the URL in its name, no shard that calls itself another one takes that one's place.
        name = hashlib.sha256(f"{self.path} {self.sha256} {offset} {ends[-1]}".encode()).hexdigest()
        return _Block(name, self.path, offset, tuple(end - offset for end in ends))


class BlockCache:
    """Reads samples of remote shards through a folder. May be pickled, and used by several threads."""

    def __init__(self, folder: Path, *, size: int) -> None:
        """`size` is the most that blocks take there, in bytes."""
        self.folder, self.size = folder, size

    def read(self, shard: "RemoteShard", position: int) -> bytes:
        """The bytes of one sample: those that are kept, else those of its block are fetched.

        Raises FileNotFoundError and RemoteError as the shard's store does.
        """
        block, here = shard.block(position), position % BLOCK
        if block.bytes > _LARGEST:
            return read_range(shard.path, block.offset + block.starts[here], block.offset + block.starts[here + 1])
        kept = self._kept(block, here)
        return self._fetch(block, here) if kept is None else kept

    def prefetch(self, wanted: Iterable[tuple["RemoteShard", int]]) -> None:
        """Fetch the blocks of the samples (shard, position) that are `wanted`, several at once; not those kept."""
        blocks = {shard.block(position).name: shard.block(position) for shard, position in wanted}
        missing = [b for b in blocks.values() if b.bytes <= _LARGEST and not self._file(b).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), _REQUESTS)) as threads:
                list(threads.map(lambda block: self._fetch(block, 0), missing))

    def _file(self, block: "_Block") -> Path:
        return self.folder / block.name[:2] / block.name

    def _fetch(self, block: "_Block", here: int) -> bytes:
        with self._alone(f".{int(block.name[:8], 16) % _LOCKS}.lock"):
            kept = self._kept(block, here)
            if kept is not None:  # another process was faster
                return kept
            content = read_range(block.path, block.offset, block.offset + block.bytes)
            if len(content) == block.bytes:  # else the tar has changed, as whoever reads the sample will say
                self._keep(block, content)
            return content[block.starts[here] : block.starts[here + 1]]

    def _kept(self, block: "_Block", here: int) -> bytes | None:
        """The bytes of a sample of a block, if they are in the folder as they were when they were fetched."""
        file, start, end = self._file(block), block.starts[here], block.starts[here + 1]
        try:
            with file.open("rb", buffering=0) as kept:
                kept.seek(block.bytes)
                checks = kept.read()
                if len(checks) != 4 * len(block.starts) or checks[-4:] != _crc32(checks[:-4]):
                    return None
                kept.seek(start)
                sample = kept.read(end - start)
                os.utime(file)
        except OSError:
            return None
        return sample if _crc32(sample) == checks[4 * here : 4 * here + 4] else None

    def _keep(self, block: "_Block", content: bytes) -> None:
        checks = b"".join(_crc32(content[a:b]) for a, b in itertools.pairwise(block.starts))
        content += checks + _crc32(checks)
        if len(content) > self.size:
            return
        file = self._file(block)
        with self._alone(".size.lock") as ledger:
            ledger.seek(0)
            text = ledger.read(40)
            taken = int(text) if text.isdigit() else self._tidy(self.size)
            if file.exists():
                taken -= file.stat().st_size
            if taken + len(content) > self.size:
                taken = self._tidy(min(self.size - len(content), int(_ROOM * self.size)))
            temporary = temporary_path(file, os.getpid())
            try:
                _note(ledger, taken + len(content))  # who is killed after this has counted too much
                file.parent.mkdir(exist_ok=True)
                with io.BufferedWriter(Output(temporary)) as out:
                    out.write(content)
                temporary.replace(file)
            except OSError as error:
                # Training goes on without what a full disk does not take.
                if disk_remedy(error) is None:
                    raise
            finally:
                temporary.unlink(missing_ok=True)

    def _tidy(self, size: int) -> int:
        """Remove blocks, the least recently used first, until they take `size` bytes; return what they take."""
        found = []
        for file in _blocks(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        found.sort(key=lambda entry: entry[0])
        taken = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, file in found:
            if taken <= size:
                break
            with contextlib.suppress(OSError):  # Windows keeps what is being read
                file.unlink()
                taken -= bytes_
        return taken

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[BinaryIO]:
        """Hold a lock of the folder, a file; the system frees it when the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a+b", buffering=0) as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _blocks(folder: Path) -> Iterator[Path]:
    """The files that are blocks, whole or unfinished: other people's files may stand beside them."""
    return (file for file in folder.glob("[0-9a-f][0-9a-f]/*") if _NAME.fullmatch(file.name))


def _note(ledger: BinaryIO, taken: int) -> None:
    ledger.seek(0)
    ledger.truncate()
    ledger.write(str(taken).encode())


def _crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def open_cache(
    shards: Path | RemotePath, *, needed: int, folder: Path | None = None, size: int | None = None
) -> BlockCache | None:
    """The cache to read remote `shards` through, of which `needed` bytes will be read; None for local ones.

    By default in the person's folder for such files, and of 50 GB, or a tenth of the disk, or half of what is free
    there if that is less. Raises ValueError where `size` is too small to be of use, or the folder cannot be one.
    """
    shards = place(shards)
    if not isinstance(shards, RemotePath):
        if folder is not None or size is not None:
            warn(f"the shards in {shards} are on a disk and read there: a cache has no effect")
        return None
    folder = place(folder or _default_folder())
    if isinstance(folder, RemotePath):
        raise ValueError(f"the cache {folder} must be a local folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if size is None:
        disk = shutil.disk_usage(folder)
        size = min(_DEFAULT, disk.total // 10, (disk.free + _taken(folder)) // 2)
    elif size < _SMALLEST:
        raise ValueError(f"a cache of {size} bytes is of no use: --cache-size must be at least 100MB")
    if needed > size:
        warn(
            f"of the shards, {needed / 1e9:.3g} GB are read and {size / 1e9:.3g} GB kept in {folder}: the rest is "
            "fetched again in every epoch, unless --cache-size is larger"
        )
    return BlockCache(folder, size=size)


def parse_size(text: str) -> int:
    """A number of bytes as people write it. Raises ValueError for what is none.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT]B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size: write it as in 20GB or 500MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _taken(folder: Path) -> int:
    return sum(file.stat().st_size for file in _blocks(folder))


def _default_folder() -> Path:
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lipprep"
