"""Files in object stores, as good as paths: `s3://bucket/folder/file`, `gs://`, `az://`.

A `RemotePath` has those methods of pathlib.Path that lipprep uses, so that what only reads need not know where. What is
written goes to a local file first and is uploaded whole: a store shows an object when all of it is there, or not.
Stores have no folders: a folder is what names have in common, and is there while it holds something.
"""

import contextlib
import fnmatch
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lipprep.io.errors import UserError
from lipprep.stages.store import STORES, BehindEnd, RemoteError, ask, check_installed, filesystem, masked, store_of
from lipprep.stages.untrusted import printable

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(.*)", re.DOTALL)
# What stores call what changes with an object's content, or when it did.
# GCS's etag changes with an object's metadata, too: its generation comes first.
_TAGS = ("ETag", "generation", "etag", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "updated")
REQUESTS = 16  # at once
_BUFFER = 1 << 16  # bytes: what a seek throws away
_SUBFOLDERS = 1000
WHOLE = 64 << 20  # bytes: a video of up to this size is fetched with one request and held
_LISTING = 600.0  # seconds, for up to a thousand names each of which a request gives


@dataclass(frozen=True, slots=True)
class RemoteStat:
    """What a store says of an object: its size in bytes, its kind, and a tag that changes whenever its content does.

    Some web servers give no tag: `etag` is None.
    """

    st_size: int
    st_mode: int
    etag: str | None


def place(text: "str | Path | RemotePath") -> "Path | RemotePath":
    """The path of what a person gives as a folder or file: of a URL a RemotePath, else a local one.

    Raises ValueError, with the remedy, for a URL of a protocol that is not read, or whose package is missing.

    >>> place("s3://bucket/shards/").parent
    RemotePath('s3://bucket')
    """
    if isinstance(text, RemotePath):
        return text
    match, shown = _URL.fullmatch(str(text)), printable(masked(str(text)))
    if match is None:
        start, colon, _ = str(text).partition(":")
        if start.lower() == "pipe" and colon:
            raise UserError(f"{shown} is a command, and none is run: name the folder or file that it reads")
        start, slash, _ = str(text).partition(":/")
        if "://" in str(text) or (slash and start.lower() in {"file", *STORES}):
            raise UserError(f"{shown} is no URL that lipprep reads: write it as in s3://bucket/folder")
        return Path(text)
    protocol, host, path = match[1].lower(), match[2], match[3]
    if protocol == "file":
        from urllib.request import url2pathname  # slow to import

        if host not in ("", "localhost"):
            raise UserError(f"{shown} is a file of another machine: write file:///folder for one of this")
        return Path(url2pathname(path))
    if protocol not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise UserError(f"{shown}: {protocol}:// is not read or written; what is: {known}, or a local path")
    if "::" in path or ".." in path.split("/") or not host:
        raise UserError(f"{shown} is no plain URL of a bucket and what is in it: write s3://bucket/folder")
    if "//" in path.rstrip("/"):  # to stores that is another name than with one
        raise UserError(f"{shown} has // in its path: write one /")
    if protocol in ("http", "https") and ("?" in path or "#" in path):
        raise UserError(f"{shown}: URLs with ? or # are of one file each: give the folder that they are in")
    try:
        check_installed(protocol)
    except RemoteError as error:
        raise UserError(str(error)) from error
    return RemotePath(f"{protocol}://{host}", PurePosixPath("/" + path.strip("/")))


