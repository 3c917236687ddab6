"""The training loop, from top to bottom, with nothing hidden in callbacks.

Every random draw of step n comes from (seed, n), the batches come from the plan, and the learning rate from
the step alone. So a run that was killed and resumed on a CPU ends in the same weights, to the bit, as one that
was not, as long as the number of threads and the precision stay the same. On a GPU the same holds but for the
order in which its kernels add.

Shapes: B clips, N clips of a whole split, T frames, S side of a crop in pixels, C words (classes).
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import Index, load_index
from lipprep.stages.store import AGAIN, RemoteError
from lipprep.train.cache import open_cache
from lipprep.train.checkpoint import BEST, LAST, Checkpoint, save_checkpoint
from lipprep.train.config import Config, as_plain, save_config
from lipprep.train.device import choose_device, load_weights, new_model, place, training_precision
from lipprep.train.epoch import evaluation_plan, training_plan
from lipprep.train.evaluate import classify, top_k
from lipprep.train.loader import BatchLoader, ShardBatches, default_workers
from lipprep.train.metrics import METRICS, Metrics, NoMetrics, has_evaluation, warn
from lipprep.train.ranks import ALONE, Ranks
from lipprep.train.resume import check_resumable, load_moments, warn_of_changes
from lipprep.train.run import CONFIG
from lipprep.train.step import Step

REMEDY = "lower lr or raise warmup (or precision=fp32), and go on from the last checkpoint with `--resume auto`"


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `best` is its best validation accuracy, None where there is no split val."""

    steps: int
    best: float | None
    seconds: float
    files: list[Path]


@dataclass(frozen=True)
class _Kept:
    """What a run folder holds: a best.pt, and the evaluation after the checkpoint's last step."""

    best: bool
    evaluation: bool


@dataclass
class _Work:
    """What a run is made of, and where it stands: `done` of `total` steps, `best` validation accuracy so far.

    `owed` says that the validation after the last step done was cut short.
    """

    config: Config
    index: Index
    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: ShardBatches
    val: ShardBatches | None
    clips: int  # of a global batch
    per_epoch: int
    total: int
    done: int = 0
    best: float | None = None
    owed: bool = False

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.done,
            epoch=self.done // self.per_epoch,
            batch=self.done % self.per_epoch,
            best=self.best,
            config=as_plain(self.config),
            labels=list(self.index.labels),
            parameters=dict(self.index.parameters),
            fps=float(self.index.fps),
            dataset=self.index.fingerprint,
        )


