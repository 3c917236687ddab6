"""A photograph that speaks: the mouth of a real face, warped by its landmarks into any shape.

The part above the line where the lips meet follows the upper lip, the part below it the lower lip and the
chin; what opens between them is painted with the photograph's own teeth. `LOOKS` are its speakers.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from lipprep.stages.align import mean_face, similarity

SIZE = 256  # of LRW's frames, pixels
CANVAS = 288  # the frame and a margin for the head to move in
MARGIN = (CANVAS - SIZE) // 2

# iBUG-68 points of the face in skimage.data.astronaut(), pixels, measured once with the package's detector, and
# four more on the inner lips (68 to 71), half way to the corners, read off the picture.
# fmt: off
_FACE = np.array([
    (180.9, 101.3), (180.2, 109.5), (180.7, 127.1), (181.9, 136.0), (184.7, 144.4), (189.4, 155.8), (199.9, 168.2),
    (212.0, 177.3), (221.0, 178.9), (230.3, 178.4), (243.8, 170.8), (256.1, 159.6), (262.0, 148.8), (266.0, 140.9),
    (268.2, 132.1), (270.2, 114.6), (270.1, 106.2), (187.4, 90.2), (191.1, 87.5), (197.2, 86.3), (205.3, 87.5),
    (214.8, 89.5), (236.3, 90.3), (246.4, 89.3), (254.9, 89.2), (261.0, 91.1), (264.5, 94.4), (224.8, 101.3),
    (224.2, 111.8), (224.0, 116.4), (223.4, 127.3), (212.2, 129.8), (217.5, 132.6), (223.2, 133.8), (229.2, 133.1),
    (234.7, 130.9), (195.6, 100.5), (199.5, 98.1), (206.3, 98.3), (213.8, 103.6), (207.8, 104.0), (200.9, 103.7),
    (236.6, 104.9), (244.6, 100.3), (251.7, 101.0), (255.5, 103.9), (249.6, 106.4), (242.6, 105.9), (202.5, 139.5),
    (207.8, 139.2), (217.3, 139.4), (223.4, 140.6), (229.6, 139.8), (239.3, 140.2), (244.5, 140.8), (234.1, 152.8),
    (228.6, 155.0), (222.4, 155.6), (216.3, 154.5), (211.3, 151.9), (204.1, 140.1), (217.8, 142.5), (223.3, 143.3),
    (228.9, 143.0), (242.9, 141.4), (228.0, 149.6), (222.6, 149.9), (217.4, 149.1),
    (210.0, 141.3), (236.6, 141.9), (236.2, 147.4), (210.3, 147.0),
])
# fmt: on

# Mouth shapes: opening, width (of the smile), rounding, pressing together, lower lip under the teeth; -1 to 1.
VISEMES = {
    "rest": (0.04, 0.0, 0.0, 0.2, 0.0),
    "P": (0.0, 0.0, 0.0, 1.0, 0.0),  # p b m
    "F": (0.10, 0.2, 0.0, 0.0, 1.0),  # f v
    "T": (0.22, 0.4, 0.0, 0.0, 0.0),  # t d n s z
    "K": (0.34, 0.2, 0.0, 0.0, 0.0),  # k g and short vowels
    "L": (0.45, 0.3, 0.0, 0.0, 0.0),
    "CH": (0.26, -0.3, 0.7, 0.0, 0.0),  # ch sh r
    "AA": (1.0, 0.2, 0.0, 0.0, 0.0),
    "EH": (0.6, 0.7, 0.0, 0.0, 0.0),
    "IY": (0.28, 1.0, 0.0, 0.0, 0.0),
    "AO": (0.75, -0.5, 0.6, 0.0, 0.0),
    "UW": (0.2, -1.0, 1.0, 0.0, 0.0),  # oo w
}


@dataclass(frozen=True)
class Look:
    """One speaker: how the photograph is geometrically and tonally changed."""

    mirrored: bool
    scale: float
    aspect: float
    shear: float
    gain: float
    bias: float
    gamma: float
    hue: tuple[float, float, float]
    lips: float  # thickness


LOOKS = tuple(
    Look(mirrored, scale, aspect, shear, gain, bias, gamma, hue, lips)
    for mirrored, scale, aspect, shear, gain, bias, gamma, hue, lips in (
        (False, 1.00, 1.00, 0.00, 1.00, 0, 1.00, (1.00, 1.00, 1.00), 1.00),
        (True, 0.94, 1.05, 0.02, 0.90, 8, 1.10, (1.04, 1.00, 0.95), 1.15),
        (False, 1.07, 0.95, -0.03, 0.75, -6, 1.00, (0.94, 1.00, 1.05), 0.90),
        (True, 1.03, 0.97, 0.03, 1.08, -14, 0.90, (1.00, 0.97, 1.03), 1.05),
        (False, 0.90, 1.03, 0.04, 0.62, 18, 1.15, (0.96, 0.99, 1.00), 1.20),
        (True, 1.10, 1.00, -0.02, 0.82, 30, 1.00, (1.05, 1.02, 0.97), 0.85),
    )
)


@dataclass(frozen=True)
class Portrait:
    """A speaker's still face: the picture (288, 288, 3) float32 and its 72 points, pixels."""

    picture: np.ndarray
    points: np.ndarray
    lips: float


