"""The networks of the field, built as their papers draw them: the yardstick of those in lipprep.train.models.

Conv3d in the stem; images one channel after another in memory; temporal convolutions padded at both ends by all that
the kernel reaches, normalised, and cut, in evaluation too; the mean over a clip's own frames in a loop over clips.
The names of the parameters are those of the published checkpoints, and so lipprep's: weights pass either way.

Letters of the shapes: B clips, T frames, C channels, H and W pixels, N frames of all clips in one row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .heads import HEADS
from .layers import ACTIVATIONS, valid_frames
from .trunks import TRUNKS


def network(model: Mapping, words: int) -> nn.Module:
    """The network of a recipe's `model`."""
    activation = ACTIVATIONS[model["activation"]]
    stem, trunk, channels = TRUNKS[model["trunk"]](model, activation)
    neck, options = nn.Sequential(), model.get("neck") or {}
    if wanted := options.get("channels"):
        neck.add_module("project", nn.Linear(channels, wanted))
        channels = wanted
    if options.get("norm"):
        neck.add_module("norm", nn.BatchNorm1d(channels))
    if dropout := options.get("dropout"):
        neck.add_module("dropout", nn.Dropout(dropout))
    head, boundary = dict(model["head"]), model.get("boundary") is not None
    make_head = HEADS[head.pop("name")]
    whole = CompactNetwork if model["trunk"] == "compact" else Network
    return whole(trunk, stem, neck, make_head(channels + boundary, words, activation, **head), boundary=boundary)


class Network(nn.Module):
    """Clips (B, 1, T, H, W), their lengths (B,), the frames of their words (B, T, 1) -> logits (B, words).

    Where `boundary`, the head sees the frames of the words, or zeros where they are not known.
    """

    def __init__(
        self, trunk: nn.Module, frontend3D: nn.Module, neck: nn.Module, tcn: nn.Module, *, boundary: bool
    ) -> None:
        super().__init__()
        self.trunk, self.frontend3D, self.neck, self.tcn = trunk, frontend3D, neck, tcn
        self.boundary = boundary

    def features(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, T, C), padding and all."""
        x_BCTHW = self.frontend3D(x_B1THW)
        B, C, T, H, W = x_BCTHW.shape
        return self.neck(self.trunk(x_BCTHW.transpose(1, 2).reshape(B * T, C, H, W))).view(B, T, -1)

    def forward(self, x_B1THW: Tensor, lengths_B: Tensor, boundary_BT1: Tensor | None = None) -> Tensor:
        feat_BTC = self.features(x_B1THW, lengths_B)
        if self.boundary:
            if boundary_BT1 is None:
                boundary_BT1 = feat_BTC.new_zeros(*feat_BTC.shape[:2], 1)
            feat_BTC = torch.cat((feat_BTC, boundary_BT1), 2)
        return self.tcn(feat_BTC, lengths_B)


class CompactNetwork(Network):
    """Only a clip's own frames reach the trunk, and count in its norms' statistics."""

    def features(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        valid_BT = valid_frames(lengths_B, x_B1THW.shape[2])
        x_BTCHW = self.frontend3D(x_B1THW * valid_BT[:, None, :, None, None]).transpose(1, 2)
        feat_NC = self.neck(self.trunk(self.frontend3D.finish(x_BTCHW[valid_BT])))
        feat_BTC = feat_NC.new_zeros(*valid_BT.shape, feat_NC.shape[1])
        feat_BTC[valid_BT] = feat_NC
        return feat_BTC
