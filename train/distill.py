"""Self-distillation: a student learns its labels, and what its teacher, an earlier network, answers to the same clips.

Born-again networks (Furlanello et al. 2018), as Ma et al. 2021 (arXiv 2007.06504) train lip readers: each student is
the teacher of the next one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lipprep.io.errors import UserError
from lipprep.stages.shard.index import Index
from lipprep.train.checkpoint import check_fits, find_checkpoint, load_checkpoint, sha256_of
from lipprep.train.config import Config, config_from
from lipprep.train.device import load_model
from lipprep.train.licence import is_of_lrw


@dataclass(frozen=True)
class Teacher:
    """A network that has learnt, in evaluation mode and without gradients.

    `sha256` is that of its file; `generation` 0 where it had no teacher itself, else one more than its teacher's;
    `of_lrw` says whether its weights come from LRW.
    """

    model: torch.nn.Module
    sha256: str
    generation: int
    of_lrw: bool


def load_teacher(config: Config, index: Index, device: torch.device) -> Teacher:
    """The teacher of a config, its moving average where it has one. It may be of any architecture.

    Raises ValueError where there is none, or it has other words, was trained on other crops, or sees their pixels in
    another way than its student.
    """
    if not config.teacher:
        raise UserError(
            f"recipe {config.recipe} needs a teacher, a run to learn from: `lipprep train --recipe {config.recipe} "
            "teacher=RUN`; teacher=null trains without"
        )
    try:
        path = find_checkpoint(Path(config.teacher))
        checkpoint = load_checkpoint(path)
        check_fits(checkpoint, index)
        theirs = config_from(checkpoint.config)
    except UserError as error:
        raise UserError(f"teacher={config.teacher}: {error}") from error
    ours = config.augment
    # The mean of all pixels goes with that of a clip's frames.
    names = ("crop_size", "std", "subtract_mean_frame", "mean_frame_gain" if ours.subtract_mean_frame else "mean")
    for name in names:
        value, here = getattr(theirs.augment, name), getattr(ours, name)
        if value != here:
            raise UserError(
                f"teacher={config.teacher} sees clips with augment.{name}={value}, this run with {here}: give "
                f"augment.{name}={value}, or name another teacher"
            )
    generation = theirs.resolved.get("generation", 0)
    if type(generation) is not int or generation < 0:
        raise UserError(f"teacher={config.teacher}: its generation is {generation!r:.40}, which is no number")
    sha256 = sha256_of(path)
    return Teacher(load_model(checkpoint, device).requires_grad_(False), sha256, generation, is_of_lrw(checkpoint))


def distillation(logits_BC: Tensor, taught_BC: Tensor, *, temperature: float) -> Tensor:
    """How far a student's answers are from its teacher's, `taught_BC`: a scalar, the mean over clips.

    T^2 KL(teacher || student) of the softmax at temperature T; by the square, gradients are as large whatever T is
    (Hinton et al. 2015).
    """
    log_p_BC, log_q_BC = (functional.log_softmax(x_BC / temperature, dim=1) for x_BC in (logits_BC, taught_BC))
    return temperature**2 * functional.kl_div(log_p_BC, log_q_BC, log_target=True, reduction="batchmean")
