"""What is seen of a run while it goes on: the bar, the lines of metrics, and what must stop it."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from lipprep.stages.atomic import write_text
from lipprep.train.checkpoint import LAST
from lipprep.train.metrics import Metrics, NoMetrics, warn
from lipprep.train.prepare import Work
from lipprep.train.ranks import Ranks
from lipprep.train.timing import Waiting

REMEDY = "lower lr, raise warmup, or set clip_norm=1 or precision=fp32, and go on with `--resume auto`"
FAILURE = "failure.json"
MOST_SKIPPED = 0.001  # of a run's clips


class Watch:
    """The steps since the last line of metrics: looked at together, for to look is to wait for the device."""

    def __init__(self, work: Work, run: Path, metrics: Metrics | NoMetrics, bar: tqdm) -> None:
        self.waiting = Waiting(work.device)
        # Of the whole run, as far as it has been looked at:
        self.clips, self.seconds, self.waited = 0, 0.0, 0.0
        self._work, self._run, self._metrics, self._bar = work, run, metrics, bar
        self._unseen: list[torch.Tensor] = []  # loss and accuracy of a step each, still on the device
        self._keys: list[list[str]] = []  # of the clips in these steps
        self._seen: list[list[float]] = []  # what was looked at since the last line
        self._line = (0, 0.0, 0.0)  # clips, seconds and waited at the last line
        self._since = time.monotonic()

    def step(self, told: torch.Tensor, keys: list[str]) -> None:
        """Note a step that is queued: its loss and accuracy (2,), and the clips that this process had for it."""
        self.waiting.step_done()
        self._unseen.append(told)
        self._keys.append(keys)
        self._bar.update()

    def look(self) -> None:
        """Wait for the device. Raises ValueError where the loss of a step since the last look is no number."""
        work = self._work
        with work.ranks.agreed():
            values = work.ranks.mean(torch.stack(self._unseen)).tolist() if self._unseen else []
            for number, (loss, _) in enumerate(values):
                if not math.isfinite(loss):
                    raise ValueError(self._explain(work.done - len(values) + number, loss, self._keys[number]))
        self.clips += len(values) * work.clips
        self.seconds += time.monotonic() - self._since
        self.waited += self.waiting.take()
        self._since = time.monotonic()
        self._seen += values
        self._unseen.clear()
        self._keys.clear()

    def pause(self) -> None:
        """What took time since the last look was no training."""
        self._since = time.monotonic()

    def line(self, *, lr: float) -> None:
        """Write a line of metrics about what was looked at since the last one."""
        clips, seconds, waited = (
            now - then for now, then in zip((self.clips, self.seconds, self.waited), self._line, strict=True)
        )
        self._line = (self.clips, self.seconds, self.waited)
        loss = self._seen[-1][0]
        mean, accuracy = (sum(column) / len(column) for column in zip(*self._seen, strict=True))
        speed, wait = round(clips / seconds, 1), round(min(waited / seconds, 1.0), 4)
        epoch = -(-self._work.done // self._work.per_epoch)
        figures = {"loss": loss, "mean_loss": mean, "accuracy": accuracy, "lr": lr, "clips_per_s": speed, "wait": wait}
        self._metrics.training(self._work.done, epoch=epoch, **figures)
        told = {"epoch": epoch, "loss": f"{mean:.3f}", "acc": f"{100 * accuracy:.0f}%"}
        self._bar.set_postfix(**told, **{"clips/s": f"{speed:.0f}", "wait": f"{100 * wait:.0f}%"}, refresh=False)
        self._seen.clear()

    def _explain(self, step: int, loss: float, keys: list[str]) -> str:
        """What the loss of step `step` (from 0) is, with what reproduces it written to a file."""
        work = self._work
        epoch, batch = divmod(step, work.per_epoch)
        about = {
            "step": step + 1,
            "epoch": epoch + 1,
            "batch": batch,
            "loss": str(loss),
            "seed": work.config.seed,
            "dataset": work.index.fingerprint,
            "clips": [[work.batches.paths[s].name, p] for s, p in work.plan(epoch)[batch].tolist()],
            "keys_here": keys,
            "weights_before": LAST if (self._run / LAST).is_file() else None,
            "to_see_it_again": f"lipprep train --run {self._run} --resume auto max_steps={step + 1} --shards ...",
        }
        if work.ranks.main:
            write_text(self._run / FAILURE, json.dumps(about, indent=1) + "\n")
        return (
            f"the loss of step {step + 1} (epoch {epoch + 1}, batch {batch}, of {keys[0]} and others) is {loss}: "
            f"{REMEDY}. {self._run / FAILURE} names its clips, and how to see it again"
        )


class Skipped:
    """The damaged clips of a run that were left out, each told once."""

    def __init__(self, clips: int, ranks: Ranks) -> None:
        """Of `clips` clips; all ranks count together."""
        self.places: set[tuple[str, int, int]] = set()
        self._clips, self._ranks = clips, ranks

    def note(self, split: str, damaged: dict[int, tuple[tuple[int, int], str]]) -> None:
        """Tell of the damaged clips of a batch. Raises ValueError where they are too many."""
        for (shard, position), why in damaged.values():
            if (split, shard, position) not in self.places:
                self.places.add((split, shard, position))
                warn(f"left out: {why}")
        if len(self.places) > MOST_SKIPPED * self._clips:
            raise ValueError(
                f"{len(self.places)} clips are damaged, which is more than {100 * MOST_SKIPPED:g} % of {self._clips}: "
                "make the shards again with `lipprep shards`"
            )

    def noted(self, split: str, loader: Iterable[dict]) -> Iterator[dict]:
        """The batches of a loader; the labels of what is damaged are -1."""
        for batch in loader:
            self.note(split, batch["damaged"])
            batch["labels"][list(batch["damaged"])] = -1
            yield batch
