"""What chance does to a batch: decided on the host, a few numbers a clip, before a pixel is touched.

Each augmentation draws from a generator of its own, seeded by (seed, step, its name): so a CPU and a GPU see the same,
switching one off changes nothing about the others, and each of several processes can say what happens to every clip of
a batch of which it reads a part.

Letters of the shape suffixes: B clips of a global batch, R of them that are looked at.
"""

import dataclasses
import math
import zlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lipprep.io.errors import UserError


@dataclass(frozen=True)
class AugmentOptions:
    """What is done to a batch; zero switches an augmentation off. The defaults are the published LRW recipe.

    `gain` and `bias` change each clip's light: x becomes (1 ± gain) x ± bias, in normalised units. With
    `subtract_mean_frame` each clip loses the mean of its frames, pixel by pixel, and what is left, the
    movement, is multiplied by `mean_frame_gain`; `bias` then cancels out. Where both `mixup` and `cutmix` are on, a
    coin decides for each batch which of them is done to it.
    """

    crop_size: int = 88  # pixels
    random_crop: bool = True  # else it is cut from the centre
    mean: float = 0.421  # of LRW's mouth crops, in units of white
    std: float = 0.165
    flip: float = 0.5  # probability
    mixup: float = 0.4  # alpha of Beta(alpha, alpha)
    cutmix: float = 0.0  # the same, for the part of a clip that is cut out in time and filled from another
    time_mask: int = 15  # frames: the mask is shorter, and in one of so many clips there is none
    variable_length: bool = True
    subtract_mean_frame: bool = False
    mean_frame_gain: float = 3.0
    erasing: float = 0.0  # probability that a rectangle is blanked, the same in all frames
    gain: float = 0.0
    bias: float = 0.0
    scale: float = 0.0  # 0.1: the mouth is 0.9 to 1.1 times as large
    aspect: float = 0.0  # 0.1: width to height is 0.9 to 1.1 times as large
    rotation: float = 0.0  # radians, either way
    shift: float = 0.0  # fraction of half the crop's width, either way, on top of the random crop

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value}: it must be a finite number")
        if self.crop_size < 1 or self.std <= 0 or not 0 <= self.flip <= 1 or not 0 <= self.erasing <= 1:
            raise UserError("crop_size and std must be positive, flip and erasing probabilities")
        for name in ("mixup", "cutmix", "time_mask", "gain", "bias", "rotation", "shift"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.time_mask > 1 << 20:
            raise UserError(f"time_mask is {self.time_mask} frames: no clip has as many")
        for name in ("scale", "aspect"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must lie in [0, 1)")

    def whole(self) -> "AugmentOptions":
        """The same, but nothing is mixed, masked, erased or shortened."""
        return dataclasses.replace(self, mixup=0.0, cutmix=0.0, time_mask=0, erasing=0.0, variable_length=False)

    @property
    def is_affine(self) -> bool:
        return bool(self.scale or self.aspect or self.rotation or self.shift)


@dataclass(frozen=True)
class Draws:
    """What is drawn for the B clips of a global batch.

    `starts` and `lengths` (B,) int64 are the stretch that is kept of each clip, in frames; `top` and `left` (B,) the
    crop's corner in pixels, `flipped` (B,) bool, `theta` (B, 2, 3) the affine way from crop to frame (None: there is
    none), `gain` and `bias` (B,) the light, `mask_starts` and `mask_widths` (B,) the time mask in frames, `erased`
    (B, 4) int64 the top, left, height and width in pixels of what is blanked. `partner` (B,) is the clip that each is
    mixed with, None without mixing: each pixel is `lam` of its own and the rest of the partner's, and `cut_widths` (B,)
    frames from `cut_starts` (B,) on are wholly the partner's. `share` (B,) is how much of the label is its own.
    """

    starts: np.ndarray
    lengths: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flipped: np.ndarray
    theta: np.ndarray | None
    gain: np.ndarray
    bias: np.ndarray
    mask_starts: np.ndarray
    mask_widths: np.ndarray
    erased: np.ndarray
    partner: np.ndarray | None
    lam: float
    cut_starts: np.ndarray
    cut_widths: np.ndarray
    share: np.ndarray

    def of(self, rows: np.ndarray) -> "Draws":
        """The same of the clips `rows` (R,) alone; partners keep the numbers that they have in the whole batch."""
        mine = {k: v[rows] if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return Draws(**mine)


def check_size(video_BTHW: Tensor, options: AugmentOptions) -> int:
    """The side of the frames, in pixels; ValueError where no crop can be cut out of them."""
    height, size = video_BTHW.shape[2:]
    if size < options.crop_size or height != size:
        raise UserError(
            f"frames of {size}x{height} pixels cannot be cropped to {options.crop_size}: "
            "lower crop_size, or make the shards with a larger --crop-size"
        )
    return size


def draw(
    lengths_B: np.ndarray,
    durations_B: np.ndarray,
    options: AugmentOptions,
    *,
    size: int,
    fps: float,
    seed: tuple[int, int],
) -> Draws:
    """Draw for a global batch as the published LRW training does (Ma et al. 2022, arXiv 2209.01383).

    `lengths_B` int64 are the clips' frames, at least one each; `durations_B` float the seconds of the spoken word (NaN
    where unknown: that clip is not shortened); `size` is the side of the frames in pixels, at least that of the crop.
    `seed` is the run's seed and the step.

    """
    count = len(lengths_B)
    starts, lengths = np.zeros(count, np.int64), lengths_B
    if options.variable_length:
        starts, lengths = _variable_length(lengths, durations_B, fps, _generator(seed, "variable_length"))
    spare = size - options.crop_size
    top, left = _generator(seed, "crop").integers(0, spare + 1, (2, count))
    if not options.random_crop:
        top, left = np.full((2, count), spare // 2)
    flipped = _generator(seed, "flip").random(count) < options.flip
    theta = None
    if options.is_affine:
        theta = _affine(size, top, left, flipped, options, _generator(seed, "affine"))
    light = _generator(seed, "light")
    gain = 1 + light.uniform(-options.gain, options.gain, count)
    bias = light.uniform(-options.bias, options.bias, count)
    mask_starts, mask_widths = np.zeros((2, count), np.int64)
    if options.time_mask:
        mask_starts, mask_widths = _time_mask(lengths, options.time_mask, _generator(seed, "time_mask"))
    erased = np.zeros((count, 4), np.int64)
    if options.erasing:
        erased = _erasing(count, options.crop_size, options.erasing, _generator(seed, "erasing"))
    partner, lam, random = _mixing(count, options, seed=seed)
    cut_starts, cut_widths = np.zeros((2, count), np.int64)
    share = np.full(count, lam)
    if partner is not None and random is not None:
        cut_starts, cut_widths = _cut(lengths, partner, lam, random)
        lam, share = 1.0, 1 - cut_widths / lengths
    return Draws(
        starts=starts,
        lengths=lengths,
        top=top,
        left=left,
        flipped=flipped,
        theta=theta,
        gain=gain,
        bias=bias,
        mask_starts=mask_starts,
        mask_widths=mask_widths,
        erased=erased,
        partner=partner,
        lam=lam,
        cut_starts=cut_starts,
        cut_widths=cut_widths,
        share=share,
    )


def partners(count: int, options: AugmentOptions, *, seed: tuple[int, int]) -> np.ndarray | None:
    """Which of `count` clips each is mixed with, (count,); None without mixup and cutmix.

    Known before the batch is read, so that a process that has a part of it can read the partners, too.
    """
    return _mixing(count, options, seed=seed)[0]


def _mixing(
    count: int, options: AugmentOptions, *, seed: tuple[int, int]
) -> tuple[np.ndarray | None, float, np.random.Generator | None]:
    """Partners, what is kept of each clip, and, where it is cut in time, the generator to draw where.

    One lam for all, and partners by a permutation (mixup: Zhang et al. 2018; cutmix: Yun et al. 2019).
    """
    if not options.mixup and not options.cutmix:
        return None, 1.0, None
    cuts = not options.mixup or (options.cutmix and _generator(seed, "mix").random() < 0.5)
    random = _generator(seed, "cutmix" if cuts else "mixup")
    alpha = options.cutmix if cuts else options.mixup
    return random.permutation(count), float(random.beta(alpha, alpha)), random if cuts else None


def _generator(seed: tuple[int, int], name: str) -> np.random.Generator:
    return np.random.default_rng([*seed, zlib.crc32(name.encode())])


def _variable_length(
    lengths: np.ndarray, durations: np.ndarray, fps: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """First frame and length of a random stretch of each clip around the word at its centre, (B,) each."""
    known = np.isfinite(durations)
    # A word longer than its clip keeps the whole clip; an absurd duration must not overflow the integers.
    half = np.minimum(np.where(known, durations, 0) / 2 * fps, lengths).astype(np.int64)
    middle = (lengths - 1) // 2
    starts = random.integers(0, np.maximum(middle - half - 1, 0), endpoint=True)
    stops = random.integers(np.minimum(middle + half + 1, lengths), lengths, endpoint=True)
    starts, stops = np.where(known, starts, 0), np.where(known, stops, lengths)
    return starts, stops - starts


def _time_mask(lengths: np.ndarray, limit: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # As published: what bounds the start is another number than the width, 0 stands for no mask, and a mask that would
    # begin beyond the clip is dropped.
    spare, widths = random.integers(0, limit, (2, len(lengths)))
    masked = (spare > 0) & (spare < lengths)
    starts = random.integers(0, np.where(masked, lengths - spare, 1))
    return starts, np.where(masked, np.minimum(widths, lengths - starts), 0)


def _cut(
    lengths: np.ndarray, partner: np.ndarray, lam: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """First frame and width of what the partner fills, where both clips have frames."""
    both = np.minimum(lengths, lengths[partner])
    widths = np.rint((1 - lam) * both).astype(np.int64)
    return random.integers(0, both - widths, endpoint=True), widths


def _erasing(count: int, size: int, probability: float, random: np.random.Generator) -> np.ndarray:
    """(B, 4): rectangles of 2 to 33 % of the area, 0.3 to 3.3 times as high as wide (Zhong et al. 2020).

    As torchvision has it: ten tries to draw one that is smaller than the picture, else none.
    """
    chosen = random.random(count) < probability
    area = size * size * random.uniform(0.02, 0.33, (10, count))
    ratio = np.exp(random.uniform(math.log(0.3), math.log(3.3), (10, count)))
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (height < size) & (width < size)
    first = fits.argmax(0), np.arange(count)
    chosen &= fits.any(0)
    height, width = (np.where(chosen, side[first], 0).astype(np.int64) for side in (height, width))
    top, left = (random.integers(0, size - side, endpoint=True) for side in (height, width))
    return np.stack([top, left, height, width], axis=1)


def _affine(
    size: int,
    top: np.ndarray,
    left: np.ndarray,
    flipped: np.ndarray,
    options: AugmentOptions,
    random: np.random.Generator,
) -> np.ndarray:
    """(B, 2, 3): from the crop's coordinates to the frame's, both in [-1, 1] as `affine_grid` has them."""
    count = len(top)
    scale = 1 + random.uniform(-options.scale, options.scale, count)
    aspect = np.sqrt(1 + random.uniform(-options.aspect, options.aspect, count))
    angle = random.uniform(-options.rotation, options.rotation, count)
    shift_2B = random.uniform(-options.shift, options.shift, (2, count)) * options.crop_size / size
    ratio = options.crop_size / size
    step_x = ratio / (scale * aspect) * np.where(flipped, -1, 1)
    step_y = ratio / scale * aspect
    # The crop's centre lies (left + crop_size / 2) pixels from the frame's edge, which is at -1.
    centre_x = 2 * (left + options.crop_size / 2) / size - 1 + shift_2B[0]
    centre_y = 2 * (top + options.crop_size / 2) / size - 1 + shift_2B[1]
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * step_x, -sin * step_y, centre_x], [sin * step_x, cos * step_y, centre_y]]
    return np.moveaxis(np.array(rows), 2, 0)
