"""A small lip reader trained on lipprep's shards with webdataset and torch alone.

    python examples/train_plain.py shards 10

trains 10 epochs (by default one). It shows how to read the shards, and is no rival of `lipprep train`.
"""

import json
import random
import sys
from pathlib import Path

import torch
import webdataset
from torch import nn


def convert(sample: dict) -> tuple[torch.Tensor, int]:
    """A clip, (T, 88, 88) float32, or of smaller crops their size, and its label."""
    strip = sample.get("mouth.jpg")  # (S x T, S) uint8, frames from top to bottom
    crops = sample["mouth.npy"] if strip is None else strip.reshape(-1, strip.shape[1], strip.shape[1])
    first = max(crops.shape[1] - 88, 0) // 2
    mouth = torch.tensor(crops[:, first : first + 88, first : first + 88]) / 255
    return (mouth - mouth.mean(0)) / 0.165, sample["json"]["label"]  # less its mean frame: what is left moves


def collate(clips: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch: (B, 1, T, 88, 88), padded with zeros to the longest clip, and labels (B,)."""
    mouths, labels = zip(*clips, strict=True)
    return nn.utils.rnn.pad_sequence(mouths, batch_first=True)[:, None], torch.tensor(labels)


def batches(split: str, shuffle: int = 0) -> torch.utils.data.DataLoader:
    tars = sorted(map(str, shards.glob(f"{split}-*.tar")))
    clips = webdataset.WebDataset(tars, shardshuffle=False).decode("l8").map(convert).shuffle(shuffle, rng=order)
    return torch.utils.data.DataLoader(clips, batch_size=16, collate_fn=collate)


shards, epochs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
words = json.loads((shards / "index.json").read_text())["labels"]
torch.manual_seed(0)
order = random.Random(0)
layers: list[nn.Module] = [nn.AvgPool3d((1, 2, 2))]
for channels, more in ((1, 16), (16, 32), (32, 64)):
    layers += [nn.Conv3d(channels, more, 3, (1, 2, 2), 1), nn.BatchNorm3d(more), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, len(words)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(epochs):
    for video, label in batches("train", shuffle=1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(video), label).backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    right = torch.cat([model(video).argmax(1) == label for video, label in batches("test")])
print(f"{len(right)} test clips of {len(words)} words: {100 * right.float().mean():.1f} % right")
