"""Pictures of the clips that are shown: sprites of their crops, averages, first frames of videos.

Of a tar only the crops that are asked for are read. T frames of S pixels are a clip's crops.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np

from lipprep.pipeline.figures import ClipTable, Place
from lipprep.stages.remote import REQUESTS, RemotePath
from lipprep.stages.shard.codec import decode_mouth, npy_array
from lipprep.stages.shard.reader import read_members
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import is_file
from lipprep.stages.video import read_frames

SIDE = 96  # pixels of a sprite's frame
FRAMES = 12  # of a sprite
A_SHEET = 32  # sprites in one picture: small ones are decoded as they are looked at
_ROOM = 4_800_000  # bytes of all sprites, a third more in the page
_QUALITIES = (60, 45, 30, 15, 5)
_BLOCK = 128  # clips that are read at once
_NOT_AGAIN = ("unreadable", "no_video", "bad_crops", "crashed", "timeout")  # classes whose files are left alone
_WIDE = 320  # pixels of a first frame with landmarks
_THUMB = (160, 120)  # pixels of a failed clip's first frame
# The strokes that the 68 points of iBUG are joined by: first point, last point, whether closed.
_STROKES = (
    (0, 16, False), (17, 21, False), (22, 26, False), (27, 30, False), (31, 35, False),
    (36, 41, True), (42, 47, True), (48, 59, True), (60, 67, True),
)  # fmt: skip


@dataclass(frozen=True)
class Sprites:
    """The crops of many clips: `sheets` are pictures of A_SHEET rows of FRAMES frames, `at` says which row is whose."""

    sheets: tuple[str, ...] = ()
    at: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Averages:
    """The mean crop of all that was read, and of each word, as pictures; `words` are in one, row by row, of `columns`.

    `of_words` gives each label's place in it, `clips` says of how many clips the whole is made.
    """

    whole: str | None = None
    words: str | None = None
    of_words: dict[int, int] = field(default_factory=dict)
    clips: int = 0
    columns: int = 10


@dataclass(frozen=True)
class Pictures:
    """All pictures of crops, and how many clips' crops could not be read."""

    sprites: Sprites
    averages: Averages
    lost: int


def uri(picture: np.ndarray, *, quality: int = 80) -> str:
    """A picture, gray or BGR, as a data: URI of a WebP."""
    return _uri(_webp(picture, quality))


def _webp(picture: np.ndarray, quality: int) -> bytes:
    ok, data = cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, quality])
    assert ok
    return data.tobytes()


def _uri(payload: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(payload).decode()


def read_mouth(place: Place, key: str) -> np.ndarray | None:
    """The mouth crops (T, S, S) uint8 of a clip; None where they cannot be read."""
    try:
        extension = next(e for e in place.extensions if e.startswith("mouth."))
        mouth = decode_mouth(extension, _member(place, key, extension))
    except (StopIteration, ValueError, RemoteError):
        return None
    return mouth if mouth.size else None


def _member(place: Place, key: str, extension: str) -> bytes:
    """The bytes of one of a clip's members. Raises ValueError where it does not stand there."""
    names = [f"{key}.{e}" for e in place.extensions[: place.extensions.index(extension) + 1]]
    return read_members(place.tar, place.offset, names)[-1]


def picture_clips(
    table: ClipTable, shown: Sequence[int], averaged: Sequence[int], progress: Callable, *, workers: int
) -> Pictures:
    """Read the crops of rows, each once, and make sprites of those that are `shown`, and means of those `averaged`."""
    rows = list(dict.fromkeys((*shown, *averaged)))
    places = {row: place for row in rows if (place := table.crops[row]) is not None}
    rows = sorted(places, key=lambda row: (str(places[row].tar), places[row].offset))  # as they lie on the disk
    wanted, meant = set(shown), set(averaged)
    remote = any(isinstance(place.tar, RemotePath) for place in places.values())
    strips: dict[int, np.ndarray] = {}
    means = _Means(len(table.manifest.labels))
    lost = 0

    def work(row: int) -> tuple[int, np.ndarray | None, np.ndarray | None] | None:
        if (mouth := read_mouth(places[row], table.clips[row].key)) is None:
            return None
        strip = _strip(mouth) if row in wanted else None
        return row, strip, mouth.mean(0, dtype=np.float32) if row in meant else None

    def results() -> Iterator:
        for start in range(0, len(rows), _BLOCK):  # not all at once: what is done would wait in memory
            yield from threads.map(work, rows[start : start + _BLOCK])

    with ThreadPoolExecutor(REQUESTS if remote else workers) as threads:
        for made in progress(results(), total=len(rows)) if rows else ():
            if made is None:
                lost += 1
                continue
            row, strip, mean = made
            if strip is not None:
                strips[row] = strip
            if mean is not None:
                means.add(table.clips[row].label, mean)
        sprites = _sprites({row: strips[row] for row in shown if row in strips}, threads)
    return Pictures(sprites, means.pictures(), lost)


def _strip(mouth_TSS: np.ndarray) -> np.ndarray:
    """FRAMES frames of a clip, evenly spread, side by side."""
    numbers = np.linspace(0, len(mouth_TSS) - 1, FRAMES).round().astype(int)
    frames = [mouth_TSS[n] for n in numbers]
    if mouth_TSS.shape[1] != SIDE:
        frames = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames]
    return np.hstack(frames)


