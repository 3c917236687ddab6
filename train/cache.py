"""A folder on the local disk that keeps what was read of remote shards, up to a size.

What is fetched are the blocks of the epoch's plan: neighbouring samples that are read together in every epoch. A file
holds one block, then the CRC-32 of each of its samples, then that of these: what is damaged or cut is fetched again.
Any number of processes, and of runs, may use a folder at once.

Room is made by blocks that were last used before this run began, the oldest first. Then this run's own go, the newest
first but for those that are still being read: every epoch is another order, so that what this one has read already is
wanted later than what it has not. With half the room, about half of the blocks are fetched again in each epoch; if the
least recently used went first, six of seven would be.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.atomic import Output, disk_remedy, temporary_path
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.index import Shard
from lipprep.stages.shard.reader import read_range
from lipprep.train.epoch import BLOCK, WINDOW
from lipprep.train.metrics import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LARGEST = 64 << 20  # bytes of a block: the clips of a larger one are fetched by themselves, and not kept
_SMALLEST = 100_000_000  # bytes of a folder: a few batches
_DEFAULT = 50_000_000_000  # bytes, or a tenth of the disk
_LEDGER = ".size.lock"  # says how many bytes blocks take
_LOCKS = 64  # for all blocks: two of one lock are fetched one after the other
REQUESTS = 8  # at once
_AT_HAND = 4 * WINDOW  # blocks: eight processes that read batches of up to 256 samples are at work on so many
_ROOM = 0.98  # of the size, after blocks have gone: looking for them takes a while, and is not done for each block
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
    """Reads samples of remote shards through a folder. May be pickled, and used by several threads.

    Where the disk is full, which each process that reads says once, samples are fetched by themselves: blocks that are
    not kept would be fetched for each of their samples.
    """

    def __init__(self, folder: Path, *, size: int, needed: int = 0) -> None:
        """`size` is the most that blocks take there, in bytes. The run begins now, for those it is pickled to, too.

        `needed` are the bytes of all that will be read in the order of a training plan. Where neither they nor a window
        of the plan find room, samples are fetched by themselves: a block would go before all of its samples are read.
        """
        self.folder, self.size, self._needed = folder, size, needed
        self._began = time.time_ns()
        self._full = False

    def read(self, shard: "RemoteShard", position: int) -> bytes:
        """The bytes of one sample: those that are kept, else those of its block are fetched.

        Raises FileNotFoundError and RemoteError as the shard's store does.
        """
        block, here = shard.block(position), position % BLOCK
        if (kept := self._kept(block, here)) is not None:
            return kept
        if not self._keeps(block):
            return read_range(shard.path, block.offset + block.starts[here], block.offset + block.starts[here + 1])
        return self._fetch(block, here)

    def forget(self, shard: "RemoteShard", position: int) -> None:
        """Let the block of a sample be fetched again when it is wanted: it may have been damaged on its way here."""
        self._file(shard.block(position)).unlink(missing_ok=True)

    def prefetch(self, wanted: Iterable[tuple["RemoteShard", int]]) -> bool:
        """Fetch the blocks of the samples (shard, position) that are `wanted`, several at once; not those kept.

        False where some are not kept, so that reading their samples takes a request each.
        """
        blocks = {block.name: block for block in itertools.starmap(RemoteShard.block, wanted)}
        missing = [b for b in blocks.values() if self._keeps(b) and not self._file(b).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), REQUESTS)) as threads:
                list(threads.map(lambda block: self._fetch(block, 0), missing))
        return all(self._keeps(block) for block in blocks.values())

    def _keeps(self, block: "_Block") -> bool:
        """Whether the block is kept when it is fetched."""
        whole = block.bytes + 4 * len(block.starts)
        fits = max(whole, min(self._needed, WINDOW * whole)) <= self.size
        return not self._full and block.bytes <= _LARGEST and fits

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
        except OSError:
            return None
        with contextlib.suppress(OSError):  # the file may be another person's
            os.utime(file)
        return sample if _crc32(sample) == checks[4 * here : 4 * here + 4] else None

    def _keep(self, block: "_Block", content: bytes) -> None:
        checks = b"".join(_crc32(content[a:b]) for a, b in itertools.pairwise(block.starts))
        content += checks + _crc32(checks)
        file = self._file(block)
        # Written while the lock is held: who makes room counts what is there, and must not miss what is on its way.
        with self._alone(_LEDGER) as ledger:
            if self._full:
                return
            ledger.seek(0)
            text = ledger.read(40)
            taken = int(text) if text.isdigit() else self._tidy(self.size)
            with contextlib.suppress(FileNotFoundError):
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
                if (remedy := disk_remedy(error)) is None:
                    raise
                self._full = True
                warn(
                    f"the cache {self.folder} takes no more ({error.strerror}): from here on every clip is fetched by "
                    f"itself, in each epoch again. {remedy.capitalize()}, or name another folder with --cache, and "
                    "start again"
                )
            finally:
                temporary.unlink(missing_ok=True)

    def _tidy(self, size: int) -> int:
        """Remove blocks until they take `size` bytes; return what they take."""
        found = []
        for file in _blocks(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        found.sort(key=lambda entry: entry[0])
        earlier = sum(used < self._began for used, _, _ in found)
        # More samples of the blocks at hand are to be read: if these went, they would be fetched for each of them.
        at_hand = max(earlier, len(found) - _AT_HAND)
        taken = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, file in [*found[:earlier], *reversed(found[earlier:at_hand]), *found[at_hand:]]:
            if taken <= size:
                break
            with contextlib.suppress(OSError):  # Windows keeps what is being read
                file.unlink()
                taken -= bytes_
        return taken

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[BinaryIO]:
        """Hold a lock of the folder, a file; the system frees it when the process ends."""
        with contextlib.ExitStack() as files:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = files.enter_context((self.folder / name).open("a+b", buffering=0))
            except OSError as error:
                if disk_remedy(error) is None:
                    raise
                file = io.BytesIO()  # a disk that has no room for a lock has none for a block
            else:
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
    shards: Path | RemotePath, read: Iterable[Shard], *, folder: Path | None = None, size: int | None = None
) -> BlockCache | None:
    """The cache to read remote `shards` through, of which those in `read` are; None for local ones.

    By default in the person's folder for such files, and of 50 GB, or a tenth of the disk, or half of what is free
    there if that is less; None where that is too small to be of use, with a warning. Raises ValueError where a `size`
    that was given is, or the folder cannot be one.
    """
    shards = place(shards)
    if not isinstance(shards, RemotePath):
        if folder is not None or size is not None:
            warn(f"the shards in {shards} are on a disk and read there: a cache has no effect")
        return None
    folder = place(folder or _default_folder())
    if isinstance(folder, RemotePath):
        raise UserError(f"the cache {folder} must be a local folder")
    if size is not None and size < _SMALLEST:
        raise UserError(f"a cache of {size} bytes is of no use: --cache-size must be at least 100MB")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _LEDGER).open("ab").close()
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written to ({error.strerror}): name another folder with --cache"
        ) from error
    if size is None:
        disk = shutil.disk_usage(folder)
        size = min(_DEFAULT, disk.total // 10, (disk.free + _taken(folder)) // 2)
        if size < _SMALLEST:
            warn(
                f"on the disk of {folder} is no room to keep what is read: every clip is fetched by itself, in each "
                "epoch again. Make room, or name another folder with --cache"
            )
            return None
    read = list(read)
    needed = sum(shard.bytes for shard in read)
    window = min(needed, WINDOW * BLOCK * needed // max(1, sum(shard.samples for shard in read)))
    if window > size:
        warn(
            f"the {WINDOW * BLOCK} clips that are mixed with one another take {window / 1e9:.3g} GB, and "
            f"{size / 1e9:.3g} GB are kept in {folder}: every clip is fetched by itself, in each epoch again, unless "
            "--cache-size is larger"
        )
    elif needed > size:
        warn(
            f"of the shards, {needed / 1e9:.3g} GB are read and {size / 1e9:.3g} GB kept in {folder}: about as "
            "much as finds no room is fetched again in every epoch, unless --cache-size is larger"
        )
    return BlockCache(folder, size=size, needed=needed)


def parse_size(text: str) -> int:
    """A number of bytes as people write it. Raises ValueError for what is none.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT]B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"{text!r} is no size: write it as in 20GB or 500MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _taken(folder: Path) -> int:
    return sum(file.stat().st_size for file in _blocks(folder))


def _default_folder() -> Path:
    try:
        return _caches() / "lipprep"
    except RuntimeError as error:
        raise UserError("you have no home folder to keep what is read in: name a folder with --cache") from error


def _caches() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home())
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