class RemotePath:
    """A file or folder in a store, with those methods of pathlib.Path that lipprep uses.

    Those that ask the store raise RemoteError where it cannot be reached or refuses, and those that read
    FileNotFoundError where there is nothing. Paths may be pickled, used by several threads, and after a fork. Their
    text has no passwords.
    """

    def __init__(self, root: str, path: PurePosixPath) -> None:
        """`root` is the protocol with the bucket or host, `path` the rest, from `/` on; `place` makes both of a URL."""
        self._root, self._path = root, path

    def __str__(self) -> str:
        return masked(self._root) + str(self._path).rstrip("/")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self):
        return RemotePath, (self._root, self._path)

    def __truediv__(self, name: "str | PurePosixPath | RemotePath") -> "RemotePath":
        """What is called `name` in this folder; as with pathlib, a path that begins elsewhere takes its place."""
        return name if isinstance(name, RemotePath) else RemotePath(self._root, self._path / name)

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self._root, self._path.parent)

    def with_name(self, name: str) -> "RemotePath":
        return RemotePath(self._root, self._path.with_name(name))

    def with_suffix(self, suffix: str) -> "RemotePath":
        return RemotePath(self._root, self._path.with_suffix(suffix))

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """The rest of the path below `folder`. Raises ValueError where it is not below it."""
        if not self.is_relative_to(folder):
            raise UserError(f"{self} is not below {folder}")
        return self._path.relative_to(folder._path)

    def is_relative_to(self, folder: object) -> bool:
        below = isinstance(folder, RemotePath) and self._root == folder._root
        return below and self._path.is_relative_to(folder._path)

    @property
    def lists(self) -> bool:
        """Whether a listing tells what `stat` does: web servers list links, and each file is to be asked for."""
        return store_of(self._root).lists

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a folder is there while something is in it. RemoteError in a store that can be read only."""
        self.check_writable()

    def stat(self) -> RemoteStat:
        return _status(self._ask("info"))

    def exists(self) -> bool:
        return self._mode() != 0

    def is_symlink(self) -> bool:
        return False

    def is_file(self) -> bool:
        return stat.S_ISREG(self._mode())

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self._mode())

    def entries(self) -> dict[str, RemoteStat]:
        """What stands in this folder itself, by name, in order; nothing where there is no such folder."""
        try:
            found = self._ask("ls", detail=True, seconds=_LISTING)
        except FileNotFoundError:
            return {}
        # Tools that show stores as disks mark a folder by an empty object of its own name: it is nothing in it.
        named = {name: info for info in found if (name := self._below(info["name"])) and "/" not in name}
        return {name: _status(named[name]) for name in sorted(named)}

    def iterdir(self) -> Iterator["RemotePath"]:
        return (self / name for name in self.entries())

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What stands in this folder itself and has a name like `pattern`."""
        return (self / name for name in self.entries() if fnmatch.fnmatchcase(name, pattern))

    def files_below(self) -> dict[str, RemoteStat]:
        """All files in this folder and in those in it, by their path from here: a request for up to 1,000 of them."""
        entries = self.entries()
        folders = [name for name, found in entries.items() if stat.S_ISDIR(found.st_mode)]
        if len(folders) > _SUBFOLDERS:
            return self._find()
        below = {name: found for name, found in entries.items() if stat.S_ISREG(found.st_mode)}
        # Folder by folder: what the store says of each file takes a kilobyte until it is cut down.
        with ThreadPoolExecutor(REQUESTS) as threads:
            for name, found in zip(folders, threads.map(lambda n: (self / n)._find(), folders), strict=True):
                below.update((f"{name}/{rest}", status) for rest, status in found.items())
        return below

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """The sizes, in bytes, of those files in this folder that have one of `names`."""
        if self.lists:
            entries = self.entries()
            return {n: entries[n].st_size for n in names if n in entries and stat.S_ISREG(entries[n].st_mode)}
        names = list(names)
        with ThreadPoolExecutor(REQUESTS) as threads:
            found = threads.map(lambda name: (self / name)._size(), names)
            return {name: size for name, size in zip(names, found, strict=True) if size is not None}

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, with one request; fewer where the file ends before."""
        if end <= start:
            return b""
        try:
            data = self._ask("cat_file", start=start, end=end, transfer=end - start)
        except BehindEnd:
            return b""
        if len(data) > end - start:
            raise RemoteError(f"{self}: the server sends no parts of files, but whole ones: copy the folder to a disk")
        return data

    def read_bytes(self) -> bytes:
        return self.read_range(0, self.stat().st_size)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", *, buffering: int = _BUFFER) -> BinaryIO:
        """A file to read, `buffering` bytes a request; what is to be written goes through `stages.atomic`."""
        assert mode == "rb", mode
        return io.BufferedReader(_RemoteFile(self), buffering)

    def unlink(self, *, missing_ok: bool = True) -> None:
        """Remove the file; whether there was one, stores do not tell."""
        self.check_writable()
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file")

    def upload(self, local: Path) -> None:
        """Make this file one with the content of a `local` one: nobody sees a part of it, whatever happens meanwhile.

        A larger file goes to S3 in parts of 8 MiB. Where one fails the rest are discarded; those of a process that was
        killed stay, unseen, until a rule of the bucket removes them (AbortIncompleteMultipartUpload).
        """
        self.check_writable()
        size = local.stat().st_size
        ask(self._root, str(self._path), "put_file", str(local), transfer=size, **store_of(self._root).upload)
        self._check_size(size)

    def copy_to(self, other: "RemotePath") -> None:
        """Make `other`, in the same store, one with this file's content; the store does it, nothing is fetched.

        Raises FileNotFoundError where there is none.
        """
        self.check_writable()
        size = self.stat().st_size
        key = filesystem(self._root)._strip_protocol(self._root + str(self._path))
        ask(other._root, str(other._path), "cp_file", key, transfer=size)
        other._check_size(size)

    def _check_size(self, size: int) -> None:
        """Raise RemoteError where the file has not the `size` that was just written."""
        if (there := self._size()) != size:
            raise RemoteError(
                f"{self} has {there or 'no'} bytes after {size} were written: another run writes there, too. Run the "
                "same command again, one at a time or each with its own --slice"
            )

    def check_writable(self) -> None:
        """Raise RemoteError, saying what can be written to, where this store can only be read."""
        if store_of(self._root).read_only:
            buckets = ", ".join(f"{name}://" for name, store in STORES.items() if not store.read_only)
            raise RemoteError(f"{self} can be read only: write to a local folder or to a bucket ({buckets})")

    def check_unchanged(self, status: RemoteStat) -> None:
        """Raise RemoteError where the file is another than it was when `status` was asked for.

        What was read of it in parts may then be of both.
        """
        if RemotePath.stat(self) != status:
            raise RemoteError(f"{self} changed while it was read: run the same command again when it is written")

    def _ask(self, call: str, **options: Any) -> Any:
        return ask(self._root, str(self._path).rstrip("/"), call, **options)

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def _size(self) -> int | None:
        try:
            return self.stat().st_size
        except FileNotFoundError:
            return None

    def _below(self, key: str) -> str:
        """The rest of a key of the store below this folder; empty where it is not below."""
        here = filesystem(self._root)._strip_protocol(self._root + str(self._path)).rstrip("/") + "/"
        return key[len(here) :].rstrip("/") if key.startswith(here) else ""

    def _find(self) -> dict[str, RemoteStat]:
        found = self._ask("find", detail=True, seconds=_LISTING)
        return {
            name: _status(info)
            for key, info in found.items()
            if not key.endswith("/") and info["type"] == "file" and (name := self._below(key))
        }


def _status(info: dict) -> RemoteStat:
    kind = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
    tag = next((str(info[name]).strip('"') for name in _TAGS if info.get(name)), None)
    return RemoteStat(int(info["size"] or 0), kind | 0o644, tag)


class _RemoteFile(io.RawIOBase):
    """A file in a store; each read is a request. RemoteError where it changes between them."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._status = path, path.stat()
        self._size, self._at, self._read_before = self._status.st_size, 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:  # with one request; without this there would be one for every 8 KiB
        return self._read(self._size)

    def _read(self, count: int) -> bytes:
        end = min(self._at + count, self._size)
        data = self._path.read_range(self._at, end)
        if end > self._at and (self._read_before or len(data) < end - self._at):
            self._path.check_unchanged(self._status)
        self._read_before = True
        self._at += len(data)
        return data


def signature(status: os.stat_result | RemoteStat) -> dict:
    """What tells that a file is another than it was, without reading it: size and time of change, or size and tag."""
    if isinstance(status, RemoteStat):
        return {"size": status.st_size, "etag": status.etag}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