def _sprites(strips: dict[int, np.ndarray], threads: ThreadPoolExecutor) -> Sprites:
    rows = list(strips)
    parts = [rows[n : n + A_SHEET] for n in range(0, len(rows), A_SHEET)]
    pictures = [np.vstack([strips[row] for row in part]) for part in parts]
    payloads: list[bytes] = []
    for quality in _QUALITIES:
        payloads = list(threads.map(lambda picture, q=quality: _webp(picture, q), pictures))
        if sum(map(len, payloads)) <= _ROOM:
            break
    at = {row: (number, n) for number, part in enumerate(parts) for n, row in enumerate(part)}
    return Sprites(tuple(map(_uri, payloads)), at)


class _Means:
    """Mean crops, of all clips and of each word's; those of another size than the first one's are brought to it."""

    def __init__(self, labels: int) -> None:
        self._sums: dict[int, np.ndarray] = {}
        self._counts = np.zeros(labels, int)

    def add(self, label: int, mean_SS: np.ndarray) -> None:
        first = next(iter(self._sums.values()), mean_SS)
        if mean_SS.shape != first.shape:
            mean_SS = cv2.resize(mean_SS, first.shape, interpolation=cv2.INTER_AREA)
        self._sums[label] = self._sums[label] + mean_SS if label in self._sums else mean_SS
        self._counts[label] += 1

    def pictures(self, *, side: int = 64) -> Averages:
        if not self._sums:
            return Averages()
        columns = min(10, len(self._sums))
        labels = sorted(self._sums)
        # Each word counts alike in the mean of all, as it does in what was read.
        whole = sum(self._sums.values()) / self._counts.sum()
        tiles = np.zeros((-(-len(labels) // columns) * columns, side, side), np.uint8)
        for n, label in enumerate(labels):
            tiles[n] = cv2.resize(
                _gray(self._sums[label] / self._counts[label]), (side, side), interpolation=cv2.INTER_AREA
            )
        grid = tiles.reshape(-1, columns, side, side).transpose(0, 2, 1, 3).reshape(-1, columns * side)
        return Averages(
            uri(_gray(whole), quality=90),
            uri(grid, quality=80),
            {label: n for n, label in enumerate(labels)},
            int(self._counts.sum()),
            columns,
        )


def _gray(mean: np.ndarray) -> np.ndarray:
    return np.rint(mean).astype(np.uint8)


class Frames:
    """The first frames of clips' videos. A store that does not answer is not asked again."""

    def __init__(self, table: ClipTable) -> None:
        self._table, self._silent = table, False

    def __call__(self, row: int) -> np.ndarray | None:
        """The first frame (H, W, 3) BGR uint8 of a clip, or of its video; None where none can be decoded.

        Videos that ended a process or took too long are not tried again.
        """
        manifest, clip = self._table.manifest, self._table.clips[row]
        if self._silent or self._table.kinds[row] in _NOT_AGAIN:
            return None
        path = manifest.root / clip.video
        for first in dict.fromkeys((max(clip.start or 0, 0), 0)):
            try:
                if not is_file(path):
                    return None
                frames = read_frames(path, fps=manifest.fps, first=first, last=first + 1, color=True)
                if (frame := next(iter(frames), None)) is not None:
                    return np.asarray(frame)
            except RemoteError:
                self._silent = True
                return None
            except Exception:  # whatever the file is, the page is made
                continue
        return None


def thumbnail(frame_HWC: np.ndarray) -> str:
    """A frame made small enough to stand beside a message."""
    return uri(_fitted(frame_HWC, *_THUMB), quality=60)


def _fitted(frame_HWC: np.ndarray, wide: int, high: int) -> np.ndarray:
    H, W = frame_HWC.shape[:2]
    ratio = min(wide / W, high / H)
    size = max(1, round(W * ratio)), max(1, round(H * ratio))
    return cv2.resize(frame_HWC, size, interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_CUBIC)


def _points(table: ClipTable, row: int) -> np.ndarray | None:
    """The landmarks (T, 68, 2) of a clip in pixels of its source; None where they cannot be read."""
    if (place := table.landmarks[row]) is None:
        return None
    try:
        points = npy_array(_member(place, table.clips[row].key, place.extensions[0]))
    except (ValueError, RemoteError):
        return None
    return points if points.ndim == 3 and points.shape[1:] == (68, 2) else None


def draw_landmarks(table: ClipTable, frames: Frames, row: int) -> str | None:
    """The face in the first frame of a clip, with its landmarks; None where either is out of reach."""
    points = _points(table, row)
    t = max(0, -(table.clips[row].start or 0))  # of a window that begins before its video: the video's first frame
    if points is None or t >= len(points) or not np.isfinite(points[t]).all():
        return None
    if (frame := frames(row)) is None:
        return None
    H, W = frame.shape[:2]
    low, high = points[t].min(0), points[t].max(0)
    reach = 0.85 * max(float((high - low).max()), 8.0)
    (x0, y0), (x1, y1) = np.clip([(low + high) / 2 - reach, (low + high) / 2 + reach], 0, [W, H]).astype(int)
    if x1 - x0 < 8 or y1 - y0 < 8:  # landmarks beyond the frame
        x0, y0, x1, y1 = 0, 0, W, H
    zoom = 2 * _WIDE / max(x1 - x0, y1 - y0)
    size = max(1, round((x1 - x0) * zoom)), max(1, round((y1 - y0) * zoom))
    picture = cv2.resize(frame[y0:y1, x0:x1], size, interpolation=cv2.INTER_CUBIC)
    where = ((points[t] - [x0, y0] + 0.5) * zoom).clip(-1e4, 1e4).round().astype(np.int32)
    for first, last, closed in _STROKES:
        cv2.polylines(picture, [where[first : last + 1]], closed, (180, 230, 120), 2, cv2.LINE_AA)
    for x, y in where.tolist():
        cv2.circle(picture, (x, y), 4, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), 4, (60, 60, 20), 1, cv2.LINE_AA)
    return uri(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), quality=70)
