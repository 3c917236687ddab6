"""Residual trunks without their first layer and their classifier, as used on LRW.

ResNet-18 and -34 (He et al. 2016a), with pre-activation (He et al. 2016b), or with squeeze and excitation (Hu et al.
2018).
"""

import math
from collections import OrderedDict

from torch import Tensor, nn

from lipprep.train.models.layers import activation

WIDTHS = (64, 128, 256, 512)
REDUCTION = 16  # of the channels in squeeze and excitation


class SqueezeExcite(nn.Module):
    """Each channel of an image times a gate that the image's channel means decide."""

    def __init__(self, channels: int, *, bias: bool):
        super().__init__()
        self.excitation = nn.Sequential(
            nn.Linear(channels, channels // REDUCTION, bias=bias),
            nn.ReLU(inplace=True),
            nn.Linear(channels // REDUCTION, channels, bias=bias),
            nn.Sigmoid(),
        )
        # Where it has biases it is published as convolutions of one pixel, and drawn as those are.
        self.drawn_by_torch = bias
        if bias:
            for layer in (self.excitation[0], self.excitation[2]):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_features))
                nn.init.zeros_(layer.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW * self.excitation(x_NCHW.mean((2, 3)))[:, :, None, None]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, gated or not, and a residual; an activation of its own after each sum."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        activation_name: str,
        gate: nn.Module | None = None,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        # The order of registration is that of the published checkpoints.
        self.relu1 = activation(activation_name, channels)
        self.relu2 = activation(activation_name, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.se = gate

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        if self.se is not None:
            out = self.se(out)
        return self.relu2(out + residual)


class PreActivationBlock(nn.Module):
    """Twice (norm, activation, 3x3 convolution) and a residual; where the shape changes, that is a 1x1 convolution of
    what the first norm and activation give. The `first` block of a trunk has neither: the stem ends with them."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, activation_name: str, first: bool):
        super().__init__()
        self.bn1 = nn.Identity() if first else nn.BatchNorm2d(in_channels)
        self.relu1 = nn.Identity() if first else activation(activation_name, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = activation(activation_name, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x_NCHW))
        residual = x_NCHW if self.downsample is None else self.downsample(out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + residual


class ResNet(nn.Sequential):
    """One layer of blocks for each width, halving the image from the second layer on, then the average over the image:
    (N, in_channels, H, W) -> (N, widths[-1]).

    `blocks` are those of each layer. `gated` adds squeeze and excitation to them, with biases where `gate_bias`;
    `preactivation` takes the other kind of block, and ends with a norm and an activation.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        *,
        blocks: tuple[int, ...],
        activation_name: str,
        preactivation: bool = False,
        gated: bool = False,
        gate_bias: bool = False,
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
            layer = nn.Sequential()
            for block in range(count):
                how = {"stride": 2 if number > 1 and block == 0 else 1, "activation_name": activation_name}
                if preactivation:
                    layer.append(PreActivationBlock(in_channels, width, first=number == 1 and block == 0, **how))
                else:
                    gate = SqueezeExcite(width, bias=gate_bias) if gated else None
                    layer.append(BasicBlock(in_channels, width, gate=gate, **how))
                in_channels = width
            layers[f"layer{number}"] = layer
        if preactivation:
            layers["norm"] = nn.BatchNorm2d(in_channels)
            layers["relu"] = activation(activation_name, in_channels)
        super().__init__(layers)
        self.channels = in_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for layer in self:
            # Images in the order of memory that the layer's weights were placed in: it follows either of them.
            if isinstance(layer, nn.Sequential) and layer[0].conv1.weight.is_contiguous():
                x_NCHW = x_NCHW.contiguous()
            x_NCHW = layer(x_NCHW)
        return x_NCHW.mean((2, 3))
