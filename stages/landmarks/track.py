"""The landmarks of one clip: one face, followed from frame to frame."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lipprep.stages.landmarks.detector import Detector, Face, choose_face
from lipprep.stages.landmarks.tiles import Tiles
from lipprep.stages.stopwatch import spent

_AT_ONCE = 1 << 20  # bytes of frames that are decoded in a row
COUNT_EVERY = 12  # frames between two counts of the faces of a tracked clip
FORGET_AFTER = 6  # frames without the clip's face after which any face will do (a cut to another camera)


@dataclass(frozen=True)
class ClipLandmarks:
    """68 iBUG points for each frame of a clip.

    `points` is (T, 68, 2) float32 in pixels of the source, NaN where there is no face; `max_faces` the
    most faces seen in one frame.
    """

    points: np.ndarray
    max_faces: int


def track(frames: Iterable[np.ndarray], detector: Detector) -> ClipLandmarks:
    """Follow one face through gray frames, (H, W) uint8; the result depends on the frames alone.

    Faces are detected in the first frame, wherever the face is lost, and in every 12th frame, to count
    them and to see that the tracked face is still one of them. A face lost for a moment is not replaced
    by somebody else's; after 6 frames without it any face is taken. With `mesh`, which shrinks what it looks at, large
    frames in which no face is seen are looked at part by part (`Tiles`).
    """
    if detector.name == "mesh":
        detector = Tiles(detector)  # a new one for each clip: it remembers when it looked
    rows: list[np.ndarray] = []
    face: Face | None = None  # where to look in this frame
    last: Face | None = None  # where the clip's face was last
    missed = max_faces = 0
    for index, frame in enumerate(_in_rows(frames)):
        points = None
        if face is not None and index % COUNT_EVERY == 0:
            with spent("detect"):
                found = detector.faces(frame)
            max_faces = max(max_faces, len(found))
            if found and choose_face(found, frame.shape, face) is None:
                face = choose_face(found, frame.shape, None)
        if face is not None:
            with spent(detector.name):
                points, face = detector.fit(frame, face)
        if points is None:
            with spent("detect"):
                found = detector.faces(frame)
            max_faces = max(max_faces, len(found))
            chosen = choose_face(found, frame.shape, last if missed < FORGET_AFTER else None)
            if chosen is not None:
                with spent(detector.name):
                    points, face = detector.fit(frame, chosen)
                last = chosen
        if points is None:
            missed += 1
            points = np.full((68, 2), np.nan, np.float32)
        else:
            missed = 0
            last = face or last
        rows.append(points)
    points = np.stack(rows) if rows else np.empty((0, 68, 2), np.float32)
    return ClipLandmarks(points, max_faces)


def _in_rows(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, several of them taken at a time: decoder and network in turn drive each other out of the caches."""
    row: list[np.ndarray] = []
    size = 0
    for frame in map(np.asarray, frames):
        row.append(frame)
        size += frame.nbytes
        if size >= _AT_ONCE:
            yield from row
            row, size = [], 0
    yield from row
