"""The spatiotemporal stem of the published networks: one 3D convolution over 5 frames, then 2D all the way.

A 3D convolution of one input channel and stride 1 in time is a 2D convolution whose input channels are
the neighbouring frames. Computed so, its output already lies as (B * T, C, H, W) in channels_last memory,
which the trunks want, and a CPU is a third faster through the stem. The parameters keep their Conv3d shape.
"""

from torch import Tensor, nn
from torch.nn import functional

from lipprep.train.models.layers import activation


def unfold_frames(x_BTHW: Tensor, width: int) -> Tensor:
    """(B, T, H, W) -> (B, T, width, H, W): each frame with its neighbours in time, zeros beyond the ends.

    `width` is odd. The last three dimensions lie in channels_last memory.
    """
    reach = width // 2
    return functional.pad(x_BTHW, (0, 0, 0, 0, reach, reach)).unfold(1, width, 1).contiguous().movedim(-1, 2)


class FrameConv3d(nn.Conv3d):
    """Conv3d of one input channel, "same" in time, giving (B, 1, T, H, W) -> (B * T, C, H', W')."""

    def forward(self, x_B1THW: Tensor) -> Tensor:
        frames_NCHW = unfold_frames(x_B1THW[:, 0], self.kernel_size[0]).flatten(0, 1)
        return functional.conv2d(frames_NCHW, self.weight[:, 0], self.bias, self.stride[1:], self.padding[1:])


class Stem(nn.Sequential):
    """5x7x7 convolution, batch norm, activation, 3x3 max pooling (Stafylakis & Tzimiropoulos 2017)."""

    skips_padding = False

    def __init__(self, channels: int, activation_name: str, *, bias: bool = False):
        super().__init__(
            FrameConv3d(1, channels, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=bias),
            nn.BatchNorm2d(channels),
            activation(activation_name, channels),
            nn.MaxPool2d(3, 2, 1),
        )

    def forward(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """-> (B * T, C, H / 4, W / 4). `lengths_B` is not used: the published networks see the padding."""
        return super().forward(x_B1THW)
