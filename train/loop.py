"""The training loop, from top to bottom, with nothing hidden in callbacks.

Every random draw of step n comes from (seed, n), the batches come from the plan, and the learning rate from
the step alone. So a run that was killed and resumed ends in the same weights, to the bit, as one that was
not, as long as device and number of threads stay the same.

Shapes: B clips, N clips of a whole split, T frames, S side of a crop in pixels, C words (classes).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lipprep.stages.shard.index import Index, load_index
from lipprep.train.augment import cross_entropy, train_batch
from lipprep.train.checkpoint import BEST, LAST, Checkpoint, check_fits, save_checkpoint
from lipprep.train.config import Config, as_plain, save_config
from lipprep.train.device import autocast, choose_device, load_weights, new_model, place
from lipprep.train.epoch import evaluation_plan, training_plan
from lipprep.train.evaluate import classify, top_k
from lipprep.train.loader import BatchLoader, ShardBatches, default_workers
from lipprep.train.metrics import METRICS, Metrics
from lipprep.train.run import CONFIG


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `best` is its best validation accuracy, None where there is no split val."""

    steps: int
    best: float | None
    seconds: float
    files: list[Path]


def train(
    config: Config, *, shards: Path, run: Path, device: str = "auto", resume: Checkpoint | None = None
) -> Outcome:
    """Train on the split `train` of a folder of shards, into the folder `run`; go on from `resume` if given.

    Raises ValueError where shards, recipe and checkpoint do not go together or the loss is no longer a
    number, and KeyboardInterrupt, with last.pt saved, where Ctrl-C was pressed.
    """
    index = load_index(shards)
    batches = ShardBatches(shards, index, "train")
    per_epoch = len(training_plan(batches.counts, seed=config.seed, epoch=0, batch_size=config.batch_size))
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    where = choose_device(device)
    if index.profile != config.profile:
        _say(
            f"warning: recipe {config.recipe} is meant for crops of profile {config.profile}, these shards are "
            f"of {index.profile}: published weights and figures do not carry over"
        )

    torch.manual_seed(config.seed)
    model = place(new_model(config.model, num_classes=len(index.labels)), where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    done, best = 0, None
    if resume is not None:
        _check_resumable(resume, config, index)
        load_weights(model, resume)
        _load_optimizer(optimizer, resume, config)
        done, best = resume.step, resume.best if (run / BEST).is_file() else None
        if done >= total:
            raise ValueError(f"the run has all of its {total} steps: epochs= or max_steps= would train it further")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / CONFIG)

    workers = default_workers(where) if config.workers is None else config.workers
    pin = where.type == "cuda"
    plan = _planned(batches.counts, config, first=done, last=total, per_epoch=per_epoch)
    loader = iter(BatchLoader(batches, plan, workers=workers, pin_memory=pin))
    validation = None
    if any(s.split == "val" and s.samples for s in index.shards):
        val = ShardBatches(shards, index, "val")
        val_plan = evaluation_plan(val.counts, batch_size=config.batch_size)
        validation = BatchLoader(val, val_plan, workers=workers, pin_memory=pin)
    else:
        _say(f"the shards have no split val: accuracy is not measured and no {BEST} is kept")

    def save(name: str) -> None:
        save_checkpoint(
            run / name,
            Checkpoint(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                step=done,
                epoch=done // per_epoch,
                batch=done % per_epoch,
                best=best,
                config=as_plain(config),
                labels=list(index.labels),
                parameters=dict(index.parameters),
                fps=float(index.fps),
                dataset=index.fingerprint,
            ),
        )

    started = time.monotonic()
    losses: list[torch.Tensor] = []  # of the steps since the last look at them, still on the device
    clips, seconds = 0, 0.0  # of the steps since the last line of metrics
    bar = tqdm(total=total, initial=done, unit="step", desc="train", disable=None, dynamic_ncols=True)
    with bar, Metrics(run, step=done) as metrics, _ctrl_c() as pressed:
        while done < total and not pressed:
            clock = time.monotonic()
            batch = next(loader)
            lr = learning_rate(done, total=total, config=config)
            losses.append(_step(model, optimizer, batch, config, index, step=done, lr=lr, device=where))
            done += 1
            clips += len(batch["labels"])
            seconds += time.monotonic() - clock
            bar.update()
            epoch = (done - 1) // per_epoch + 1
            ends_epoch = done % per_epoch == 0 or done == total
            saves = done % config.save_every == 0 or done == total if config.save_every else ends_epoch
            logs = done % config.log_every == 0 or done == total

            # Looking at a loss waits for the device, so it is done for many steps at once.
            if logs or saves or ends_epoch or pressed:
                loss = _finite(losses, step=done)
                losses.clear()
                bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
            if logs:
                speed = round(clips / seconds, 1)
                metrics.training(done, epoch=epoch, loss=loss, lr=lr, clips_per_second=speed)
                clips, seconds = 0, 0.0
            if ends_epoch and validation is not None:
                figures = _validate(model, validation, config, device=where)
                metrics.evaluation(done, "val", epoch=epoch, **figures)
                _say(f"epoch {epoch}/{config.epochs}  loss {loss:.3f}  val top-1 {100 * figures['top1']:.1f} %")
                if best is None or figures["top1"] > best:
                    best = figures["top1"]
                    save(BEST)
            if saves or pressed:
                save(LAST)
    if done < total:
        raise KeyboardInterrupt
    files = [run / name for name in (CONFIG, METRICS, LAST, BEST) if (run / name).is_file()]
    return Outcome(done, best, time.monotonic() - started, files)


