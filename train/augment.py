"""Batched augmentation on the training device: uint8 clips in, normalised float32 out.

What is drawn comes from the host (`lipprep.train.draws`), in a few vectors of one number a clip. The pixels never leave
the device; the crop is cut out of the bytes, and float arithmetic sees only what is cut out. Keep `lengths_B` on the
host (as a loader gives them) and nothing here waits for the device.

Letters of the shape suffixes: B clips, R of a global batch that are here, T frames, H and W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipprep.train.boundary import MIXED, boundary_vectors
from lipprep.train.draws import AugmentOptions, Draws, check_size


@dataclass(frozen=True)
class AugmentedBatch:
    """Clips ready for the network, and how their labels mix: share * own + (1 - share) * partner's."""

    x_B1THW: Tensor  # float32, exactly zero after each clip's length
    lengths_B: Tensor  # int64, frames, on the device of x
    partner_B: Tensor | None  # int64, rows of the batch that was given, on the device of x; None without mixing
    share_B: Tensor  # float32, on the device of x
    # By formula, (B, T, 1) float32: 1 in the frames of the word, on the device of x.
    boundaries: Mapping[str, Tensor] = field(default_factory=dict)


def train_batch(
    video_RTHW: Tensor,
    draws: Draws,
    options: AugmentOptions,
    *,
    rows: np.ndarray | None = None,
    wanted: int | None = None,
    frames: int | None = None,
    words: Mapping[str, np.ndarray] | None = None,
) -> AugmentedBatch:
    """Do to a batch, `video_RTHW` uint8, what was drawn for it.

    In this order: variable length, random crop with any affine change, flip, normalisation, light, mean frame, time
    mask (filled with the mean of the clip's own frames), erasing (filled with 0), zero padding, mixup or cutmix. T is
    `frames`, or that of the longest clip that is left of the global batch. With mixup a pair is as long as its longer
    clip, so that neither is cut; with cutmix each keeps its length.

    Of a part of a global batch, `rows` (R,) are its clips' numbers in there. The first `wanted` of them come out, the
    others are here as their partners.

    `words`, by formula (R, 2), are the frames of the whole clips from the first of the word to the one after its last:
    they become the boundaries. Frames that cutmix brings keep theirs; mixup leaves each clip its own or mixes them, as
    those who published the formula do.

    Raises ValueError if the frames are smaller than the crop.
    """
    size = check_size(video_RTHW, options)
    rows = np.arange(len(video_RTHW)) if rows is None else rows
    wanted = len(rows) if wanted is None else wanted
    mine, frames = draws.of(rows), frames or int(draws.lengths.max())
    lengths = mine.lengths
    assert (lengths >= 1).all() and (mine.starts + lengths <= video_RTHW.shape[1]).all()
    if mine.theta is not None:
        cropped_RTHW = _sample(_frames(video_RTHW, mine, frames), mine.theta, options.crop_size)
    else:
        cropped_RTHW = _crop(video_RTHW, mine, frames, size, options.crop_size)
    x_RTHW = _normalise(cropped_RTHW, lengths, mine.gain, mine.bias, options)
    if mine.mask_widths.any():
        _mask_time(x_RTHW, lengths, mine.mask_starts, mine.mask_widths)
    if mine.erased.any():
        _erase(x_RTHW, mine.erased)
    share_B = _to(mine.share[:wanted].astype(np.float32), x_RTHW)
    known = {}
    for formula, frames_R2 in (words or {}).items():
        inside_R2 = np.clip(frames_R2 - mine.starts[:, None], 0, lengths[:, None])
        known[formula] = _to(boundary_vectors(inside_R2, frames), x_RTHW)
    own = {formula: boundary_RT1[:wanted] for formula, boundary_RT1 in known.items()}
    if mine.partner is None:
        return AugmentedBatch(x_RTHW[:wanted, None], _to(lengths[:wanted], x_RTHW), None, share_B, own)
    places = np.full(len(draws.lengths), -1)
    places[rows] = np.arange(len(rows))
    partner = places[mine.partner[:wanted]]
    assert (partner >= 0).all()
    at = _to(partner, x_RTHW)
    if draws.lam == 1:
        own = {formula: _splice(boundary_RT1, partner, mine) for formula, boundary_RT1 in known.items()}
        x_BTHW = _splice(x_RTHW, partner, mine)
        return AugmentedBatch(x_BTHW[:, None], _to(lengths[:wanted], x_RTHW), at, share_B, own)
    for formula in MIXED & set(own):
        own[formula] = own[formula].lerp(known[formula][at], 1 - draws.lam)
    x_BTHW = x_RTHW[:wanted].lerp(x_RTHW[at], 1 - draws.lam)
    longer = _to(np.maximum(lengths[:wanted], lengths[partner]), x_RTHW)
    return AugmentedBatch(x_BTHW[:, None], longer, at, share_B, own)


