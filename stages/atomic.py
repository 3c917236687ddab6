"""Files that are there whole or not at all, on a disk or in a store.

What is for a store is written to a local file, which is uploaded when it is whole.
"""

import contextlib
import errno
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.scratch import COPY, scratch
from lipprep.stages.untrusted import is_file, printable

_REMEDY = {
    errno.ENOSPC: "make room",
    getattr(errno, "EDQUOT", errno.ENOSPC): "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or take a file system without one",
    errno.EROFS: "make it writable",
    errno.EIO: "see to the disk",
}
_FETCH = 1 << 24  # bytes a request


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


def fsync_folder(folder: Path | RemotePath) -> None:
    """Make renames and removals in `folder` last through a power cut (a no-op where folders cannot be opened)."""
    if isinstance(folder, RemotePath):
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and needs none of this
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_path(path: Path | RemotePath, tag: object, folder: Path | None = None) -> Path:
    """Return where `path` is written before it is whole: in `folder`, else beside it, or in the local scratch folder.

    The `tag` keeps two writers apart. Listings pass over the name.
    """
    return (folder or _beside(path)) / f".{path.name}.{tag}.tmp"


def temporary_paths(path: Path | RemotePath, folder: Path | None = None) -> list[Path]:
    """List what writers of `path` that were killed have left in `folder`, or one at work is writing."""
    return sorted((folder or _beside(path)).glob(f".{path.name}.*.tmp"))


def _beside(path: Path | RemotePath) -> Path:
    return scratch(path.parent) if isinstance(path, RemotePath) else path.parent


def publish(temporary: Path, path: Path | RemotePath) -> None:
    """Give a file that is whole its name, replacing an older one: by renaming it, or by uploading it.

    What was uploaded is still there, for its writer to remove when all that belongs to it is.
    """
    if isinstance(path, RemotePath):
        path.upload(temporary)
        return
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # Of another file system, where nothing can be renamed to: copied beside it first.
        beside = temporary_path(path, uuid.uuid4().hex[:12])
        try:
            with temporary.open("rb") as whole, io.BufferedWriter(Output(beside)) as copy:
                shutil.copyfileobj(whole, copy, _FETCH)
                sync(copy)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        temporary.unlink()
    fsync_folder(path.parent)


def abandon(file: BinaryIO) -> None:
    """Close a file whose content is not wanted: that it cannot be written any more does not matter."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def replacing(path: Path | RemotePath, scratch_folder: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write; on success it is fsynced and takes the name `path`, on failure it goes.

    Until then it lies in `scratch_folder`, by default beside `path`. Raises RemoteError where a store does not take it;
    what was there before is there still. A device or a pipe of that name, as /dev/null, takes what is written and stays
    what it is.
    """
    path = place(path)
    if isinstance(path, Path) and path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: processes of two containers may have the same.
    temporary = temporary_path(path, uuid.uuid4().hex[:12], scratch_folder)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    file = io.BufferedWriter(Output(temporary))
    try:
        yield file
        sync(file)
        file.close()
        publish(temporary, path)
    finally:
        abandon(file)
        temporary.unlink(missing_ok=True)


def check_own(path: Path | RemotePath, mark: bytes) -> None:
    """Raise UserError where `path` is a file that lipprep did not make, whose first 4 KiB lack `mark`."""
    path = place(path)
    if not is_file(path):  # a folder, a pipe or nothing: to write tells
        return
    with path.open("rb") as file:
        start = file.read(4096)
    if start and mark not in start:
        raise UserError(f"{printable(path)} is not lipprep's, and is never replaced: name another file, or move it")


def write_text(path: Path | RemotePath, text: str, scratch_folder: Path | None = None) -> None:
    """Write UTF-8 `text` to `path` atomically, as `replacing` does, with newlines as they are."""
    with replacing(path, scratch_folder) as file:
        file.write(text.encode())


@contextlib.contextmanager
def fetched(path: Path | RemotePath) -> Iterator[Path]:
    """A local file with the content of `path`, for those who read all of it: itself where it is local, else a copy.

    Raises FileNotFoundError where there is none, RemoteError where it changes meanwhile. The copy goes at the end, that
    of a process that was killed when it is a day old (`scratch`).
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    where = scratch(path.parent)
    with tempfile.TemporaryDirectory(prefix=COPY, dir=where) as folder:
        local, status = Path(folder) / path.name, path.stat()
        with io.BufferedWriter(Output(local)) as file:
            for start in range(0, status.st_size, _FETCH):
                file.write(path.read_range(start, min(start + _FETCH, status.st_size)))
        path.check_unchanged(status)
        yield local
