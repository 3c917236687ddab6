"""Tars that are the same to the byte whenever their members are."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

from lipprep.stages.atomic import Output, abandon, publish, sync, temporary_path
from lipprep.stages.remote import RemotePath, place


class _Hashing:
    """A file that hashes what is written to it, so that a tar need not be read again for its sha256."""

    def __init__(self, path: Path) -> None:
        self._file = io.BufferedWriter(Output(path))
        self._digest = hashlib.sha256()
        self._position = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> tuple[int, str]:
        sync(self._file)
        self._file.close()
        return self._position, self._digest.hexdigest()

    def abandon(self) -> None:
        abandon(self._file)


class TarWriter:
    """Writes one tar under a temporary name; `close()` completes it, `publish()` gives it its name.

    The two are apart because the record of an older tar at the same place must go in between. Members have
    mtime 0, uid 0 and mode 0644 and stand in the order of the calls. Leaving the `with` block unpublished
    leaves nothing behind, unless `keep` is set. `tag` tells two writers of one tar apart; by default it is the
    process's number. The unfinished file lies in `scratch`, by default beside the tar.
    """

    def __init__(self, path: Path | RemotePath, tag: str | None = None, *, scratch: Path | None = None) -> None:
        self.path = place(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self._temporary = temporary_path(self.path, tag or os.getpid(), scratch)
        self._file = _Hashing(self._temporary)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self.keep = False
        self.bytes = 0
        self.sha256 = ""

    @property
    def offset(self) -> int:
        """Where the next member's header will stand, in bytes."""
        return self._tar.offset

    def add(self, name: str, payload: bytes) -> None:
        """Append one member."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        padding = -len(payload) % tarfile.BLOCKSIZE
        # What `addfile` does, but for its copy of the payload.
        for part in (header, payload, bytes(padding)):
            self._file.write(part)
        self._tar.offset += len(header) + len(payload) + padding

    def flush(self) -> None:
        """Hand what was added to the system, so that it outlives this process."""
        self._file.flush()

    def close(self) -> None:
        """Complete and fsync the temporary file; `bytes` and `sha256` are known from here on."""
        self._tar.close()
        self.bytes, self.sha256 = self._file.close()

    def publish(self) -> None:
        """Give the completed file its name, replacing an older one; RemoteError where a store does not take it."""
        publish(self._temporary, self.path)

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.abandon()
        if not self.keep:
            self._temporary.unlink(missing_ok=True)