def eval_batch(video_BTHW: Tensor, lengths_B: Tensor, options: AugmentOptions) -> Tensor:
    """The centre crop of a uint8 batch, normalised, (B, 1, T, H, W) float32, zero after each clip's length.

    Nothing is drawn and T is kept. Raises ValueError if the frames are smaller than the crop.
    """
    size = check_size(video_BTHW, options)
    first = (size - options.crop_size) // 2
    window = slice(first, first + options.crop_size)
    none = np.zeros(len(lengths_B))
    return _normalise(video_BTHW[:, :, window, window], lengths_B.cpu().numpy(), none + 1, none, options)[:, None]


def cross_entropy(
    logits: Tensor,
    labels_R: Tensor,
    batch: AugmentedBatch,
    label_smoothing: float = 0.0,
    *,
    normalised: bool = False,
) -> Tensor:
    """The batch's mean cross entropy, a scalar, labels mixed as the clips are (Zhang et al. 2018).

    `labels_R` are of the clips that were given, of which those of the logits come first. `normalised` ones are log
    posteriors already, or means of such over frames (Stafylakis & Tzimiropoulos 2017), and taken as they are.
    """
    own = labels_R[: len(logits)]
    if batch.partner_B is None and not normalised:
        return functional.cross_entropy(logits, own, label_smoothing=label_smoothing)

    def losses(labels_B: Tensor) -> Tensor:
        if not normalised:
            return functional.cross_entropy(logits, labels_B, label_smoothing=label_smoothing, reduction="none")
        return functional.nll_loss(logits, labels_B, reduction="none").lerp(-logits.mean(1), label_smoothing)

    if batch.partner_B is None:
        return losses(own).mean()
    return losses(labels_R[batch.partner_B]).lerp(losses(own), batch.share_B).mean()


def correct(logits: Tensor, labels_R: Tensor, batch: AugmentedBatch) -> Tensor:
    """The part of the batch that was read right, a scalar; of a mixed clip, as much as is of the word that was read."""
    answers_B = logits.argmax(1)
    own_B = (answers_B == labels_R[: len(logits)]).float()
    if batch.partner_B is None:
        return own_B.mean()
    return (answers_B == labels_R[batch.partner_B]).float().lerp(own_B, batch.share_B).mean()


def _to(values: np.ndarray | Tensor, like: Tensor) -> Tensor:
    # Without this a copy to CUDA waits for all work queued there; from pageable memory it is safe.
    return torch.as_tensor(values).to(like.device, non_blocking=like.is_cuda)


def _frame_positions(video_RTHW: Tensor, draws: Draws, frames: int) -> np.ndarray:
    """Where the frames kept stand among all R * T, (R, frames) int64; a clip's last frame repeats."""
    batch_size, num_frames = video_RTHW.shape[:2]
    offsets_RT = np.minimum(np.arange(frames), draws.lengths[:, None] - 1)
    return np.arange(batch_size)[:, None] * num_frames + draws.starts[:, None] + offsets_RT


def _frames(video_RTHW: Tensor, draws: Draws, frames: int) -> Tensor:
    positions_RT = _frame_positions(video_RTHW, draws, frames)
    kept = video_RTHW.flatten(0, 1).index_select(0, _to(positions_RT.ravel(), video_RTHW))
    return kept.unflatten(0, positions_RT.shape)


def _crop(video_RTHW: Tensor, draws: Draws, frames: int, size: int, crop_size: int) -> Tensor:
    """Cut frames and rows in one copy of whole rows, then columns (mirrored where flipped) in another."""
    positions_RT = _frame_positions(video_RTHW, draws, frames)
    offsets = np.arange(crop_size)
    lines_RTH = positions_RT[:, :, None] * size + (draws.top[:, None] + offsets)[:, None, :]
    lines = video_RTHW.reshape(-1, size).index_select(0, _to(lines_RTH.ravel(), video_RTHW))
    columns_RW = draws.left[:, None] + np.where(draws.flipped[:, None], offsets[::-1], offsets)
    columns = _to(columns_RW, video_RTHW)[:, None, None, :].expand(*lines_RTH.shape, -1)
    return lines.unflatten(0, lines_RTH.shape).gather(3, columns)