def train(
    config: Config,
    *,
    shards: Path | RemotePath,
    run: Path,
    device: str = "auto",
    resume: Checkpoint | None = None,
    cache: Path | None = None,
    cache_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train on the split `train` of a folder of shards, into the folder `run`; go on from `resume` if given.

    Remote shards are read through `cache`, a local folder that takes up to `cache_size` bytes. Where `ranks` are
    several, each calls this, and the main one writes and speaks for all.

    Raises ValueError where shards, recipe and checkpoint do not go together, or loss or weights are no longer
    numbers, and, with last.pt saved, KeyboardInterrupt where Ctrl-C was pressed or SIGTERM came, and RemoteError where
    a store does not answer.
    """
    # Asked before any rank can fail by itself: other machines may not have the folder.
    kept = ranks.of_main(lambda: _Kept((run / BEST).is_file(), resume is not None and has_evaluation(run, resume.step)))
    with ranks.agreed():
        work = _prepare(config, shards, device, resume, kept, cache, cache_size, ranks)
    config, index, total, per_epoch = work.config, work.index, work.total, work.per_epoch
    if ranks.main:
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / CONFIG)
    step = Step(
        work.model,
        work.optimizer,
        config,
        clips=work.clips,
        size=index.crop_size,
        fps=index.fps,
        device=work.device,
        ranks=ranks,
    )
    reading = {"workers": config.resolved["workers"], "pin_memory": work.device.type == "cuda"}
    loader = iter(BatchLoader(work.batches, _planned(work, step), **reading))
    validation = None
    if work.val is not None:
        share = max(1, config.batch_size // ranks.world)
        val_plan = evaluation_plan(work.val.counts, batch_size=share, rank=ranks.rank, world=ranks.world)
        validation = BatchLoader(work.val, val_plan, **reading)

    def save(name: str) -> None:
        if ranks.main:
            _check_weights(work.model, step=work.done)
            save_checkpoint(run / name, work.checkpoint())

    def look() -> list[float]:
        """The losses of the steps since the last look; it waits for the device, so many are looked at together."""
        with ranks.agreed():
            values = _finite(ranks.mean(torch.stack(unseen)).tolist() if unseen else [], step=work.done)
        unseen.clear()
        return values

    def rescue() -> None:
        """Save where this rank fails: alone, for what the others do meanwhile is not known."""
        if ranks.world == 1:
            look()
        save(LAST)

    started = time.monotonic()
    unseen: list[torch.Tensor] = []  # losses of the steps since the last look at them, still on the device
    losses: list[float] = []  # of the steps since the last line of metrics, as are these:
    clips, seconds = 0, 0.0
    silent = None if ranks.main else True
    bar = tqdm(total=total, initial=work.done, unit="step", desc="train", disable=silent, dynamic_ncols=True)
    writing = Metrics(run, step=work.done) if ranks.main else NoMetrics()
    with bar, writing as metrics, _interrupted() as pressed, _resumable(run, rescue, ranks):

        def validate() -> None:
            epoch = -(-work.done // per_epoch)
            ranks.spread(work.model)
            figures = _validate(work, validation, ranks)
            with ranks.agreed():
                if not math.isfinite(figures["loss"]):
                    raise ValueError(f"the validation loss after step {work.done} is {figures['loss']}: {REMEDY}")
            if work.best is None or figures["top1"] > work.best:
                work.best = figures["top1"]
                save(BEST)
                save(LAST)
            metrics.evaluation(work.done, "val", epoch=epoch, **figures)
            if ranks.main:
                accuracy = f"val top-1 {100 * figures['top1']:.1f} %"
                tqdm.write(f"epoch {epoch}/{config.epochs}  val loss {figures['loss']:.3f}  {accuracy}")

        if work.owed:
            validate()
        since = time.monotonic()
        while work.done < total and not ranks.any(bool(pressed)):
            batch = next(loader)
            lr = learning_rate(work.done, total=total, config=config)
            unseen.append(step(batch, step=work.done, lr=lr))
            work.done += 1
            done = work.done
            clips += work.clips
            bar.update()
            epoch = (done - 1) // per_epoch + 1
            ends_epoch = done % per_epoch == 0 or done == total
            validates = ends_epoch and validation is not None
            saves = validates or done == total or done % (config.save_every or per_epoch) == 0
            logs = done % config.log_every == 0 or done == total
            if not (logs or saves):
                continue

            losses += look()
            seconds += time.monotonic() - since
            bar.set_postfix(epoch=epoch, loss=f"{losses[-1]:.3f}", refresh=False)
            if logs:
                mean, speed = sum(losses) / len(losses), round(clips / seconds, 1)
                figures = {"loss": losses[-1], "mean_loss": mean, "lr": lr, "clips_per_second": speed}
                metrics.training(done, epoch=epoch, **figures)
                losses, clips, seconds = [], 0, 0.0
            if saves:
                save(LAST)
            if validates:
                validate()
            since = time.monotonic()  # saving and validating are not training
        if work.done < total:
            look()
            save(LAST)
    if work.done < total:
        raise KeyboardInterrupt
    files = [run / name for name in (CONFIG, METRICS, LAST, BEST) if (run / name).is_file()]
    return Outcome(work.done, work.best, time.monotonic() - started, files)


def _prepare(
    config: Config,
    shards: Path | RemotePath,
    device: str,
    resume: Checkpoint | None,
    kept: _Kept,
    cache: Path | None,
    cache_size: int | None,
    ranks: Ranks,
) -> _Work:
    """All that can be told to be wrong before the first step is, here."""
    index = load_index(shards)
    read = [s for s in index.shards if s.split in ("train", "val")]
    blocks = open_cache(shards, read, folder=cache, size=cache_size)
    batches = ShardBatches(shards, index, "train", cache=blocks)
    parts = ranks.world * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size}, which is that of all processes together, cannot be dealt equally to "
            f"{ranks.world} processes with accumulate={config.accumulate}: make it a multiple of {parts}"
        )
    plan = training_plan(batches.counts, seed=config.seed, epoch=0, batch_size=config.batch_size, parts=parts)
    if not plan:
        raise ValueError(f"{sum(batches.counts)} clips to train on are too few for {parts} parts of a batch")
    per_epoch = len(plan)
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    where = choose_device(device, local=ranks.local, beside=ranks.beside)
    if config.augment.crop_size > index.crop_size:
        raise ValueError(
            f"the crops of the shards are {index.crop_size} pixels wide, augment.crop_size={config.augment.crop_size} "
            "cannot be cut from them: lower it, or make the shards with a larger --crop-size"
        )
    if index.profile != config.profile and ranks.main:
        warn(
            f"recipe {config.recipe} is meant for crops of profile {config.profile}, these shards are "
            f"of {index.profile}: published weights and figures do not carry over"
        )

    torch.manual_seed(config.seed)
    model = place(new_model(config.model, num_classes=len(index.labels)), where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    val = None
    if any(s.split == "val" and s.samples for s in index.shards):
        val = ShardBatches(shards, index, "val", cache=blocks)
    elif ranks.main:
        tqdm.write(f"the shards have no split val: accuracy is not measured and no {BEST} is kept")
    workers = default_workers(where, beside=ranks.beside) if config.workers is None else config.workers
    resolved = {"device": where.type, "precision": training_precision(where, config.precision), "workers": workers}
    resolved["processes"] = ranks.world
    config = dataclasses.replace(config, resolved=resolved)
    work = _Work(config, index, where, model, optimizer, batches, val, len(plan[0]), per_epoch, total)
    if resume is not None:
        check_resumable(resume, config, index)
        if ranks.main:
            warn_of_changes(resume, resolved)
        load_weights(model, resume)
        load_moments(optimizer, resume)
        work.done = done = resume.step
        work.best = resume.best if kept.best else None
        # A run that was killed while it validated does so first.
        work.owed = val is not None and done > 0 and (done % per_epoch == 0 or done == total) and not kept.evaluation
        if done >= total and not work.owed:
            raise ValueError(f"the run has all of its {total} steps: epochs= or max_steps= would train it further")
    return work


def learning_rate(step: int, *, total: int, config: Config) -> float:
    """The rate of step `step` (from 0) of `total`: a linear warm-up, then half a cosine down to 0."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _validate(work: _Work, loader: BatchLoader, ranks: Ranks) -> dict:
    config = work.config
    logits_nC, labels_n, _ = classify(
        work.model, loader, options=config.augment, device=work.device, precision=config.precision
    )
    # Row i of rank r is of sample world * i + r; those beyond the last sample are repeated ones.
    count, C = sum(work.val.counts), logits_nC.shape[1]
    logits_NC = ranks.gather(logits_nC).reshape(ranks.world, -1, C).swapaxes(0, 1).reshape(-1, C)[:count]
    labels_N = ranks.gather(labels_n).reshape(ranks.world, -1).T.ravel()[:count]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_NC), torch.from_numpy(labels_N))
    return {"loss": loss.item(), "top1": top_k(logits_NC, labels_N, 1), "top5": top_k(logits_NC, labels_N, 5)}


