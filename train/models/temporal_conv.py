"""Strided temporal convolutions as a head: the first stage of Stafylakis & Tzimiropoulos 2017, and its PyTorch port."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipprep.io.errors import UserError
from lipprep.train.models.layers import activation, mean_over_valid


class TemporalConvHead(nn.Module):
    """Two strided convolutions with max pooling between them, the mean over time, a hidden layer, a classifier.

    The convolutions are not padded: of 29 frames, kernels of 5 leave one, kernels of 2 three. Shorter clips are padded
    with zeros until one is left.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        activation_name: str,
        kernel_size: int,
        channels: Sequence[int],
        hidden: int,
        dropout: float,
    ):
        super().__init__()
        if len(channels) != 2:
            raise UserError(f"the temporal_conv head has two convolutions, and {len(channels)} channels: give two")
        first, second = channels
        self.conv1 = nn.Conv1d(in_channels, first, kernel_size, 2)
        self.norm1 = nn.BatchNorm1d(first)
        self.relu1 = activation(activation_name, first)
        self.conv2 = nn.Conv1d(first, second, kernel_size, 2)
        self.norm2 = nn.BatchNorm1d(second)
        self.relu2 = activation(activation_name, second)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(second, hidden)
        self.norm3 = nn.BatchNorm1d(hidden)
        self.relu3 = activation(activation_name, hidden)
        self.output = nn.Linear(hidden, num_classes)
        self.kernel_size = kernel_size
        self.fewest = 2 * (2 * kernel_size - 1) + kernel_size  # frames that leave one

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        x_BCT = feat_BTC.mT
        # A traced network serves all lengths: there the zeros are always added, and never counted. Eight more of them
        # leave two frames or more, for tracing takes what may be a single one to be always one.
        if torch.compiler.is_exporting():
            x_BCT = functional.pad(x_BCT, (0, self.fewest + 7))
        elif x_BCT.shape[2] < self.fewest:
            x_BCT = functional.pad(x_BCT, (0, self.fewest - 1))
        # As pooling in two dimensions: that of one forgets in tracing that lengths differ.
        out = functional.max_pool2d(self.relu1(self.norm1(self.conv1(x_BCT)))[:, :, None], (1, 2))[:, :, 0]
        out = self.relu2(self.norm2(self.conv2(out)))
        left_B = (((lengths_B - self.kernel_size) // 2 + 1) // 2 - self.kernel_size) // 2 + 1
        mean_BC = mean_over_valid(out.mT, left_B.clamp(min=1))
        return self.output(self.relu3(self.norm3(self.linear(self.dropout(mean_BC)))))
