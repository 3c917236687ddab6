"""Where a worker's time goes: decode, detect, mesh, warp, encode, write.

A process does one thing at a time, and so there is one stopwatch in it. A part that begins within another stops
that one's clock: no second counts twice.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_END = object()
_OTHER = "other"


class _Stopwatch:
    def __init__(self) -> None:
        self.part = _OTHER
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def turn_to(self, part: str) -> str:
        """Count for `part` from here on; give the part that was counted for before."""
        now, before = time.perf_counter(), self.part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self.part, self._since = part, now
        return before


_watch = _Stopwatch()


class spent:  # noqa: N801 (it is called as a function is: `with spent("warp"):`)
    """Count the time in the block as spent on `part`."""

    __slots__ = ("_before", "_part")

    def __init__(self, part: str) -> None:
        self._part = part

    def __enter__(self) -> None:
        self._before = _watch.turn_to(self._part)

    def __exit__(self, *_: object) -> None:
        _watch.turn_to(self._before)


def spent_on(part: str, items: Iterable[_Item]) -> Iterator[_Item]:
    """Give `items`, and count the time that making each takes as spent on `part`."""
    items = iter(items)
    while True:
        with spent(part):
            item = next(items, _END)
        if item is _END:
            return
        yield item


def time_by_part() -> dict[str, float]:
    """The seconds by part since this was last asked, longest first; `other` is what no part was named for."""
    _watch.turn_to(_watch.part)
    seconds, _watch.seconds = _watch.seconds, {}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
