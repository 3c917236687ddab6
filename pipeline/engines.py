"""Where chunks are made: in processes here (loky), in this process (serial), or on a Dask or Ray cluster.

A cluster gives `submit()` and futures, and hands a chunk to another worker by itself when one dies. How that is
asked of each kind of cluster, and which of its errors mean what, is told here and nowhere else.
"""

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from tqdm import tqdm

import lipprep
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable

ENGINES = ("loky", "dask", "ray", "serial")
_PATIENCE = 6  # seconds until an address that does not answer is given up
_ANSWER = 60  # seconds that workers may take to say what they have: they may be about to start a long task
RERUNS = 3  # how often a task is handed to another worker when its own dies: what Dask does unless it is told otherwise
_RAY_HEAD = "the head of a Ray cluster (HOST:6379, or auto on one of its machines)"
_SOME = 16  # tasks to have waiting on a cluster that has no workers yet


@dataclass(frozen=True)
class Engine:
    """Which engine is wanted: `workers` processes here or of a cluster made for the run, or the one at `address`.

    Raises ValueError for an address that no cluster is at.
    """

    name: str = "loky"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"unknown engine {self.name!r}: choose one of {', '.join(ENGINES)}")
        if self.address is not None and not self.is_cluster:
            raise ValueError(f"--address is for --engine dask or ray; {self.name} works on this machine")

    @property
    def is_cluster(self) -> bool:
        return self.name in ("dask", "ray")


HERE = Engine()


class ClusterError(ValueError):
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


@contextlib.contextmanager
def open_cluster(engine: Engine, folder: Path | RemotePath) -> Iterator[Cluster]:
    """Connect to a cluster, or make one; what still waits there when the block is left is cancelled.

    Raises ValueError where the package is missing, the address does not answer, or the workers cannot work: they
    lack lipprep or have another version of it, do not see a local `folder`, or run several tasks in one process.
    """
    # Ray tells on stdout of workers that died.
    with contextlib.redirect_stdout(sys.stderr), (_dask if engine.name == "dask" else _ray)(engine, folder) as cluster:
        yield cluster


def _need(package: str, extra: str, error: ImportError) -> ValueError:
    return ValueError(f'--engine {extra} needs the package {package} ({error}): pip install "lipprep[{extra}]"')


def _probe(folder: str | None) -> dict:
    """Run by a worker: whether it could work."""
    import importlib.metadata
    import pathlib
    import socket

    try:
        version = importlib.metadata.version("lipprep")
    except importlib.metadata.PackageNotFoundError:
        version = None
    sees = folder is None or pathlib.Path(folder).is_dir()
    return {"host": socket.gethostname(), "lipprep": version, "sees": sees}


def _to_see(folder: Path | RemotePath) -> str | None:
    """What workers must see; whether they reach a store they say when they ask it."""
    return None if isinstance(folder, RemotePath) else str(folder)


def _check(answers: Mapping[str, dict], folder: Path | RemotePath) -> None:
    """Raise ValueError, naming one, where workers cannot work."""
    for told, what, remedy in (
        (lambda a: a["lipprep"] is None, "has no lipprep", f"install lipprep {lipprep.__version__} there"),
        (
            lambda a: a["lipprep"] != lipprep.__version__,
            "has lipprep {lipprep}",
            f"this is {lipprep.__version__}: install the same everywhere",
        ),
        (
            lambda a: not a["sees"],
            f"does not see {folder}",
            "manifest, videos, work and shards must be on a disk that all see, or in an object store",
        ),
    ):
        if wrong := [where for where, answer in answers.items() if told(answer)]:
            answer = answers[wrong[0]]
            more = f" (and {len(wrong) - 1} of the other {len(answers) - 1} workers)" if len(wrong) > 1 else ""
            raise ValueError(f"the worker {wrong[0]} on {answer['host']} {what.format(**answer)}{more}: {remedy}")


# ----------------------------------------------------------------------------------------------------------- Dask


def _within(seconds: float, call: Callable[..., Any], *arguments: object) -> Any:
    """The result of a call, which goes on in a thread of its own where it takes longer; TimeoutError then."""
    outcome: Future = Future()

    def settle() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=settle, daemon=True).start()
    return outcome.result(seconds)


class _Dask:
    def __init__(self, client: Any, address: str, folder: str | None) -> None:
        from distributed import CancelledError as Forgotten
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        self._client, self._address, self._folder = client, address, folder
        self._executor = client.get_executor(pure=False)
        self._lost = KilledWorker
        self._gone = (CancelledError, Forgotten, CommClosedError)

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        payload = pickle.dumps((function, task))
        return self._executor.submit(_on_dask, lipprep.__version__, self._folder, payload)

    def result(self, future: Future) -> Any:
        try:
            result, why = future.result()
        except self._lost as error:
            raise WorkerLost(printable(error)) from error
        except self._gone as error:
            raise ClusterError(_gone(self._address)) from error
        if why:
            raise ClusterError(f"{why}. What is done is kept: mend that, and run the same command again")
        return result

    def ahead(self) -> int:
        return 2 * sum(self._client.nthreads().values()) or _SOME