def _sample(frames_RTHW: Tensor, theta_R23: np.ndarray, crop_size: int) -> Tensor:
    """All frames of a clip through one grid, bilinear, the edge repeated outside: float32 in 0 to 255."""
    theta = _to(theta_R23.astype(np.float32), frames_RTHW)
    grid = functional.affine_grid(theta, [len(theta), 1, crop_size, crop_size], align_corners=False)
    return functional.grid_sample(frames_RTHW.float(), grid, padding_mode="border", align_corners=False)


def _normalise(
    video_BTHW: Tensor, lengths: np.ndarray, gain: np.ndarray, bias: np.ndarray, options: AugmentOptions
) -> Tensor:
    """((video / 255 - mean) / std) * gain + bias, less the mean frame if so wanted, zero in the padding.

    In place where `video_BTHW` is of floats, in as few passes as there can be: with the mean frame goes all that is
    added to each pixel, and one factor is as good as two.
    """
    factor = gain / (255 * options.std)
    if options.subtract_mean_frame:
        factor = factor * options.mean_frame_gain
    factor_B = _to(factor.astype(np.float32), video_BTHW)[:, None, None, None]
    x_BTHW = video_BTHW.mul_(factor_B) if video_BTHW.is_floating_point() else video_BTHW * factor_B
    padding_BT = np.arange(x_BTHW.shape[1]) >= lengths[:, None]
    if options.subtract_mean_frame:
        _fill_frames(x_BTHW, padding_BT, 0.0)
        x_BTHW.sub_((x_BTHW.sum(1) / _to(lengths, x_BTHW)[:, None, None])[:, None])
    else:
        offset = bias - gain * options.mean / options.std
        x_BTHW.add_(_to(offset.astype(np.float32), video_BTHW)[:, None, None, None])
    _fill_frames(x_BTHW, padding_BT, 0.0)
    return x_BTHW


def _mask_time(x_RTHW: Tensor, lengths: np.ndarray, starts: np.ndarray, widths: np.ndarray) -> None:
    """Fill a stretch of each clip with the clip's mean, in place; `x_RTHW` is zero in the padding."""
    frames = np.arange(x_RTHW.shape[1])
    masked_RT = (frames >= starts[:, None]) & (frames < (starts + widths)[:, None])
    mean_R = x_RTHW.mean((1, 2, 3)) * _to(x_RTHW.shape[1] / lengths.astype(np.float32), x_RTHW)
    clips = _to(masked_RT.nonzero()[0], x_RTHW)
    _fill_frames(x_RTHW, masked_RT, mean_R[clips][:, None, None])


def _erase(x_RTHW: Tensor, erased: np.ndarray) -> None:
    """Blank a rectangle of each clip, in place."""
    height, width = x_RTHW.shape[2:]
    top, left, tall, wide = erased.T[:, :, None]
    rows_RH = (np.arange(height) >= top) & (np.arange(height) < top + tall)
    columns_RW = (np.arange(width) >= left) & (np.arange(width) < left + wide)
    x_RTHW.masked_fill_(_to(rows_RH[:, None, :, None] & columns_RW[:, None, None, :], x_RTHW), 0.0)


def _splice(x_RT: Tensor, partner: np.ndarray, draws: Draws) -> Tensor:
    """The first clips, (B, T, ...), a stretch of each from its partner: one copy of whole frames."""
    num_frames = x_RT.shape[1]
    frames = np.arange(num_frames)
    starts, stops = draws.cut_starts[:, None], (draws.cut_starts + draws.cut_widths)[:, None]
    cut_BT = ((frames >= starts) & (frames < stops))[: len(partner)]
    clips_BT = np.where(cut_BT, partner[:, None], np.arange(len(partner))[:, None])
    positions = _to((clips_BT * num_frames + frames).ravel(), x_RT)
    return x_RT.flatten(0, 1).index_select(0, positions).unflatten(0, cut_BT.shape)


def _fill_frames(x_BTHW: Tensor, chosen_BT: np.ndarray, value: Tensor | float) -> None:
    """Set the chosen frames, in place. Positions from the host: a mask on the device would be waited for."""
    if chosen_BT.any():
        x_BTHW.flatten(0, 1)[_to(chosen_BT.ravel().nonzero()[0], x_BTHW)] = value
