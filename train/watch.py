"""What is seen of a run while it goes on: the bar, the lines of metrics, and what must stop it."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.stages.atomic import write_text
from lipprep.stages.shard.reader import MAKE_AGAIN
from lipprep.train.checkpoint import LAST, load_checkpoint, save_checkpoint
from lipprep.train.config import as_plain
from lipprep.train.metrics import Metrics, NoMetrics, warn
from lipprep.train.prepare import Work
from lipprep.train.ranks import ALONE, Ranks
from lipprep.train.run import CONFIG
from lipprep.train.timing import Waiting

REMEDY = "lower lr, raise warmup, or set clip_norm=1 or precision=fp32, and go on with `--resume auto`"
FAILURE, BEFORE = "failure.json", "failure.pt"
LEAST_SCALE = 1e-3  # of fp16's gradients: it is halved with each step that is left out because they overflow
MOST_SKIPPED = 0.001  # of a run's clips


class Watch:
    """The steps since the last line of metrics: looked at together, for to look is to wait for the device."""

    def __init__(self, work: Work, run: Path, metrics: Metrics | NoMetrics, bar: tqdm) -> None:
        self.waiting = Waiting(work.device)
        # Of the whole run, as far as it has been looked at:
        self.clips, self.seconds, self.waited = 0, 0.0, 0.0
        self._work, self._run, self._metrics, self._bar = work, run, metrics, bar
        self._unseen: list[torch.Tensor] = []  # what each step tells of itself, still on the device
        self._keys: list[list[str]] = []  # of the clips in these steps
        self._last_keys: list[str] = []  # of the last step
        self._seen: list[list[float]] = []  # what was looked at since the last line
        self._line = (0, 0.0, 0.0)  # clips, seconds and waited at the last line
        self._since = time.monotonic()

    def step(self, told: torch.Tensor, keys: list[str]) -> None:
        """Note a step that is queued: what `Step` tells of it, and the clips that this process had for it."""
        self.waiting.step_done()
        self._unseen.append(told)
        self._keys.append(keys)
        self._bar.update()

    def look(self) -> None:
        """Wait for the device. Raises ValueError where the loss of a step since the last look is no number."""
        work = self._work
        with work.ranks.agreed():
            values = work.ranks.mean(torch.stack(self._unseen)).tolist() if self._unseen else []
            for number, (loss, *_) in enumerate(values):
                if not math.isfinite(loss):
                    step = work.done - len(values) + number
                    raise self.failed(f"the loss of step {step + 1}", loss, step=step, keys=self._keys[number])
            if work.scaler.is_enabled() and not work.scaler.get_scale() >= LEAST_SCALE:
                raise self.failed(f"the scale of fp16's gradients after step {work.done}", work.scaler.get_scale())
        self.clips += len(values) * work.clips
        self.seconds += time.monotonic() - self._since
        self.waited += self.waiting.take()
        self._since = time.monotonic()
        self._seen += values
        self._last_keys = self._keys[-1] if self._keys else self._last_keys
        self._unseen.clear()
        self._keys.clear()

    def pause(self) -> None:
        """What took time since the last look was no training."""
        self._since = time.monotonic()
        self.waiting.pause()

    def line(self, *, lr: float) -> None:
        """Write a line of metrics about what was looked at since the last one."""
        clips, seconds, waited = (
            now - then for now, then in zip((self.clips, self.seconds, self.waited), self._line, strict=True)
        )
        self._line = (self.clips, self.seconds, self.waited)
        loss = self._seen[-1][0]
        mean, accuracy, *distill = (sum(column) / len(column) for column in zip(*self._seen, strict=True))
        speed, wait = round(clips / seconds, 1), round(min(waited / seconds, 1.0), 4)
        epoch = -(-self._work.done // self._work.per_epoch)
        figures = {"loss": loss, "mean_loss": mean, "accuracy": accuracy, "lr": lr, "clips_per_s": speed, "wait": wait}
        if distill:
            figures["distill"] = distill[0]
        if self._work.scaler.is_enabled():
            figures["scale"] = self._work.scaler.get_scale()
        self._metrics.training(self._work.done, epoch=epoch, **figures)
        told = {"epoch": epoch, "loss": f"{mean:.3f}", "acc": f"{100 * accuracy:.0f}%"}
        if distill:
            told["distill"] = f"{distill[0]:.3f}"
        self._bar.set_postfix(**told, **{"clips/s": f"{speed:.0f}", "wait": f"{100 * wait:.0f}%"}, refresh=False)
        self._seen.clear()

    def failed(self, what: str, value: float, *, step: int | None = None, keys: list[str] | None = None) -> UserError:
        """The error of a run in which something is no number after step `step` (from 0; by default the last one).

        What leads there again is kept: the last checkpoint, and a file that names the step's clips and the command.
        """
        work, run = self._work, self._run
        step = work.done - 1 if step is None else step
        keys = self._last_keys if keys is None else keys
        epoch, batch = divmod(step, work.per_epoch)
        device = work.device if work.ranks.world == 1 else work.device.type
        again = f"lipprep train --shards {work.batches.paths[0].parent} --run {run}-again --device {device}"
        if work.ranks.world > 1:
            again = again.replace("lipprep train", f"torchrun --nproc-per-node {work.ranks.world} -m lipprep.train")
        if work.batches.skip_damaged:
            again += " --skip-corrupt"
        if work.ranks.main and (run / LAST).is_file():
            # Its settings are those of the time when it was saved, which may have been before this start of the run.
            last = load_checkpoint(run / LAST)
            save_checkpoint(run / BEFORE, replace(last, config=as_plain(work.config)))
            again += f" --resume {run / BEFORE}"
        else:
            again += f" --recipe {run / CONFIG}"
        about = {
            "what": what,
            "value": str(value),
            "step": step + 1,
            "epoch": epoch + 1,
            "batch": batch + 1,
            "seed": work.config.seed,
            "dataset": work.index.fingerprint,
            "clips": [[work.batches.paths[s].name, p] for s, p in work.plan(epoch)[batch].tolist()],
            "keys_here": keys,
            "to_see_it_again": again,
        }
        if work.ranks.main:
            write_text(run / FAILURE, json.dumps(about, indent=1) + "\n")
        whose = f", of {keys[0]} and others" if keys else ""
        return UserError(
            f"{what} is {value} (step {step + 1} is batch {batch + 1} of epoch {epoch + 1}{whose}): {REMEDY}. "
            f"{run / FAILURE} names the clips, and how to see it again"
        )


class Skipped:
    """The damaged clips of a run that were left out, each told once."""

    def __init__(self, clips: int, ranks: Ranks = ALONE) -> None:
        """Of `clips` clips; all ranks count together."""
        self.places: set[tuple[str, int, int]] = set()
        self._clips, self._ranks = clips, ranks

    def note(self, split: str, damaged: dict[int, tuple[tuple[int, int], str]]) -> None:
        """Tell of the damaged clips of a batch."""
        for (shard, position), why in damaged.values():
            if (split, shard, position) not in self.places:
                self.places.add((split, shard, position))
                warn(f"left out: {why.removesuffix(MAKE_AGAIN)}")
        if self._ranks.world == 1:
            self.check()

    def check(self) -> None:
        """Count those of all ranks. Raises ValueError where they are too many: more than 0.1 %, and more than one."""
        self.places = self._ranks.union(self.places)
        with self._ranks.agreed():
            if len(self.places) > max(1, MOST_SKIPPED * self._clips):
                raise UserError(
                    f"{len(self.places)} clips are damaged, more than {100 * MOST_SKIPPED:g} % of {self._clips}: make "
                    "the shards again with `lipprep shards`"
                )

    def noted(self, split: str, loader: Iterable[dict], *, masked: bool = True) -> Iterator[dict]:
        """The batches of a loader; where `masked`, the label of what is damaged, where another clip stands, is -1."""
        for batch in loader:
            self.note(split, batch["damaged"])
            if masked:
                batch["labels"][list(batch["damaged"])] = -1
            yield batch
