"""Clips compared with each other: whose mouth lies elsewhere, whose face is another's, and which are copies.

Shapes: N clips, F numbers of a description (`lipprep.stages.quality`), M rows of a group.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import cv2
import numpy as np

from lipprep.pipeline.manifest import Clip
from lipprep.stages.quality import LOOK

MIN_GROUP = 10  # clips of a speaker, from which on they are compared with each other
CERTAIN = 10  # bits of `motion`: clips that look alike and differ in no more are copies, wherever their faces are
LIKELY = 32  # the same, of clips with like faces in one place; any two differ in 64, more or less
_NEAR = 0.5  # pixels that mouth and face size of copies differ by in another encoding
_FACE_ALIKE, _LOOK_ALIKE = 0.3, 0.07  # root mean squares that `face` (pixels) and `look` (deviations) differ by
_ALL_PAIRS = 20_000  # clips up to which each is compared with each
_PIECES = 8  # of `motion`, one of which two copies have in common: for certain if fewer bits than pieces differ
_MOST_ALIKE = 256  # clips with one piece, or in one place, of which each is compared with each
_TOLD = 8  # copies of a clip
_DIRECTIONS = 12  # in which descriptions are compared: those in which they differ most
_LEAST_SPREAD = 1e-6  # a variance above what rounding leaves of descriptions that are the same
_FARTHEST, _FINEST = 3, 0.25  # cells of `look` that a mouth is looked for off the middle, and in what steps
_COST = 0.08  # correlation that a move must gain a cell: a mouth 20 pixels off gains three times as much
_BLOCK = 1 << 14  # clips that are compared at once


def groups_of(clips: Sequence[Clip]) -> list[np.ndarray]:
    """The rows that are compared with each other: those of each speaker with enough clips, and all others."""
    rows: dict[str, list[int]] = {}
    for row, clip in enumerate(clips):
        rows.setdefault(clip.speaker or "", []).append(row)
    large = [np.array(mine) for speaker, mine in rows.items() if speaker and len(mine) >= MIN_GROUP]
    rest = np.setdiff1d(np.arange(len(clips)), np.concatenate(large)) if large else np.arange(len(clips))
    return [*large, rest] if len(rest) else large


def members(known_N: np.ndarray, groups: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of each group of which something is known, where they are enough to be compared."""
    for rows in groups:
        if len(mine := rows[known_N[rows]]) >= MIN_GROUP:
            yield mine


