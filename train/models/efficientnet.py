"""EfficientNet-B3 (Tan & Le 2019) as a trunk, its 1000-way classifier the features, as one published lip reader has it.

Its weights come from a port of TensorFlow's code: the names, the norms' constants and the paddings are that port's. It
pads as TensorFlow does ("SAME"), for the 300 pixels that B3 is meant for, whatever comes in: on smaller images, and
where an image's side is odd, that is neither TensorFlow's padding nor a symmetric one, so that no other EfficientNet
gives the same output.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_SIZE = 300  # pixels that B3 is meant for
FEATURES = 1000
STEM_WIDTH, HEAD_WIDTH = 40, 1536
# B3 is B0 (the paper's table 1), 1.2 times as wide and 1.4 times as deep: kernel size, stride, expansion, output
# channels, blocks.
STAGES = (
    (3, 1, 1, 24, 2),
    (3, 2, 6, 32, 3),
    (5, 2, 6, 48, 3),
    (3, 2, 6, 96, 5),
    (5, 1, 6, 136, 5),
    (5, 2, 6, 232, 6),
    (3, 1, 6, 384, 2),
)
DROPOUT, DROP_CONNECT = 0.3, 0.2


class SameConv2d(nn.Conv2d):
    """A convolution padded so that an image of `size` pixels gives size / stride of them, rounded up; an odd pixel of
    padding goes to the right and the bottom."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int = 1, *, size: int, groups: int = 1
    ):
        padding = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
        even = padding % 2 == 0
        super().__init__(
            in_channels, channels, kernel_size, stride, padding // 2 if even else 0, groups=groups, bias=False
        )
        self.uneven = None if even else (padding // 2, padding - padding // 2) * 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW if self.uneven is None else functional.pad(x_NCHW, self.uneven))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, and a residual where the shape stays."""

    def __init__(
        self, in_channels: int, channels: int, *, kernel_size: int, stride: int, expansion: int, size: int, drop: float
    ):
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel_size, stride, size=size, groups=width)
        self._bn1 = _norm(width)
        squeezed = max(1, in_channels // 4)
        self._se_reduce = nn.Conv2d(width, squeezed, 1)
        self._se_expand = nn.Conv2d(squeezed, width, 1)
        self._project_conv = nn.Conv2d(width, channels, 1, bias=False)
        self._bn2 = _norm(channels)
        self.residual = stride == 1 and in_channels == channels
        self.drop = drop

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = x_NCHW
        if self.expands:
            out = functional.silu(self._bn0(self._expand_conv(out)))
        out = functional.silu(self._bn1(self._depthwise_conv(out)))
        gate = self._se_expand(functional.silu(self._se_reduce(out.mean((2, 3), keepdim=True))))
        out = self._bn2(self._project_conv(out * gate.sigmoid()))
        if not self.residual:
            return out
        if self.training and self.drop:
            # Stochastic depth (Huang et al. 2016): of each image the block counts or does not.
            kept = torch.rand(len(out), 1, 1, 1, device=out.device) >= self.drop
            out = out * (kept / (1 - self.drop)).to(out.dtype)
        return out + x_NCHW


class EfficientNetB3(nn.Module):
    """(N, 3, H, W) -> (N, 1000)."""

    smallest = 48  # pixels of the crop: with its paddings, less leaves nothing

    def __init__(self) -> None:
        super().__init__()
        size = IMAGE_SIZE
        self._conv_stem = SameConv2d(3, STEM_WIDTH, 3, 2, size=size)
        self._bn0 = _norm(STEM_WIDTH)
        size = math.ceil(size / 2)
        self._blocks = nn.ModuleList()
        in_channels, count = STEM_WIDTH, sum(blocks for *_, blocks in STAGES)
        for kernel_size, first_stride, expansion, channels, blocks in STAGES:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                bottleneck = InvertedBottleneck(
                    in_channels,
                    channels,
                    kernel_size=kernel_size,
                    stride=stride,
                    expansion=expansion,
                    size=size,
                    drop=DROP_CONNECT * len(self._blocks) / count,
                )
                self._blocks.append(bottleneck)
                in_channels, size = channels, math.ceil(size / stride)
        self._conv_head = nn.Conv2d(in_channels, HEAD_WIDTH, 1, bias=False)
        self._bn1 = _norm(HEAD_WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self._fc = nn.Linear(HEAD_WIDTH, FEATURES)
        self.channels = FEATURES

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = functional.silu(self._bn0(self._conv_stem(x_NCHW)))
        for block in self._blocks:
            out = block(out)
        out = functional.silu(self._bn1(self._conv_head(out)))
        return self._fc(self.dropout(out.mean((2, 3))))
