"""One batch through everything, before a run of days: does it fit, and how long will it take?"""

import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.train.checkpoint import LAST, Checkpoint, load_checkpoint, save_checkpoint
from lipprep.train.config import Config
from lipprep.train.epoch import evaluation_plan
from lipprep.train.errors import explained, less_memory
from lipprep.train.evaluate import classify
from lipprep.train.loader import BatchLoader
from lipprep.train.optimize import learning_rate
from lipprep.train.prepare import prepare
from lipprep.train.timing import PARTS, Clock, peak_memory

STEPS = 3  # the first one pays for what is made once


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What one batch took: `parts` the seconds of each part of a step, all others as their names say."""

    device: str
    precision: str
    parameters: int
    batch: list[int]  # clips, frames, height and width of the largest slice that goes through the network
    parts: dict[str, float]
    step_seconds: float
    clips_per_s: float
    epoch_seconds: float
    steps: int
    run_seconds: float
    validation_batch_seconds: float | None
    checkpoint_seconds: float
    checkpoint_bytes: int
    peak_memory: int  # bytes


def rehearse(
    config: Config, *, shards: Path | RemotePath, device: str = "auto", resume: Checkpoint | None = None, **reading
) -> Rehearsal:
    """Read, augment, train, validate, save and load one batch; nothing is left behind.

    `reading` is `cache`, `cache_size`, `skip_corrupt` and `other_shards` of `lipprep.train.loop.train`. Raises what
    that does.
    """
    with explained(less_memory(config)), tempfile.TemporaryDirectory(prefix="lipprep-") as folder:
        work = prepare(config, shards, device=device, resume=resume, **reading)
        config, step = work.config, work.step()
        # Batches follow each other as in a run, but no step is the first of many: its number is one that there is.
        number = min(work.done, work.total - 1)
        epoch, place = divmod(number, work.per_epoch)
        places = work.plan(epoch)[place][step.rows(number)]
        reader = {"workers": config.resolved["workers"], "pin_memory": work.device.type == "cuda"}
        loader = iter(BatchLoader(work.batches, [places] * (STEPS + 1), **reader))
        lr = learning_rate(number, total=work.total, per_epoch=work.per_epoch, config=config)
        shape: list[int] = []
        step.show = lambda batch, _: shape.extend([len(batch.x_B1THW), *batch.x_B1THW.shape[2:]])
        for _ in range(STEPS):
            step.clock = clock = Clock(work.device)
            batch = next(loader)
            clock.mark("wait")
            told = step(batch, step=number, lr=lr)
        if not told.isfinite().all():
            raise UserError(f"the loss of the first steps is {told[0].item()}: lower lr, or look at the crops")
        validation = None
        if work.val is not None:
            plan = evaluation_plan(work.to_validate(), batch_size=config.batch_size)[:1]
            began = time.perf_counter()
            classify(
                work.reader,
                BatchLoader(work.val, plan, workers=0, pin_memory=False),
                options=config.augment,
                fps=work.index.fps,
                device=work.device,
                precision=config.precision,
            )
            validation = time.perf_counter() - began
        path = Path(folder) / LAST
        began = time.perf_counter()
        save_checkpoint(path, work.checkpoint())
        saving = time.perf_counter() - began
        load_checkpoint(path)
        seconds = sum(clock.seconds.values())
        return Rehearsal(
            device=torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else work.device.type,
            precision=config.resolved["precision"],
            parameters=sum(weight.numel() for weight in work.model.parameters()),
            batch=shape,
            parts={part: clock.seconds.get(part, 0.0) for part in PARTS},
            step_seconds=seconds,
            clips_per_s=work.clips / seconds,
            epoch_seconds=work.per_epoch * seconds,
            steps=work.total,
            run_seconds=work.total * seconds,
            validation_batch_seconds=validation,
            checkpoint_seconds=saving,
            checkpoint_bytes=path.stat().st_size,
            peak_memory=peak_memory(work.device),
        )


def told(rehearsal: Rehearsal) -> list[str]:
    """The lines of a table for people."""
    r = rehearsal
    clips, *shape = r.batch
    lines = [
        f"device       {r.device}, {r.precision}",
        f"network      {r.parameters:,} parameters",
        f"batch        {clips} clips of {shape[0]} frames, {shape[1]} x {shape[2]} pixels",
        f"memory       {r.peak_memory / 1e6:,.0f} MB at most",
        *(f"{part:12} {1e3 * r.parts[part]:8.1f} ms" for part in PARTS),
        f"step         {1e3 * r.step_seconds:8.1f} ms, {r.clips_per_s:,.1f} clips/s",
    ]
    if r.validation_batch_seconds is not None:
        lines.append(f"validation   {1e3 * r.validation_batch_seconds:8.1f} ms a batch")
    lines += [
        f"checkpoint   {1e3 * r.checkpoint_seconds:8.1f} ms, {r.checkpoint_bytes / 1e6:,.1f} MB",
        f"epoch        {_span(r.epoch_seconds)}",
        f"run          {_span(r.run_seconds)}, {r.steps:,} steps, less validation",
    ]
    return lines


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.1f} {unit}"
    return f"about {seconds:.0f} seconds"
