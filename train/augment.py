"""Batched augmentation on the training device: uint8 clips in, normalised float32 out.

Which frames, which pixels and how much is decided on the host, in a few vectors of one number a clip, drawn
from one generator: so a CPU and a GPU see the same augmentation. The pixels never leave the device; the crop
is cut out of the bytes, and float arithmetic sees only what is cut out. Keep `lengths_B` and `durations_B`
on the host (as a loader gives them) and nothing here waits for the device.

Letters of the shape suffixes: B clips, T frames, H and W pixels.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class AugmentOptions:
    """What is done to a batch; zero switches an augmentation off. The defaults are the published LRW recipe.

    `gain` and `bias` change each clip's light: x becomes (1 ± gain) x ± bias, in normalised units. With
    `subtract_mean_frame` each clip loses the mean of its frames, pixel by pixel, and what is left, the
    movement, is multiplied by `mean_frame_gain`; `bias` then cancels out.
    """

    crop_size: int = 88  # pixels
    mean: float = 0.421  # of LRW's mouth crops, in units of white
    std: float = 0.165
    flip: float = 0.5  # probability
    mixup: float = 0.4  # alpha of Beta(alpha, alpha)
    time_mask: int = 15  # the mask is shorter than this many frames
    variable_length: bool = True
    subtract_mean_frame: bool = False
    mean_frame_gain: float = 3.0
    gain: float = 0.0
    bias: float = 0.0
    scale: float = 0.0  # 0.1: the mouth is 0.9 to 1.1 times as large
    aspect: float = 0.0  # 0.1: width to height is 0.9 to 1.1 times as large
    rotation: float = 0.0  # radians, either way
    shift: float = 0.0  # fraction of half the crop's width, either way, on top of the random crop

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}: it must be a finite number")
        if self.crop_size < 1 or self.std <= 0 or not 0 <= self.flip <= 1:
            raise ValueError("crop_size and std must be positive, and flip a probability")
        for name in ("mixup", "time_mask", "gain", "bias", "rotation", "shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        for name in ("scale", "aspect"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1)")

    @property
    def is_affine(self) -> bool:
        return bool(self.scale or self.aspect or self.rotation or self.shift)


@dataclass(frozen=True)
class AugmentedBatch:
    """Clips ready for the network, and how their labels mix: lam * own + (1 - lam) * partner's."""

    x_B1THW: Tensor  # float32, exactly zero after each clip's length
    lengths_B: Tensor  # int64, frames, on the device of x
    partner_B: Tensor | None  # int64, on the device of x; None without mixup
    lam: float


def train_batch(
    video_BTHW: Tensor,
    lengths_B: Tensor,
    durations_B: Tensor,
    options: AugmentOptions,
    *,
    fps: float,
    generator: torch.Generator,
) -> AugmentedBatch:
    """Augment a batch as the published LRW training does (Ma et al. 2022, arXiv 2209.01383).

    `video_BTHW` uint8, `lengths_B` int64 frames, `durations_B` float seconds of the spoken word (NaN where
    unknown: that clip is not shortened), `generator` on the CPU. In this order: variable length, random
    crop with any affine change, flip, normalisation, light, mean frame, time mask, zero padding, mixup.
    T shrinks to the longest clip left.

    The time mask is as long as drawn, lies inside the clip, and is filled with the mean of the clip's own
    frames; a draw that would cover the whole clip is dropped. A mixed pair is as long as its longer clip,
    so that neither is cut.

    Raises ValueError if the frames are smaller than the crop.
    """
    size = _check_size(video_BTHW, options)
    rng = np.random.default_rng(torch.randint(2**63 - 1, (), generator=generator).item())
    # starts, lengths: (B,) int64, frames
    starts, lengths = np.zeros(len(lengths_B), dtype=np.int64), _host(lengths_B)
    assert (lengths >= 1).all() and (lengths <= video_BTHW.shape[1]).all()
    if options.variable_length:
        starts, lengths = _variable_length(lengths, _host(durations_B), fps, rng)
    batch_size = len(lengths)
    top, left = rng.integers(0, size - options.crop_size + 1, (2, batch_size))
    flipped = rng.random(batch_size) < options.flip

    if options.is_affine:
        frames_BTHW = _frames(video_BTHW, starts, lengths)
        theta_B23 = _affine(size, top, left, flipped, options, rng)
        cropped_BTHW = _sample(frames_BTHW, theta_B23, options.crop_size)
    else:
        cropped_BTHW = _crop(video_BTHW, starts, lengths, top, left, flipped, options.crop_size)
    gain = 1 + rng.uniform(-options.gain, options.gain, batch_size)
    bias = rng.uniform(-options.bias, options.bias, batch_size)
    x_BTHW = _normalise(cropped_BTHW, lengths, gain, bias, options)
    if options.time_mask:
        _mask_time(x_BTHW, lengths, options.time_mask, rng)

    partner, lam = None, 1.0
    if options.mixup:
        lam = float(rng.beta(options.mixup, options.mixup))
        permutation = rng.permutation(batch_size)
        partner = _to(permutation, x_BTHW)
        x_BTHW.lerp_(x_BTHW[partner], 1 - lam)
        lengths = np.maximum(lengths, lengths[permutation])
    return AugmentedBatch(x_BTHW[:, None], _to(lengths, x_BTHW), partner, lam)


