"""A remote file whose content is kept while it is worked on."""

import contextlib
from collections.abc import Callable

from lipprep.stages.remote import WHOLE, RemotePath, RemoteStat


class HeldPath(RemotePath):
    """A file that is asked for once: what the store says of it is kept and, up to WHOLE bytes, its content.

    Each request is made within `waiting()`.
    """

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path._root, path._path)
        self.waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self._status: RemoteStat | None = None
        self._content: bytes | None = None

    @property
    def held(self) -> int:
        """The bytes that are in memory."""
        return len(self._content or b"")

    def fetch(self) -> None:
        """Have the content in memory, if it is not larger than WHOLE. Raises FileNotFoundError where there is none."""
        if self._content is None and self.stat().st_size <= WHOLE:
            with self.waiting():
                self._content = super().read_range(0, self.stat().st_size)

    def stat(self) -> RemoteStat:
        if self._status is None:
            with self.waiting():
                self._status = super().stat()
        return self._status

    def read_range(self, start: int, end: int) -> bytes:
        self.fetch()
        if self._content is not None:
            return self._content[start:end]
        with self.waiting():
            return super().read_range(start, end)

    def check_unchanged(self, status: RemoteStat) -> None:
        with self.waiting():
            super().check_unchanged(status)
