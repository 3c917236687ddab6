"""What a run is made of, put together before its first step: all that can be told to be wrong by then, is, here."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.stages.lrw import is_lrw
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import Index, load_index
from lipprep.stages.untrusted import printable
from lipprep.train.boundary import words_of
from lipprep.train.cache import open_cache
from lipprep.train.calibrate import Calibration
from lipprep.train.checkpoint import BEST, MAX_FRAMES, Checkpoint, find_checkpoint, load_checkpoint, versions
from lipprep.train.config import Config, as_plain, without_effect
from lipprep.train.device import choose_device, load_weights, new_model, place, training_precision
from lipprep.train.distill import load_teacher
from lipprep.train.epoch import places, training_plan
from lipprep.train.licence import is_of_lrw
from lipprep.train.loader import ShardBatches, default_workers
from lipprep.train.metrics import warn
from lipprep.train.models import switch_off_dropout
from lipprep.train.optimize import make_optimizer
from lipprep.train.ranks import ALONE, Ranks
from lipprep.train.resume import check_resumable, load_moments, load_scale, warn_of_changes
from lipprep.train.step import MovingAverage, Step


@dataclass(frozen=True)
class Kept:
    """What a run folder holds: a best.pt, and the evaluation after the checkpoint's last step."""

    best: bool = False
    evaluation: bool = False


@dataclass
class Work:
    """What a run is made of, and where it stands: `done` of `total` steps, `best` validation accuracy so far.

    `average` is the moving average of the weights and `teacher` what is learnt from beside the labels, None without
    one. `owed` says that the validation after the last step done was cut short. `calibration` is that of the weights as
    they are, None where they were not validated.
    """

    config: Config
    index: Index
    device: torch.device
    model: torch.nn.Module
    average: MovingAverage | None
    teacher: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: ShardBatches
    val: ShardBatches | None
    clips: int  # of a global batch
    per_epoch: int
    total: int
    ranks: Ranks
    done: int = 0
    best: float | None = None
    owed: bool = False
    calibration: Calibration | None = None

    @property
    def reader(self) -> torch.nn.Module:
        """The network that is validated: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch, each (clips, 2) int64 of places."""
        return _plan(self.batches.counts, self.config, epoch=epoch, world=self.ranks.world)

    def to_validate(self) -> np.ndarray:
        """The places (N, 2) of `val` that are validated."""
        return np.concatenate(self.plan(0)) if self.config.overfit else places(self.val.counts)

    def step(self) -> Step:
        """What updates the model."""
        return Step(
            self.model,
            self.optimizer,
            self.config,
            clips=self.clips,
            size=self.index.crop_size,
            fps=self.index.fps,
            device=self.device,
            scaler=self.scaler,
            average=self.average,
            teacher=self.teacher,
            ranks=self.ranks,
        )

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
            ema=None if self.average is None else self.average.module.state_dict(),
            scaler=self.scaler.state_dict(),
            versions=versions(),
            temperature=None if self.calibration is None else self.calibration.temperature,
            threshold=None if self.calibration is None else self.calibration.threshold,
            num_frames=None if self.index.num_frames is None else min(self.index.num_frames, MAX_FRAMES),
        )


