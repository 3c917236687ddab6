"""Temporal heads of the published networks: TCN and multi-scale TCN (Martinez et al. 2020), and both of depthwise
separable convolutions (Ma et al. 2021).

Features (B, T, C) of the frames go through dilated convolutions, are averaged over each clip's own frames
and classified. As published, the average is the only place that knows the lengths: what stands in the
padding reaches a clip's last frames through the convolutions.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipprep.train.models.layers import activation, mean_over_valid


def same_conv(
    in_channels: int, channels: int, kernel_size: int, dilation: int = 1, *, groups: int = 1, bias: bool = True
) -> nn.Conv1d:
    """A temporal convolution that keeps the number of frames; `kernel_size` is odd."""
    padding = dilation * (kernel_size - 1) // 2
    how = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    return nn.Conv1d(in_channels, channels, kernel_size, **how)


def conv_norm(conv: nn.Conv1d, norm: nn.BatchNorm1d, x_BCT: Tensor) -> Tensor:
    """norm(conv(x)), with the published networks' batch statistics.

    They pad by twice as much, normalise, and then cut the surplus frames off both ends, so that these
    count in the batch statistics. In evaluation they would only be computed in vain.
    """
    if not norm.training:
        return norm(conv(x_BCT))
    surplus = conv.padding[0]
    return norm(conv(functional.pad(x_BCT, (surplus, surplus)))).narrow(2, surplus, x_BCT.shape[2])


class TemporalBlock(nn.Module):
    """Twice (convolution, norm, activation, dropout), and a residual.

    The published checkpoints hold every tensor twice, by name and by its place in `net`. So does this
    state_dict; the modules and parameters exist once.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_size: int,
        dilation: int,
        dropout: float,
        activation_name: str,
    ):
        super().__init__()
        self.conv1 = same_conv(in_channels, channels, kernel_size, dilation)
        self.batchnorm1 = nn.BatchNorm1d(channels)
        self.relu1 = activation(activation_name, channels)
        self.conv2 = same_conv(channels, channels, kernel_size, dilation)
        self.batchnorm2 = nn.BatchNorm1d(channels)
        self.relu2 = activation(activation_name, channels)
        self.net = nn.ModuleDict(
            {
                "0": self.conv1,
                "1": self.batchnorm1,
                "3": self.relu1,
                "5": self.conv2,
                "6": self.batchnorm2,
                "8": self.relu2,
            }
        )
        self.downsample = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else None
        self.relu = activation(activation_name, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BCT: Tensor) -> Tensor:
        residual = x_BCT if self.downsample is None else self.downsample(x_BCT)
        out = self.dropout(self.relu1(conv_norm(self.conv1, self.batchnorm1, x_BCT)))
        out = self.dropout(self.relu2(conv_norm(self.conv2, self.batchnorm2, out)))
        return self.relu(out + residual)


