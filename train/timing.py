"""Where the time of a training step goes: waiting for data, and part by part where asked."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

FIRST_TRACED = 3  # step of a start
PARTS = ("wait", "copy", "augment", "forward", "backward", "optimizer")


class Waiting:
    """How long the device had nothing to do because the next batch was not there, in seconds.

    A CPU waits as long as the loop does. A GPU works off what is queued while the loop waits, so there the gap is
    measured between the end of a step and the start of the next one, by the GPU's own clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._ended: torch.cuda.Event | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def for_batch(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        if not self._gpu:
            self._seconds += time.perf_counter() - began
        elif self._ended is not None:
            self._gaps.append((self._ended, self._event()))

    def step_done(self) -> None:
        """After a step is queued."""
        self._ended = self._event() if self._gpu else None

    def take(self) -> float:
        """The seconds since the last call; what is queued must be done."""
        self._seconds += sum(ended.elapsed_time(began) for ended, began in self._gaps) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._gaps.clear()
        self.pause()
        return seconds

    def pause(self) -> None:
        """What the device did not do until now was not for want of a batch."""
        self._ended = self._event() if self._gpu else None

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Clock:
    """Adds up the seconds of each part of a step. At each mark a GPU is waited for: a run is slower with it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What was done since the last mark was `part`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


@contextlib.contextmanager
def tracing(path: Path, device: torch.device) -> Iterator[torch.profiler.profile]:
    """Record three steps from `FIRST_TRACED` on, for chrome://tracing or Perfetto; call `.step()` after each step."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    plan = torch.profiler.schedule(wait=1, warmup=FIRST_TRACED - 2, active=3, repeat=1)

    def export(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(path))

    with torch.profiler.profile(activities=kinds, schedule=plan, on_trace_ready=export) as profile:
        yield profile


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use at once, in bytes: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
