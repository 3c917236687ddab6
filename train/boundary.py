"""Word boundaries: the frames of a clip in which its word is said, as an input of the network.

Published results that know them are better by two to four points (Stafylakis et al. 2018, Feng et al. 2020, Ma et al.
2022). In the wild they are unknown, so that accuracies with and without them are told apart.

Letters of the shape suffixes: B clips, T frames.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

# Where a clip is mixed with another, published training mixes the boundaries, too (VIPL), or keeps the first clip's.
MIXED = {"vipl"}


def _mpc001(lengths_B: np.ndarray, half_B: np.ndarray, times_B2: np.ndarray, fps: float) -> np.ndarray:
    half = half_B.astype(np.int64)
    middle = (lengths_B - 1) // 2
    return np.stack([middle - half - 1, middle + half + 1], axis=1)


def _vipl(lengths_B: np.ndarray, half_B: np.ndarray, times_B2: np.ndarray, fps: float) -> np.ndarray:
    return np.stack([lengths_B / 2 - half_B, lengths_B / 2 + half_B], axis=1).astype(np.int64)


def _times(lengths_B: np.ndarray, half_B: np.ndarray, times_B2: np.ndarray, fps: float) -> np.ndarray:
    starts_B, stops_B = times_B2.T * fps
    # A word that ends with a frame may end a rounding error after it: 0.28 seconds are 7.000000000000001 frames.
    return np.stack([np.floor(starts_B + 1e-6), np.ceil(stops_B - 1e-6)], axis=1).astype(np.int64)


# mpc001's and VIPL's take the word to stand in the middle of its clip, as LRW has it, and know its duration alone;
# mpc001's middle is half a frame early. `times` is for words that stand anywhere.
FORMULAS = {"mpc001": _mpc001, "vipl": _vipl, "times": _times}


def word_frames(
    formula: str, lengths_B: np.ndarray, durations_B: np.ndarray, times_B2: np.ndarray, *, fps: float
) -> np.ndarray:
    """The first frame of each word and the one after its last, (B, 2) int64 within the clip; equal where not known.

    `lengths_B` int64 are the whole clips' frames; `durations_B` and `times_B2` (start and end from the clip's first
    frame) float in seconds, NaN where unknown. `formula` is one of FORMULAS.
    """
    known_B = np.isfinite(times_B2).all(axis=1) if formula == "times" else np.isfinite(durations_B)
    # An absurd duration must not overflow the integers.
    limit = lengths_B.max(initial=1) / fps
    durations_B = np.clip(np.where(known_B, durations_B, 0.0), 0, 2 * limit)
    times_B2 = np.clip(np.where(known_B[:, None], times_B2, 0.0), 0, limit)
    frames_B2 = FORMULAS[formula](lengths_B, durations_B / 2 * fps, times_B2, fps)
    return np.where(known_B[:, None], np.clip(frames_B2, 0, lengths_B[:, None]), 0)


def words_of(batch: Mapping, formulas: Iterable[str], *, fps: float) -> dict[str, np.ndarray]:
    """By formula, the frames (B, 2) of the words of a batch as `lipprep.train.loader` reads it."""
    durations, times = (batch[name].numpy() for name in ("durations", "times"))
    return {formula: word_frames(formula, batch["lengths"].numpy(), durations, times, fps=fps) for formula in formulas}


def boundary_vectors(frames_B2: np.ndarray, num_frames: int) -> Tensor:
    """(B, T, 1) float32: 1 from the first to before the second frame of each row."""
    places = np.arange(num_frames)
    inside_BT = (places >= frames_B2[:, :1]) & (places < frames_B2[:, 1:])
    return torch.from_numpy(inside_BT.astype(np.float32))[:, :, None]
