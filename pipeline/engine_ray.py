"""Chunks on a Ray cluster: one at an address, or one that is started here for the run."""

import contextlib
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from threading import Event, Thread
from types import ModuleType
from typing import Any

import lipprep
from lipprep.io.errors import UserError
from lipprep.pipeline.engines import (
    ANSWER,
    PATIENCE,
    RERUNS,
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
from lipprep.stages.untrusted import printable

_ABSENCE = 30  # seconds that the head of a cluster may be away, to be started again
_KIND = "the head of a Ray cluster (HOST:6379, or auto on one of its machines)"


def reach(address: str | None) -> None:
    """Raise ValueError where the package is missing, or no head of a cluster that lets us in is at HOST:PORT."""
    package("ray", "ray")
    # `auto` is looked for in files of this machine. Elsewhere Ray itself would wait for a minute and more.
    if address is not None and address.rpartition(":")[2].isdecimal():
        _knock(address)


class _Ray:
    def __init__(self, ray: ModuleType, address: str, places: Sequence[str]) -> None:
        self._ray, self._address, self._places = ray, address, places
        self._run = ray.remote(max_retries=RERUNS, num_cpus=1)(_on_ray)
        self._waiting: dict[Future, Any] = {}
        self._cores = ray.cluster_resources().get("CPU", 0)
        self._closed = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        reference = self._run.remote(lipprep.__version__, self._places, pickle.dumps((function, task)))
        future = reference.future()
        self._waiting[future] = reference
        return future

    def result(self, future: Future) -> Any:
        errors = self._ray.exceptions
        self._waiting.pop(future, None)
        try:
            return answer(future.result())
        except errors.RayTaskError as error:
            raise error.cause from error
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            raise WorkerLost(printable(error)) from error
        except (errors.RayError, CancelledError) as error:
            raise gone(self._address, f" ({printable(error)[:200]})") from error

    def ahead(self) -> int:
        return 2 * int(self._cores) or SOME

    def _watch(self) -> None:
        """Tell when no worker is left, and end what waits for a head that is gone.

        Ray would end this process after a minute, and not say what of.
        """
        seen, absence = time.monotonic(), Absence(self._address, self._cores)
        while not self._closed.wait(1):
            try:
                self._cores = within(PATIENCE, self._ray.cluster_resources).get("CPU", 0)
                seen = time.monotonic()
                absence.look(self._cores)
            except (TimeoutError, self._ray.exceptions.RayError):
                if time.monotonic() - seen > _ABSENCE:
                    for future in list(self._waiting):
                        with contextlib.suppress(InvalidStateError):
                            future.set_exception(gone(self._address))

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()  # it asks nothing of a Ray that is shut down
        for reference in self._waiting.values():
            self._ray.cancel(reference, force=True)


@sent_whole
def _on_ray(version: str, places: Sequence[str], payload: bytes) -> tuple[Any, str]:
    import ray

    # A task that is cancelled is killed.
    return work(ray.get_runtime_context().get_node_id(), version, places, payload, lambda: True)


@contextlib.contextmanager
def connect(engine: Engine, places: Sequence[str]) -> Iterator[_Ray]:
    ray = package("ray", "ray")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if engine.address is None:
        # Without this Ray would go to a cluster that its environment or its files name.
        ray.init("local", num_cpus=engine.workers, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(engine.address, **quiet)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise silent(engine.address, _KIND, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        ask = ray.remote(num_cpus=0)(probe)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        asked = [ask.options(scheduling_strategy=On(node, soft=False)).remote(places) for node in nodes]
        try:
            answers = ray.get(asked, timeout=ANSWER)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"nodes of {engine.address or 'this machine'} do not answer ({printable(error)[:200]}): are they "
                "stopped, or hung?"
            ) from error
        check(dict(zip(nodes, answers, strict=True)))
        cluster = _Ray(ray, engine.address or "this machine", places)
        stack.callback(cluster.close)
        yield cluster


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise silent(address, _KIND, error) from error
    # Somebody is there. To start Python and import Ray alone takes seconds.
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(ask, check=True, capture_output=True, timeout=ANSWER, text=True, errors="replace")
    except subprocess.CalledProcessError as error:
        if "AUTH" in error.stderr:
            raise UserError(
                f"the Ray cluster at {address} asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what "
                "`ray get-auth-token` says on its head, or have it in ~/.ray/auth_token here"
            ) from error
        last = error.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{address} is not to be used as {_KIND}: {printable(last)[:300]}") from error
    except (subprocess.TimeoutExpired, OSError) as error:
        raise silent(address, _KIND, error) from error