def eval_batch(video_BTHW: Tensor, lengths_B: Tensor, options: AugmentOptions) -> Tensor:
    """The centre crop of a uint8 batch, normalised, (B, 1, T, H, W) float32, zero after each clip's length.

    Nothing is drawn and T is kept. Raises ValueError if the frames are smaller than the crop.
    """
    size = _check_size(video_BTHW, options)
    first = (size - options.crop_size) // 2
    window = slice(first, first + options.crop_size)
    none = np.zeros(len(lengths_B))
    return _normalise(video_BTHW[:, :, window, window], _host(lengths_B), none + 1, none, options)[:, None]


def cross_entropy(logits: Tensor, labels_B: Tensor, batch: AugmentedBatch, label_smoothing: float = 0.0) -> Tensor:
    """The batch's mean cross entropy, a scalar, labels mixed as the clips are (Zhang et al. 2018)."""
    own = functional.cross_entropy(logits, labels_B, label_smoothing=label_smoothing)
    if batch.partner_B is None:
        return own
    partners = labels_B[batch.partner_B]
    others = functional.cross_entropy(logits, partners, label_smoothing=label_smoothing)
    return batch.lam * own + (1 - batch.lam) * others


def _check_size(video_BTHW: Tensor, options: AugmentOptions) -> int:
    size = video_BTHW.shape[3]
    if size < options.crop_size or video_BTHW.shape[2] != size:
        raise ValueError(
            f"frames of {size}x{video_BTHW.shape[2]} pixels cannot be cropped to {options.crop_size}: "
            "lower crop_size, or make the shards with a larger --crop-size"
        )
    return size


def _host(values_B: Tensor) -> np.ndarray:
    return values_B.cpu().numpy()


def _to(values: np.ndarray, like: Tensor) -> Tensor:
    # Without this a copy to CUDA waits for all work queued there; from pageable memory it is safe.
    return torch.from_numpy(values).to(like.device, non_blocking=like.is_cuda)


