"""Where chunks are made: in processes here (loky), in this process (serial), or on a Dask or Ray cluster.

A cluster gives `submit()` and futures, and hands a chunk to another worker by itself when one dies. How that is
asked of each kind, and which of its errors mean what, is told in a file each: engine_dask.py and engine_ray.py.
"""

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, Protocol

from tqdm import tqdm

import lipprep
from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable

ENGINES = ("loky", "dask", "ray", "serial")
PATIENCE = 6  # seconds until an address that does not answer is given up
ANSWER = 60  # seconds that workers may take to say what they have: they may be about to start a long task
AWAY = 5  # seconds without workers until that is told: one that died alone is soon replaced
RERUNS = 3  # how often a task is handed to another worker when its own dies: what Dask does unless it is told otherwise
SOME = 16  # tasks to have waiting on a cluster that has no workers yet


@dataclass(frozen=True)
class Engine:
    """Which engine is wanted: `workers` processes here or of a cluster made for the run, or the one at `address`.

    Raises ValueError for an address that no cluster can be at.
    """

    name: str = "loky"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise UserError(f"unknown engine {self.name!r}: choose one of {', '.join(ENGINES)}")
        if self.address is not None and not self.is_cluster:
            raise UserError(f"--address is for --engine dask or ray; {self.name} works on this machine")
        if self.address is not None and not self.address.strip():
            raise UserError("--address is empty: name a cluster, or leave it out to have one made for the run")

    @property
    def is_cluster(self) -> bool:
        return self.name in ("dask", "ray")


HERE = Engine()


class ClusterError(UserError):
    """A cluster is gone, or its workers cannot work."""


class WorkerLost(Exception):
    """The worker of a task died, and so did those that tried it again."""


class Cluster(Protocol):
    """A cluster that is connected."""

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        """Have `function(task)` run by a worker."""
        ...

    def result(self, future: Future) -> Any:
        """What came of it, or the function's own error.

        Raises WorkerLost and ClusterError.
        """
        ...

    def ahead(self) -> int:
        """How many tasks to have submitted at a time."""
        ...


def reach(engine: Engine) -> None:
    """Knock at the address of a cluster, which takes seconds: before a manifest of a million lines is read.

    Raises ValueError where nobody answers, or the engine's package is missing.
    """
    if engine.is_cluster:
        _kind(engine).reach(engine.address)


@contextlib.contextmanager
def open_cluster(engine: Engine, *places: Path | RemotePath) -> Iterator[Cluster]:
    """Connect to a cluster, or make one; what still waits there when the block is left is cancelled.

    Raises ValueError where the package is missing, the address does not answer, or the workers cannot work: they
    lack lipprep or have another version of it, do not see all `places` that are local, or run several tasks in one
    process.
    """
    # What workers must see; whether they reach a store they say when they ask it.
    shared = tuple(str(place) for place in places if not isinstance(place, RemotePath))
    # Ray tells on stdout of workers that died.
    with contextlib.redirect_stdout(sys.stderr), _kind(engine).connect(engine, shared) as cluster:
        yield cluster


def _kind(engine: Engine) -> ModuleType:
    return importlib.import_module(f"lipprep.pipeline.engine_{engine.name}")


