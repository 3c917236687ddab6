"""The mouth patch: warped straight out of the source frame, frame by frame as the video is decoded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.align import FRAME, Profile, find_profile, mean_face, patch_matrices
from lipprep.stages.failures import ClipFailure
from lipprep.stages.gray import gray_from_bgr
from lipprep.stages.video import GrayFrame

MAX_REPEATED = 1000  # frames that a window may reach beyond its video's ends: each is stored
_AT_ONCE = 1 << 20  # bytes of frames' parts that are warped in a row: about three clips of LRW


@dataclass(frozen=True)
class CropParameters:
    """How mouth crops are cut. Raises ValueError for what no crop can be cut with.

    `profile` names the alignment; `crop_size` is the patch's side in pixels of the aligned 256x256 frame and
    never rescales; `exact` decodes colour and converts to gray where the reference does; `box` (x, y, w, h)
    is the patch of profile `fixed`, in pixels of the source.
    """

    profile: str = "lrw2021"
    crop_size: int = 96
    exact: bool = False
    box: tuple[int, int, int, int] = (80, 116, 96, 96)

    def __post_init__(self) -> None:
        profile = find_profile(self.profile)
        if not 8 <= self.crop_size <= FRAME:
            raise UserError(f"crop size {self.crop_size} is outside 8 to {FRAME}, the side of the aligned frame")
        if profile.align is None:
            x, y, w, h = self.box
            if w != h or x < 0 or y < 0:
                raise UserError(f"box {x},{y},{w},{h}: mouth crops are square, so W and H must agree, X and Y be >= 0")
            if w != self.crop_size:
                raise UserError(
                    f"profile fixed cuts its box as it is: crop size {self.crop_size} must equal the box's side {w}"
                )

    @property
    def needs_landmarks(self) -> bool:
        """Whether the profile aligns to landmarks, or cuts a fixed box."""
        return find_profile(self.profile).align is not None


@dataclass(frozen=True)
class Crop:
    """Mouth crops (T, S, S) uint8, and how they were cut.

    `scale` is the mean scale from source to patch, `outside` the share of frames whose patch reaches beyond
    the source frame (black there).
    """

    mouth: np.ndarray
    scale: float
    outside: float


@dataclass(frozen=True)
class Window:
    """The frames of a video that make one clip.

    `start` is the clip's first frame, may be negative, and counts as `read_frames` counts; frames beyond the
    video's ends repeat its edge frame. A clip that is a whole video has `start` None. `points` (T, 68, 2) are
    its landmarks, NaN without a face; for profile `fixed`, which needs none, only `num_frames` counts.
    """

    start: int | None
    num_frames: int | None
    points: np.ndarray | None = None


def reach_failure(
    start: int | None, num_frames: int | None, count: int, video: str = "the video"
) -> ClipFailure | None:
    """Why a window of a video of `count` frames cannot be cut: it sees none of them, or reaches too far beyond them."""
    if not count or (start or 0) >= count:
        return ClipFailure("too_short", f"the clip starts at frame {start or 0}, {video} has {count}")
    if start is not None and (repeated := max(0, -start) + max(0, start + num_frames - count)) > MAX_REPEATED:
        return ClipFailure(
            "too_short",
            f"the window of {num_frames} frames from frame {start} on has {repeated} frames beyond the {count} of "
            f"{video}, at most {MAX_REPEATED} are repeated: list a shorter window",
        )
    return None


def _bilinear(frame_HWC: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The patch of a colour frame as scikit-image's `warp` computes it: bilinear in floats, zero outside, truncated."""
    H, W, _ = frame_HWC.shape
    inverse = cv2.invertAffineTransform(matrix)
    r = np.arange(size, dtype=np.float64)
    x = inverse[0, 0] * r[None, :] + inverse[0, 1] * r[:, None] + inverse[0, 2]
    y = inverse[1, 0] * r[None, :] + inverse[1, 1] * r[:, None] + inverse[1, 2]
    x0, y0 = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    dx, dy = (x - x0)[..., None], (y - y0)[..., None]
    unit = np.zeros((H + 2, W + 2, 3))
    unit[1:-1, 1:-1] = frame_HWC
    unit *= 1 / 255  # as scikit-image does: a division rounds otherwise, and truncation shows it

    def at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return unit[np.clip(rows + 1, 0, H + 1), np.clip(columns + 1, 0, W + 1)]

    top = (1 - dx) * at(y0, x0) + dx * at(y0, x0 + 1)
    bottom = (1 - dx) * at(y0 + 1, x0) + dx * at(y0 + 1, x0 + 1)
    return (((1 - dy) * top + dy * bottom) * 255).astype(np.uint8)


