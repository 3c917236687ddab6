"""What the parts of a lip reader share: activations, initialisation, and the frames that are no padding.

Letters of the shape suffixes in this folder: B clips, T frames, C channels, H and W pixels, N frames of
all clips in one row (either all B * T of them or, where padding is skipped, the valid ones).
"""

import math

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "prelu": lambda channels: nn.PReLU(channels),
    "relu": lambda channels: nn.ReLU(inplace=True),
    "swish": lambda channels: nn.SiLU(),
}


def activation(name: str, channels: int) -> nn.Module:
    """The non-linearity NAME for `channels` channels (PReLU has one slope a channel)."""
    return ACTIVATIONS[name](channels)


def initialise(model: nn.Module) -> None:
    """Draw weights as the published LRW networks do: normal, scaled by the fan-out for convolutions
    (He et al. 2015) and by the fan-in for linear layers; biases of convolutions zero.

    Parts that have `drawn_by_torch` keep what torch has drawn, as the published ones of their kind do.
    """
    kept = {part for module in model.modules() if getattr(module, "drawn_by_torch", False) for part in module.modules()}
    for module in model.modules():
        if module in kept:
            continue
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            # All output channels count, for grouped convolutions too, as in the published code.
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_features))


def valid_frames(lengths_B: Tensor, num_frames: int) -> Tensor:
    """(B, T) bool: True where a frame belongs to its clip, False where it is padding."""
    return torch.arange(num_frames, device=lengths_B.device) < lengths_B[:, None]


def mean_over_valid(feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, C): each clip's features averaged over its first `lengths_B` frames."""
    valid_BT1 = valid_frames(lengths_B, feat_BTC.shape[1])[:, :, None]
    return (feat_BTC * valid_BT1).sum(1) / lengths_B[:, None].to(feat_BTC.dtype)


class Packing:
    """From frames as they stand, (B, T, ...), to the valid ones in one row, (N, ...), and back.

    A traced network (torch.export) has no shapes that depend on what it reads: there the row holds all B * T frames,
    and the way back leaves zeros in the padding all the same. In evaluation, where norms do not look at their batch,
    that makes no difference.
    """

    def __init__(self, lengths_B: Tensor, num_frames: int):
        self.valid_BT = valid_frames(lengths_B, num_frames)
        self._all = torch.compiler.is_exporting()
        if not self._all:
            self._positions_N = self.valid_BT.flatten().nonzero()[:, 0]

    def pack(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...): the valid frames alone."""
        rows = x_BT.flatten(0, 1)
        return rows if self._all else rows.index_select(0, self._positions_N)

    def unpack(self, feat_NC: Tensor) -> Tensor:
        """(N, C) -> (B, T, C) with zeros in the padding; the inverse of `pack`."""
        if self._all:
            return feat_NC.masked_fill(~self.valid_BT.flatten()[:, None], 0.0).unflatten(0, self.valid_BT.shape)
        feat = feat_NC.new_zeros(self.valid_BT.numel(), feat_NC.shape[1])
        return feat.index_copy(0, self._positions_N, feat_NC).unflatten(0, self.valid_BT.shape)
