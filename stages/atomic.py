"""Files that are there whole or not at all."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_REMEDY = {
    errno.ENOSPC: "make room",
    getattr(errno, "EDQUOT", errno.ENOSPC): "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or take a file system without one",
    errno.EROFS: "make it writable",
    errno.EIO: "see to the disk",
}


def disk_remedy(error: OSError) -> str | None:
    """What to do where a disk does not take what is written; None for another error."""
    return _REMEDY.get(error.errno)


class Output(io.FileIO):
    """A file to write. Every byte that lipprep stores goes through `write`: here a full or failing disk is met."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")

    def write(self, data: bytes) -> int:
        """Write what fits; OSError names the file, which Python's own does not."""
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from error


def sync(file: BinaryIO) -> None:
    """Make what was written last through a power cut; OSError where the disk could not keep it."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last through a power cut (a no-op where folders cannot be opened)."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and needs none of this
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_path(path: Path, tag: object) -> Path:
    """Where `path` is written before it is whole: beside it, a name that listings pass over.

    The `tag` keeps two writers apart.
    """
    return path.with_name(f".{path.name}.{tag}.tmp")


def temporary_paths(path: Path) -> list[Path]:
    """What writers of `path` that were killed have left, or one at work is writing."""
    return sorted(path.parent.glob(f".{path.name}.*.tmp"))


def abandon(file: BinaryIO) -> None:
    """Close a file whose content is not wanted: that it cannot be written any more does not matter."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; on success it is fsynced and takes the name `path`, on failure it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, os.getpid())
    file = io.BufferedWriter(Output(temporary))
    try:
        yield file
        sync(file)
        file.close()
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        abandon(file)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically, with newlines as they are."""
    with replacing(path) as file:
        file.write(text.encode())
