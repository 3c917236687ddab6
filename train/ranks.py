"""The processes of a run: one alone, or as many as torchrun started, which take equal parts of every batch.

torchrun tells each process its number (RANK), how many there are (WORLD_SIZE) and its number on its machine
(LOCAL_RANK). What the host decides by is exchanged through gloo, so that no device is waited for; gradients go through
NCCL between GPUs.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from lipprep.io.errors import UserError

_LOST = (
    "the processes of this run have lost one of them: its message, or torchrun's, says why. What is saved is kept: "
    "start it again with --resume auto"
)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the `world` of the run: `rank` in all, `local` on its machine of `beside`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    beside: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, each of the same shape, one after another."""
        if self.world == 1:
            return values
        mine = torch.from_numpy(np.ascontiguousarray(values))
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(parts, mine, group=_host_group())
        return torch.cat(parts).numpy()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        if self.world > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.world
        return value

    def union(self, values: set) -> set:
        """What any of the ranks has."""
        if self.world == 1:
            return values
        parts: list = [None] * self.world
        distributed.all_gather_object(parts, values, group=_host_group())
        return set().union(*parts)

    def spread(self, model: torch.nn.Module) -> None:
        """Give all ranks the main one's buffers: the last step has left each with running statistics of its own."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def of_main(self, call: Callable[[], Any]) -> Any:
        """What `call` gives on the main rank, which all others get; its error ends all, and is told once."""
        if self.world == 1:
            return call()
        outcome: list = [None, None]
        error: Exception | None = None
        if self.main:
            try:
                outcome[0] = call()
            except Exception as raised:
                error, outcome[1] = raised, True
        distributed.broadcast_object_list(outcome, 0, group=_host_group())
        if error is not None:
            raise error
        if outcome[1]:
            sys.exit(1)
        return outcome[0]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Within the block all ranks do the same, or fail alike: an error that all have is told by one of them."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.world > 1:
            failed: list = [None] * self.world
            distributed.all_gather_object(failed, error is not None, group=_host_group())
            if any(failed) and failed.index(True) != self.rank:
                sys.exit(1)
        if error is not None:
            raise error


ALONE = Ranks()
_group: list = []


def _host_group() -> Any:
    return _group[0]


@contextlib.contextmanager
def join(device: str) -> Iterator[Ranks]:
    """This process's place: alone, or where torchrun started it, among the others.

    Raises ValueError where another rank is lost on the way.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing := missing + [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(missing)} is not, or is no number: start it with torchrun, or unset it"
        )
    ranks = Ranks(*(int(os.environ[name]) for name in names))
    on_gpus = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpus and not torch.cuda.is_available():
        raise UserError(f"device {device} is not available here: use --device auto or cpu")
    if on_gpus and not distributed.is_nccl_available():
        raise UserError(
            "this torch lacks NCCL, by which processes train on GPUs together: it comes with torch for CUDA on Linux; "
            "one process needs none, and --device cpu trains without"
        )
    with _deadly_signals():
        try:
            distributed.init_process_group("nccl" if on_gpus else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes of this run did not find each other: {_first_line(error)}") from error
        _group[:] = [distributed.new_group(backend="gloo")]
    try:
        yield ranks
    except RuntimeError as error:  # what a broken connection raises
        if isinstance(error, torch.OutOfMemoryError) or not _is_lost(error):
            raise
        raise UserError(_LOST) from error
    finally:
        _group.clear()
        distributed.destroy_process_group()


@contextlib.contextmanager
def _deadly_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once: while torch waits for the others, Python hears nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(
        sign in text for sign in ("connection closed", "connection reset", "gloo", "broken pipe", "timed out")
    )
