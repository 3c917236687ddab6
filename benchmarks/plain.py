"""What people train with today, as a yardstick: a file a clip, augmentation on the host, a plain loop in fp32.

The networks are those of lipprep.train.models, written as the papers draw them: Conv3d in the stem, temporal
convolutions padded on both sides and cut afterwards, images one channel after another in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

MEAN, STD, SIDE, FPS = 0.421, 0.165, 88, 25
DURATION = 0.4  # seconds


class Files(Dataset):
    """Clips in compressed npz files, one each, augmented in float64 one at a time."""

    def __init__(
        self,
        paths: Sequence[Path],
        words: Sequence[str],
        *,
        augment: bool,
        variable_length: bool = True,
        subtract_mean_frame: bool = False,
    ) -> None:
        self.paths, self.words, self.augment = list(paths), list(words), augment
        self.variable_length, self.subtract_mean_frame = variable_length, subtract_mean_frame
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int, int]:
        path = self.paths[number]
        data = np.load(path)["data"]
        label = self.words.index(path.parent.name)
        if not self.augment:
            return data, label, len(data)
        if self.variable_length:
            half, middle = int(DURATION / 2 * FPS), (len(data) - 1) // 2
            first = self.random.integers(0, max(0, middle - half - 1) + 1)
            last = self.random.integers(min(middle + half + 1, len(data)), len(data) + 1)
            data = data[first:last]
        data = data / 255.0
        top, left = self.random.integers(0, data.shape[1] - SIDE + 1, 2)
        data = data[:, top : top + SIDE, left : left + SIDE]
        if self.random.random() < 0.5:
            data = data[:, :, ::-1]
        data = (data - MEAN) / STD
        if self.subtract_mean_frame:
            data = 3 * (data - data.mean(0))
        return data, label, len(data)


def collate(clips: list[tuple[np.ndarray, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, 1, T, H, W) float32, labels and lengths; the longest clip first, zeros behind the others."""
    clips = sorted(clips, key=lambda clip: -clip[2])
    video = torch.zeros(len(clips), clips[0][2], *clips[0][0].shape[1:])
    for row, (data, _, length) in zip(video, clips, strict=True):
        row[:length] = torch.FloatTensor(data.astype(np.float32, copy=True))
    return video[:, None], torch.tensor([c[1] for c in clips]), torch.tensor([c[2] for c in clips])


def step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple, device: torch.device, *, mixup: float
) -> None:
    """One update in fp32."""
    video, labels, lengths = (part.to(device) for part in batch)
    network.train()
    lam, partner = 1.0, torch.arange(len(video), device=device)
    if mixup:
        lam = torch.distributions.Beta(mixup, mixup).sample().item()
        partner = torch.randperm(len(video), device=device)
        video = lam * video + (1 - lam) * video[partner]
    optimizer.zero_grad()
    logits = network(video, lengths)
    loss = nn.functional.cross_entropy
    (lam * loss(logits, labels) + (1 - lam) * loss(logits, labels[partner])).backward()
    optimizer.step()


ACTIVATIONS = {"prelu": nn.PReLU, "relu": lambda channels: nn.ReLU(inplace=True), "swish": lambda channels: nn.SiLU()}


def network(model: Mapping, words: int) -> nn.Module:
    """The network of a recipe's `model`."""
    activation = ACTIVATIONS[model["activation"]]
    head = dict(model["head"])
    kind = head.pop("name")
    if model["trunk"] == "compact":
        return Network(CompactStem(activation), resnet(32, (32, 64, 128), 1, activation), CompactHead(words, **head))
    if model["trunk"] == "resnet18":
        stem, trunk, channels = Stem(64, activation), resnet(64, (64, 128, 256, 512), 2, activation), 512
    else:
        stem, trunk, channels = Stem(24, activation), shufflenet(), 1024
    sizes = head.pop("kernel_sizes", None) or [head.pop("kernel_size")]
    return Network(stem, trunk, Tcn(kind, channels, words, sizes, activation, **head))


