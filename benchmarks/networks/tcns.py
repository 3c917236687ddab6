"""The published heads of temporal convolutions, (B, T, C) and lengths (B,) -> logits (B, words)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import ACTIVATIONS, Activation, mean_over_valid


class Chomp(nn.Module):
    """Cut as many frames off each end."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x_BCT: Tensor) -> Tensor:
        return x_BCT[:, :, self.frames : x_BCT.shape[2] - self.frames].contiguous()


def _temporal(
    inside: int, channels: int, size: int, dilation: int, activation: Activation, *, groups: int = 1
) -> list[nn.Module]:
    """Convolution, norm, cut, activation. Only a depthwise convolution has no bias."""
    padding = (size - 1) * dilation
    return [
        nn.Conv1d(inside, channels, size, padding=padding, dilation=dilation, groups=groups, bias=groups == 1),
        nn.BatchNorm1d(channels),
        Chomp(padding // 2),
        activation(channels),
    ]


def _separable(inside: int, channels: int, size: int, dilation: int, activation: Activation) -> list[nn.Module]:
    return [
        *_temporal(inside, inside, size, dilation, activation, groups=inside),
        nn.Conv1d(inside, channels, 1, bias=False),
        nn.BatchNorm1d(channels),
        activation(channels),
    ]


class TemporalBlock(nn.Module):
    """Each module has two names, and so each tensor is twice in the state_dict."""

    def __init__(
        self, inside: int, channels: int, size: int, dilation: int, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        names = ("conv", "batchnorm", "chomp", "relu", "dropout")
        layers = []
        for number, before in ((1, inside), (2, channels)):
            stage = [*_temporal(before, channels, size, dilation, activation), nn.Dropout(dropout)]
            for name, module in zip(names, stage, strict=True):
                self.add_module(f"{name}{number}", module)
            layers += stage
        self.net = nn.Sequential(*layers)
        self.downsample = nn.Conv1d(inside, channels, 1) if inside != channels else None
        self.relu = activation(channels)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.relu(self.net(x_BCT) + (x_BCT if self.downsample is None else self.downsample(x_BCT)))


class SeparableBlock(TemporalBlock):
    def __init__(
        self, inside: int, channels: int, size: int, dilation: int, activation: Activation, dropout: float
    ) -> None:
        nn.Module.__init__(self)
        self.net = nn.Sequential(
            *_separable(inside, channels, size, dilation, activation),
            nn.Dropout(dropout),
            *_separable(channels, channels, size, dilation, activation),
            nn.Dropout(dropout),
        )
        self.downsample = nn.Conv1d(inside, channels, 1) if inside != channels else None
        self.relu = activation(channels)


class Branch(nn.Module):
    def __init__(self, inside: int, channels: int, size: int, dilation: int, activation: Activation) -> None:
        super().__init__()
        self.conv, self.batchnorm, self.chomp, self.non_lin = _temporal(inside, channels, size, dilation, activation)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.non_lin(self.chomp(self.batchnorm(self.conv(x_BCT))))


class SeparableBranch(nn.Module):
    """With PReLU or ReLU: swish was never written for it."""

    def __init__(self, inside: int, channels: int, size: int, dilation: int, activation: Activation) -> None:
        super().__init__()
        own = activation if activation is ACTIVATIONS["prelu"] else ACTIVATIONS["relu"]
        self.conv = nn.Sequential(*_separable(inside, channels, size, dilation, own))

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.conv(x_BCT)


class Multiscale(nn.Module):
    """Twice all branches side by side, and a residual through a convolution always."""

    def __init__(
        self,
        branch: type[nn.Module],
        inside: int,
        channels: int,
        sizes: Sequence[int],
        dilation: int,
        activation: Activation,
        dropout: float,
    ) -> None:
        super().__init__()
        self.branches, width = range(len(sizes)), channels * len(sizes)
        for stage, before in enumerate((inside, width)):
            for number, size in enumerate(sizes):
                self.add_module(f"cbcr{stage}_{number}", branch(before, channels, size, dilation, activation))
        self.dropout = nn.Dropout(dropout)
        self.downsample = nn.Conv1d(inside, width, 1)
        self.relu_final = activation(width)

    def forward(self, x_BCT: Tensor) -> Tensor:
        out = x_BCT
        for stage in (0, 1):
            out = torch.cat([self.get_submodule(f"cbcr{stage}_{n}")(out) for n in self.branches], 1)
            out = self.dropout(out)
        return self.relu_final(out + self.downsample(x_BCT))


class SqueezeFrames(nn.Module):
    """Squeeze and excitation over all frames, padding too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        less = channels // 16
        layers = nn.Linear(channels, less, bias=False), nn.SiLU(), nn.Linear(less, channels, bias=False), nn.Sigmoid()
        self.fc = nn.Sequential(*layers)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return x_BCT * self.fc(x_BCT.mean(2))[:, :, None]


class DenseBranch(nn.Module):
    def __init__(self, inside: int, channels: int, size: int, dilation: int, activation: Activation) -> None:
        super().__init__()
        self.net = nn.Sequential(*_temporal(inside, channels, size, dilation, activation))

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.net(x_BCT)


class DenseLayer(nn.Module):
    def __init__(
        self,
        inside: int,
        growth: int,
        sizes: Sequence[int],
        dilation: int,
        activation: Activation,
        squeeze: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.branches, self.squeeze, channels = range(len(sizes)), squeeze, growth // len(sizes)
        for number, size in enumerate(sizes):
            if squeeze:
                self.add_module(f"cbcr0_se_{number}", SqueezeFrames(inside))
            self.add_module(f"cbcr0_{number}", DenseBranch(inside, channels, size, dilation, activation))
        for number, size in enumerate(sizes):
            branch = DenseBranch(channels * len(sizes), channels, size, dilation, activation)
            self.add_module(f"cbcr1_{number}", branch)
        self.dropout = nn.Dropout(dropout)
        self.downsample = nn.Conv1d(inside, channels * len(sizes), 1) if inside != channels * len(sizes) else None
        self.relu_final = activation(channels * len(sizes))

    def forward(self, x_BCT: Tensor) -> Tensor:
        first = []
        for number in self.branches:
            squeezed = self.get_submodule(f"cbcr0_se_{number}")(x_BCT) if self.squeeze else x_BCT
            first.append(self.get_submodule(f"cbcr0_{number}")(squeezed))
        out = self.dropout(torch.cat(first, 1))
        out = self.dropout(torch.cat([self.get_submodule(f"cbcr1_{n}")(out) for n in self.branches], 1))
        out = self.relu_final(out + (x_BCT if self.downsample is None else self.downsample(x_BCT)))
        return torch.cat((x_BCT, out), 1)


def _transition(inside: int, channels: int, activation: Activation) -> nn.Module:
    layer = nn.Sequential()
    layer.add_module("conv", nn.Conv1d(inside, channels, 1, bias=False))
    layer.add_module("norm", nn.BatchNorm1d(channels))
    layer.add_module("prelu", activation(channels))
    return layer


class TemporalHead(nn.Module):
    """A network over time under one of the published names, the mean over a clip's own frames, a classifier."""

    def __init__(self, name: str, part: str, blocks: nn.Module, channels: int, words: int) -> None:
        super().__init__()
        self.over_time = f"{name}.{part}"
        self.add_module(name, nn.ModuleDict({part: blocks}))
        self.tcn_output = nn.Linear(channels, words)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        out_BCT = self.get_submodule(self.over_time)(feat_BTC.transpose(1, 2))
        return self.tcn_output(mean_over_valid(out_BCT.transpose(1, 2), lengths_B))


def tcn(block: type[nn.Module]):
    def make(
        inside: int,
        words: int,
        activation: Activation,
        *,
        kernel_size: int = 3,
        num_layers: int = 4,
        channels: int = 256,
        dropout: float = 0.2,
    ) -> nn.Module:
        widths = [inside, *[channels] * num_layers]
        blocks = [block(widths[n], channels, kernel_size, 2**n, activation, dropout) for n in range(num_layers)]
        return TemporalHead("tcn_trunk", "network", nn.Sequential(*blocks), channels, words)

    return make


def mstcn(branch: type[nn.Module]):
    def make(
        inside: int,
        words: int,
        activation: Activation,
        *,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        num_layers: int = 4,
        channels: int = 256,
        dropout: float = 0.2,
    ) -> nn.Module:
        width = channels * len(kernel_sizes)
        widths = [inside, *[width] * num_layers]
        blocks = [
            Multiscale(branch, widths[n], channels, kernel_sizes, 2**n, activation, dropout) for n in range(num_layers)
        ]
        return TemporalHead("mb_ms_tcn", "network", nn.Sequential(*blocks), width, words)

    return make


def dctcn(
    inside: int,
    words: int,
    activation: Activation,
    *,
    block_layers: Sequence[int] = (3, 3, 3, 3),
    growth_rates: Sequence[int] = (384, 384, 384, 384),
    kernel_sizes: Sequence[int] = (3, 5, 7),
    dilations: Sequence[int] = (1, 2, 5),
    reduced_channels: int = 512,
    squeeze_excitation: bool = True,
    dropout: float = 0.2,
) -> nn.Module:
    """The densely connected head (Ma et al. 2021); its first transition has PReLU whatever the rest has."""
    features = nn.Sequential()
    features.add_module("transition0", _transition(inside, reduced_channels, nn.PReLU))
    for block, (layers, growth) in enumerate(zip(block_layers, growth_rates, strict=True), 1):
        width = reduced_channels
        dense = nn.Sequential()
        for layer in range(layers):
            dilation = dilations[layer % len(dilations)]
            one = DenseLayer(width, growth, kernel_sizes, dilation, activation, squeeze_excitation, dropout)
            dense.add_module(f"denselayer{layer + 1}", one)
            width += growth
        features.add_module(f"denseblock{block}", dense)
        if block < len(block_layers):
            features.add_module(f"transition{block}", _transition(width, reduced_channels, activation))
    features.add_module("norm5", nn.BatchNorm1d(width))
    return TemporalHead("tcn_trunk", "features", features, width, words)