def prepare(
    config: Config,
    shards: Path | RemotePath,
    *,
    device: str = "auto",
    resume: Checkpoint | None = None,
    kept: Kept | None = None,
    cache: Path | None = None,
    cache_size: int | None = None,
    skip_corrupt: bool = False,
    other_shards: bool = False,
    ranks: Ranks = ALONE,
) -> Work:
    """Put a run together; the arguments are those of `lipprep.train.loop.train`, and so is what it raises."""
    index = load_index(shards)
    read = [s for s in index.shards if s.split in ("train", "val")]
    blocks = open_cache(shards, read, folder=cache, size=cache_size)
    batches = ShardBatches(shards, index, "train", cache=blocks, skip_damaged=skip_corrupt)
    parts = ranks.world * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size}, which is that of all processes together, cannot be dealt equally to "
            f"{ranks.world} processes with accumulate={config.accumulate}: make it a multiple of {parts}"
        )
    plan = _plan(batches.counts, config, epoch=0, world=ranks.world)
    if not plan:
        raise UserError(f"{sum(batches.counts)} clips to train on are too few for {parts} parts of a batch")
    per_epoch = len(plan)
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    where = choose_device(device, local=ranks.local, beside=ranks.beside)
    if config.augment.crop_size > index.crop_size:
        raise UserError(
            f"the crops of the shards are {index.crop_size} pixels wide, augment.crop_size={config.augment.crop_size} "
            "cannot be cut from them: lower it, or make the shards with a larger --crop-size"
        )
    if index.profile != config.profile and ranks.main:
        warn(
            f"recipe {config.recipe} is meant for crops of profile {config.profile}, these shards are "
            f"of {index.profile}: published weights and figures do not carry over"
        )
    elif config.box is not None and (box := index.parameters.get("box")) != config.box and ranks.main:
        meant = f"recipe {config.recipe} is meant for crops of the box {config.box}"
        if box is None:
            warn(
                f"the shards do not say which box their crops were cut with, and {meant}: of another, published "
                "weights and figures do not carry over"
            )
        else:
            warn(f"{meant}, these shards are of {box}: published weights and figures do not carry over")

    if config.sync_batchnorm and ranks.world == 1 and ranks.main:
        warn("sync_batchnorm is for several processes: in one, each slice of a batch is normalised by itself")
    if ranks.main:
        for sentence in without_effect(config):
            warn(sentence)
    torch.manual_seed(config.seed)
    model = new_model(config.model, num_classes=len(index.labels))
    if config.augment.crop_size < model.smallest:
        raise UserError(
            f"augment.crop_size={config.augment.crop_size} is too small for the trunk {config.model['trunk']}: "
            f"{model.smallest} or more"
        )
    if model.boundary is not None and resume is None and ranks.main:
        _check_boundaries(batches, plan[0], model.boundary, fps=index.fps)
    precision = training_precision(where, config.precision, model)
    model = place(model, where, precision=precision)
    if config.overfit:
        switch_off_dropout(model)
    if config.compile and model.frontend3D.skips_padding:
        raise UserError("compile=true is not for the trunk compact: its shapes change with every batch, leave it out")
    begun: set[str] = set()  # the weights that are not drawn at random
    origin = resume
    if resume is not None:
        begun = set(resume.model)
    elif config.init_from is not None:
        origin = load_checkpoint(find_checkpoint(Path(config.init_from)))
        begun = _initialise(model, origin, config.init_from, index, tell=ranks.main)
    if config.freeze:
        _freeze(model, config.freeze, begun, tell=ranks.main)
    optimizer = make_optimizer([weight for weight in model.parameters() if weight.requires_grad], config)
    teacher = None if config.teacher is None else load_teacher(config, index, where)
    val = None
    if config.overfit:
        val = batches
    elif any(s.split == "val" and s.samples for s in index.shards):
        val = ShardBatches(shards, index, "val", cache=blocks, skip_damaged=skip_corrupt)
    elif ranks.main:
        tqdm.write(
            f"the shards have no split val: accuracy is not measured, confidence not calibrated, and no {BEST} is kept"
        )
    workers = default_workers(where, beside=ranks.beside) if config.workers is None else config.workers
    resolved = {"device": where.type, "precision": precision, "workers": workers, "processes": ranks.world}
    if where.type == "cpu":
        resolved["threads"] = torch.get_num_threads()
    if teacher is not None:
        resolved |= {"teacher_sha256": teacher.sha256, "generation": teacher.generation + 1}
    learnt = (origin is not None and is_of_lrw(origin)) or (teacher is not None and teacher.of_lrw)
    if learnt or is_lrw(index.labels, [index.dataset]):
        resolved["of_lrw"] = True  # what learns from these weights is bound by LRW's agreement, too
    config = dataclasses.replace(config, resolved=resolved)
    work = Work(
        config=config,
        index=index,
        device=where,
        model=model,
        average=MovingAverage(model, config.ema) if config.ema else None,
        teacher=None if teacher is None else teacher.model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(where.type, enabled=precision == "fp16"),
        batches=batches,
        val=val,
        clips=len(plan[0]),
        per_epoch=per_epoch,
        total=total,
        ranks=ranks,
    )
    if resume is not None:
        check_resumable(resume, config, index, other_shards=other_shards, tell=ranks.main)
        _go_on(work, resume, kept or Kept())
    return work


