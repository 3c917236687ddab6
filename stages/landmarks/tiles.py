"""Faces that are small in their frame, with a detector that shrinks what it is given.

BlazeFace sees 128 x 128 pixels, and finds no face that is less than about a seventh of a frame's larger side: in 720p,
none below 180 pixels. Halves and quarters of the frame, that overlap by half, bring that down to a 25th, 50 pixels.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lipprep.stages.landmarks.detector import Detector, Face

_PARTS = (2, 4)  # of the frame's larger side, a tile's side
_LEAST = 256  # pixels of a tile's side: smaller ones show faces whose mouths are too small to be read
_SURE = 0.5  # score of a face in a part of the frame: of 35 of them, one may always look a little like a face
_REST = 4  # calls after one that looked at all parts: in 720p the halves take 20 ms, the quarters 80


class Tiles:
    """A detector that looks at parts of large frames, too, and else is the one it is made of.

    The parts get smaller; where a face is seen, smaller ones are not looked at; where none is, no parts are for four
    calls. With `small_too`, halves are looked at in every call, and quarters in every fifth.
    """

    def __init__(self, detector: Detector, *, small_too: bool = False) -> None:
        self.name, self.identity = detector.name, detector.identity
        self.fit = detector.fit
        self._detector, self._small_too = detector, small_too
        self._rest = 0

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of the frame, best score first."""
        kept = self._detector.faces(frame)
        resting = self._rest > 0
        self._rest = self._rest - 1 if resting else _REST
        for parts in _PARTS:
            if max(frame.shape) < parts * _LEAST or (kept and not self._small_too):
                break
            if resting and not (self._small_too and parts == _PARTS[0]):
                break
            found = [_moved(face, x, y) for x, y, tile in _tiles(frame, parts) for face in self._detector.faces(tile)]
            for face in sorted(found, key=lambda face: -face.score):
                # A tile may show a part of a face that is seen whole in a larger one.
                if face.score >= _SURE and not any(_covers(other, face) for other in kept):
                    kept.append(face)
        if kept and not self._small_too:
            self._rest = 0
        return sorted(kept, key=lambda face: -face.score)


def _covers(face: Face, other: Face) -> bool:
    """Whether a face's box holds the middle of another's."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = face.box, other.box
    return x0 <= (u0 + u1) / 2 <= x1 and y0 <= (v0 + v1) / 2 <= y1


def _tiles(frame: np.ndarray, parts: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Left upper corners (x, y) and squares of the frame, which overlap by half or more."""
    side = max(frame.shape) // parts
    for y in _places(frame.shape[0], side):
        for x in _places(frame.shape[1], side):
            yield x, y, np.ascontiguousarray(frame[y : y + side, x : x + side])


def _places(length: int, side: int) -> list[int]:
    """Where tiles of a side begin that cover a length.

    >>> _places(1280, 640), _places(720, 640), _places(300, 640)
    ([0, 320, 640], [0, 80], [0])
    """
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / (side / 2))
    return [round(k * (length - side) / steps) for k in range(steps + 1)]


def _moved(face: Face, x: int, y: int) -> Face:
    x0, y0, x1, y1 = face.box
    region = face.region and face.region._replace(x=face.region.x + x, y=face.region.y + y)
    return dataclasses.replace(face, box=(x0 + x, y0 + y, x1 + x, y1 + y), region=region)
