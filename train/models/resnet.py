"""ResNet-18 without its first layer and its classifier (He et al. 2016), as used on LRW."""

from collections import OrderedDict

from torch import Tensor, nn

from lipprep.train.models.layers import activation


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual; an activation of its own after each sum."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, activation_name: str):
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

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out = self.relu1(self.bn1(self.conv1(x_NCHW)))
        return self.relu2(self.bn2(self.conv2(out)) + residual)


class ResNet(nn.Sequential):
    """One layer of `blocks` BasicBlocks for each width, halving the image from the second layer on,
    then the average over the image: (N, in_channels, H, W) -> (N, widths[-1])."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], *, blocks: int, activation_name: str):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, width in enumerate(widths, 1):
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if number > 1 and block == 0 else 1
                layer.append(BasicBlock(in_channels, width, stride=stride, activation_name=activation_name))
                in_channels = width
            layers[f"layer{number}"] = layer
        super().__init__(layers)
        self.channels = in_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW).mean((2, 3))
