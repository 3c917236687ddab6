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
from lipprep.train.augment import cross_entropy, train_batch
from lipprep.train.cache import open_cache
from lipprep.train.checkpoint import BEST, LAST, Checkpoint, check_fits, save_checkpoint
from lipprep.train.config import Config, as_plain, save_config
from lipprep.train.device import autocast, choose_device, load_weights, new_model, place, training_precision
from lipprep.train.epoch import evaluation_plan, training_plan
from lipprep.train.evaluate import classify, top_k
from lipprep.train.loader import BatchLoader, ShardBatches, default_workers
from lipprep.train.metrics import METRICS, Metrics, has_evaluation, warn
from lipprep.train.run import CONFIG

REMEDY = "lower lr or raise warmup (or precision=fp32), and go on from the last checkpoint with `--resume auto`"


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `best` is its best validation accuracy, None where there is no split val."""

    steps: int
    best: float | None
    seconds: float
    files: list[Path]


def train(
    config: Config,
    *,
    shards: Path | RemotePath,
    run: Path,
    device: str = "auto",
    resume: Checkpoint | None = None,
    cache: Path | None = None,
    cache_size: int | None = None,
) -> Outcome:
    """Train on the split `train` of a folder of shards, into the folder `run`; go on from `resume` if given.

    Remote shards are read through `cache`, a local folder that takes up to `cache_size` bytes.

    Raises ValueError where shards, recipe and checkpoint do not go together, or loss or weights are no longer
    numbers, and, with last.pt saved, KeyboardInterrupt where Ctrl-C was pressed and RemoteError where a store does not
    answer.
    """
    index = load_index(shards)
    read = [s for s in index.shards if s.split in ("train", "val")]
    kept = open_cache(shards, read, folder=cache, size=cache_size)
    batches = ShardBatches(shards, index, "train", cache=kept)
    per_epoch = len(training_plan(batches.counts, seed=config.seed, epoch=0, batch_size=config.batch_size))
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    where = choose_device(device)
    if config.augment.crop_size > index.crop_size:
        raise ValueError(
            f"the crops of the shards are {index.crop_size} pixels wide, augment.crop_size={config.augment.crop_size} "
            "cannot be cut from them: lower it, or make the shards with a larger --crop-size"
        )
    if index.profile != config.profile:
        warn(
            f"recipe {config.recipe} is meant for crops of profile {config.profile}, these shards are "
            f"of {index.profile}: published weights and figures do not carry over"
        )

    torch.manual_seed(config.seed)
    model = place(new_model(config.model, num_classes=len(index.labels)), where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    has_val = any(s.split == "val" and s.samples for s in index.shards)
    workers = default_workers(where) if config.workers is None else config.workers
    resolved = {"device": where.type, "precision": training_precision(where, config.precision), "workers": workers}
    done, best, owed = 0, None, False
    if resume is not None:
        _check_resumable(resume, config, index)
        _warn_of_changes(resume, resolved)
        load_weights(model, resume)
        _load_moments(optimizer, resume)
        done, best = resume.step, resume.best if (run / BEST).is_file() else None
        # A run that was killed while it validated does so first.
        owed = has_val and done > 0 and (done % per_epoch == 0 or done == total) and not has_evaluation(run, done)
        if done >= total and not owed:
            raise ValueError(f"the run has all of its {total} steps: epochs= or max_steps= would train it further")
    config = dataclasses.replace(config, resolved=resolved)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / CONFIG)

    pin = where.type == "cuda"
    plan = _planned(batches.counts, config, first=done, last=total, per_epoch=per_epoch)
    loader = iter(BatchLoader(batches, plan, workers=workers, pin_memory=pin))
    validation = None
    if has_val:
        val = ShardBatches(shards, index, "val", cache=kept)
        val_plan = evaluation_plan(val.counts, batch_size=config.batch_size)
        validation = BatchLoader(val, val_plan, workers=workers, pin_memory=pin)
    else:
        _say(f"the shards have no split val: accuracy is not measured and no {BEST} is kept")

    def save(name: str) -> None:
        _check_weights(model, step=done)
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

    def stop() -> None:
        if unseen:
            _finite(unseen, step=done)
        save(LAST)

    started = time.monotonic()
    unseen: list[torch.Tensor] = []  # losses of the steps since the last look at them, still on the device
    losses: list[float] = []  # of the steps since the last line of metrics, as are these:
    clips, seconds = 0, 0.0
    bar = tqdm(total=total, initial=done, unit="step", desc="train", disable=None, dynamic_ncols=True)
    with bar, Metrics(run, step=done) as metrics, _ctrl_c() as pressed, _resumable(run, stop):

        def validate() -> None:
            nonlocal best
            epoch = -(-done // per_epoch)
            figures = _validate(model, validation, config, device=where)
            if not math.isfinite(figures["loss"]):
                raise ValueError(f"the validation loss after step {done} is {figures['loss']}: {REMEDY}")
            if best is None or figures["top1"] > best:
                best = figures["top1"]
                save(BEST)
                save(LAST)
            metrics.evaluation(done, "val", epoch=epoch, **figures)
            accuracy = f"val top-1 {100 * figures['top1']:.1f} %"
            _say(f"epoch {epoch}/{config.epochs}  val loss {figures['loss']:.3f}  {accuracy}")

        if owed:
            validate()
        since = time.monotonic()
        while done < total and not pressed:
            batch = next(loader)
            lr = learning_rate(done, total=total, config=config)
            unseen.append(_step(model, optimizer, batch, config, index, step=done, lr=lr, device=where))
            done += 1
            clips += len(batch["labels"])
            bar.update()
            epoch = (done - 1) // per_epoch + 1
            ends_epoch = done % per_epoch == 0 or done == total
            validates = ends_epoch and validation is not None
            saves = validates or done == total or done % (config.save_every or per_epoch) == 0
            logs = done % config.log_every == 0 or done == total
            if not (logs or saves):
                continue

            # Looking at a loss waits for the device, so it is done for many steps at once.
            losses += _finite(unseen, step=done)
            unseen.clear()
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
        if done < total:
            stop()
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
    with autocast(device, config.resolved["precision"]):
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


def _finite(losses: list[torch.Tensor], *, step: int) -> list[float]:
    """The losses of the steps up to `step`; ValueError where one of them is no finite number."""
    values = torch.stack(losses).tolist()
    for before, value in enumerate(values, start=1 - len(values)):
        if not math.isfinite(value):
            raise ValueError(f"the loss of step {step + before} is {value}: {REMEDY}")
    return values


def _check_weights(model: torch.nn.Module, *, step: int) -> None:
    """Raise ValueError where a weight, or a running statistic, is no finite number: none of it is worth saving."""
    finite = [value.isfinite().all() for value in model.state_dict().values()]
    if not torch.stack(finite).all():
        raise ValueError(f"weights after step {step} are no finite numbers: {REMEDY}")


def _load_moments(optimizer: torch.optim.AdamW, checkpoint: Checkpoint) -> None:
    """Take over the moments of each weight; the settings stay this run's.

    The fused kernel trusts the moments' shapes: others would read beyond the memory that they have.
    """
    unfit = "the checkpoint's optimizer state does not fit its model"
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = checkpoint.optimizer.get("state")
    if state == {} and checkpoint.step == 0:
        return
    if not isinstance(state, dict) or set(state) != set(range(len(weights))):
        raise ValueError(f"{unfit}: it is not that of {len(weights)} weights")
    taken = {}
    for number, weight in enumerate(weights):
        kept = state[number]
        shapes = {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        if not isinstance(kept, dict) or {k: getattr(v, "shape", None) for k, v in kept.items()} != shapes:
            raise ValueError(f"{unfit}: the moments of weight {number} are not of the weight's shape")
        try:
            with torch.no_grad():
                moments = {k: torch.empty_like(weight).copy_(kept[k]) for k in ("exp_avg", "exp_avg_sq")}
                taken[number] = {"step": kept["step"].to(torch.float32, copy=True), **moments}
        except RuntimeError as error:  # tensors of a kind that cannot be copied, as quantized ones
            raise ValueError(f"{unfit}: the moments of weight {number} are no plain numbers") from error
    optimizer.load_state_dict({"state": taken, "param_groups": optimizer.state_dict()["param_groups"]})


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


def _warn_of_changes(checkpoint: Checkpoint, resolved: dict) -> None:
    before = checkpoint.config.get("resolved") or {}
    for name in ("device", "precision"):
        if name in before and before[name] != resolved[name]:
            warn(
                f"the run was on {name} {before[name]} and goes on with {resolved[name]}: it will not end in the same "
                "weights as without the change"
            )


@contextlib.contextmanager
def _resumable(run: Path, stop: Callable[[], None]) -> Iterator[None]:
    """Where a store stops answering, call `stop` and say how to go on."""
    try:
        yield
    except RemoteError as error:
        stop()
        why = str(error).removesuffix(AGAIN)
        raise RemoteError(f"{why}. The run is saved: go on with `--run {run} --resume auto`") from error


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