def _plan(counts: list[int], config: Config, *, epoch: int, world: int) -> list[np.ndarray]:
    parts, batch_size = world * config.accumulate, config.batch_size
    if not config.overfit:
        return training_plan(counts, seed=config.seed, epoch=epoch, batch_size=batch_size, parts=parts)
    clips = min(config.overfit, sum(counts))
    batches = -(-clips // batch_size)
    batch_size = clips // batches // parts * parts
    if not batch_size:
        return []
    return training_plan(counts, seed=config.seed, epoch=0, batch_size=batch_size, parts=parts)[:batches]


def _go_on(work: Work, resume: Checkpoint, kept: Kept) -> None:
    """Take over what a checkpoint holds. Raises ValueError where it does not fit the run, or the run is at its end."""
    config, total, per_epoch = work.config, work.total, work.per_epoch
    if work.ranks.main:
        warn_of_changes(resume, config)
    load_weights(work.model, resume.model)
    load_moments(work.optimizer, resume)
    if work.average is not None:
        # An average that begins late begins with the weights as they are, and counts the steps before.
        load_weights(work.average.module, resume.weights)
        work.average.updates = resume.step
    load_scale(work.scaler, resume)
    work.done = done = resume.step
    work.best = resume.best if kept.best else None
    # A run that was killed while it validated does so first.
    work.owed = work.val is not None and done > 0 and validates(config, done, total, per_epoch) and not kept.evaluation
    if done >= total and not work.owed:
        raise UserError(f"the run has all of its {total} steps: epochs= or max_steps= would train it further")


def validates(config: Config, done: int, total: int, per_epoch: int) -> bool:
    """Whether a run validates after `done` steps: every `eval_every` steps, else after each epoch, and at the end."""
    return done % (config.eval_every or per_epoch) == 0 or done == total


def _check_boundaries(batches: ShardBatches, places: np.ndarray, formula: str, *, fps: float) -> None:
    """Warn where of none of the first clips it is known where its word stands: the network would be told nothing."""
    batch = batches.read(places[:32])
    seconds = {name: torch.from_numpy(batch[name]) for name in ("lengths", "durations", "times")}
    frames_B2 = words_of(seconds, [formula], fps=fps)[formula]
    if (frames_B2[:, 0] == frames_B2[:, 1]).all():
        what = "a word_start and word_end" if formula == "times" else "a duration"
        warn(
            f"model.boundary={formula} is without effect: none of the first {len(frames_B2)} clips has {what}, so that "
            "the network is told nothing (see `lipprep manifest`, and the formulas in docs/training.md)"
        )


def _freeze(model: torch.nn.Module, names: list[str], begun: set[str], *, tell: bool) -> None:
    """Have no gradients of the parts `names`; warn of those that are drawn at random, having no weight in `begun`.

    Raises ValueError where there is no such part, or nothing is left to train.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in parts:
            close = difflib.get_close_matches(name, parts, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(part for part in parts if part and part.count(".") < 2)
            raise UserError(f"freeze: the network has no part {name!r}: {hint}It has {known}, and their parts")
        parts[name].requires_grad_(False)
        own = {k for k in model.state_dict() if k.startswith(f"{name}.") and not k.endswith(".num_batches_tracked")}
        if tell and (drawn := own - begun):
            what = name if drawn == own else f"{len(drawn)} of {len(own)} weights of {name}"
            warn(
                f"freeze: {what}, drawn at random, will stay so: begin with the weights of a run that has learnt, "
                "init_from=RUN"
            )
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    if frozen == total:
        raise UserError(f"freeze={','.join(names)} leaves nothing to train: freeze fewer parts")
    if tell:
        tqdm.write(f"freeze: {frozen:,} of {total:,} parameters stay as they are")


def _initialise(model: torch.nn.Module, checkpoint: Checkpoint, path: str, index: Index, *, tell: bool) -> set[str]:
    """Begin with the weights of another run, `path`, as far as names and shapes agree, and tell of those that do not.

    Returns the names of those that do. Raises ValueError where none does.
    """
    ours, theirs = model.state_dict(), checkpoint.weights
    taken = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if not taken:
        raise UserError(f"init_from={path}: none of its {len(theirs)} weights has the name and shape of one here")
    if checkpoint.labels != list(index.labels):
        # However many they are, the rows of the classifier stand for other words.
        taken = {name: value for name, value in taken.items() if not name.startswith(f"{model.classifier}.")}
    for name, value in taken.items():
        if value.is_complex() or value.is_floating_point() != ours[name].is_floating_point():
            raise UserError(f"init_from={path}: its weight {name} is of type {value.dtype}, not {ours[name].dtype}")
        if not value.isfinite().all():
            raise UserError(f"init_from={path}: its weight {name} has values that are no finite numbers")
    model.load_state_dict({**ours, **taken})
    if not tell:
        return set(taken)
    tqdm.write(f"init_from: {len(taken)} of {len(ours)} weights are those of {printable(path)}")
    for name, value in ours.items():
        if name not in theirs:
            tqdm.write(f"  {name} is not there: it begins anew")
        elif theirs[name].shape != value.shape:
            shapes = f"{tuple(value.shape)} here and {tuple(theirs[name].shape)} there"
            tqdm.write(f"  {name} is {shapes}: it begins anew")
        elif name not in taken:
            tqdm.write(f"  {name} is for other words there: it begins anew")
    for name in theirs:
        if name not in ours:
            tqdm.write(f"  {printable(name)} is only there: it is not used")
    return set(taken)
