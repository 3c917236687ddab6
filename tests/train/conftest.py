"""A tiny data set that can be learnt: a blob on a mouth-sized patch moves, grows or shrinks."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lipprep.stages.shard.codec import encode_mouth
from lipprep.stages.shard.index import Index, Shard, save_index
from lipprep.stages.shard.writer import TarWriter

WORDS = ("down", "grow", "shrink", "up")  # the same in a mirror


def moving_blob(word: str, *, frames: int, random: np.random.Generator) -> np.ndarray:
    """(T, 96, 96) uint8: a bright disc on noisy gray that moves or changes its size."""
    y, x = np.mgrid[:96, :96]
    path = np.linspace(-1, 1, frames)[:, None, None] * {"up": -1, "shrink": -1}.get(word, 1)
    dy, dx = random.uniform(-6, 6, 2)
    moves = word in ("up", "down")
    distance = np.hypot(y - 48 - dy - (24 * path if moves else 0), x - 48 - dx)
    clip = 90 + 120 * (distance < (12 if moves else 14 + 10 * path)) + random.normal(0, 6, (frames, 96, 96))
    return np.clip(clip, 0, 255).astype(np.uint8)


def write_shards(
    folder: Path,
    *,
    splits: dict[str, list[int]],
    words: tuple[str, ...] = WORDS,
    frames: tuple[int, int] = (9, 9),
    profile: str = "lrw2021",
    codec: str = "npy",
    seed: int = 0,
) -> Path:
    """Shards of moving blobs; `splits` gives the clips of each shard, `frames` the least and most of a clip."""
    random = np.random.default_rng(seed)
    shards, offsets = [], {}
    number = 0
    for split, counts in splits.items():
        for chunk, count in enumerate(counts):
            name = f"{split}-{chunk:04d}.tar"
            starts = []
            with TarWriter(folder / name) as tar:
                for _ in range(count):
                    word = words[number % len(words)]
                    key = f"{word}/{split}/{word}_{number:05d}"
                    mouth = moving_blob(word, frames=int(random.integers(frames[0], frames[1] + 1)), random=random)
                    extension, payload = encode_mouth(mouth, codec=codec)
                    sample = {
                        "label": words.index(word),
                        "word": word,
                        "duration": None if number % 3 else 0.24,
                        "num_frames": len(mouth),
                        "split": split,
                    }
                    starts.append(tar.offset)
                    tar.add(f"{key}.{extension}", payload)
                    tar.add(f"{key}.json", json.dumps(sample).encode())
                    number += 1
                offsets[name] = np.array([*starts, tar.offset], np.int64)
                tar.close()
                tar.publish()
            shards.append(Shard(name, split, count, tar.bytes, tar.sha256))
    fingerprint = hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()
    save_index(
        folder,
        Index(
            dataset="blobs",
            fingerprint=fingerprint,
            labels=tuple(words),
            fps=25.0,
            parameters={"profile": profile, "crop_size": 96, "codec": codec},
            failures={},
            shards=tuple(shards),
            offsets=offsets,
        ),
    )
    return folder


def unrendered(draw: Callable[..., None]) -> Callable[..., None]:
    """`draw` up to the pixels: an empty file is its picture."""

    def drawn(*args: object) -> None:
        from matplotlib.figure import Figure

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda *_, **__: None)
            draw(*args)

    return drawn


@pytest.fixture(autouse=True)
def few_pixels() -> Iterator[None]:
    """Pictures would take most of the time of runs this short. `trained_run`, made before any test, has some."""
    with pytest.MonkeyPatch.context() as patch:
        if loop := sys.modules.get("lipprep.train.loop"):
            for name in ("draw_batch", "draw_curves"):
                patch.setattr(loop, name, unrendered(getattr(loop, name)))
        yield


@pytest.fixture(scope="session")
def make_shards():
    """The function `write_shards`."""
    return write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """48 clips to train on in two shards, 10 to validate, 14 to test."""
    return write_shards(
        tmp_path_factory.mktemp("shards"), splits={"train": [30, 18], "val": [10], "test": [9, 5]}, frames=(7, 9)
    )


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make the recipe `compact` smaller still, and leave out what needs many steps to pay."""
    model = ["model.head.channels=32", "model.head.num_layers=2"]
    return [*model, "augment.crop_size=72", "augment.rotation=0", "batch_size=8", "log_every=1", "workers=0"]


@pytest.fixture(scope="session")
def trained_run(shards, tiny, tmp_path_factory) -> Path:
    """A run folder whose model reads the blobs of `shards`."""
    from lipprep.train.config import load_recipe
    from lipprep.train.loop import train

    run = tmp_path_factory.mktemp("trained") / "run"
    train(load_recipe("compact", [*tiny, "epochs=6"]), shards=shards, run=run, device="cpu")
    return run
