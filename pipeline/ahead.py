"""Reading ahead: while one file is worked on, the next ones are on their way from the disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_THREADS = 4  # from a network an item may take longer to come than to be worked on


def ahead(
    items: Iterable[_Item], read: Callable[[_Item], _Read], *, threads: int = _THREADS, depth: int | None = None
) -> Iterator[tuple[_Item, Future[_Read]]]:
    """Each item with the future of `read(item)`, which threads run for up to `depth` items beyond it.

    By default they are as many as the threads: what is read takes memory. Where it is small, more let no thread wait
    for one slow item.
    """
    items = iter(items)
    tasks: SimpleQueue[tuple[_Item, Future[_Read]] | None] = SimpleQueue()
    waiting: deque[tuple[_Item, Future[_Read]]] = deque()

    def submit(count: int) -> None:
        for item in islice(items, count):
            waiting.append((item, Future()))
            tasks.put(waiting[-1])

    def work() -> None:
        while (task := tasks.get()) is not None:
            item, future = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(read(item))
                except BaseException as error:
                    future.set_exception(error)

    try:
        for _ in range(threads):
            # Daemons: who leaves, by Ctrl-C say, need not wait for a disk that does not answer.
            Thread(target=work, name="ahead", daemon=True).start()
        submit(1 + (depth or threads))
        while waiting:
            yield waiting.popleft()
            submit(1)
    finally:
        for _, future in waiting:
            future.cancel()
        for _ in range(threads):
            tasks.put(None)