class _Cutter:
    """Cuts one clip's patches as the frames come by.

    What a patch sees of its frame is kept until there are several: decoder and warp in turn, frame by frame, would
    drive each other's code and data out of the cache.
    """

    def __init__(self, matrix_T23: np.ndarray, frame_shape: tuple[int, ...], parameters: CropParameters) -> None:
        self._profile: Profile = find_profile(parameters.profile)
        self._exact = parameters.exact
        self._patch = np.empty((parameters.crop_size, parameters.crop_size), np.float32)
        T, S = len(matrix_T23), parameters.crop_size
        H, W = frame_shape[:2]
        self.mouth = np.empty((T, S, S), np.uint8)
        # Only the part of the frame that the patch sees is touched: its corners, brought back to the source.
        self.scale = np.hypot(matrix_T23[:, 0, 0], matrix_T23[:, 1, 0])
        back_T22 = np.linalg.inv(matrix_T23[:, :, :2])
        corners = np.array([[0, 0], [S - 1, 0], [0, S - 1], [S - 1, S - 1]], np.float64)
        source_T42 = (corners[None] - matrix_T23[:, None, :, 2]) @ back_T22.transpose(0, 2, 1)
        low_T2, high_T2 = source_T42.min(1), source_T42.max(1)
        self.outside = (low_T2 < 0).any(1) | (high_T2 > [W - 1, H - 1]).any(1)
        # One pixel more on each side for the interpolation; an empty part (a patch wholly outside) keeps a pixel.
        low_T2 = np.clip(np.floor(low_T2).astype(int) - 1, 0, [W - 1, H - 1])
        high_T2 = np.clip(np.ceil(high_T2).astype(int) + 2, low_T2 + 1, [W, H])
        self._parts = np.concatenate([low_T2, high_T2], axis=1).tolist()
        self._matrix = matrix_T23.copy()
        self._matrix[:, :, 2] += (matrix_T23[:, :, :2] @ low_T2[:, :, None])[:, :, 0]
        self._seen: list[tuple[int, np.ndarray]] = []  # frame's number in the clip, what its patch sees
        self._held = 0  # bytes of them

    def cut(self, t: int, frame: GrayFrame | np.ndarray) -> None:
        """Take from `frame` what the patch of the clip's frame `t` sees."""
        x0, y0, x1, y1 = self._parts[t]
        part = np.ascontiguousarray(frame[y0:y1, x0:x1])  # a view would keep the whole frame
        self._seen.append((t, part))
        self._held += part.nbytes
        if self._held >= _AT_ONCE:
            self._warp_seen()

    def _warp_seen(self) -> None:
        for t, part in self._seen:
            self._warp(t, part)
        self._seen.clear()
        self._held = 0

    def _warp(self, t: int, part: np.ndarray) -> None:
        matrix, size = self._matrix[t], self._patch.shape
        if not self._exact:
            # Floats keep what an 8-bit warp would round away, and are faster here.
            cv2.warpAffine(part.astype(np.float32), matrix, size, dst=self._patch)
            self.mouth[t] = self._patch if self._profile.truncate else np.rint(self._patch)
        elif self._profile.gray_first:
            cv2.warpAffine(gray_from_bgr(part), matrix, size, dst=self.mouth[t])
        else:
            self.mouth[t] = gray_from_bgr(_bilinear(part, matrix, size[0]))

    def crop(self) -> Crop:
        self._warp_seen()
        return Crop(self.mouth, float(self.scale.mean()), float(self.outside.mean()))