class SeparableBlock(nn.Module):
    """As TemporalBlock, but for each convolution a depthwise and a pointwise one, both with norm and activation, and
    without bias."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_size: int,
        dilation: int,
        dropout: float,
        activation_name: str,
    ):
        super().__init__()
        first = _separable(in_channels, channels, kernel_size, dilation, activation_name)
        second = _separable(channels, channels, kernel_size, dilation, activation_name)
        # The places that the published code's list of layers has them at, less its cuts and dropouts.
        self.net = nn.ModuleDict({**first, **{str(int(place) + 8): module for place, module in second.items()}})
        self.downsample = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else None
        self.relu = activation(activation_name, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BCT: Tensor) -> Tensor:
        residual = x_BCT if self.downsample is None else self.downsample(x_BCT)
        out = self.dropout(_through_separable(self.net, 0, x_BCT))
        out = self.dropout(_through_separable(self.net, 8, out))
        return self.relu(out + residual)


def _separable(
    in_channels: int, channels: int, kernel_size: int, dilation: int, activation_name: str
) -> dict[str, nn.Module]:
    depthwise = same_conv(in_channels, in_channels, kernel_size, dilation, groups=in_channels, bias=False)
    return {
        "0": depthwise,
        "1": nn.BatchNorm1d(in_channels),
        "3": activation(activation_name, in_channels),
        "4": nn.Conv1d(in_channels, channels, 1, bias=False),
        "5": nn.BatchNorm1d(channels),
        "6": activation(activation_name, channels),
    }


def _through_separable(layers: nn.ModuleDict, first: int, x_BCT: Tensor) -> Tensor:
    depthwise, norm, act, pointwise, norm_after, act_after = (layers[str(first + n)] for n in (0, 1, 3, 4, 5, 6))
    return act_after(norm_after(pointwise(act(conv_norm(depthwise, norm, x_BCT)))))


class SeparableBranch(nn.Module):
    """A depthwise separable convolution: one kernel size of a multi-scale block. Where the network has swish, this has
    ReLU, as published."""

    def __init__(self, in_channels: int, channels: int, *, kernel_size: int, dilation: int, activation_name: str):
        super().__init__()
        name = "prelu" if activation_name == "prelu" else "relu"
        self.conv = nn.ModuleDict(_separable(in_channels, channels, kernel_size, dilation, name))

    def forward(self, x_BCT: Tensor) -> Tensor:
        return _through_separable(self.conv, 0, x_BCT)


class Branch(nn.Module):
    """Convolution, norm, activation: one kernel size of a multi-scale block."""

    def __init__(self, in_channels: int, channels: int, *, kernel_size: int, dilation: int, activation_name: str):
        super().__init__()
        self.conv = same_conv(in_channels, channels, kernel_size, dilation)
        self.batchnorm = nn.BatchNorm1d(channels)
        self.non_lin = activation(activation_name, channels)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.non_lin(conv_norm(self.conv, self.batchnorm, x_BCT))


class MultiscaleBlock(nn.Module):
    """Twice (one branch a kernel size, concatenated, dropout), and a residual.

    The residual has its 1x1 convolution in every block, also where the widths agree, as published.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_sizes: Sequence[int],
        dilation: int,
        dropout: float,
        activation_name: str,
        branch: type[nn.Module],
    ):
        super().__init__()
        self.num_branches = len(kernel_sizes)
        width = channels * self.num_branches
        for stage, stage_in in enumerate((in_channels, width)):
            for number, kernel_size in enumerate(kernel_sizes):
                how = {"kernel_size": kernel_size, "dilation": dilation, "activation_name": activation_name}
                self.add_module(f"cbcr{stage}_{number}", branch(stage_in, channels, **how))
        self.downsample = nn.Conv1d(in_channels, width, 1)
        self.relu_final = activation(activation_name, width)
        self.dropout = nn.Dropout(dropout)

    def _stage(self, stage: int, x_BCT: Tensor) -> Tensor:
        branches = [self.get_submodule(f"cbcr{stage}_{n}")(x_BCT) for n in range(self.num_branches)]
        return self.dropout(torch.cat(branches, dim=1))

    def forward(self, x_BCT: Tensor) -> Tensor:
        out = self._stage(1, self._stage(0, x_BCT))
        return self.relu_final(out + self.downsample(x_BCT))


class Head(nn.Module):
    """Layers under the published name `outer.inner`, the average over valid frames, a classifier."""

    def __init__(self, outer: str, inner: str, layers: nn.Sequential, channels: int, num_classes: int):
        super().__init__()
        self._outer = outer
        self.add_module(outer, nn.Sequential(OrderedDict([(inner, layers)])))
        self.tcn_output = nn.Linear(channels, num_classes)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        out_BCT = self.get_submodule(self._outer)(feat_BTC.mT)
        return self.tcn_output(mean_over_valid(out_BCT.mT, lengths_B))


def tcn(
    in_channels: int,
    num_classes: int,
    *,
    activation_name: str,
    kernel_size: int,
    num_layers: int,
    channels: int,
    dropout: float,
    separable: bool = False,
) -> nn.Module:
    """The single-scale head: `num_layers` blocks with dilations 1, 2, 4, ..., `channels` wide."""
    blocks = nn.Sequential()
    for layer in range(num_layers):
        block = (SeparableBlock if separable else TemporalBlock)(
            in_channels,
            channels,
            kernel_size=kernel_size,
            dilation=2**layer,
            dropout=dropout,
            activation_name=activation_name,
        )
        blocks.append(block)
        in_channels = channels
    return Head("tcn_trunk", "network", blocks, channels, num_classes)


def mstcn(
    in_channels: int,
    num_classes: int,
    *,
    activation_name: str,
    kernel_sizes: Sequence[int],
    num_layers: int,
    channels: int,
    dropout: float,
    separable: bool = False,
) -> nn.Module:
    """The multi-scale head: `num_layers` blocks with dilations 1, 2, 4, ..., `channels` wide a branch."""
    width = channels * len(kernel_sizes)
    blocks = nn.Sequential()
    for layer in range(num_layers):
        block = MultiscaleBlock(
            in_channels,
            channels,
            kernel_sizes=kernel_sizes,
            dilation=2**layer,
            dropout=dropout,
            activation_name=activation_name,
            branch=SeparableBranch if separable else Branch,
        )
        blocks.append(block)
        in_channels = width
    return Head("mb_ms_tcn", "network", blocks, width, num_classes)
