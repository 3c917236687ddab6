"""The landmarks of every face of a video: each followed over time, with any detector.

A face keeps its track by where it is: frames of a video are so close in time that a face moves by less than its own
side between two of them. Nothing here knows people by their looks; after a cut, whoever sits in the same place is
taken for the same face.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lipprep.stages.landmarks.detector import Detector, Face
from lipprep.stages.landmarks.tiles import Tiles
from lipprep.stages.stopwatch import spent

DETECT_EVERY = 5  # frames between two looks for new faces: a fifth of a second
FORGET_AFTER = 12  # frames without a face after which its track ends: half a second
_UNSEEN = 16  # looks in a row that do not find a face that is followed, after which it is none: three at parts
_SAME = 0.5  # of the smaller face's side: middles that are nearer belong to one face
_SEATED = 1.0  # of a lost face's side: one that is found no farther off is the lost one


@dataclass(frozen=True)
class FaceTrack:
    """One face: `start` is the first frame that it is seen in, `points_TKD` (T, 68, 2) float32 its iBUG-68 points.

    They are in pixels of the source, NaN where the face was lost for a moment; it is seen in the last frame, too.
    """

    start: int
    points_TKD: np.ndarray

    @property
    def stop(self) -> int:
        """The frame after the last."""
        return self.start + len(self.points_TKD)

    @property
    def size(self) -> float:
        """The larger side of the box round its points in pixels, the mean over the frames that it is seen in."""
        sides_T2 = self.points_TKD.max(axis=1) - self.points_TKD.min(axis=1)
        return float(np.nanmean(sides_T2.max(axis=1)))


@dataclass
class _Followed:
    """A face that is being followed: `look` says where to look in the next frame, `place` where it was last."""

    number: int
    look: Face | None
    place: tuple[float, float, float]
    points: np.ndarray | None = None  # in this frame
    missed: int = 0
    unseen: int = 0  # looks in a row


class FaceTracker:
    """Follows all faces through the frames of a video, which come one at a time: of a camera, too.

    New faces are looked for every `detect_every` frames, the smallest every fifth time (Tiles); and in each frame while
    one is lost. A face that is lost for up to `forget_after` frames is the same again where it was, or no farther off
    than its own size. Two tracks never follow one face: of two that meet on one, that stays which moved less to get
    there.
    """

    def __init__(
        self, detector: Detector, *, detect_every: int = DETECT_EVERY, forget_after: int = FORGET_AFTER
    ) -> None:
        self._detector = Tiles(detector, small_too=True)
        self._detect_every, self._forget_after = detect_every, forget_after
        self._followed: list[_Followed] = []
        self._index = self._count = 0

    def step(self, frame: np.ndarray) -> dict[int, np.ndarray]:
        """The points (68, 2) float32 of each face of the next frame, (H, W) uint8 gray, by the number of its track.

        Tracks are numbered from 0 in the order in which they begin.
        """
        frame = np.asarray(frame)
        for one in self._followed:
            self._fit(frame, one, one.look)
        self._part()
        if self._index % self._detect_every == 0 or any(one.points is None for one in self._followed):
            self._look(frame)
            self._part()
        self._index += 1
        for one in self._followed:
            if one.points is None:
                one.missed += 1
            else:
                one.missed, one.place = 0, _middle(one.points)
        self._followed = [o for o in self._followed if o.missed <= self._forget_after and o.unseen < _UNSEEN]
        return {one.number: one.points for one in self._followed if one.points is not None}

    def _fit(self, frame: np.ndarray, one: _Followed, look: Face | None) -> None:
        """Find a face's points in this frame, where it is looked for."""
        one.points = None
        if look is not None:
            with spent(self._detector.name):
                one.points, one.look = self._detector.fit(frame, look)

    def _look(self, frame: np.ndarray) -> None:
        """Detect faces: each is one that is followed, a lost one again, or new."""
        with spent("detect"):
            found = [(_box_middle(face), face) for face in self._detector.faces(frame)]
        for one in self._followed:
            if one.points is not None:
                mine = [place for place, _ in found if _apart(_middle(one.points), place) < _SAME]
                one.unseen = 0 if mine else one.unseen + 1
                found = [(place, face) for place, face in found if place not in mine]
        lost = [one for one in self._followed if one.points is None]
        pairs = [(_apart(one.place, place), n, one) for one in lost for n, (place, _) in enumerate(found)]
        taken: set[int] = set()
        for apart, n, one in sorted(pairs, key=lambda pair: pair[:2]):
            if apart < _SEATED and one.points is None and n not in taken:
                taken.add(n)
                self._fit(frame, one, found[n][1])
                one.unseen = 0
        for n, (place, face) in enumerate(found):
            if n not in taken:
                new = _Followed(self._count, None, place)
                self._fit(frame, new, face)
                if new.points is not None and not any(_one_face(new, other) for other in self._followed):
                    self._followed.append(new)
                    self._count += 1

    def _part(self) -> None:
        """Where tracks meet on one face, leave it to the one that moved least to get there; the others have lost it."""
        here = [one for one in self._followed if one.points is not None]
        kept: list[_Followed] = []
        for one in sorted(here, key=lambda one: (_apart(one.place, _middle(one.points)), one.number)):
            if any(_one_face(one, other) for other in kept):
                one.points = one.look = None
            else:
                kept.append(one)


def track_faces(
    frames: Iterable[np.ndarray],
    detector: Detector,
    *,
    detect_every: int = DETECT_EVERY,
    forget_after: int = FORGET_AFTER,
) -> list[FaceTrack]:
    """Follow every face through gray frames, (H, W) uint8; the largest mean face first.

    One FaceTracker does it; the result depends on the frames alone. A face that comes back after its track has ended
    has a new one.
    """
    tracker = FaceTracker(detector, detect_every=detect_every, forget_after=forget_after)
    seen: dict[int, tuple[int, list[np.ndarray]]] = {}  # by number: first frame, and the points of each from there
    for index, frame in enumerate(frames):
        for number, points in tracker.step(frame).items():
            start, rows = seen.setdefault(number, (index, []))
            rows += [np.full((68, 2), np.nan, np.float32)] * (index - start - len(rows))
            rows.append(points)
    tracks = [FaceTrack(start, np.stack(rows)) for start, rows in seen.values()]
    return sorted(tracks, key=lambda track: -track.size)


def _middle(points: np.ndarray) -> tuple[float, float, float]:
    """Where a face is: the middle of the box round its points, and the larger side of it, pixels."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)


def _box_middle(face: Face) -> tuple[float, float, float]:
    x0, y0, x1, y1 = face.box
    return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """The distance of two faces' middles, in sides of the smaller."""
    return math.hypot(a[0] - b[0], a[1] - b[1]) / max(min(a[2], b[2]), 1e-6)


def _one_face(a: _Followed, b: _Followed) -> bool:
    return a.points is not None and b.points is not None and _apart(_middle(a.points), _middle(b.points)) < _SAME
