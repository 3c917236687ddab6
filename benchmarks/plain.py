"""What people train with today, as a yardstick: a file a clip, augmentation on the host, a plain loop in fp32.

Its networks are those of the folder networks.
"""

from collections.abc import Sequence
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