class Network(nn.Module):
    """(B, 1, T, H, W) and lengths -> logits."""

    def __init__(self, stem: nn.Module, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.trunk, self.head = stem, trunk, head

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        B, C, T, H, W = x.shape
        x = self.trunk(x.transpose(1, 2).reshape(B * T, C, H, W))
        return self.head(x.view(B, T, -1), lengths)


class Stem(nn.Sequential):
    def __init__(self, channels: int, activation) -> None:
        super().__init__(
            nn.Conv3d(1, channels, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(channels),
            activation(channels),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )


class CompactStem(nn.Sequential):
    def __init__(self, activation) -> None:
        super().__init__(
            nn.AvgPool3d((1, 2, 2)),
            nn.Conv3d(1, 32, 5, (1, 2, 2), 2, bias=False),
            nn.BatchNorm3d(32),
            activation(32),
            nn.MaxPool3d((1, 2, 2)),
        )


class Block(nn.Module):
    def __init__(self, inside: int, channels: int, stride: int, activation) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = activation(channels), activation(channels)
        self.downsample = None
        if stride != 1 or inside != channels:
            across = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(across, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


def resnet(inside: int, widths: Sequence[int], blocks: int, activation) -> nn.Module:
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inside, width, 2 if number and not block else 1, activation))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


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
            self.left = nn.Sequential(*_depthwise(inside, 2), *_pointwise(inside, half))
        else:
            inside = half
        self.right = nn.Sequential(*_pointwise(inside, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 2:
            out = torch.cat((self.left(x), self.right(x)), 1)
        else:
            half = x.shape[1] // 2
            out = torch.cat((x[:, :half], self.right(x[:, half:])), 1)
        N, C, H, W = out.shape
        return out.view(N, 2, C // 2, H, W).transpose(1, 2).contiguous().view(N, C, H, W)


def shufflenet() -> nn.Module:
    """Half as wide as the standard one."""
    units, inside = [], 24
    for width, count in ((48, 4), (96, 8), (192, 4)):
        for number in range(count):
            units.append(Unit(inside, width, 2 if number == 0 else 1))
            inside = width
    return nn.Sequential(*units, *_pointwise(inside, 1024), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Branch(nn.Module):
    """Padded on both sides by all that the kernel reaches, and cut after the norm."""

    def __init__(self, inside: int, channels: int, size: int, dilation: int, activation) -> None:
        super().__init__()
        self.cut = (size - 1) * dilation // 2
        self.conv = nn.Conv1d(inside, channels, size, padding=2 * self.cut, dilation=dilation)
        self.norm, self.activation = nn.BatchNorm1d(channels), activation(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(x))
        return self.activation(out[:, :, self.cut : -self.cut].contiguous())


class Tcn(nn.Module):
    """The heads of the published networks (Martinez et al. 2020, Ma et al. 2021)."""

    def __init__(
        self, kind, inside, words, sizes, activation, *, num_layers: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        width = channels * len(sizes)
        self.layers = nn.ModuleList()
        for number in range(num_layers):
            stages = nn.ModuleList(
                nn.ModuleList(Branch(before, channels, size, 2**number, activation) for size in sizes)
                for before in (inside, width)
            )
            same = kind == "tcn" and inside == width
            layer = {"stages": stages, "skip": nn.Identity() if same else nn.Conv1d(inside, width, 1)}
            self.layers.append(nn.ModuleDict({**layer, "activation": activation(width)}))
            inside = width
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(width, words)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        for layer in self.layers:
            out = x
            for stage in layer["stages"]:
                out = self.dropout(torch.cat([branch(out) for branch in stage], 1))
            x = layer["activation"](out + layer["skip"](x))
        return self.output(torch.stack([clip[:, :length].mean(1) for clip, length in zip(x, lengths, strict=True)]))


class CompactHead(nn.Module):
    def __init__(self, words: int, *, kernel_size: int, num_layers: int, channels: int, dropout: float) -> None:
        super().__init__()
        pads = [(kernel_size - 1) // 2 * 2**n for n in range(num_layers)]
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, channels, kernel_size, padding=pad, dilation=2**n),
                nn.BatchNorm1d(channels),
                nn.ReLU(),
                nn.Dropout(dropout),
            )
            for n, pad in enumerate(pads)
        )
        self.output = nn.Linear(channels, words)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = x + conv(x)
        return self.output(torch.stack([clip[:, :length].mean(1) for clip, length in zip(x, lengths, strict=True)]))
