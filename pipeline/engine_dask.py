"""Chunks on a Dask cluster: one at an address, or worker processes that are started here for the run."""

import asyncio
import contextlib
import logging
import multiprocessing.resource_tracker
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from threading import Event, Thread
from types import ModuleType
from typing import Any

from tqdm import tqdm

import lipprep
from lipprep.io.errors import UserError
from lipprep.pipeline.engines import (
    ANSWER,
    PATIENCE,
    SOME,
    Absence,
    Engine,
    WorkerLost,
    answer,
    check,
    gone,
    package,
    probe,
    sent_whole,
    silent,
    within,
    work,
)
from lipprep.pipeline.pool import unheard_interrupt
from lipprep.stages.untrusted import printable

_KIND = "a Dask scheduler (tcp://HOST:8786)"


def reach(address: str | None) -> None:
    """Raise ValueError where the package is missing, or no scheduler is at the address."""
    distributed = package("distributed", "dask")
    if address is not None:
        _client(distributed, address).close()


class _Dask:
    def __init__(self, client: Any, address: str, places: Sequence[str]) -> None:
        from distributed import CancelledError as Forgotten
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        self._client, self._address, self._places = client, address, places
        self._waiting: dict[Future, Any] = {}
        self._lost = KilledWorker
        self._gone = (CancelledError, Forgotten, CommClosedError)
        self._threads = sum(client.nthreads().values())
        self._closed = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        payload = pickle.dumps((function, task))
        future: Future = Future()
        task = self._waiting[future] = self._client.submit(
            _on_dask, lipprep.__version__, self._places, payload, pure=False
        )
        # Those of `Client.get_executor` are never settled where the scheduler dies as a result is fetched.
        task.add_done_callback(future.set_result)
        return future

    def result(self, future: Future) -> Any:
        try:
            return answer(self._waiting.pop(future).result())
        except self._lost as error:
            raise WorkerLost(printable(error)) from error
        except self._gone as error:
            raise gone(self._address) from error

    def ahead(self) -> int:
        return 2 * self._threads or SOME

    def _watch(self) -> None:
        absence = Absence(self._address, self._threads)
        while not self._closed.wait(1):
            # Of a scheduler that is gone the tasks themselves tell.
            with contextlib.suppress(Exception, asyncio.CancelledError):
                self._threads = sum(within(PATIENCE, self._client.nthreads).values())
                absence.look(self._threads)

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()  # it asks nothing of a client that is closed


@sent_whole
def _on_dask(version: str, places: Sequence[str], payload: bytes) -> tuple[Any, str]:
    from distributed import get_worker

    worker = get_worker()
    key, threads = worker.get_current_task(), worker.state.nthreads
    if threads > 1:
        return None, f"the worker {worker.address} has {threads} threads, and must have one (--nthreads 1)"

    def wanted() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state == "executing"

    return work(worker.address, version, places, payload, wanted)


def _client(distributed: ModuleType, address: str) -> Any:
    import dask

    dask.config.set({"distributed.comm.timeouts.connect": f"{PATIENCE}s"})
    # What it logs is for those who look after clusters; what it means for the run is told by us.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:  # a server of another kind may say nothing, or anything
        return within(PATIENCE, distributed.Client, address)
    except Exception as error:
        raise silent(address, _KIND, error) from error


@contextlib.contextmanager
def connect(engine: Engine, places: Sequence[str]) -> Iterator[_Dask]:
    distributed = package("distributed", "dask")
    with contextlib.ExitStack() as stack:
        address = engine.address
        if address is None:
            if os.name == "posix":  # it lets interrupts through when it starts
                multiprocessing.resource_tracker.ensure_running()
            with unheard_interrupt():  # workers are born of the thread that is started here, later ones too
                made = distributed.LocalCluster(
                    n_workers=engine.workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address="127.0.0.1:0",  # any port: one that is taken is warned of
                    silence_logs=logging.CRITICAL,
                )
                address = stack.enter_context(made).scheduler_address
        client = stack.enter_context(_client(distributed, address))
        threads = client.nthreads()
        if several := [worker for worker, count in threads.items() if count > 1]:
            raise UserError(
                f"the worker {several[0]} runs {threads[several[0]]} tasks in one process, whose libraries keep state: "
                "start workers with one thread each (dask worker --nworkers auto --nthreads 1; with dask-jobqueue, "
                "processes as many as cores)"
            )
        if not threads:
            tqdm.write(f"no worker has come to {address} yet: waiting for the first", file=sys.stderr)
        try:
            answers = within(ANSWER, client.run, probe, places)
        except TimeoutError as error:
            raise UserError(f"workers of {address} do not answer: are they stopped, or hung?") from error
        check(answers)
        # What is left is cancelled when the client is closed.
        yield stack.enter_context(contextlib.closing(_Dask(client, address, places)))
