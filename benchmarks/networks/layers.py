"""What trunks and heads share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS = {"prelu": nn.PReLU, "relu": lambda channels: nn.ReLU(inplace=True), "swish": lambda channels: nn.SiLU()}
Activation = Callable[[int], nn.Module]


def valid_frames(lengths_B: Tensor, frames: int) -> Tensor:
    """(B, T) bool"""
    return torch.arange(frames, device=lengths_B.device) < lengths_B[:, None]


def mean_over_valid(feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.stack([clip[:length].mean(0) for clip, length in zip(feat_BTC, lengths_B, strict=True)])