def package(name: str, extra: str) -> ModuleType:
    """A package that an extra of lipprep brings; ValueError says how, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'--engine {extra} needs the package {name} ({error}): pip install "lipprep[{extra}]"'
        ) from error


def silent(address: str, what: str, error: Exception) -> ValueError:
    """What to raise where nobody answers at an address as `what` should be there, or it is the address of no such."""
    why = printable(" ".join(str(error).split()))[:300]
    if isinstance(error, OSError):
        return UserError(f"nobody answers at {address} as {what}{why and f' ({why})'}")
    return UserError(f"{address} is not to be used as {what}: {why}")


def gone(address: str, why: str = "") -> ClusterError:
    """What to raise where a cluster ended in mid-run."""
    return ClusterError(
        f"the cluster at {address} is gone{why}; what is done is kept: run the same command again to go on"
    )


class Absence:
    """Tells the user, once, that the last worker of a cluster has gone and none has come for a while."""

    def __init__(self, address: str, workers: float) -> None:
        self._address = address
        self._seen = math.inf  # when workers were last seen; infinite where it has been told, and before the first
        self.look(workers)

    def look(self, workers: float) -> None:
        """Take note of how many workers there are now."""
        if workers:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > AWAY:
            self._seen = math.inf
            tqdm.write(
                f"no worker is left at {self._address}: waiting for new ones (Ctrl-C ends the run; what is done is "
                "kept)",
                file=sys.stderr,
            )


def sent_whole(function: Callable) -> Callable:
    """A function that is sent with its code, and not by name: a worker that lacks lipprep could not import it."""
    function.__module__ = "__main__"
    return function


def within(seconds: float, call: Callable[..., Any], *arguments: object) -> Any:
    """The result of a call, which goes on in a thread of its own where it takes longer; TimeoutError then."""
    outcome: Future = Future()

    def settle() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=settle, daemon=True).start()
    return outcome.result(seconds)


@sent_whole
def probe(places: Sequence[str]) -> dict:
    """Run by a worker: whether it could work."""
    import importlib.metadata
    import os.path
    import socket

    try:
        version = importlib.metadata.version("lipprep")
    except importlib.metadata.PackageNotFoundError:
        version = None
    unseen = next((place for place in places if not os.path.exists(place)), None)  # noqa: PTH110 (raises nothing)
    return {"host": socket.gethostname(), "lipprep": version, "unseen": unseen}


def check(answers: Mapping[str, dict]) -> None:
    """Raise ValueError, naming the first of the workers that cannot work."""
    wrong: dict[str, str] = {}
    for where, told in answers.items():
        if told["lipprep"] is None:
            wrong[where] = f"has no lipprep: install lipprep {lipprep.__version__} there"
        elif told["lipprep"] != lipprep.__version__:
            wrong[where] = f"has lipprep {told['lipprep']}: this is {lipprep.__version__}, install the same everywhere"
        elif told["unseen"] is not None:
            wrong[where] = (
                f"does not see {printable(told['unseen'])}: manifest, videos, work and shards must be on a disk that "
                "all see, or in an object store"
            )
    if wrong:
        where, why = next(iter(wrong.items()))
        more = f" ({len(wrong)} of {len(answers)} workers cannot work)" if len(wrong) > 1 else ""
        raise UserError(f"the worker {where} on {answers[where]['host']} {why}{more}")


@sent_whole
def work(who: str, version: str, places: Sequence[str], payload: bytes, wanted: Callable[[], bool]) -> tuple[Any, str]:
    """Run by a worker, which may have come after the others were looked at: a result, or why it cannot work.

    While it works, `stop_if_unwanted` asks `wanted`.
    """
    import os.path
    import pickle

    try:
        import lipprep
        from lipprep.pipeline.pool import wanted_while
        from lipprep.stages.store import RemoteError
    except ImportError as error:
        return None, f"the worker {who} cannot import lipprep {version} ({error})"
    if lipprep.__version__ != version:
        return None, f"the worker {who} has lipprep {lipprep.__version__}, and this is {version}"
    for place in places:
        if not os.path.exists(place):  # noqa: PTH110 (raises nothing)
            return None, f"the worker {who} does not see {place}"
    function, task = pickle.loads(payload)  # the driver's own, which came as all that clusters send does: as a pickle
    try:
        with wanted_while(wanted):
            return function(task), ""
    except RemoteError as error:  # its credentials, or the address that it knows, may be others than the driver's
        raise RemoteError(f"on the worker {who}: {error}") from error


def answer(told: tuple[Any, str]) -> Any:
    """The result, of what `work` gave. Raises ClusterError where the worker could not work."""
    result, why = told
    if why:
        raise ClusterError(f"{printable(why)}. What is done is kept: mend that, and run the same command again")
    return result
