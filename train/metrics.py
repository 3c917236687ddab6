"""What a run reports of itself: metrics.jsonl for programs, TensorBoard events for people."""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lipprep.stages.atomic import write_text
from lipprep.stages.untrusted import printable, shortened

METRICS = "metrics.jsonl"
_MAX_WARNING = 3000  # characters


def warn(text: str) -> None:
    """Say it on stderr, above any progress bar; what is not printable in it is escaped."""
    lines = [printable(line) for line in shortened(text, _MAX_WARNING).split("\n")]
    tqdm.write("warning: " + "\n".join(lines), file=sys.stderr)


class Metrics:
    """Appends lines to metrics.jsonl and scalars to TensorBoard's events, both in the run folder."""

    def __init__(self, run: Path, *, step: int) -> None:
        """Go on after `step` steps: what an interrupted run wrote of later ones is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = run / METRICS
        if path.exists():
            write_text(path, "".join(line for line in _lines(run) if _step(line) <= step))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(os.fspath(run), purge_step=step + 1 if step else None)

    def training(self, step: int, **values: float) -> None:
        """One training step: its loss (of that batch), learning rate and so on."""
        self._line({"step": step, **values})
        for name, value in values.items():
            self._events.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, split: str, *, epoch: int, **values: float) -> None:
        """What a whole split gave after a step."""
        self._line({"step": step, "epoch": epoch, "split": split, **values})
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        self._events.flush()

    def _line(self, values: dict) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._events.close()


class NoMetrics:
    """What the processes have that leave writing to the main one."""

    def training(self, step: int, **values: float) -> None:
        """Nothing."""

    def evaluation(self, step: int, split: str, *, epoch: int, **values: float) -> None:
        """Nothing."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_) -> None:
        pass


def has_evaluation(run: Path, step: int) -> bool:
    """Whether the run's metrics have a line of an evaluation after `step` steps."""
    return any(row["step"] == step and "split" in row for row in read_metrics(run))


def best_validation(run: Path) -> dict | None:
    """The line of the validation that best.pt is of: of the best top-1, of equal ones the last."""
    rows = [row for row in read_metrics(run) if row.get("split") == "val" and isinstance(row.get("top1"), float)]
    return max(rows, key=lambda row: (row["top1"], row["step"]), default=None)


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, less those that a kill or a disk has damaged."""
    return [json.loads(line) for line in _lines(run) if math.isfinite(_step(line))]


def _lines(run: Path) -> list[str]:
    path = run / METRICS
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> int | float:
    """The step of a line; infinity for one that is none, as a kill may cut it short."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    return step if type(step) is int else math.inf