def _variable_length(
    lengths: np.ndarray, durations: np.ndarray, fps: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """First frame and length of a random stretch of each clip around the word at its centre, (B,) each."""
    known = np.isfinite(durations)
    # A word longer than its clip keeps the whole clip; an absurd duration must not overflow the integers.
    half = np.minimum(np.where(known, durations, 0) / 2 * fps, lengths).astype(np.int64)
    middle = (lengths - 1) // 2
    starts = rng.integers(0, np.maximum(middle - half - 1, 0), endpoint=True)
    stops = rng.integers(np.minimum(middle + half + 1, lengths), lengths, endpoint=True)
    starts, stops = np.where(known, starts, 0), np.where(known, stops, lengths)
    return starts, stops - starts


def _frame_positions(video_BTHW: Tensor, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Where the frames kept stand among all B * T, (B, max length) int64; a clip's last frame repeats."""
    batch_size, num_frames = video_BTHW.shape[:2]
    offsets_BT = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    return np.arange(batch_size)[:, None] * num_frames + starts[:, None] + offsets_BT


def _frames(video_BTHW: Tensor, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    positions_BT = _frame_positions(video_BTHW, starts, lengths)
    frames = video_BTHW.flatten(0, 1).index_select(0, _to(positions_BT.ravel(), video_BTHW))
    return frames.unflatten(0, positions_BT.shape)


def _crop(
    video_BTHW: Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    flipped: np.ndarray,
    crop_size: int,
) -> Tensor:
    """Cut frames and rows in one copy of whole rows, then columns (mirrored where flipped) in another."""
    size = video_BTHW.shape[3]
    positions_BT = _frame_positions(video_BTHW, starts, lengths)
    offsets = np.arange(crop_size)
    rows_BTH = positions_BT[:, :, None] * size + (top[:, None] + offsets)[:, None, :]
    rows = video_BTHW.reshape(-1, size).index_select(0, _to(rows_BTH.ravel(), video_BTHW))
    columns_BW = left[:, None] + np.where(flipped[:, None], offsets[::-1], offsets)
    columns = _to(columns_BW, video_BTHW)[:, None, None, :].expand(*rows_BTH.shape, -1)
    return rows.unflatten(0, rows_BTH.shape).gather(3, columns)


def _affine(
    size: int,
    top: np.ndarray,
    left: np.ndarray,
    flipped: np.ndarray,
    options: AugmentOptions,
    rng: np.random.Generator,
) -> np.ndarray:
    """(B, 2, 3): from the crop's coordinates to the frame's, both in [-1, 1] as `affine_grid` has them."""
    batch_size = len(top)
    scale = 1 + rng.uniform(-options.scale, options.scale, batch_size)
    aspect = np.sqrt(1 + rng.uniform(-options.aspect, options.aspect, batch_size))
    angle = rng.uniform(-options.rotation, options.rotation, batch_size)
    shift_2B = rng.uniform(-options.shift, options.shift, (2, batch_size)) * options.crop_size / size
    ratio = options.crop_size / size
    step_x = ratio / (scale * aspect) * np.where(flipped, -1, 1)
    step_y = ratio / scale * aspect
    # The crop's centre lies (left + crop_size / 2) pixels from the frame's edge, which is at -1.
    centre_x = 2 * (left + options.crop_size / 2) / size - 1 + shift_2B[0]
    centre_y = 2 * (top + options.crop_size / 2) / size - 1 + shift_2B[1]
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * step_x, -sin * step_y, centre_x], [sin * step_x, cos * step_y, centre_y]]
    return np.moveaxis(np.array(rows), 2, 0)


def _sample(frames_BTHW: Tensor, theta_B23: np.ndarray, crop_size: int) -> Tensor:
    """All frames of a clip through one grid, bilinear, the edge repeated outside: float32 in 0 to 255."""
    theta = _to(theta_B23.astype(np.float32), frames_BTHW)
    grid = functional.affine_grid(theta, [len(theta), 1, crop_size, crop_size], align_corners=False)
    return functional.grid_sample(frames_BTHW.float(), grid, padding_mode="border", align_corners=False)


def _normalise(
    video_BTHW: Tensor, lengths: np.ndarray, gain: np.ndarray, bias: np.ndarray, options: AugmentOptions
) -> Tensor:
    """((video / 255 - mean) / std) * gain + bias, less the mean frame if so wanted, zero in the padding."""
    factor = gain / (255 * options.std)
    offset = bias - gain * options.mean / options.std
    factor_B, offset_B = (_to(v.astype(np.float32), video_BTHW)[:, None, None, None] for v in (factor, offset))
    x_BTHW = (video_BTHW * factor_B).add_(offset_B)
    padding_BT = np.arange(x_BTHW.shape[1]) >= lengths[:, None]
    _fill_frames(x_BTHW, padding_BT, 0.0)
    if options.subtract_mean_frame:
        lengths_B = _to(lengths, x_BTHW)[:, None, None]
        mean_B1HW = (x_BTHW.sum(1) / lengths_B)[:, None]
        x_BTHW.sub_(mean_B1HW).mul_(options.mean_frame_gain)
        _fill_frames(x_BTHW, padding_BT, 0.0)
    return x_BTHW


def _mask_time(x_BTHW: Tensor, lengths: np.ndarray, limit: int, rng: np.random.Generator) -> None:
    """Fill a random stretch of each clip with its mean, in place; `x_BTHW` is zero in the padding."""
    widths = rng.integers(0, limit, len(lengths))
    widths[widths >= lengths] = 0
    starts = rng.integers(0, lengths - widths, endpoint=True)
    frames = np.arange(x_BTHW.shape[1])
    masked_BT = (frames >= starts[:, None]) & (frames < (starts + widths)[:, None])
    mean_B = x_BTHW.mean((1, 2, 3)) * _to(x_BTHW.shape[1] / lengths.astype(np.float32), x_BTHW)
    clips = _to(masked_BT.nonzero()[0], x_BTHW)
    _fill_frames(x_BTHW, masked_BT, mean_B[clips][:, None, None])


def _fill_frames(x_BTHW: Tensor, chosen_BT: np.ndarray, value: Tensor | float) -> None:
    """Set the chosen frames, in place. Positions from the host: a mask on the device would be waited for."""
    positions = _to(chosen_BT.ravel().nonzero()[0], x_BTHW)
    x_BTHW.flatten(0, 1)[positions] = value
