"""Densely connected temporal convolutions (Ma et al., "Lip-reading with densely connected temporal convolutional
networks", WACV 2021), with the names that published checkpoints have.

As there, squeeze and excitation averages over all frames, padding among them, and only the mean before the classifier
knows the lengths.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipprep.io.errors import UserError
from lipprep.train.models.layers import activation
from lipprep.train.models.tcn import Head, conv_norm, same_conv

REDUCTION = 16  # of the channels in squeeze and excitation


class TimeSqueezeExcite(nn.Module):
    """The gate (B, C, 1) of each channel, from the channels' means over time."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // REDUCTION, bias=False),
            nn.SiLU(),
            nn.Linear(channels // REDUCTION, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, mean_BC: Tensor) -> Tensor:
        return self.fc(mean_BC)[:, :, None]


class TemporalConv(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, in_channels: int, channels: int, *, kernel_size: int, dilation: int, activation_name: str):
        super().__init__()
        conv = same_conv(in_channels, channels, kernel_size, dilation)
        act = activation(activation_name, channels)
        self.net = nn.ModuleDict({"0": conv, "1": nn.BatchNorm1d(channels), "3": act})

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.net["3"](conv_norm(self.net["0"], self.net["1"], x_BCT))


class DenseLayer(nn.Module):
    """Twice (one convolution a kernel size, concatenated, dropout), the first on gated channels, and a residual."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_sizes: Sequence[int],
        dilation: int,
        squeeze_excitation: bool,
        dropout: float,
        activation_name: str,
    ):
        super().__init__()
        self.num_branches, self.gated = len(kernel_sizes), squeeze_excitation
        branch = channels // self.num_branches
        for stage, stage_in in enumerate((in_channels, channels)):
            for number, kernel_size in enumerate(kernel_sizes):
                if stage == 0 and squeeze_excitation:
                    self.add_module(f"cbcr0_se_{number}", TimeSqueezeExcite(in_channels))
                how = {"kernel_size": kernel_size, "dilation": dilation, "activation_name": activation_name}
                self.add_module(f"cbcr{stage}_{number}", TemporalConv(stage_in, branch, **how))
        self.downsample = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else None
        self.relu_final = activation(activation_name, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BCT: Tensor) -> Tensor:
        mean_BC = x_BCT.mean(2) if self.gated else None
        branches = []
        for number in range(self.num_branches):
            gate_BC1 = self.get_submodule(f"cbcr0_se_{number}")(mean_BC) if self.gated else 1.0
            branches.append(self.get_submodule(f"cbcr0_{number}")(x_BCT * gate_BC1))
        out = self.dropout(torch.cat(branches, dim=1))
        branches = [self.get_submodule(f"cbcr1_{number}")(out) for number in range(self.num_branches)]
        out = self.dropout(torch.cat(branches, dim=1))
        return self.relu_final(out + (x_BCT if self.downsample is None else self.downsample(x_BCT)))


class DenseBlock(nn.ModuleDict):
    """Layers of which each sees the block's input and the outputs of all before it."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        for layer in self.values():
            x_BCT = torch.cat([x_BCT, layer(x_BCT)], dim=1)
        return x_BCT


def _transition(in_channels: int, channels: int, activation_name: str) -> nn.Sequential:
    conv, norm = nn.Conv1d(in_channels, channels, 1, bias=False), nn.BatchNorm1d(channels)
    act = activation(activation_name, channels)
    return nn.Sequential(OrderedDict([("conv", conv), ("norm", norm), (activation_name, act)]))


def dctcn(
    in_channels: int,
    num_classes: int,
    *,
    activation_name: str,
    block_layers: Sequence[int],
    growth_rates: Sequence[int],
    kernel_sizes: Sequence[int],
    dilations: Sequence[int],
    reduced_channels: int,
    squeeze_excitation: bool,
    dropout: float,
) -> nn.Module:
    """The densely connected head: blocks of layers with the dilations in turn, each layer adding `growth_rates`
    channels, and a transition to `reduced_channels` before each block. The first transition has PReLU always."""
    if len(block_layers) != len(growth_rates):
        raise UserError(
            f"the dctcn head has {len(block_layers)} block_layers, and {len(growth_rates)} growth_rates: give as many"
        )
    if bad := [rate for rate in growth_rates if rate % len(kernel_sizes)]:
        raise UserError(
            f"growth_rates {bad[0]} of the dctcn head is no multiple of its {len(kernel_sizes)} kernel_sizes"
        )
    if squeeze_excitation and reduced_channels < REDUCTION:
        raise UserError(
            f"reduced_channels {reduced_channels} of the dctcn head are too few for squeeze_excitation: "
            f"{REDUCTION} or more"
        )
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (layers, growth) in enumerate(zip(block_layers, growth_rates, strict=True)):
        name = activation_name if number else "prelu"
        features[f"transition{number}"] = _transition(in_channels, reduced_channels, name)
        block = DenseBlock()
        for layer in range(layers):
            block[f"denselayer{layer + 1}"] = DenseLayer(
                reduced_channels + layer * growth,
                growth,
                kernel_sizes=kernel_sizes,
                dilation=dilations[layer % len(dilations)],
                squeeze_excitation=squeeze_excitation,
                dropout=dropout,
                activation_name=activation_name,
            )
        features[f"denseblock{number + 1}"] = block
        in_channels = reduced_channels + layers * growth
    features["norm5"] = nn.BatchNorm1d(in_channels)
    return Head("tcn_trunk", "features", nn.Sequential(features), in_channels, num_classes)
