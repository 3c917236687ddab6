"""Which clips to look at first: those whose figures say that something is wrong with them.

A clip is as suspicious as the worst thing that is known of it. It failed: nothing is worse. It moves just as another
clip does: one of them is a copy. All else is told by comparison, in deviations from the median of those that it belongs
with: the clips of its speaker where there are enough, else all. A deviation is robust and one-sided: what faults there
are do not make it wide, and a long tail to the right does not make what lies left of it look good.

Shapes: N clips; F numbers of a description of faces or mouths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lipprep.pipeline.figures import OK, PENDING, ClipTable
from lipprep.stages.quality import MOTION_BITS, face_vector, look_vector, motion_bits

SUSPICION = "suspicion"  # what the score is called where figures are named
FAILED = 1000.0  # the score of a clip that is in no shard: above any other
MOST = 100.0  # the highest of the others
NOTED = 4.0  # deviations from which on something is told as a reason
MIN_GROUP = 20  # clips of a speaker, from which on they are compared with each other
ALIKE = 10  # bits of `motion` in which two encodings of one recording may differ
_PIECES = 8  # of 16 bits, one of which two copies share: for certain if they differ in fewer bits than there are pieces
_ALL_PAIRS = 20_000  # clips up to which each is compared with each
_MOST_COPIES = 256  # clips with one piece in common of which each is compared with each
_KEPT = 12  # directions in which descriptions are compared: those in which they differ most


@dataclass(frozen=True)
class Suspect:
    """Row `index` of the table, with a `score` (0: nothing is known against it) and `reasons`, the worst first."""

    index: int
    score: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Test:
    """A figure that is compared: where it is suspicious (1 high, -1 low, 0 both), the least deviation that counts as
    one, in the figure's unit, and what is said of it. `ratio`: what counts is how many times it is another's.
    """

    figure: str
    side: int
    floor: float
    text: str
    ratio: bool = False


_TESTS = (
    _Test("black", 1, 0.01, "{:.0%} of the frames show nothing"),
    _Test("frozen", 1, 0.04, "{:.0%} of the steps show no change"),
    _Test("face_share", -1, 0.02, "a face in {:.0%} of the frames"),
    _Test("max_faces", 1, 0.5, "up to {:.0f} faces in a frame"),
    _Test("outside", 1, 0.1, "the crop leaves the picture in {:.0%} of the frames"),
    _Test("jitter", 1, 0.1, "landmarks jitter by {:.2f} pixels", ratio=True),
    _Test("jump", 1, 0.1, "a change {:.0f} times the usual one between two frames", ratio=True),
    _Test("face_size", 0, 0.03, "eyes {:.0f} pixels apart", ratio=True),
    _Test("scale", 0, 0.03, "scaled by {:.2f}", ratio=True),
    _Test("rotation", 0, 1.0, "the head turned by {:.0f} degrees"),
    _Test("centre_x", 0, 1.0, "the mouth at x = {:.0f} pixels"),
    _Test("centre_y", 0, 1.0, "the mouth at y = {:.0f} pixels"),
    _Test("brightness", 0, 3.0, "brightness {:.0f}"),
    _Test("sharpness", -1, 0.05, "sharpness {:.1f}", ratio=True),
    _Test("movement", 0, 0.05, "movement {:.2f}", ratio=True),
)


def scores(table: ClipTable) -> np.ndarray:
    """The suspicion of each clip, (N,) float64."""
    return np.array([suspect.score for suspect in sorted(rank(table), key=lambda s: s.index)])


def rank(table: ClipTable) -> list[Suspect]:
    """Every clip of `table`, the most suspicious first; those of one score in the manifest's order."""
    found: list[list[tuple[float, str]]] = [[] for _ in range(len(table))]
    for row, (kind, stage) in enumerate(zip(table.kinds, table.stages, strict=True)):
        if kind not in (OK, PENDING):
            found[row].append((FAILED, f"{kind} in {stage}: {table.messages[row]}"))
    groups = _groups(table)
    for row, score, reason in _evidence(table, groups):
        found[row].append((score, reason))
    suspects = []
    for row, evidence in enumerate(found):
        evidence.sort(key=lambda e: -e[0])
        score = evidence[0][0] if evidence else 0.0
        reasons = [reason for value, reason in evidence if value >= NOTED] or [reason for _, reason in evidence[:1]]
        suspects.append(Suspect(row, round(score, 3), tuple(reasons)))
    return sorted(suspects, key=lambda s: (-s.score, s.index))


def _evidence(table: ClipTable, groups: Sequence[np.ndarray]) -> Iterator[tuple[int, float, str]]:
    whole = np.array([kind == OK for kind in table.kinds])
    for test in _TESTS:
        values = table.columns[test.figure]
        z_N = _deviations(np.log(np.maximum(values, 1e-3)) if test.ratio else values, whole, groups, test.floor)
        z_N = {1: z_N, -1: -z_N, 0: np.abs(z_N)}[test.side]
        for row in np.flatnonzero(z_N > 1):
            yield int(row), min(float(z_N[row]), MOST), test.text.format(values[row])
    for name, read, text in (
        ("face", face_vector, "another face than others have"),
        ("look", look_vector, "another mouth than others have, or another part of the face"),
    ):
        z_N = _strangeness(table.texts[name], read, whole, groups)
        for row in np.flatnonzero(z_N > 1):
            yield int(row), min(float(z_N[row]), MOST), text
    yield from _copies(table)