@functools.cache
def portrait(look: int) -> Portrait:
    """The still face of LOOKS[look]."""
    from skimage import data

    chosen, photo, points = LOOKS[look], data.astronaut(), _FACE
    if chosen.mirrored:
        swap = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), *range(45, 41, -1), 47, 46]
        swap += [
            *range(39, 35, -1),
            41,
            40,
            *range(54, 47, -1),
            *range(59, 54, -1),
            *range(64, 59, -1),
            67,
            66,
            65,
            69,
            68,
            71,
            70,
        ]
        photo = photo[:, ::-1]
        points = np.stack([photo.shape[1] - 1 - points[:, 0], points[:, 1]], 1)[swap]
    stable = [33, 36, 39, 42, 45]
    target = (mean_face() - SIZE / 2) * chosen.scale + SIZE / 2 + MARGIN
    target = (target - CANVAS / 2) * [chosen.aspect**0.5, chosen.aspect**-0.5] + CANVAS / 2
    target[:, 0] += chosen.shear * (target[:, 1] - CANVAS / 2)
    # An affine fit, so that geometry differs between speakers and not the size alone.
    basis = np.column_stack([points[stable], np.ones(5)])
    pull = similarity(points[None, stable], target[stable])[0]
    stretch = np.array([[chosen.aspect**0.5, chosen.shear], [0, chosen.aspect**-0.5]])
    matrix = np.column_stack([stretch @ pull[:, :2], np.zeros(2)])
    matrix[:, 2] = (target[stable] - basis[:, :2] @ matrix[:, :2].T).mean(0)
    picture = cv2.warpAffine(
        np.ascontiguousarray(photo), matrix, (CANVAS, CANVAS), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    tone = 255 * (picture / 255.0) ** chosen.gamma * np.array(chosen.hue) * chosen.gain + chosen.bias
    return Portrait(np.clip(tone, 0, 255).astype(np.float32), points @ matrix[:, :2].T + matrix[:, 2], chosen.lips)


_INNER_UPPER, _INNER_LOWER = [68, 61, 62, 63, 69], [71, 67, 66, 65, 70]  # from left to right, without the corners
_UPPER = [*range(48, 55), 60, *_INNER_UPPER, 64]
_LOWER = [48, *range(54, 60), 60, *_INNER_LOWER, 64]
_STILL = [1, 2, 3, 13, 14, 15, 30, 31, 32, 33, 34, 35, 36, 39, 42, 45]
_CHIN = {3: 0.15, 4: 0.4, 5: 0.7, 6: 0.9, 7: 1.0, 8: 1.0, 9: 1.0, 10: 0.9, 11: 0.7, 12: 0.4, 13: 0.15}


def mouth_points(points: np.ndarray, shape: np.ndarray, lips: float) -> np.ndarray:
    """The points (72, 2) of a face whose mouth takes a shape of VISEMES, with lips `lips` times as thick."""
    opening, width, rounding, press, tuck = np.clip(shape, [0, -1, 0, 0, 0], 1.2)
    left, right = points[48], points[54]
    centre, half = (left + right) / 2, np.linalg.norm(right - left) / 2
    along = (right - left) / (2 * half)
    down = np.array([-along[1], along[0]])
    moved = points.copy()
    # The photograph smiles: at rest a mouth is narrower, and its corners hang lower.
    span = half * (0.80 + 0.13 * width - 0.14 * rounding - 0.03 * opening)
    line = half * (0.26 - 0.05 * width - 0.04 * tuck)  # where the closed lips meet, below the photograph's corners
    upper_gap = half * 0.20 * opening
    lower_gap = half * (0.60 * opening - 0.12 * tuck)
    thick = lips * half * (1 - 0.45 * press) * (1 + 0.25 * rounding)
    for n in range(48, 72):
        s = float(np.clip((points[n] - centre) @ along / half, -1, 1))
        arch = max(0.0, 1 - s * s) ** 0.6
        y = line * (0.82 + 0.18 * arch)
        if 49 <= n <= 53 or n in _INNER_UPPER:
            y -= upper_gap * arch
        elif 55 <= n <= 59 or n in _INNER_LOWER:
            y += lower_gap * arch
        if 49 <= n <= 53:
            y -= 0.22 * thick * arch * (0.93 if n == 51 else 1.0) + 0.02 * half
        elif 55 <= n <= 59:
            y += 0.36 * thick * (1 - 0.5 * tuck) * arch + 0.02 * half
        reach = span * (0.96 if n in (60, 64) else 1.0)
        if n in (55, 59):  # the photograph's outer lower lip is narrower than its corners tell
            s *= 1.05
        moved[n] = centre + along * s * reach + down * y
    jaw = half * (0.42 * opening - 0.04 * press)
    for n, share in _CHIN.items():
        moved[n] = points[n] + down * jaw * share
    return moved


def _field(where: np.ndarray, centres: np.ndarray, pulls: np.ndarray, reach: float) -> np.ndarray:
    """Displacements (N, 2) at `where` (N, 2) that pass through `pulls` at `centres`: Gaussian radial functions."""

    def bumps(points: np.ndarray) -> np.ndarray:
        return np.exp(-((points[:, None] - centres[None]) ** 2).sum(-1) / (2 * reach**2))

    weights = np.linalg.solve(bumps(centres) + 0.02 * np.eye(len(centres)), pulls)
    return bumps(where) @ weights


_STEP = 6  # pixels between the places where the displacement is computed; it is smooth


@dataclass(frozen=True)
class _Box:
    """The part of the picture that speaking changes: its corner and size, and its pixels' coordinates."""

    x: int
    y: int
    width: int
    height: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        return picture[self.y : self.y + self.height, self.x : self.x + self.width]

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows, (height, width) float32 each."""
        columns = np.arange(self.x, self.x + self.width, dtype=np.float32)
        rows = np.arange(self.y, self.y + self.height, dtype=np.float32)
        return np.meshgrid(columns, rows)


def _box(low: np.ndarray, high: np.ndarray) -> _Box:
    (x0, y0), (x1, y1) = (
        np.clip(np.floor(low), 0, CANVAS - 2).astype(int),
        np.clip(np.ceil(high), 2, CANVAS).astype(int),
    )
    return _Box(int(x0), int(y0), int(x1 - x0), int(y1 - y0))


def _warp(box: _Box, chosen: list[int], points: np.ndarray, moved: np.ndarray, reach: float) -> np.ndarray:
    """Where each pixel of the box comes from, relative to itself: (height, width, 2) float32."""
    columns = np.arange(box.x, box.x + box.width + _STEP, _STEP, dtype=np.float64)
    rows = np.arange(box.y, box.y + box.height + _STEP, _STEP, dtype=np.float64)
    where = np.stack(np.meshgrid(columns, rows), -1)
    coarse = _field(where.reshape(-1, 2), moved[chosen], points[chosen] - moved[chosen], reach)
    # Pixel i lies between samples, at i / step: exactly what warpAffine by 1 / step reads.
    return cv2.warpAffine(
        coarse.reshape(where.shape).astype(np.float32),
        np.array([[1 / _STEP, 0, 0], [0, 1 / _STEP, 0]]),
        (box.width, box.height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def speak(look: int, shape: np.ndarray) -> np.ndarray:
    """The speaker's face with the mouth in a shape: (288, 288, 3) float32."""
    still = portrait(look)
    points, moved = still.points, mouth_points(still.points, shape, still.lips)
    half = np.linalg.norm(points[54] - points[48]) / 2
    reach = 0.4 * half  # beyond the face's outline nothing moves
    low, high = points.min(0), points.max(0)
    box = _box(np.array([low[0] - reach, points[30, 1]]), np.array([high[0] + reach, high[1] + 3.5 * reach]))
    chin = [n for n in _CHIN if n not in _STILL]
    upper, lower = (_warp(box, [*lip, *_STILL], points, moved, 0.45 * half) for lip in (_UPPER, [*_LOWER, *chin]))

    columns, rows = box.pixels()
    left, right = moved[60], moved[64]
    length = np.linalg.norm(right - left)
    along = ((right - left) / length).astype(np.float32)
    down = np.array([-along[1], along[0]])
    s = (columns - np.float32(left[0])) * along[0] + (rows - np.float32(left[1])) * along[1]
    y = (columns - np.float32(left[0])) * down[0] + (rows - np.float32(left[1])) * down[1]
    # The line where the lips part: through the corners and the middle between the inner lips.
    seam = (moved[_INNER_UPPER] + moved[_INNER_LOWER]) / 2 - left
    knots = [0.0, *(float(p @ along) for p in seam), length]
    heights = [0.0, *(float(p @ down) for p in seam), 0.0]
    below = y - np.interp(s, knots, heights).astype(np.float32)
    outside = np.maximum(0, np.maximum(-s, s - np.float32(length)))
    weight = np.clip(0.5 + below / (1.0 + 1.2 * outside), 0, 1)[..., None]
    source = np.stack([columns, rows], -1) + upper + weight * (lower - upper)
    face = still.picture.copy()
    box.of(face)[...] = cv2.remap(still.picture, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    _open_mouth(face, still, moved, shape)
    return face


def _open_mouth(face: np.ndarray, still: Portrait, moved: np.ndarray, shape: np.ndarray) -> None:
    """Paint, in place, what is between the lips: the dark, the upper teeth, the shadow where closed lips meet."""
    inner, half = moved[[60, *_INNER_UPPER, 64, *_INNER_LOWER[::-1]]], np.linalg.norm(moved[64] - moved[60]) / 2
    box = _box(inner.min(0) - 6, inner.max(0) + 6)
    corner = np.array([box.x, box.y])

    def drawn(line: np.ndarray, *, filled: bool, blur: float) -> np.ndarray:
        mask = np.zeros((box.height, box.width), np.uint8)
        outline = [np.rint((line - corner) * 16).astype(np.int32)]
        if filled:
            cv2.fillPoly(mask, outline, 255, cv2.LINE_AA, 4)
        else:
            cv2.polylines(mask, outline, False, 255, 1, cv2.LINE_AA, 4)
        return cv2.GaussianBlur(mask, (3, 3), blur).astype(np.float32)[..., None] / 255

    top = moved[[61, 62, 63]].mean(0)
    columns, rows = box.pixels()
    depth = (rows - np.float32(top[1])) / np.float32(0.5 * half)
    side = np.abs(columns - np.float32(top[0])) / np.float32(half)
    skin = still.picture[int(still.points[33][1]), int(still.points[33][0])]
    dark = skin * np.array([0.26, 0.13, 0.13], np.float32)
    tongue = skin * np.array([0.55, 0.30, 0.30], np.float32)
    cavity = dark + (tongue - dark) * np.clip(depth - 0.75, 0, 0.6)[..., None]
    # The teeth hang from the skull: those of the photograph, where it shows them, rounder lips hiding more.
    teeth_top, teeth_bottom = still.points[[61, 62, 63]].mean(0), still.points[[65, 66, 67]].mean(0)
    shift = top - teeth_top - [0, 0.05 * half] - corner
    teeth = cv2.warpAffine(
        still.picture,
        np.array([[1, 0, shift[0]], [0, 1, shift[1]]]),
        (box.width, box.height),
        borderMode=cv2.BORDER_REFLECT,
    )
    height = np.float32((teeth_bottom - teeth_top)[1] * (0.75 - 0.25 * shape[2]))
    shown = np.clip((height - (rows - np.float32(top[1]))) / 2 + 0.5, 0, 1) * np.clip((0.78 - side) * 6, 0, 1)
    shade = np.clip(1.0 - 0.45 * side**2 - np.float32(0.15 * shape[2]), 0.3, 1)
    interior = cavity + (teeth * shade[..., None] - cavity) * (0.9 * shown)[..., None]

    mouth = box.of(face)
    mouth += (interior - mouth) * drawn(_curve(inner), filled=True, blur=0.7)
    middle = np.concatenate([moved[[60]], (moved[_INNER_UPPER] + moved[_INNER_LOWER]) / 2, moved[[64]]])
    contact = np.float32(0.55 * np.clip(1 - 3 * shape[0], 0.25, 1))
    mouth *= 1 - contact * drawn(_curve(middle, closed=False), filled=False, blur=0.8)


def _curve(points: np.ndarray, *, closed: bool = True) -> np.ndarray:
    """A smooth line through points (N, 2): Catmull-Rom, eight pieces a side."""
    around = (
        np.concatenate([points[-1:], points, points[:2]]) if closed else np.pad(points, ((1, 1), (0, 0)), mode="edge")
    )
    t = (np.arange(8) / 8)[:, None]
    pieces = []
    for a, b, c, d in zip(around, around[1:], around[2:], around[3:], strict=False):
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate(pieces if closed else [*pieces, points[-1:]])
