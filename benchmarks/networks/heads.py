"""The heads, (B, T, C) and lengths (B,) -> logits (B, words)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Activation, mean_over_valid, valid_frames
from .tcns import Branch, SeparableBlock, SeparableBranch, TemporalBlock, dctcn, mstcn, tcn


class CompactHead(nn.Module):
    """lipprep's own: each convolution finds zeros beyond a clip's end, and its norm counts the clip's own frames."""

    def __init__(
        self,
        inside: int,
        words: int,
        activation: Activation,
        *,
        kernel_size: int = 3,
        num_layers: int = 4,
        channels: int = 128,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(inside, channels) if inside != channels else nn.Identity()
        pads = [(kernel_size - 1) // 2 * 2**n for n in range(num_layers)]
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, padding=pad, dilation=2**n) for n, pad in enumerate(pads)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in pads)
        self.activations = nn.ModuleList(activation(channels) for _ in pads)
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(channels, words)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        valid_BT = valid_frames(lengths_B, feat_BTC.shape[1])
        x_BTC = self.project(feat_BTC) * valid_BT[:, :, None]
        for conv, norm, activation in zip(self.convs, self.norms, self.activations, strict=True):
            out_NC = norm(conv(x_BTC.transpose(1, 2)).transpose(1, 2)[valid_BT])
            x_BTC = x_BTC.clone()
            x_BTC[valid_BT] += self.dropout(activation(out_NC))
        return self.output(mean_over_valid(x_BTC, lengths_B))


def recurrent(kind: type[nn.Module], usual_hidden: int, usual_layers: int):
    def make(inside: int, words: int, activation: Activation, **options) -> nn.Module:
        return Recurrent(kind, inside, words, **{"hidden": usual_hidden, "num_layers": usual_layers, **options})

    return make


class Recurrent(nn.Module):
    """Two directions, together from layer to layer or `independent`; a classifier a frame; the mean over frames."""

    def __init__(
        self,
        kind: type[nn.Module],
        inside: int,
        words: int,
        *,
        hidden: int,
        num_layers: int,
        dropout: float = 0.2,
        output_dropout: float = 0.0,
        independent: bool = False,
        consensus: str = "scores",
    ) -> None:
        super().__init__()
        dropout = dropout if num_layers > 1 else 0.0  # else torch warns
        if independent:
            both = (kind(inside, hidden, num_layers, batch_first=True, dropout=dropout) for _ in range(2))
            self.rnn = nn.ModuleList(both)
        else:
            self.rnn = kind(inside, hidden, num_layers, batch_first=True, dropout=dropout, bidirectional=True)
        self.dropout, self.output = nn.Dropout(output_dropout), nn.Linear(2 * hidden, words)
        self.independent, self.posteriors = independent, consensus == "posteriors"

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        if self.independent:
            ahead_BTC, _ = self.rnn[0](feat_BTC)
            back_BTC, _ = self.rnn[1](torch.flip(feat_BTC, [1]))
            out_BTC = torch.cat((ahead_BTC, torch.flip(back_BTC, [1])), 2)
        else:
            out_BTC, _ = self.rnn(feat_BTC)
        frames_BTC = self.output(self.dropout(out_BTC))
        if self.posteriors:
            frames_BTC = torch.log_softmax(frames_BTC, 2)
        return mean_over_valid(frames_BTC, lengths_B)


class TemporalConvolutions(nn.Module):
    """Two convolutions of stride 2, not padded, with a pool between; the mean; two linear layers."""

    def __init__(
        self,
        inside: int,
        words: int,
        activation: Activation,
        *,
        kernel_size: int = 5,
        channels: Sequence[int] = (512, 1024),
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        first, second = channels
        self.conv1, self.norm1 = nn.Conv1d(inside, first, kernel_size, 2), nn.BatchNorm1d(first)
        self.relu1, self.pool = activation(first), nn.MaxPool1d(2)
        self.conv2, self.norm2 = nn.Conv1d(first, second, kernel_size, 2), nn.BatchNorm1d(second)
        self.relu2, self.dropout = activation(second), nn.Dropout(dropout)
        self.linear, self.norm3, self.relu3 = nn.Linear(second, hidden), nn.BatchNorm1d(hidden), activation(hidden)
        self.output = nn.Linear(hidden, words)
        self.size, self.fewest = kernel_size, 2 * (2 * kernel_size - 1) + kernel_size  # frames that leave one

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        x_BCT = feat_BTC.transpose(1, 2)
        if x_BCT.shape[2] < self.fewest:
            x_BCT = nn.functional.pad(x_BCT, (0, self.fewest - x_BCT.shape[2]))
        out = self.pool(self.relu1(self.norm1(self.conv1(x_BCT))))
        out = self.relu2(self.norm2(self.conv2(out)))
        left = [(((int(length) - self.size) // 2 + 1) // 2 - self.size) // 2 + 1 for length in lengths_B]
        mean_BC = mean_over_valid(out.transpose(1, 2), torch.tensor([max(frames, 1) for frames in left]))
        return self.output(self.relu3(self.norm3(self.linear(self.dropout(mean_BC)))))


class Transformer(nn.Module):
    """An encoder (Vaswani et al. 2017) of the pre-norm kind over a clip's own frames, and their mean."""

    def __init__(
        self,
        inside: int,
        words: int,
        activation: Activation,
        *,
        channels: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.project, self.dropout = nn.Linear(inside, channels), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            channels, num_heads, 4 * channels, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(channels), enable_nested_tensor=False)
        self.output = nn.Linear(channels, words)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        x_BTC = self.project(feat_BTC)
        x_BTC = self.dropout(x_BTC + sinusoids(x_BTC.shape[1], x_BTC.shape[2]).to(x_BTC.device))
        padding_BT = ~valid_frames(lengths_B, feat_BTC.shape[1])
        return self.output(mean_over_valid(self.layers(x_BTC, src_key_padding_mask=padding_BT), lengths_B))


def sinusoids(frames: int, channels: int) -> Tensor:
    """(T, C): sines of the places in the even channels, cosines in the odd ones."""
    places_T1, pairs = torch.arange(frames)[:, None], torch.arange(channels) // 2 * 2
    angles_TC = places_T1 / 10_000 ** (pairs / channels)
    return torch.where(torch.arange(channels) % 2 == 0, angles_TC.sin(), angles_TC.cos())


HEADS = {
    "tcn": tcn(TemporalBlock),
    "dstcn": tcn(SeparableBlock),
    "mstcn": mstcn(Branch),
    "dsmstcn": mstcn(SeparableBranch),
    "dctcn": dctcn,
    "bigru": recurrent(nn.GRU, 1024, 3),
    "bilstm": recurrent(nn.LSTM, 256, 2),
    "temporal_conv": TemporalConvolutions,
    "transformer": Transformer,
    "compact": CompactHead,
}