def _groups(table: ClipTable) -> list[np.ndarray]:
    """The rows that are compared with each other: those of each speaker with enough clips, and all others."""
    rows: dict[str | None, list[int]] = {}
    for row, clip in enumerate(table.clips):
        rows.setdefault(clip.speaker or None, []).append(row)
    large = [np.array(mine) for speaker, mine in rows.items() if speaker is not None and len(mine) >= MIN_GROUP]
    rest = np.setdiff1d(np.arange(len(table)), np.concatenate(large)) if large else np.arange(len(table))
    return [*large, rest] if len(rest) else large


def _deviations(values_N: np.ndarray, whole_N: np.ndarray, groups: Sequence[np.ndarray], floor: float) -> np.ndarray:
    """How many deviations each value lies above (negative: below) the median of its group; 0 where it is not known."""
    z_N = np.zeros(len(values_N))
    for rows in groups:
        known = rows[whole_N[rows] & np.isfinite(values_N[rows])]
        if len(known):
            z_N[known] = _robust(values_N[known], floor)
    return z_N


def _robust(values: np.ndarray, floor: float) -> np.ndarray:
    """Deviations from the median: on each side the larger of a MAD's and a 95th percentile's, as of a normal spread."""
    off = values - np.median(values)
    spread = 1.4826 * float(np.median(np.abs(off)))
    low, high = (max(spread, abs(float(np.quantile(off, q))) / 1.645, floor) for q in (0.05, 0.95))
    return np.where(off < 0, off / low, off / high)


def _strangeness(
    texts: Sequence[str | None], read: Callable[[str], np.ndarray], whole_N: np.ndarray, groups: Sequence[np.ndarray]
) -> np.ndarray:
    """How far each description lies from those of its group, in deviations of such distances; 0 where not known.

    Distances are Mahalanobis', in the directions in which clips differ most from the medians of their groups.
    """
    z_N = np.zeros(len(texts))
    rows = np.array([n for n, text in enumerate(texts) if text is not None and whole_N[n]], int)
    if len(rows) < MIN_GROUP:
        return z_N
    vectors_NF = np.stack([read(texts[n]) for n in rows])
    members = [np.flatnonzero(np.isin(rows, group)) for group in groups]
    members = [mine for mine in members if len(mine) >= MIN_GROUP]
    for mine in members:
        vectors_NF[mine] -= np.median(vectors_NF[mine], axis=0)
    inside = np.concatenate(members) if members else np.array([], int)
    if not len(inside):
        return z_N
    # What is far off would widen the spread that it is measured by: the directions come from the nearer nine tenths.
    size = np.linalg.norm(vectors_NF[inside], axis=1)
    near_NF = vectors_NF[inside[size <= np.quantile(size, 0.9)]]
    spreads_F, axes_FF = np.linalg.eigh(near_NF.T @ near_NF / len(near_NF))
    kept = axes_FF[:, -_KEPT:] / np.sqrt(np.maximum(spreads_F[-_KEPT:], spreads_F[-1] * 1e-3))
    distance = np.linalg.norm(vectors_NF @ kept, axis=1)
    for mine in members:
        z_N[rows[mine]] = _robust(np.log(distance[mine] + 1), 0.1)
    return z_N


def _copies(table: ClipTable) -> Iterator[tuple[int, float, str]]:
    rows = [row for row, text in enumerate(table.texts["motion"]) if text is not None and table.kinds[row] == OK]
    if len(rows) < 2:
        return
    bits_N2 = np.stack([motion_bits(table.texts["motion"][row]) for row in rows])
    for a, b, differing in _pairs(bits_N2):
        one, other = table.clips[rows[a]], table.clips[rows[b]]
        if one.video == other.video and (one.start is None or abs(one.start - other.start) < one.num_frames):
            continue  # windows that overlap
        for row, twin in ((rows[a], other), (rows[b], one)):
            yield row, MOST - differing, f"moves as {twin.key} does ({differing} of {MOTION_BITS} bits differ)"


def _pairs(bits_N2: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Pairs of rows that differ in at most ALIKE bits, and in how many."""
    N = len(bits_N2)
    if N <= _ALL_PAIRS:
        for a in range(N - 1):
            differing = np.bitwise_count(bits_N2[a + 1 :] ^ bits_N2[a]).sum(1)
            for n in np.flatnonzero(differing <= ALIKE):
                yield a, a + 1 + int(n), int(differing[n])
        return
    pieces_NP = bits_N2.view(np.uint16).reshape(N, _PIECES)
    seen: set[tuple[int, int]] = set()
    for piece in range(_PIECES):
        order = np.argsort(pieces_NP[:, piece], kind="stable")
        sorted_N = pieces_NP[order, piece]
        for gap in range(1, min(N, _MOST_COPIES)):
            same = np.flatnonzero(sorted_N[gap:] == sorted_N[:-gap])
            if not len(same):
                break
            a, b = order[same], order[same + gap]
            differing = np.bitwise_count(bits_N2[a] ^ bits_N2[b]).sum(1)
            for n in np.flatnonzero(differing <= ALIKE):
                pair = (int(min(a[n], b[n])), int(max(a[n], b[n])))
                if pair not in seen:
                    seen.add(pair)
                    yield *pair, int(differing[n])
