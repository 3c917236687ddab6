"""From landmarks to one 2x3 matrix a frame: repair, smoothing, similarity to the mean face, named profiles.

Weights are tied to the way their training crops were cut, so each way has a name that goes into records, the
index and checkpoints. `lrw2021` and `lrw2022` are the two versions of the preprocessing of
"Lipreading using Temporal Convolutional Networks" (Ma, Martinez et al., 2020-2022).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.failures import ClipFailure

FRAME = 256  # side of the aligned frame, pixels: the mean face lies in such a frame
MOUTH = slice(48, 68)  # iBUG-68: outer and inner lip


def similarity(src_TKD: np.ndarray, dst_KD: np.ndarray) -> np.ndarray:
    """Least-squares similarities (T, 2, 3) float64 that bring points (T, K, 2) onto (K, 2).

    Umeyama 1991 in two dimensions, all frames at once: as complex numbers, dst = a src + b with
    a = sum(conj(src) dst) / sum(|src|^2) about the centroids. Points that all coincide give infinities or NaN.
    """
    z_TK = src_TKD[..., 0] + 1j * src_TKD[..., 1]
    w_K = dst_KD[:, 0] + 1j * dst_KD[:, 1]
    z_mean_T, w_mean = z_TK.mean(1), w_K.mean()
    z_TK = z_TK - z_mean_T[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        a_T = (z_TK.conj() * (w_K - w_mean)).sum(1) / (np.abs(z_TK) ** 2).sum(1)
        b_T = w_mean - a_T * z_mean_T
    return np.stack(
        [np.stack([a_T.real, -a_T.imag, b_T.real], -1), np.stack([a_T.imag, a_T.real, b_T.imag], -1)], axis=1
    )


def robust_similarity(src_TKD: np.ndarray, dst_KD: np.ndarray) -> np.ndarray:
    """As `similarity`, by OpenCV's least median of squares: a point far off the others is left out."""
    dst_KD = np.ascontiguousarray(dst_KD)
    matrices = [
        cv2.estimateAffinePartial2D(src_KD, dst_KD, method=cv2.LMEDS)[0] for src_KD in np.ascontiguousarray(src_TKD)
    ]
    if any(m is None for m in matrices):
        raise ClipFailure("bad_landmarks", "the stable points of a frame coincide or lie on a line")
    return np.stack(matrices)


def repair(points_TKD: np.ndarray) -> np.ndarray:
    """Fill frames without a face (NaN): linear between their neighbours, copies before the first and after the last.

    Takes (T, 68, 2), returns float64. Raises ClipFailure("no_face") where no frame has one.
    """
    T = len(points_TKD)
    valid = np.flatnonzero(np.isfinite(points_TKD).all(axis=(1, 2)))
    if not len(valid):
        raise ClipFailure("no_face", f"no face was found in any of {T} frames")
    filled = points_TKD.astype(np.float64)
    if len(valid) == T:
        return filled
    t = np.arange(T)
    after = np.searchsorted(valid, t).clip(max=len(valid) - 1)
    a, b = valid[np.where(valid[after] > t, (after - 1).clip(min=0), after)], valid[after]
    share = np.where(b > a, (t - a) / np.maximum(b - a, 1), 0.0)[:, None, None]
    return filled[a] + share * (filled[b] - filled[a])


def smooth_forward(points_TKD: np.ndarray, window: int = 12) -> np.ndarray:
    """Mean over frames t .. t + window - 1 for every window that fits: (T - window + 1, 68, 2).

    Looks forward, not around: the 2021 version's queue. The window shrinks to a clip that is shorter.
    """
    window = min(window, len(points_TKD))
    sums = np.concatenate([np.zeros_like(points_TKD[:1]), np.cumsum(points_TKD, 0)])
    return (sums[window:] - sums[:-window]) / window


def smooth_centred(points_TKD: np.ndarray, margin: int = 6) -> np.ndarray:
    """Mean over up to 2 x margin + 1 frames around each, fewer at the ends, moved back to the frame's own centroid."""
    T = len(points_TKD)
    t = np.arange(T)
    m = np.minimum(np.minimum(margin, t), T - 1 - t)
    sums = np.concatenate([np.zeros_like(points_TKD[:1]), np.cumsum(points_TKD, 0)])
    smoothed = (sums[t + m + 1] - sums[t - m]) / (2 * m + 1)[:, None, None]
    return smoothed + (points_TKD.mean(1) - smoothed.mean(1))[:, None]


