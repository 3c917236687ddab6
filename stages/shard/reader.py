"""Reading tars: single members by name, and training samples at their offsets."""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.codec import MAX_CROPS, decode_mouth
from lipprep.stages.untrusted import check_file, printable

MAKE_AGAIN = ": run `lipprep shards` again"  # how messages about damaged shards end
_BLOCK = tarfile.BLOCKSIZE
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KINDS = (*_PLAIN, tarfile.GNUTYPE_LONGNAME)
_NAME = re.compile(rb"[\w/@%.\0-]{10}")  # a key's bytes; compressed files begin otherwise
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_MAX_JSON = 1 << 20  # bytes of a sample's json, which has eight fields
_MAX_SAMPLE = MAX_CROPS + 2 * _MAX_JSON  # bytes, with headers and json
_MAX_READ = 1 << 31  # bytes of neighbouring samples


class TarMembers:
    """The members of one tar, by name; their headers are read once, their bytes when asked for.

    Nothing is ever written: a member may call itself `../x` or `/x`, it is a name and no more.
    """

    def __init__(self, path: Path | RemotePath) -> None:
        """Raises ValueError where the file is no tar of plain members, or is cut short."""
        self.path = check_file(place(path), "tar")
        self._file = self.path.open("rb")
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    # Sparse members claim any size; links and devices have no bytes.
                    if info.type not in _PLAIN or info.issparse():
                        raise tarfile.TarError(f"its member {printable(info.name)} is no plain file")
                    self._places[info.name] = info.offset_data, info.size
        except (tarfile.TarError, MemoryError, OverflowError) as error:  # a header may claim more than any memory
            self._file.close()
            reason = printable(error) or "a header claims more than there is"
            raise UserError(f"{self.path} is no readable tar ({reason}): make it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> bytes:
        """The bytes of one member; KeyError where there is none of that name."""
        offset, size = self._places[name]
        self._file.seek(offset)
        payload = self._file.read(size)
        if len(payload) != size:
            raise UserError(f"{self.path} ends inside its member {name}: make it again")
        return payload

    def __enter__(self) -> "TarMembers":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def read_members(path: Path | RemotePath, offset: int, names: Sequence[str]) -> list[bytes]:
    """The bytes of the members `names`, which stand one after another from byte `offset` of a tar on.

    The tar may be unfinished. Raises ValueError where other members stand there, or it ends before.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            payloads = []
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for name in names:
                    info = tar.next()
                    if info is None or info.name != name or info.type not in _PLAIN or info.issparse():
                        raise UserError(f"{path} does not hold {printable(name)} where it should")
                    file.seek(info.offset_data)
                    if len(payload := file.read(info.size)) != info.size:
                        raise UserError(f"{path} ends inside its member {printable(name)}")
                    payloads.append(payload)
            return payloads
    except (tarfile.TarError, OSError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} cannot be read at byte {offset}: {printable(error)}") from error


def decode_sample(sample: dict) -> dict:
    """One grouped WebDataset sample to {key, mouth (T, S, S) uint8, and the fields of its json}.

    Raises ValueError, naming the clip, where a member is missing or damaged.
    """
    key = sample["__key__"]
    extension = next((e for e in ("mouth.jpg", "mouth.npy") if e in sample), None)
    if extension is None or "json" not in sample:
        raise UserError(f"clip {printable(key)} lacks its mouth crop or its json")
    try:
        if len(sample["json"]) > _MAX_JSON:
            raise UserError(f"its json has {len(sample['json'])} bytes, at most {_MAX_JSON} are read")
        fields = json.loads(sample["json"])
        if not isinstance(fields, dict):
            raise UserError("its json is no object")
        return {**fields, "key": key, "mouth": decode_mouth(extension, sample[extension])}
    except (ValueError, RecursionError) as error:
        raise UserError(f"clip {printable(key)}: {error}") from error


def read_range(path: Path | RemotePath, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file, with one read or one request; fewer where it ends before."""
    if isinstance(path, RemotePath):
        return path.read_range(start, end)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def read_samples(
    path: Path | RemotePath,
    offsets: np.ndarray,
    positions: range,
    *,
    read: Callable[[Path | RemotePath, int, int], bytes] = read_range,
) -> list[dict]:
    """Read the neighbouring samples `positions` of one shard with a single read, in order.

    `offsets` (samples + 1,) int64 are the bytes where samples start and the last one ends, as the index has
    them. `read` gives the bytes of the file from one to another. webdataset expands and groups the members.
    Raises ValueError, naming the shard, where what stands there is not as many whole samples, or larger than
    samples are.
    """
    if not positions:
        return []
    path = place(path)
    data = slice_of(path, offsets, positions, read=read)
    try:
        samples = list(map(decode_sample, expand([data])))
    except ValueError as error:
        first, last = positions.start, positions.stop - 1
        where = f"sample {first}" if first == last else f"samples {first} to {last}"
        why = printable(error.args[0])
        raise UserError(f"shard {path} is damaged ({where}, from 0: {why}){MAKE_AGAIN}") from error
    if len(samples) != len(positions):
        raise UserError(f"shard {path} holds {len(samples)} samples where its index has {len(positions)}{MAKE_AGAIN}")
    return samples


def slice_of(
    path: Path | RemotePath,
    offsets: np.ndarray,
    positions: range,
    *,
    read: Callable[[Path | RemotePath, int, int], bytes] = read_range,
) -> bytes:
    """The bytes of the neighbouring samples `positions` of one shard; the arguments are those of `read_samples`.

    Raises ValueError where they are more than samples have.
    """
    start, end = int(offsets[positions.start]), int(offsets[positions.stop])
    largest = int(np.diff(offsets[positions.start : positions.stop + 1]).max(initial=0))
    if largest > _MAX_SAMPLE:
        raise UserError(
            f"shard {path} has a sample of {largest} bytes, at most {_MAX_SAMPLE} are read: cut its clip into windows"
        )
    if end - start > _MAX_READ:
        raise UserError(f"{end - start} bytes of shard {path} at once, at most {_MAX_READ} are read: read fewer clips")
    return read(path, start, end)


def expand(slices: Iterable[bytes]) -> Iterator[dict]:
    """The grouped samples of slices of shards, none of them twice, as `decode_sample` takes them.

    The slice of a tar between two samples is a tar but for its closing blocks, which tarfile can do without; so are
    several of them in a row. A slice is asked for when its turn comes, and what it raises is raised; ValueError where
    it is no such slice.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    stream = _Pieces(slices)
    try:
        yield from group_by_keys(tar_file_expander([{"url": "", "stream": stream}]))
    except (tarfile.TarError, ValueError) as error:
        raise stream.error or UserError(printable(error.args[0])) from error
    if stream.error is not None:
        raise stream.error


class _Pieces:
    """A file that gives its bytes in the very pieces that tarfile is about to ask for, whatever length it asks for.

    tarfile reads streams 10 KiB at a time, and joins what it has with each of them.
    """

    def __init__(self, slices: Iterable[bytes]) -> None:
        self._pieces = (piece for data in slices for piece in _members(data))
        self.error: Exception | None = None  # tarfile and webdataset would make others of it

    def read(self, size: int) -> bytes | memoryview:
        try:
            return next(self._pieces, b"")
        except Exception as error:
            self.error = error
            return b""

    def close(self) -> None:
        pass


def _members(data: bytes) -> list[bytes | memoryview]:
    """Headers, contents and paddings of the members of a slice, in order.

    Raises ValueError unless they are members as lipprep writes them: plain ones, and names too long for a header.
    webdataset would unpack a compressed tar, and fill the holes of a sparse member: a few bytes could become any
    number of them.
    """
    at, pieces, view = 0, [], memoryview(data)
    if data and not _NAME.match(data):
        raise UserError("it does not begin with a member's name")
    while at < len(data):
        header = data[at : at + _BLOCK]
        size = _OCTAL.fullmatch(header[124:136])
        if header[156:157] not in _KINDS or size is None:
            raise UserError(f"at byte {at} of the sample stands no plain member")
        content = at + _BLOCK
        end = content + int(size[1], 8)
        at = content + -(-(end - content) // _BLOCK) * _BLOCK
        pieces += [piece for piece in (header, view[content:end], view[end:at]) if len(piece)]
    if at > len(data):
        raise UserError("its last member is cut short")
    return pieces
