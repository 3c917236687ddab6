"""How weights follow their gradients, and at what rate: the optimizers and schedules of the published recipes."""

import math
from collections.abc import Iterable

import torch

from lipprep.train.config import Config

MOMENTUM = 0.9  # of SGD, in the published trainers


def make_optimizer(weights: Iterable[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimizer of a config: in AdamW weights decay by themselves, in Adam and SGD as a part of the gradient (L2).

    Loshchilov & Hutter 2019 (AdamW), Kingma & Ba 2015 (Adam).
    """
    how = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        # Not the fused one: where fp16's first gradients overflow, its momentum begins as whatever the memory held.
        return torch.optim.SGD(weights, momentum=MOMENTUM, **how)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(weights, fused=True, **how)


def learning_rate(step: int, *, total: int, per_epoch: int, config: Config) -> float:
    """The rate of step `step` (from 0) of `total`, `per_epoch` of them an epoch: a linear warm-up, then `schedule`.

    `cosine` falls from the end of the warm-up to the last step. The others go by whole epochs, e from 0 of E (the last
    one may be cut short), and the warm-up is a factor on them: `cosine_by_epoch` is half a cosine over E, `mpc001` that
    of the published LRW trainer, which stands still in its second epoch, and `halving` halves every `halve_every`
    epochs. Cosines fall to `lr_min`.
    """
    warmup, epoch, epochs = round(config.warmup * total), step // per_epoch, math.ceil(total / per_epoch)
    match config.schedule:
        case "halving":
            rate = config.lr * 0.5 ** (epoch // config.halve_every)
        case "cosine":
            rate = _cosine(max(0, step - warmup), max(1, total - warmup), config)
        case "cosine_by_epoch":
            rate = _cosine(epoch, epochs, config)
        case "mpc001":
            rate = _cosine(max(0, epoch - 1), epochs, config)
    return rate * (step + 1) / warmup if step < warmup else rate


def _cosine(done: int, of: int, config: Config) -> float:
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * done / of))