def apply(matrix_T23: np.ndarray, points_TKD: np.ndarray) -> np.ndarray:
    """Points (T, K, 2) moved by matrices (T, 2, 3)."""
    return points_TKD @ matrix_T23[:, :, :2].transpose(0, 2, 1) + matrix_T23[:, None, :, 2]


def _align_2021(points_TKD: np.ndarray, mean_face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stable = [33, 36, 39, 42, 45]
    fitted = similarity(smooth_forward(points_TKD[:, stable]), mean_face[stable])
    # The last frames, for which no window is left, re-use the last transform.
    matrix_T23 = fitted[np.arange(len(points_TKD)).clip(max=len(fitted) - 1)]
    return matrix_T23, apply(matrix_T23, points_TKD[:, MOUTH]).mean(1)


def _align_2022(points_TKD: np.ndarray, mean_face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stable = [28, 33, 36, 39, 42, 45, 48, 54]
    smoothed = smooth_centred(points_TKD)
    matrix_T23 = robust_similarity(smoothed[:, stable], mean_face[stable])
    return matrix_T23, apply(matrix_T23, smoothed[:, MOUTH]).mean(1)


def _unaligned(points_TKD: np.ndarray, mean_face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.eye(2, 3), (len(points_TKD), 1, 1)), points_TKD[:, MOUTH].mean(1)


@dataclass(frozen=True)
class Profile:
    """A named way to cut mouth crops.

    `align` takes repaired landmarks (T, 68, 2) and the mean face and returns the matrices (T, 2, 3) into the
    aligned frame and the mouth centres (T, 2) there; None: the crop is a fixed box and needs no landmarks.
    `gray_first`: the reference converts to gray before it warps. `truncate`: it cuts off the fraction of a
    warped value where others round. `channels` is the order in which the reference saves crops in colour, None where
    there is no reference that does.
    """

    name: str
    about: str
    align: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None
    aligned: bool = True
    gray_first: bool = True
    truncate: bool = False
    channels: str | None = None


PROFILES = {
    p.name: p
    for p in (
        Profile(
            "lrw2021",
            "five stable points, forward 12-frame mean",
            _align_2021,
            gray_first=False,
            truncate=True,
            channels="RGB",
        ),
        Profile("lrw2022", "eight stable points, centred window", _align_2022, channels="BGR"),
        Profile("unaligned", "round the raw mouth centre, no alignment", _unaligned, aligned=False),
        Profile("fixed", "a fixed box of the frame, no landmarks", None, aligned=False),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name; ValueError, naming those there are, for another."""
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


@cache
def mean_face() -> np.ndarray:
    """The published 20-words mean face, (68, 2) float64 pixels in a 256x256 frame (see NOTICE)."""
    with (resources.files("lipprep.stages") / "data" / "mean_face.npy").open("rb") as file:
        face = np.load(file, allow_pickle=False)
    face.setflags(write=False)
    return face


def cut_corners(centre_T2: np.ndarray, crop_size: int, width: float, height: float) -> np.ndarray:
    """Top left corners (T, 2) of patches round `centre_T2`, moved so that they lie inside width x height.

    Centres are rounded half to even, as the reference does.
    """
    half = crop_size / 2
    centre_T2 = np.clip(centre_T2, half, np.maximum([width - half, height - half], half))
    return np.rint(centre_T2) - crop_size // 2


def patch_matrices(
    points_TKD: np.ndarray,
    profile: Profile,
    *,
    crop_size: int,
    face: np.ndarray,
    frame_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Matrices (T, 2, 3) float64 from source pixels straight into the crop_size x crop_size patch.

    `points_TKD` (T, 68, 2) are raw landmarks, NaN where there is no face; `frame_size` (width, height) of the
    source bounds the patches of profiles that do not align. Raises ClipFailure: no_face, bad_landmarks.
    """
    points_TKD = repair(points_TKD)
    matrix_T23, centre_T2 = profile.align(points_TKD, face)
    width, height = (FRAME, FRAME) if profile.aligned else frame_size
    if not np.isfinite(matrix_T23).all():
        raise ClipFailure("bad_landmarks", "the stable points of a frame coincide: no similarity fits them")
    matrix_T23 = matrix_T23.copy()
    matrix_T23[:, :, 2] -= cut_corners(centre_T2, crop_size, width, height)
    return matrix_T23
