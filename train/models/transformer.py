"""A transformer encoder over time as a head (Vaswani et al. 2017), of the pre-norm kind (Xiong et al. 2020)."""

import math

import torch
from torch import Tensor, nn

from lipprep.io.errors import UserError
from lipprep.train.models.layers import mean_over_valid, valid_frames


def positions(num_frames: int, channels: int, like: Tensor) -> Tensor:
    """Sinusoidal encodings of the places 0 to T - 1, (T, C) in the dtype of `like`: any length has them."""
    rates = torch.exp(torch.arange(0, channels, 2, device=like.device) * (-math.log(10_000) / channels))
    angles = torch.arange(num_frames, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :channels].to(like.dtype)


class TransformerHead(nn.Module):
    """Layers of self-attention over a clip's own frames, their mean, a classifier; padding is not looked at."""

    ignores_padding = True
    drawn_by_torch = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        activation_name: str,
        channels: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ):
        super().__init__()
        if channels % num_heads:
            raise UserError(f"channels {channels} of the transformer head are no multiple of its {num_heads} num_heads")
        self.project = nn.Linear(in_channels, channels)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            channels, num_heads, 4 * channels, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(channels), enable_nested_tensor=False)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        num_frames = feat_BTC.shape[1]
        out_BTC = self.project(feat_BTC)
        out_BTC = self.dropout(out_BTC + positions(num_frames, out_BTC.shape[2], out_BTC))
        out_BTC = self.layers(out_BTC, src_key_padding_mask=~valid_frames(lengths_B, num_frames))
        return self.output(mean_over_valid(out_BTC, lengths_B))
