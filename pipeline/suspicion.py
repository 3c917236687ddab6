"""Which clips to look at first: those whose figures say that something is wrong with them.

A clip is as suspicious as the worst thing that is known of it. It failed: nothing is worse. It shows what another clip
shows: one of them is a copy. All else is told by comparison, in deviations from the median of those that it belongs
with: the clips of its speaker where there are enough, else all. What says little of the crops, as where in the picture
a face is, counts for less.

Shapes: N clips.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lipprep.pipeline.figures import OK, PENDING, ClipTable
from lipprep.pipeline.likeness import copies, groups_of, strangeness
from lipprep.pipeline.manifest import Clip
from lipprep.stages.quality import MOTION_BITS, motion_bits

SUSPICION = "suspicion"  # what the score is called where figures are named
FAILED = 1000.0  # the score of a clip that is in no shard: above any other
MOST = 100.0  # the highest of the others
COUNTED = 2.0  # deviations from which on something counts
NOTED = 3.0  # deviations from which on something is told as a reason


@dataclass(frozen=True)
class Suspect:
    """Row `index` of the table, with a `score` (0: nothing is known against it) and `reasons`, the worst first."""

    index: int
    score: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Test:
    """A figure that is compared: where it is suspicious (1 high, -1 low, 0 both), the least deviation that counts as
    one, in the figure's unit, and what is said of it. `ratio`: what counts is how many times it is another's. `weight`:
    what a deviation counts for.
    """

    figure: str
    side: int
    floor: float
    text: str
    ratio: bool = False
    weight: float = 1.0


_TESTS = (
    _Test("black", 1, 0.01, "{:.0%} of the frames show nothing"),
    _Test("frozen", 1, 0.06, "{:.0%} of the steps show no change"),
    _Test("face_share", -1, 0.02, "a face in {:.0%} of the frames"),
    _Test("max_faces", 1, 0.5, "up to {:.0f} faces in a frame"),
    _Test("outside", 1, 0.2, "the crop leaves the picture in {:.0%} of the frames"),
    _Test("off_centre", 1, 0.02, "the mouth lies {:.0%} of the crop's side from where others have it"),
    _Test("jitter", 1, 0.1, "landmarks jitter by {:.2f} pixels", ratio=True),
    _Test("jump", 1, 0.1, "a change {:.0f} times the usual one between two frames", ratio=True),
    _Test("face_size", 0, 0.03, "eyes {:.0f} pixels apart", ratio=True, weight=0.5),
    _Test("rotation", 0, 1.0, "the head turned by {:.0f} degrees", weight=0.5),
    _Test("centre_x", 0, 1.0, "the mouth at x = {:.0f} pixels", weight=0.5),
    _Test("centre_y", 0, 1.0, "the mouth at y = {:.0f} pixels", weight=0.5),
    _Test("brightness", 0, 3.0, "brightness {:.0f}", weight=0.5),
    _Test("sharpness", -1, 0.05, "sharpness {:.1f}", ratio=True),
    _Test("movement", 0, 0.1, "movement {:.2f}", ratio=True, weight=0.5),
)
_DESCRIPTIONS = {
    "face": "another face than others have",
    "look": "another mouth than others have, or another part of the face",
}


def scores(table: ClipTable) -> np.ndarray:
    """The suspicion of each clip, (N,) float64."""
    return np.array([suspect.score for suspect in sorted(rank(table), key=lambda s: s.index)])


def rank(table: ClipTable) -> list[Suspect]:
    """Every clip of `table`, the most suspicious first; those of one score in the manifest's order."""
    found: list[list[tuple[float, str]]] = [[] for _ in range(len(table))]
    for row, (kind, stage) in enumerate(zip(table.kinds, table.stages, strict=True)):
        if kind not in (OK, PENDING):
            found[row].append((FAILED, f"{kind} in {stage}: {table.messages[row]}"))
    for row, score, reason in _evidence(table):
        found[row].append((score, reason))
    suspects = []
    for row, evidence in enumerate(found):
        evidence.sort(key=lambda e: -e[0])
        score = _together([value for value, _ in evidence])
        reasons = [reason for value, reason in evidence if value >= NOTED] or [reason for _, reason in evidence[:1]]
        suspects.append(Suspect(row, round(score, 3), tuple(reasons)))
    return sorted(suspects, key=lambda s: (-s.score, s.index))


def _together(values: Sequence[float]) -> float:
    """The score of what is known of one clip, the worst first."""
    if values and values[0] >= FAILED:
        return values[0]
    return min(math.hypot(*(value for value in values if value >= COUNTED)), MOST)


def _evidence(table: ClipTable) -> Iterator[tuple[int, float, str]]:
    whole = np.array([kind == OK for kind in table.kinds])
    groups = groups_of(table.clips)
    for test in _TESTS:
        values = table.columns[test.figure]
        z_N = _deviations(np.log(np.maximum(values, 1e-3)) if test.ratio else values, whole, groups, test.floor)
        z_N = test.weight * {1: z_N, -1: -z_N, 0: np.abs(z_N)}[test.side]
        for row in np.flatnonzero(z_N > 1):
            yield int(row), min(float(z_N[row]), MOST), test.text.format(values[row])
    for name, text in _DESCRIPTIONS.items():
        far_N = np.log1p(strangeness(table.vectors(name), groups))
        z_N = _deviations(far_N, whole, groups, 0.1)
        for row in np.flatnonzero(z_N > 1):
            yield int(row), min(float(z_N[row]), MOST), text
    yield from _copies(table)


def _deviations(values_N: np.ndarray, whole_N: np.ndarray, groups: Sequence[np.ndarray], floor: float) -> np.ndarray:
    """How many deviations each value lies above (negative: below) the median of its group; 0 where it is not known.

    A deviation is that of a normal spread with the same median of distances from the median, on each side by itself:
    what faults there are do not widen it, and a long tail to one side does not make what lies on the other look good.
    """
    z_N = np.zeros(len(values_N))
    for rows in groups:
        known = rows[whole_N[rows] & np.isfinite(values_N[rows])]
        if len(known):
            off = values_N[known] - np.median(values_N[known])
            low, high = (max(1.4826 * float(np.median(np.abs(side))), floor) for side in (off[off <= 0], off[off >= 0]))
            z_N[known] = np.where(off < 0, off / low, off / high)
    return z_N


def _overlap(one: Clip, other: Clip) -> bool:
    """Whether two clips of one video have frames in common."""
    if one.start is None or other.start is None:
        return True
    return one.start < other.start + other.num_frames and other.start < one.start + one.num_frames


def _copies(table: ClipTable) -> Iterator[tuple[int, float, str]]:
    rows = np.array([n for n, text in enumerate(table.texts["motion"]) if text and table.kinds[n] == OK], int)
    if len(rows) < 2:
        return
    motion_N2 = np.stack([motion_bits(table.texts["motion"][row]) for row in rows])
    places_N3 = np.stack([table.columns[name][rows] for name in ("centre_x", "centre_y", "face_size")], axis=1)
    vectors = (table.vectors("face")[rows], table.vectors("look")[rows])
    for a, b, differing in copies(motion_N2, places_N3, *vectors).tolist():
        one, other = table.clips[rows[a]], table.clips[rows[b]]
        if one.video == other.video and _overlap(one, other):
            continue
        for row, twin in ((rows[a], other), (rows[b], one)):
            yield int(row), MOST - differing, f"shows what {twin.key} shows ({differing} of {MOTION_BITS} bits differ)"