def _matrices(window: Window, parameters: CropParameters, face: np.ndarray, frame_shape: tuple) -> np.ndarray:
    """The clip's matrices (T, 2, 3) from source pixels into the patch."""
    profile = find_profile(parameters.profile)
    if profile.align is not None:
        H, W = frame_shape[:2]
        return patch_matrices(window.points, profile, crop_size=parameters.crop_size, face=face, frame_size=(W, H))
    x, y, _, _ = parameters.box
    return np.tile(np.array([[1.0, 0.0, -x], [0.0, 1.0, -y]]), (window.num_frames, 1, 1))


def crop_clips(
    frames: Iterable[GrayFrame | np.ndarray],
    windows: Sequence[Window],
    parameters: CropParameters,
    *,
    first: int = 0,
    face: np.ndarray | None = None,
) -> list[Crop | ClipFailure]:
    """Cut the clips of one video while its frames come by, once; each gets its crops or the reason why not.

    `frames` are those of `read_frames` from number `first` on: gray, or BGR where `parameters.exact`. A clip's crops
    take T x S x S bytes, and its matrices more where S is small, so how many frames it has is for the caller to bound.
    `face` is the mean face (68, 2), by default the published one. What the frames' iterator raises (a video
    that cannot be read) is raised: it concerns all clips.
    """
    face = mean_face() if face is None else face
    outcome: list[Crop | ClipFailure | None] = [None] * len(windows)
    cutters: list[_Cutter | None] = [None] * len(windows)
    number, frame = first - 1, None
    for number, frame in enumerate(frames, first):
        for n, window in enumerate(windows):
            if number == first:
                try:
                    cutters[n] = _Cutter(_matrices(window, parameters, face, frame.shape), frame.shape, parameters)
                except ClipFailure as failure:
                    outcome[n] = failure
            cutter, start = cutters[n], window.start or 0
            if cutter is None:
                continue
            for t in range(0, 1 - start) if number == 0 else (number - start,):
                if 0 <= t < len(cutter.mouth):
                    cutter.cut(t, frame)
    count = number + 1
    for n, window in enumerate(windows):
        if outcome[n] is not None:
            continue
        if cutters[n] is None:
            outcome[n] = ClipFailure("too_short", f"the video ends before frame {first}")
            continue
        T = len(cutters[n].mouth)
        if window.start is None and count != T:
            outcome[n] = ClipFailure("landmarks_mismatch", f"landmarks for {T} frames, but the video has {count}")
        elif (failure := reach_failure(window.start, T, count)) is not None:
            outcome[n] = failure
        else:
            for t in range(max(0, count - (window.start or 0)), T):
                cutters[n].cut(t, frame)
            outcome[n] = cutters[n].crop()
    return outcome


def crop_stretches(
    frames: Iterable[GrayFrame | np.ndarray],
    window: Window,
    parameters: CropParameters,
    *,
    length: int,
    face: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Cut the clip that a whole video is, and give its mouth crops `length` frames at a time, (t, S, S) uint8.

    One after another, they are those of `crop_clips`, to the bit; but no more than one stretch is held. Raises what the
    frames' iterator does, and ClipFailure where no crop can be cut or the video has more or fewer frames than `window`.
    """
    face = mean_face() if face is None else face
    matrix_T23, cutter, count = np.empty((0, 2, 3)), None, 0
    for number, frame in enumerate(frames):
        if number == 0:
            matrix_T23 = _matrices(window, parameters, face, frame.shape)
        count, t = number + 1, number % length
        if count > len(matrix_T23):
            continue
        if t == 0:
            if cutter is not None:
                yield cutter.crop().mouth
            cutter = _Cutter(matrix_T23[number : number + length], frame.shape, parameters)
        cutter.cut(t, frame)
    if cutter is None or count != len(matrix_T23):
        raise ClipFailure("landmarks_mismatch", f"landmarks for {len(matrix_T23)} frames, but the video has {count}")
    yield cutter.crop().mouth