def _planned(work: _Work, step: Step) -> Iterator[np.ndarray]:
    """What this process reads for each step from the one at hand on, over the ends of epochs."""
    config, number = work.config, work.done
    parts = config.resolved["processes"] * config.accumulate
    while number < work.total:
        epoch, first = divmod(number, work.per_epoch)
        plan = training_plan(
            work.batches.counts, seed=config.seed, epoch=epoch, batch_size=config.batch_size, parts=parts
        )
        for batch in plan[first : first + work.total - number]:
            yield batch[step.rows(number)]
            number += 1


def _finite(values: list[float], *, step: int) -> list[float]:
    """The losses of the steps up to `step`; ValueError where one of them is no finite number."""
    for before, value in enumerate(values, start=1 - len(values)):
        if not math.isfinite(value):
            raise ValueError(f"the loss of step {step + before} is {value}: {REMEDY}")
    return values


def _check_weights(model: torch.nn.Module, *, step: int) -> None:
    """Raise ValueError where a weight, or a running statistic, is no finite number: none of it is worth saving."""
    finite = [value.isfinite().all() for value in model.state_dict().values()]
    if not torch.stack(finite).all():
        raise ValueError(f"weights after step {step} are no finite numbers: {REMEDY}")


@contextlib.contextmanager
def _resumable(run: Path, stop: Callable[[], None], ranks: Ranks) -> Iterator[None]:
    """Where a store stops answering, save by `stop` and say how to go on."""
    try:
        yield
    except RemoteError as error:
        stop()
        why = str(error).removesuffix(AGAIN)
        saved = "The run is saved: go on" if ranks.main else "Go on from where the run was saved last,"
        raise RemoteError(f"{why}. {saved} with `--run {run} --resume auto`") from error


@contextlib.contextmanager
def _interrupted() -> Iterator[list]:
    """A list that holds something once Ctrl-C was pressed or SIGTERM came: the step and its checkpoint come first.

    Pressed again, it stops at once. In a thread, which gets no signals, the list stays empty.
    """
    pressed: list = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(*_: object) -> None:
        pressed.append(True)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield pressed
    finally:
        restore()