def learning_rate(step: int, *, total: int, config: Config) -> float:
    """The rate of step `step` (from 0) of `total`: a linear warm-up, then half a cosine down to 0."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    config: Config,
    index: Index,
    *,
    step: int,
    lr: float,
    device: torch.device,
) -> torch.Tensor:
    """One update; returns the loss of the batch, on the device."""
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)  # dropout
    generator = torch.Generator().manual_seed(seed)
    video_BTSS = batch["video"].to(device, non_blocking=True)
    labels_B = batch["labels"].to(device, non_blocking=True)
    augmented = train_batch(
        video_BTSS, batch["lengths"], batch["durations"], config.augment, fps=index.fps, generator=generator
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    with autocast(device, config.precision):
        logits_BC = model(augmented.x_B1THW, augmented.lengths_B)
    loss = cross_entropy(logits_BC.float(), labels_B, augmented, config.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _validate(model: torch.nn.Module, loader: BatchLoader, config: Config, *, device: torch.device) -> dict:
    logits_NC, labels_N, _ = classify(model, loader, options=config.augment, device=device, precision=config.precision)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_NC), torch.from_numpy(labels_N))
    return {"loss": loss.item(), "top1": top_k(logits_NC, labels_N, 1), "top5": top_k(logits_NC, labels_N, 5)}


def _planned(counts: list[int], config: Config, *, first: int, last: int, per_epoch: int) -> Iterator[np.ndarray]:
    """The batches of steps `first` to `last`, over the ends of epochs."""
    step = first
    while step < last:
        epoch, batch = divmod(step, per_epoch)
        plan = training_plan(counts, seed=config.seed, epoch=epoch, batch_size=config.batch_size)
        yield from plan[batch : batch + last - step]
        step += per_epoch - batch


def _finite(losses: list[torch.Tensor], *, step: int) -> float:
    """The last of the losses of the steps up to `step`; ValueError where one of them is no finite number."""
    values = torch.stack(losses).tolist() if losses else [0.0]
    for before, value in enumerate(values, start=1 - len(values)):
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of step {step + before} is {value}: lower lr or raise warmup (or precision=fp32), "
                "and go on from the last checkpoint with `--resume auto`"
            )
    return values[-1]


def _load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, config: Config) -> None:
    try:
        optimizer.load_state_dict(checkpoint.optimizer)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the checkpoint's optimizer state does not fit its model: {error}") from error
    for group in optimizer.param_groups:  # the checkpoint's settings came along
        group["weight_decay"] = config.weight_decay


def _check_resumable(checkpoint: Checkpoint, config: Config, index: Index) -> None:
    check_fits(checkpoint, index)
    if checkpoint.dataset != index.fingerprint:
        raise ValueError("the shards were made anew since the checkpoint was saved: start a new run in another --run")
    now = as_plain(config)
    for name in ("model", "seed", "batch_size"):
        if now[name] != checkpoint.config.get(name):
            raise ValueError(
                f"the run has {name}={checkpoint.config.get(name)}, not {now[name]}, and that cannot change on "
                "its way: start a new run in another --run"
            )


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list]:
    """A list that holds something once Ctrl-C was pressed: the step, its lines and its checkpoint come first.

    Pressed again, it stops at once. In a thread, which gets no signals, the list stays empty.
    """
    pressed: list = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _say(line: str) -> None:
    tqdm.write(line)
