"""Reading ahead: while one video is worked on, the next ones are on their way from the disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_DEPTH = 2  # items: one that is being read and one that is there


def ahead(items: Iterable[_Item], read: Callable[[_Item], _Read]) -> Iterator[tuple[_Item, Future[_Read]]]:
    """Each item with the future of `read(item)`, which a thread runs for up to two items beyond it."""
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        waiting = deque((item, reader.submit(read, item)) for item in islice(items, 1 + _DEPTH))
        try:
            while waiting:
                yield waiting.popleft()
                waiting.extend((item, reader.submit(read, item)) for item in islice(items, 1))
        finally:
            for _, future in waiting:
                future.cancel()