def off_centre(look_NF: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """How far each clip's mouth lies from where its group has it, (N,), in parts of the crop's side; NaN: not known.

    The group's median look, moved by up to three cells of eight each way, is laid over the clip's: where they
    correlate best says how far one is off, unless that is hardly better than nearer by: another mouth is not one that
    lies elsewhere. `look_NF` has NaN where there is none.
    """
    off_N = np.full(len(look_NF), np.nan)
    far_M, order_M, moves_DSS = _moves()
    for mine in members(np.isfinite(look_NF[:, 0]), groups):
        usual_SS = np.median(look_NF[mine], axis=0).reshape(LOOK, LOOK).astype(np.float32)
        moved_DDSS = moves_DSS.transpose(0, 2, 1) @ (usual_SS @ moves_DSS)[:, None]
        moved_MF = _unit(moved_DDSS.reshape(len(far_M), -1)[order_M])
        for block in np.array_split(mine, -(-len(mine) // _BLOCK)):
            alike_BM = _unit(look_NF[block]) @ moved_MF.T
            near_B = far_M[(alike_BM - _COST * far_M).argmax(1)]
            # What a move costs draws it in: where there is one, it is what fits best from there to a cell farther.
            beyond_BM = (far_M >= near_B[:, None]) & (far_M <= near_B[:, None] + 1)
            best_B = far_M[np.where(beyond_BM, alike_BM, -1).argmax(1)]
            off_N[block] = np.where(near_B < 1, near_B, best_B) / LOOK
    return off_N


@cache
def _moves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All moves of a look in x and y: how far each goes (M,), cells, the nearest first; their order (M,); and matrices.

    Of these, (D, S, S), each moves a row, and turned over a column, by one of the D steps: M is D x D.
    """
    steps_D = np.arange(-_FARTHEST, _FARTHEST + _FINEST / 2, _FINEST)
    far_M = np.hypot(steps_D[:, None], steps_D[None]).ravel()
    order_M = np.argsort(far_M, kind="stable")
    rows = np.eye(LOOK, dtype=np.float32)
    matrices = (np.array([[1, 0, step], [0, 1, 0]], np.float64) for step in steps_D)
    moves = [cv2.warpAffine(rows, matrix, (LOOK, LOOK), borderMode=cv2.BORDER_REPLICATE) for matrix in matrices]
    return far_M[order_M], order_M, np.stack(moves)


def _unit(values: np.ndarray) -> np.ndarray:
    values = values - values.mean(-1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-6)


def strangeness(vectors_NF: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """How far each description lies from its group's median, (N,), as Mahalanobis has it; NaN where not known.

    In the directions in which clips differ most from the medians of their groups, by the spread of the nearer nine
    tenths: what is far off would widen what it is measured by. `vectors_NF` has NaN where there is none.
    """
    far_N = np.full(len(vectors_NF), np.nan)
    compared = list(members(np.isfinite(vectors_NF[:, 0]), groups))
    if not compared:
        return far_N
    rows = np.concatenate(compared)
    off_MF = np.concatenate([vectors_NF[mine] - np.median(vectors_NF[mine], axis=0) for mine in compared])
    size_M = np.linalg.norm(off_MF, axis=1)
    near_MF = off_MF[size_M <= np.quantile(size_M, 0.9)]
    spreads_F, axes_FF = np.linalg.eigh(near_MF.T @ near_MF / len(near_MF))
    spreads_F, axes_FF = spreads_F[-_DIRECTIONS:], axes_FF[:, -_DIRECTIONS:]
    least = max(spreads_F[-1] * 1e-3, _LEAST_SPREAD)
    far_N[rows] = np.linalg.norm(off_MF @ axes_FF / np.sqrt(np.maximum(spreads_F, least)), axis=1)
    return far_N


def copies(motion_N2: np.ndarray, places_N3: np.ndarray, face_NF: np.ndarray, look_NF: np.ndarray) -> np.ndarray:
    """Pairs of rows that show one recording, and in how many bits of their motion they differ, (P, 3) int64.

    `motion_N2` are bits (N, 2) uint64; `places_N3` mouth centre and face size, pixels; NaN where not known. Of a clip
    with very many copies, some are told.
    """
    told_N = np.zeros(len(motion_N2), np.int64)
    found = [np.empty((0, 3), np.int64)]
    for a, b in _candidates(motion_N2, places_N3):
        wanted = np.flatnonzero(told_N[a] < _TOLD)
        a, b = a[wanted], b[wanted]
        differing = np.bitwise_count(motion_N2[a] ^ motion_N2[b]).sum(1)
        close = np.flatnonzero(differing <= LIKELY)
        a, b, differing = a[close], b[close], differing[close].astype(np.int64)
        look = np.sqrt(((look_NF[a] - look_NF[b]) ** 2).mean(1)) <= _LOOK_ALIKE
        face = np.sqrt(((face_NF[a] - face_NF[b]) ** 2).mean(1)) <= _FACE_ALIKE
        near = (np.abs(places_N3[a] - places_N3[b]) <= _NEAR).all(1)  # False where one is not known
        same = np.flatnonzero(look & ((differing <= CERTAIN) | (face & near)))
        a, b, differing = a[same], b[same], differing[same]
        # a comes in runs: of each, as many as are still to be told.
        begins = np.flatnonzero(np.diff(a, prepend=-1))
        nth = np.arange(len(a)) - np.repeat(begins, np.diff(begins, append=len(a)))
        kept = nth + told_N[a] < _TOLD
        np.add.at(told_N, a[kept], 1)
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b), differing], axis=1)[kept])
    return np.unique(np.concatenate(found), axis=0)


def _candidates(motion_N2: np.ndarray, places_N3: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that may be copies of each other: all pairs of few clips; of many those that have something in common."""
    N = len(motion_N2)
    if N <= _ALL_PAIRS:
        for a in range(N - 1):
            b = np.arange(a + 1, N)
            yield np.full(len(b), a), b
        return
    pieces_NP = np.ascontiguousarray(motion_N2).view(np.uint16).reshape(N, _PIECES)
    for piece in range(_PIECES):
        yield from _in_common(pieces_NP[:, piece].astype(np.int64), np.arange(N), (0,))
    known = np.flatnonzero(np.isfinite(places_N3).all(1))
    cells = np.floor(places_N3[known] / _NEAR).astype(np.int64).clip(-(1 << 19), 1 << 19)
    ids = ((cells[:, 0] << 40) + (cells[:, 1] << 20) + cells[:, 2]) if len(known) else np.array([], np.int64)
    around = [(dx << 40) + (dy << 20) + ds for dx in (-1, 0, 1) for dy in (-1, 0, 1) for ds in (-1, 0, 1)]
    yield from _in_common(ids, known, [offset for offset in around if offset >= 0])


def _in_common(ids: np.ndarray, rows: np.ndarray, offsets: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of `rows` whose ids differ by one of the offsets, which are >= 0; of very many with one id, some."""
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    for offset in offsets:
        begins, ends = (np.searchsorted(ids, ids + offset, side) for side in ("left", "right"))
        if offset == 0:
            begins = np.arange(1, len(ids) + 1)  # those behind it
        counts = (ends - begins).clip(0, _MOST_ALIKE)
        for block in np.array_split(np.arange(len(ids)), -(-max(len(ids), 1) // _BLOCK)):
            mine = counts[block]
            a = np.repeat(block, mine)
            b = np.repeat(begins[block], mine) + np.arange(mine.sum()) - np.repeat(np.cumsum(mine) - mine, mine)
            if len(a):
                yield rows[order[a]], rows[order[b]]
