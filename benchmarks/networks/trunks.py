"""Stems, and trunks from images (N, C, H, W) to features (N, C). Each of TRUNKS gives a stem, a trunk and C."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .layers import Activation


class Stem(nn.Sequential):
    def __init__(self, channels: int, activation: Activation, *, bias: bool = False) -> None:
        super().__init__(
            nn.Conv3d(1, channels, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=bias),
            nn.BatchNorm3d(channels),
            activation(channels),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )


class CompactStem(nn.Module):
    """lipprep's own: the halved image through a 5x5x5 convolution; then, for single frames, norm, pool, activation."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 32, 5, bias=False)  # five frames are its channels, but only by its shape
        self.norm, self.activation = nn.BatchNorm2d(32), activation(32)
        self.halve, self.pool = nn.AvgPool3d((1, 2, 2)), nn.MaxPool2d(2)

    def forward(self, x_B1THW: Tensor) -> Tensor:
        """-> (B, C, T, H / 4, W / 4)"""
        return nn.functional.conv3d(self.halve(x_B1THW), self.conv.weight[:, None], None, (1, 2, 2), 2)

    def finish(self, x_NCHW: Tensor) -> Tensor:
        return self.activation(self.pool(self.norm(x_NCHW)))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        less = channels // 16
        layers = nn.Linear(channels, less, bias=bias), nn.ReLU(), nn.Linear(less, channels, bias=bias), nn.Sigmoid()
        self.excitation = nn.Sequential(*layers)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW * self.excitation(x_NCHW.mean((2, 3)))[:, :, None, None]


class Block(nn.Module):
    """The basic block of a ResNet (He et al. 2016a), with squeeze and excitation (Hu et al. 2018) where it is given."""

    def __init__(
        self, inside: int, channels: int, stride: int, activation: Activation, se: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = activation(channels), activation(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inside != channels:
            across = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(across, nn.BatchNorm2d(channels))
        self.se = se

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_NCHW)))))
        if self.se is not None:
            out = self.se(out)
        return self.relu2(out + (x_NCHW if self.downsample is None else self.downsample(x_NCHW)))


