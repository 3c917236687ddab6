"""Worker processes, any of which may die at any moment: of a codec, of want of memory, of an operator's kill."""

import contextlib
import multiprocessing.resource_tracker
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from itertools import islice
from typing import Any, Protocol

import psutil

_WATCH = 0.5  # seconds between two looks at the parent
_IDLE = 300  # seconds after which a worker without work goes
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerDied(Exception):
    """A worker process is gone and its pool with it; `codes` are the exit codes, as far as they are known."""

    def __init__(self, error: BrokenExecutor) -> None:
        found = re.search(r"exit codes of the workers are \{(.*?)\}", str(error))
        self.codes = found[1] if found else "killed"
        super().__init__(self.codes)


_parent: psutil.Process | None = None  # of this process, where it is a worker


def _begin(parent: int) -> None:
    """Make a process a worker: Ctrl-C is the parent's to answer, and without a parent there is no work."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _parent = psutil.Process(parent)
    except psutil.NoSuchProcess:
        os._exit(1)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while True:
        leave_if_orphaned()
        time.sleep(_WATCH)


def leave_if_orphaned() -> None:
    """End this process where it is a worker whose parent is gone: another run may be making the same chunk."""
    if _parent is None:
        return
    try:
        gone = not _parent.is_running() or _parent.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        gone = True
    if gone:
        os._exit(1)


class Unwanted(Exception):
    """Nobody waits for this chunk any more."""


_wanted: Callable[[], bool] | None = None


@contextlib.contextmanager
def wanted_while(wanted: Callable[[], bool]) -> Iterator[None]:
    """Within the block `stop_if_unwanted` asks `wanted`: so a worker of a cluster learns that its task is cancelled."""
    global _wanted
    _wanted = wanted
    try:
        yield
    finally:
        _wanted = None


def stop_if_unwanted() -> None:
    """Raise Unwanted where the chunk that this process makes was cancelled."""
    if _wanted is not None and not _wanted():
        raise Unwanted


@contextlib.contextmanager
def unheard_interrupt() -> Iterator[None]:
    """Let processes be born deaf to Ctrl-C, which a terminal sends to them too; here it is answered afterwards.

    So is SIGTERM: a process that is half born would tell of it with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []
    # Children inherit the mask, and must hear SIGTERM. Here other threads may take a signal: it is kept for afterwards.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handlers = {n: signal.signal(n, lambda number, _: heard.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in heard[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Executor]:
    """An executor of `workers` processes; where the block is left by an exception they are killed at once."""
    from loky import cpu_count, get_reusable_executor
    from loky.backend import resource_tracker

    # Both let interrupts through when they start.
    resource_tracker.ensure_running()
    if os.name == "posix":
        multiprocessing.resource_tracker.ensure_running()
    threads = str(max(1, cpu_count() // workers))
    with unheard_interrupt():
        executor = get_reusable_executor(
            max_workers=workers,
            timeout=_IDLE,
            initializer=_begin,
            initargs=(os.getpid(),),
            env={name: os.environ.get(name, threads) for name in _THREADS},
        )
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=True, kill_workers=True)
        raise


class Submits(Protocol):
    """An executor, or what is as good as one."""

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        """Have `function(task)` run elsewhere."""
        ...


def run_all(
    executor: Submits, function: Callable[[Any], object], tasks: Iterable[Any], *, ahead: Callable[[], int]
) -> Iterator[tuple[Any, Future]]:
    """Each task with its future as it is done, `ahead()` of them submitted at a time. Raises WorkerDied."""
    tasks = iter(tasks)
    waiting: dict[Future, Any] = {}

    def submit(task: Any) -> None:
        with unheard_interrupt():  # here processes are started
            waiting[executor.submit(function, task)] = task

    try:
        for task in islice(tasks, ahead()):
            submit(task)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                if not future.cancelled() and isinstance(error := future.exception(), BrokenExecutor):
                    raise error
                yield waiting.pop(future), future
                for task in islice(tasks, max(0, ahead() - len(waiting))):
                    submit(task)
    except BrokenExecutor as error:
        raise WorkerDied(error) from error