def _on_dask(version: str, folder: str | None, payload: bytes) -> tuple[Any, str]:
    """Run by a Dask worker, which may have come after the others were looked at: a result, or why it cannot work.

    A task that is cancelled while it runs is told so by `stop_if_unwanted`.
    """
    import pathlib
    import pickle

    from distributed import get_worker

    worker = get_worker()
    try:
        import lipprep
        from lipprep.pipeline.pool import wanted_while
    except ImportError as error:
        return None, f"the worker {worker.address} cannot import lipprep {version} ({error})"
    if lipprep.__version__ != version:
        return None, f"the worker {worker.address} has lipprep {lipprep.__version__}, and this is {version}"
    if worker.state.nthreads > 1:
        return (
            None,
            f"the worker {worker.address} has {worker.state.nthreads} threads, and must have one (--nthreads 1)",
        )
    if folder is not None and not pathlib.Path(folder).is_dir():
        return None, f"the worker {worker.address} does not see {folder}"
    key = worker.get_current_task()

    def wanted() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state == "executing"

    function, task = pickle.loads(payload)  # the driver's own, which came as all that Dask sends does: as a pickle
    with wanted_while(wanted):
        return function(task), ""


# So that they are sent as they are: a worker that lacks lipprep could not import them.
_probe.__module__ = _on_dask.__module__ = "__main__"


@contextlib.contextmanager
def _dask(engine: Engine, folder: Path | RemotePath) -> Iterator[_Dask]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _need("distributed", "dask", error) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.comm.timeouts.connect": f"{_PATIENCE}s"}))
        if engine.address is None:
            made = LocalCluster(n_workers=engine.workers, threads_per_worker=1, processes=True, dashboard_address=None)
            client = stack.enter_context(Client(stack.enter_context(made)))
        else:
            try:  # a server of another kind may say nothing, or anything
                client = stack.enter_context(_within(_PATIENCE, Client, engine.address))
            except Exception as error:
                raise _silent(engine.address, "a Dask scheduler (tcp://HOST:8786)", error) from error
        threads = client.nthreads()
        if several := [worker for worker, count in threads.items() if count > 1]:
            raise ValueError(
                f"the worker {several[0]} runs {threads[several[0]]} tasks in one process, whose libraries keep state: "
                "start workers with one thread each (dask worker --nworkers auto --nthreads 1; with dask-jobqueue, "
                "processes as many as cores)"
            )
        if not threads:
            tqdm.write(f"no worker has come to {engine.address} yet: waiting for the first", file=sys.stderr)
        try:
            answers = _within(_ANSWER, client.run, _probe, _to_see(folder))
        except TimeoutError as error:
            raise ValueError(f"workers of {engine.address} do not answer: are they stopped, or hung?") from error
        _check(answers, folder)
        cluster = _Dask(client, engine.address or "this machine", _to_see(folder))
        try:
            yield cluster
        finally:
            cluster._executor.shutdown(wait=False)  # it cancels what is left


# ------------------------------------------------------------------------------------------------------------ Ray


class _Ray:
    def __init__(self, address: str) -> None:
        import ray

        self._ray, self._address = ray, address
        self._run = ray.remote(max_retries=RERUNS, num_cpus=1)(_call)
        self._waiting: dict[Future, Any] = {}

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        reference = self._run.remote(function, task)
        future = reference.future()
        self._waiting[future] = reference
        return future

    def result(self, future: Future) -> Any:
        errors = self._ray.exceptions
        self._waiting.pop(future, None)
        try:
            return future.result()
        except errors.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise ClusterError(
                    f"a worker of {self._address} cannot import lipprep ({error.cause}): install it there"
                ) from error
            raise error.cause from error
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            raise WorkerLost(printable(error)) from error
        except (errors.RayError, CancelledError) as error:
            raise ClusterError(f"{_gone(self._address)} ({printable(error)[:200]})") from error

    def ahead(self) -> int:
        return 2 * int(self._ray.cluster_resources().get("CPU", 0)) or _SOME

    def cancel(self) -> None:
        for reference in self._waiting.values():
            self._ray.cancel(reference, force=True)


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)


@contextlib.contextmanager
def _ray(engine: Engine, folder: Path | RemotePath) -> Iterator[_Ray]:
    try:
        import ray
    except ImportError as error:
        raise _need("ray", "ray", error) from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if engine.address is None:
        ray.init(num_cpus=engine.workers, include_dashboard=False, **quiet)
    else:
        _knock(engine.address)
        try:
            ray.init(engine.address, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise _silent(engine.address, _RAY_HEAD, error) from error
    cluster = None
    try:
        probe = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_probe)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        asked = {
            f"{node['NodeManagerAddress']}": probe.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(
                _to_see(folder)
            )
            for node in nodes
        }
        _check(dict(zip(asked, ray.get(list(asked.values()), timeout=60), strict=True)), folder)
        cluster = _Ray(engine.address or "this machine")
        yield cluster
    finally:
        if cluster is not None:
            cluster.cancel()
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise ValueError where no head of a cluster is at HOST:PORT: Ray itself would wait for a minute and more."""
    if not address.rpartition(":")[2].isdecimal():  # `auto`
        return
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(ask, check=True, capture_output=True, timeout=_PATIENCE)
    except (subprocess.SubprocessError, OSError) as error:
        raise _silent(address, _RAY_HEAD, error) from error


def _silent(address: str, what: str, error: Exception) -> ValueError:
    why = str(error).partition("\n")[0] if isinstance(error, OSError) else ""
    return ValueError(f"nobody answers at {address} as {what}{why and f' ({printable(why)})'}")


def _gone(address: str) -> str:
    return f"the cluster at {address} is gone; what is done is kept: run the same command again to go on"