class PreActivationBlock(nn.Module):
    """The block of He et al. 2016b: norm and activation before each convolution."""

    def __init__(self, inside: int, channels: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inside), activation(inside)
        self.conv1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), activation(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample = None
        if stride != 1 or inside != channels:
            self.downsample = nn.Conv2d(inside, channels, 1, stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        first = self.relu1(self.bn1(x_NCHW))
        out = self.conv2(self.relu2(self.bn2(self.conv1(first))))
        return out + (x_NCHW if self.downsample is None else self.downsample(first))


def residual(inside: int, widths: Sequence[int], counts: Sequence[int], block: Callable[..., nn.Module]) -> nn.Module:
    """`layer1`, `layer2`, ...: the images are halved from the second on."""
    layers = nn.Sequential()
    for number, (width, count) in enumerate(zip(widths, counts, strict=True), 1):
        layer = nn.Sequential()
        for place in range(count):
            layer.append(block(inside, width, 2 if number > 1 and place == 0 else 1))
            inside = width
        layers.add_module(f"layer{number}", layer)
    return layers


def average(trunk: nn.Sequential) -> nn.Sequential:
    trunk.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    trunk.add_module("flatten", nn.Flatten())
    return trunk


def resnet(counts: Sequence[int]):
    def make(model: Mapping, activation: Activation) -> tuple[nn.Module, nn.Module, int]:
        before = model.get("preactivation", False)
        kind = PreActivationBlock if before else Block
        trunk = residual(64, (64, 128, 256, 512), counts, lambda *shape: kind(*shape, activation))
        if before:
            # The stem has just ended with both.
            trunk.layer1[0].bn1 = trunk.layer1[0].relu1 = nn.Identity()
            trunk.add_module("norm", nn.BatchNorm2d(512))
            trunk.add_module("relu", activation(512))
        return Stem(64, activation, bias=model.get("stem_bias", False)), average(trunk), 512

    return make


def senet(model: Mapping, activation: Activation) -> tuple[nn.Module, nn.Module, int]:
    def block(inside: int, channels: int, stride: int) -> nn.Module:
        return Block(inside, channels, stride, activation, SqueezeExcitation(channels, model.get("gate_bias", False)))

    return Stem(64, activation), average(residual(64, (64, 128, 256, 512), (2, 2, 2, 2), block)), 512


def compact(model: Mapping, activation: Activation) -> tuple[nn.Module, nn.Module, int]:
    trunk = residual(32, (32, 64, 128), (1, 1, 1), lambda *shape: Block(*shape, activation))
    return CompactStem(activation), average(trunk), 128


def _pointwise(inside: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


class Unit(nn.Module):
    """A unit of ShuffleNetV2 (Ma et al. 2018)."""

    def __init__(self, inside: int, channels: int, stride: int) -> None:
        super().__init__()
        half, self.stride = channels // 2, stride
        if stride == 2:
            self.banch1 = nn.Sequential(*_depthwise(inside, 2), *_pointwise(inside, half))
        else:
            inside = half
        self.banch2 = nn.Sequential(*_pointwise(inside, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.stride == 2:
            out = torch.cat((self.banch1(x_NCHW), self.banch2(x_NCHW)), 1)
        else:
            half = x_NCHW.shape[1] // 2
            out = torch.cat((x_NCHW[:, :half], self.banch2(x_NCHW[:, half:])), 1)
        N, C, H, W = out.shape
        return out.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W)


SHUFFLENET = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shufflenet(model: Mapping, activation: Activation) -> tuple[nn.Module, nn.Module, int]:
    """ShuffleNetV2, with ReLU whatever the rest has."""
    *widths, last = SHUFFLENET[model.get("width_mult", 1.0)]
    units, inside = nn.Sequential(), 24
    for width, count in zip(widths, (4, 8, 4), strict=True):
        for number in range(count):
            units.append(Unit(inside, width, 2 if number == 0 else 1))
            inside = width
    trunk = nn.Sequential(units, nn.Sequential(*_pointwise(inside, last)))
    return Stem(24, activation), average(trunk), last


class SamePad(nn.ZeroPad2d):
    """TensorFlow's padding "SAME" for images of one size, the odd pixel at the right and the bottom."""

    def __init__(self, size: int, kernel: int, stride: int) -> None:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        super().__init__((total // 2, total - total // 2) * 2)


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MobileBlock(nn.Module):
    """An inverted residual with squeeze and excitation (Tan & Le 2019)."""

    def __init__(
        self, inside: int, channels: int, kernel: int, stride: int, expand: int, size: int, drop: float
    ) -> None:
        super().__init__()
        wide, less = inside * expand, inside // 4
        self.expands, self.residual, self.drop = expand > 1, stride == 1 and inside == channels, drop
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inside, wide, 1, bias=False), _norm(wide)
        self.pad = SamePad(size, kernel, stride)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._se_reduce, self._se_expand = nn.Conv2d(wide, less, 1), nn.Conv2d(less, wide, 1)
        self._project_conv, self._bn2 = nn.Conv2d(wide, channels, 1, bias=False), _norm(channels)
        self.swish, self.pool = nn.SiLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = x_NCHW
        if self.expands:
            out = self.swish(self._bn0(self._expand_conv(out)))
        out = self.swish(self._bn1(self._depthwise_conv(self.pad(out))))
        out = out * torch.sigmoid(self._se_expand(self.swish(self._se_reduce(self.pool(out)))))
        out = self._bn2(self._project_conv(out))
        if not self.residual:
            return out
        if self.training and self.drop:
            kept = torch.rand(len(out), 1, 1, 1, device=out.device) >= self.drop
            out = out * kept / (1 - self.drop)
        return x_NCHW + out


class EfficientNetB3(nn.Module):
    """EfficientNet-B3 (Tan & Le 2019) with its classifier of a thousand classes, padded as for images of 300 pixels."""

    # repeats, kernel, stride, expansion, channels
    STAGES = (
        (2, 3, 1, 1, 24),
        (3, 3, 2, 6, 32),
        (3, 5, 2, 6, 48),
        (5, 3, 2, 6, 96),
        (5, 5, 1, 6, 136),
        (6, 5, 2, 6, 232),
        (2, 3, 1, 6, 384),
    )

    def __init__(self) -> None:
        super().__init__()
        size, inside, number, total = 150, 40, 0, sum(stage[0] for stage in self.STAGES)
        self.pad, self._conv_stem, self._bn0 = SamePad(300, 3, 2), nn.Conv2d(3, 40, 3, 2, bias=False), _norm(40)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expand, channels in self.STAGES:
            for repeat in range(repeats):
                step, drop = 1 if repeat else stride, 0.2 * number / total
                self._blocks.append(MobileBlock(inside, channels, kernel, step, expand, size, drop))
                size, inside, number = -(-size // step), channels, number + 1
        self._conv_head, self._bn1 = nn.Conv2d(inside, 1536, 1, bias=False), _norm(1536)
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3)
        self._fc, self.swish = nn.Linear(1536, 1000), nn.SiLU()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.swish(self._bn0(self._conv_stem(self.pad(x_NCHW))))
        for block in self._blocks:
            x_NCHW = block(x_NCHW)
        x_NCHW = self.swish(self._bn1(self._conv_head(x_NCHW)))
        return self._fc(self.dropout(self.pool(x_NCHW).flatten(1)))


def efficientnet(model: Mapping, activation: Activation) -> tuple[nn.Module, nn.Module, int]:
    return Stem(3, activation), EfficientNetB3(), 1000


TRUNKS = {
    "resnet18": resnet((2, 2, 2, 2)),
    "resnet34": resnet((3, 4, 6, 3)),
    "senet18": senet,
    "shufflenetv2": shufflenet,
    "efficientnet_b3": efficientnet,
    "compact": compact,
}
