"""Going on where a checkpoint stands: what must be as it was, and what may change."""

import math

import torch

from lipprep.io.errors import UserError
from lipprep.stages.shard.index import Index
from lipprep.train.checkpoint import Checkpoint, check_fits, versions
from lipprep.train.config import Config, as_plain, config_from
from lipprep.train.metrics import warn


def load_moments(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Take over the moments of each weight; the settings stay this run's.

    The fused kernel trusts the moments' shapes: others would read beyond the memory that they have.
    """
    unfit = "the checkpoint's optimizer state does not fit its model"
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    counts = not isinstance(optimizer, torch.optim.SGD)
    names = ("exp_avg", "exp_avg_sq") if counts else ("momentum_buffer",)
    state = checkpoint.optimizer.get("state")
    # SGD keeps nothing of steps that are left out, as fp16's first ones may all be.
    if state == {} and (checkpoint.step == 0 or not counts):
        return
    if not isinstance(state, dict) or set(state) != set(range(len(weights))):
        raise UserError(f"{unfit}: it is not that of {len(weights)} weights")
    taken = {}
    for number, weight in enumerate(weights):
        kept = state[number]
        shapes = dict.fromkeys(names, weight.shape) | ({"step": torch.Size()} if counts else {})
        if not isinstance(kept, dict) or {k: getattr(v, "shape", None) for k, v in kept.items()} != shapes:
            raise UserError(f"{unfit}: the moments of weight {number} are not of the weight's shape")
        try:
            with torch.no_grad():
                # In torch's order: a run that is gone on with ends in the same bytes.
                taken[number] = {"step": kept["step"].to(torch.float32, copy=True)} if counts else {}
                taken[number] |= {k: torch.empty_like(weight).copy_(kept[k]) for k in names}
        except RuntimeError as error:  # tensors of a kind that cannot be copied, as quantized ones
            raise UserError(f"{unfit}: the moments of weight {number} are no plain numbers") from error
    optimizer.load_state_dict({"state": taken, "param_groups": optimizer.state_dict()["param_groups"]})


def load_scale(scaler: torch.amp.GradScaler, checkpoint: Checkpoint) -> None:
    """Take over by how much gradients are scaled (fp16), and for how many steps that has gone well.

    Raises ValueError where the checkpoint holds no such numbers: torch would stumble over them in the first step.
    """
    if not scaler.is_enabled() or not checkpoint.scaler:
        return
    scale, steps = checkpoint.scaler.get("scale"), checkpoint.scaler.get("_growth_tracker")
    if type(scale) is not float or not 0 < scale < math.inf or type(steps) is not int or steps < 0:
        raise UserError(
            "the checkpoint's state of the gradient scaler is none: precision=bf16 or precision=fp32 goes on without it"
        )
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": steps})


def check_resumable(
    checkpoint: Checkpoint, config: Config, index: Index, *, other_shards: bool = False, tell: bool = True
) -> None:
    """Raise ValueError where a run cannot go on with these shards and this config.

    With `other_shards` what is different about the shards is warned of (where `tell` is set) and no more, if they have
    as many words.
    """
    if not checkpoint.optimizer:
        raise UserError(
            "an imported checkpoint has no state of training to go on from: begin a new run with its weights, "
            "init_from=PATH, in another --run"
        )
    try:
        check_fits(checkpoint, index)
        if checkpoint.dataset != index.fingerprint:
            raise UserError("the shards are others than those that the run began with, or were made anew since")
    except UserError as error:
        if len(index.labels) != len(checkpoint.labels):
            remedy = "Begin a new run with its weights: init_from=PATH, in another --run"
        elif other_shards:
            if tell:
                warn(f"{error}. Going on all the same, as --other-shards says")
            remedy = ""
        else:
            remedy = (
                "Add --other-shards to go on all the same, or begin a new run with its weights: init_from=PATH, in "
                "another --run"
            )
        if remedy:
            raise UserError(f"{error}. {remedy}") from error
    now, before = as_plain(config), as_plain(config_from(checkpoint.config))
    for name in ("model", "seed", "batch_size", "overfit", "optimizer", "freeze"):
        if now[name] != before[name]:
            raise UserError(
                f"the run has {name}={before[name]}, not {now[name]}, and that cannot change on its way: start a new "
                "run in another --run; init_from=PATH begins it with these weights"
            )


def warn_of_changes(checkpoint: Checkpoint, config: Config) -> None:
    """Say what is different from before, so that the run will not end as it would have."""
    if config.init_from != checkpoint.config.get("init_from"):
        warn("init_from is for the beginning of a run: this one goes on with its own weights")
    before, resolved = checkpoint.config.get("resolved") or {}, config.resolved
    before = {"torch": checkpoint.versions.get("torch"), **before}
    now = {"torch": versions()["torch"], **resolved}
    was, is_now = before.get("teacher_sha256"), resolved.get("teacher_sha256")
    if was != is_now:
        what = f"teacher={config.teacher} is not the file that the run has learnt from"
        if was is None or is_now is None:
            what = f"the run has learnt {'without' if was is None else 'from'} a teacher, and that changes now"
        warn(f"{what}: it will not end in the same weights as without the change")
    for name in ("device", "precision", "processes", "threads", "torch"):
        if before.get(name) is not None and name in now and before[name] != now[name]:
            warn(
                f"the run was on {name} {before[name]} and goes on with {now[name]}: it will not end in the same "
                "weights as without the change"
            )
