"""What every detector gives and takes, and the choice of the face that a clip is about."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Region(NamedTuple):
    """A rotated square of the frame: centre and side in pixels, angle in radians (clockwise on screen)."""

    x: float
    y: float
    side: float
    angle: float


@dataclass(frozen=True)
class Face:
    """A face of one frame.

    `box` is (x0, y0, x1, y1) in pixels, `score` in 0..1. `region` is where a detector that tracks looks
    for the points; `tracked` says that it comes from the points of the frame before, not from a detection.
    """

    box: tuple[float, float, float, float]
    score: float
    region: Region | None = None
    tracked: bool = False


class Detector(Protocol):
    """Finds faces and their 68 iBUG points in a gray frame, (H, W) uint8, full range.

    `identity` names the detector and its weights: landmarks of another identity are other landmarks.
    """

    name: str
    identity: str

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of the frame with its score."""
        ...

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray | None, Face | None]:
        """Give the points of `face`, (68, 2) float32 pixels, and where to look in the next frame.

        No points: there is no face here. No face to look for: detect again in the next frame.
        """
        ...


@cache
def weights_identity(name: str, path: Path) -> str:
    """Name a detector by the sha256 of its weights, e.g. mesh-c7d54204."""
    with path.open("rb") as weights:
        return f"{name}-{hashlib.file_digest(weights, 'sha256').hexdigest()[:8]}"


def choose_face(faces: Sequence[Face], frame_shape: tuple[int, ...], previous: Face | None) -> Face | None:
    """Choose the face that a clip is about.

    With a previous face: the one that overlaps it most, or None where none does (another person is no
    stand-in for a speaker who was missed). Without: the largest, its side weighted by a factor that falls
    from 1 at the centre of the frame to 1/2 at its corners, as corpora keep their speaker in the centre.
    """
    if not faces:
        return None
    if previous is not None:
        best = max(faces, key=lambda face: _overlap(face, previous))
        return best if _overlap(best, previous) > 0 else None
    height, width = frame_shape[:2]

    def prominence(face: Face) -> float:
        x0, y0, x1, y1 = face.box
        distance = np.hypot((x0 + x1 - width) / 2, (y0 + y1 - height) / 2)
        return max(x1 - x0, y1 - y0) * (1 - distance / np.hypot(width, height))

    return max(faces, key=prominence)


def _overlap(a: Face, b: Face) -> float:
    """Intersection over union of two boxes."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = sum((f.box[2] - f.box[0]) * (f.box[3] - f.box[1]) for f in (a, b))
    return common / (areas - common)
