"""What a worker writes down while it makes a chunk, so that little is lost when it dies, and it is known where.

Beside the unfinished tar stands its journal: a line before the clips of a video are worked on, a line for
every clip that is in the tar or has failed, and, where the process ends itself, what Python knew at that moment.
"""

import contextlib
import faulthandler
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from lipprep.pipeline.record_form import Entry, decode_entries
from lipprep.pipeline.records import record_path
from lipprep.stages.atomic import Output, abandon, temporary_path, temporary_paths

_SLACK = 1.1


class _Working(msgspec.Struct, forbid_unknown_fields=True):
    working: Annotated[list[str], msgspec.Meta(min_length=1)]
    reading: bool = False


_working = msgspec.json.Decoder(_Working)


def _journal(tar: Path) -> Path:
    return tar.with_suffix(".journal")


def _path(tar: Path, attempt: str, scratch: Path) -> Path:
    return temporary_path(_journal(tar), attempt, scratch)


class Journal:
    """The journal of one attempt at a chunk, in the folder `scratch` beside the unfinished tar.

    It goes when the attempt ends, but not when that is killed or sets `keep`.
    """

    def __init__(self, tar: Path, attempt: str, scratch: Path) -> None:
        self.path = _path(tar, attempt, scratch)
        self._file = Output(self.path)
        self.keep = False
        self._timeout: float | None = None
        self._until = 0.0
        # A fault in a codec is told here, not on the user's terminal.
        faulthandler.enable(self._file)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def working(self, keys: Sequence[str], timeout: float | None) -> None:
        """Say that the clips `keys` are worked on.

        After `timeout` seconds, if there is one, or up to a tenth more, the process ends, whatever holds it.
        """
        self._write({"working": list(keys)})
        self._timeout = timeout
        self._start()

    def _start(self) -> None:
        timeout = self._timeout
        if timeout is None:
            return
        now = time.monotonic()
        if not timeout <= self._until - now <= _SLACK * timeout:
            # A thread of C: it needs neither Python's lock nor the cooperation of what hangs. To start one for every
            # clip would cost more than all the rest of the journal.
            faulthandler.dump_traceback_later(_SLACK * timeout, exit=True, file=self._file)
            self._until = now + _SLACK * timeout

    def reading(self, keys: Sequence[str], timeout: float | None) -> None:
        """Say that the video of the clips `keys` is waited for; else as `working`."""
        self._write({"working": list(keys), "reading": True})
        self._timeout = timeout
        self._start()

    def clock(self, timeout: float | None) -> None:
        """Start the clock anew: a part of what is worked on has its own time."""
        self._timeout = timeout
        self._start()

    def rest(self) -> None:
        """Stop the clock: what follows waits for a disk or a network, which is no clip's fault."""
        faulthandler.cancel_dump_traceback_later()
        self._until = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Stop the clock in the block, which waits for a network; it starts anew behind it."""
        self.rest()
        try:
            yield
        finally:
            self._start()

    def done(self, entry: dict) -> None:
        """Say what became of one clip. Its members are in the tar."""
        self._write(entry)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.rest()
        faulthandler.disable()  # its file's number will be another file's
        abandon(self._file)
        if not self.keep:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Attempt:
    """What is left of an attempt that was killed: its unfinished tar and what its journal says.

    `tag` names it. `entries` are those of the clips that were done. `working` are the keys of the clips that it died
    of or with; None where it died between clips. `reading`: their video was waited for. `last_words` is what the
    process wrote as it ended itself.
    """

    tag: str
    tar: Path
    entries: list[Entry]
    working: list[str] | None
    last_words: str
    reading: bool = False

    @property
    def kind(self) -> str:
        """What the process died of: crashed; or where it ended itself, timeout or, of a video that never came, mute."""
        if not self.last_words.startswith("Timeout"):
            return "crashed"
        return "mute" if self.reading else "timeout"


def read_attempt(tar: Path, attempt: str, scratch: Path) -> Attempt | None:
    """What the attempt at `tar` has left behind; None where it left no journal."""
    try:
        lines = _path(tar, attempt, scratch).read_bytes().splitlines(keepends=True)
    except OSError:
        return None
    entries, working, reading = [], None, False
    for number, text in enumerate(lines):
        try:
            if text.startswith(b'{"working": '):
                line = _working.decode(text)
                working, reading = line.working, line.reading
            else:
                entries += (done := decode_entries(text))
                if working and done and done[-1]["key"] == working[-1]:
                    working = None
        except (ValueError, RecursionError):  # cut short, or no line of ours
            last_words = b"".join(lines[number:]).decode(errors="replace")
            break
    else:
        last_words = ""
    return Attempt(attempt, temporary_path(tar, attempt, scratch), entries, working, last_words, reading)


def attempts(tar: Path, scratch: Path) -> list[Attempt]:
    """All attempts at `tar` that were killed, or are still at work."""
    tags = [path.name.split(".")[-2] for path in temporary_paths(_journal(tar), scratch)]
    return [found for tag in tags if (found := read_attempt(tar, tag, scratch)) is not None]


def clear_attempts(tar: Path, scratch: Path) -> None:
    """Remove what killed attempts at `tar` have left behind."""
    for whole in (tar, _journal(tar), record_path(tar)):
        for path in temporary_paths(whole, scratch):
            path.unlink(missing_ok=True)
