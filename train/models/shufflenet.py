"""ShuffleNetV2 without its first layer and its classifier (Ma et al. 2018), as used on LRW.

Its own activations are always ReLU, whatever the rest of the network has.
"""

import torch
from torch import Tensor, nn

# Channels before the first stage, of the three stages, and after the last convolution (the paper's table 5).
WIDTHS = {
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}
STAGE_UNITS = (4, 8, 4)


def _pointwise(in_channels: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


def _interleave(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """The channels a0, b0, a1, b1, ...: concatenation and two-group channel shuffle in one."""
    pairs = torch.stack((a_NCHW.movedim(1, -1), b_NCHW.movedim(1, -1)), dim=-1)
    return pairs.flatten(-2).movedim(-1, 1)  # last in memory: channels_last


class ShuffleUnit(nn.Module):
    """Half of the channels go through three convolutions, the other half pass; with stride 2 all channels
    go through both branches. `banch` is the published checkpoints' spelling."""

    def __init__(self, in_channels: int, channels: int, *, stride: int):
        super().__init__()
        half = channels // 2
        if stride == 2:
            self.banch1 = nn.Sequential(*_depthwise(in_channels, 2), *_pointwise(in_channels, half))
        else:
            self.banch1 = None
            in_channels = half
        self.banch2 = nn.Sequential(*_pointwise(in_channels, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.banch1 is None:
            kept, changed = x_NCHW.chunk(2, dim=1)
            return _interleave(kept, self.banch2(changed))
        return _interleave(self.banch1(x_NCHW), self.banch2(x_NCHW))


class ShuffleNetV2(nn.Sequential):
    """(N, 24, H, W) -> (N, 1024), or 2048 at width 2; averages over the image at the end."""

    def __init__(self, width_mult: float):
        channels, *stages, last = WIDTHS[width_mult]
        units = nn.Sequential()
        for width, num_units in zip(stages, STAGE_UNITS, strict=True):
            for unit in range(num_units):
                units.append(ShuffleUnit(channels, width, stride=2 if unit == 0 else 1))
                channels = width
        super().__init__(units, nn.Sequential(*_pointwise(channels, last)))
        self.channels = last

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW).mean((2, 3))
