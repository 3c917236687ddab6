"""What the page shows, as plain data: each figure's spread, and the clips of each contact sheet.

N is the number of clips of the manifest; rows are positions in it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lipprep.pipeline.figures import OK, ClipTable
from lipprep.pipeline.suspicion import Suspect
from lipprep.stages.failures import FAILURES

SUSPICIOUS = 60
RANDOM = 60
FAILED = 48
AN_END = 10  # outliers at each end of a figure
_WORDS = (300, 6, 500)  # clips of the sheet by word: about so many, at most so many a word, of at most so many words
_SPEAKERS = (150, 6, 60)
BINS = 32
_USUAL = (0.5, 99.5)  # percentiles between which a histogram's axis runs
_MOST = (2.5, 97.5)  # percentiles between which mouths fill half of their chart
_AVERAGED = 4000  # clips that averages are made of, at most
_A_WORD = 60  # of them of one word


@dataclass(frozen=True)
class Figure:
    """A figure of the records: its name there, what people call it, and which of its ends may mean trouble."""

    name: str
    title: str
    unit: str
    about: str
    digits: int = 2
    factor: float = 1.0
    ends: tuple[str, ...] = ("low", "high")

    def say(self, value: float) -> str:
        """A value for people, with its unit."""
        number = f"{self.factor * value:.{self.digits}f}"
        return f"{number} {self.unit}".rstrip()


FIGURES = (
    Figure("face_size", "Face size", "px", "Distance between the outer corners of the eyes in the source.", 1),
    Figure("jitter", "Jitter", "px", "How far the eyes' corners tremble from frame to frame in the source."),
    Figure("brightness", "Brightness", "", "Mean gray level of the mouth crops, from 0 to 255.", 0),
    Figure("sharpness", "Sharpness", "", "Fine detail of the crops (deviation of the Laplacian): low is blurred.", 1),
    Figure("num_frames", "Clip length", "frames", "Frames of the clip.", 0),
    Figure("scale", "Scale", "×", "Pixels of the crop for one of the source: high is enlarged."),
    Figure("rotation", "Rotation", "°", "Mean roll of the line through the eyes, clockwise.", 1),
    Figure("movement", "Mouth movement", "", "Mean change of the crops from frame to frame, gray levels."),
    Figure("jump", "Jump", "×", "The largest change between two frames beside the clip's usual one.", 1, 1, ("high",)),
    Figure("face_share", "Frames with a face", "%", "Share of the frames in which a face was found.", 0, 100, ("low",)),
    Figure("outside", "Outside the frame", "%", "Share of frames whose crop leaves the picture.", 0, 100, ("high",)),
    Figure("black", "Black frames", "%", "Share of the frames that show nothing.", 0, 100, ("high",)),
    Figure("frozen", "Frozen steps", "%", "Share of the steps between frames that show no change.", 0, 100, ("high",)),
)


@dataclass(frozen=True)
class Spread:
    """How a figure is spread over the clips that have it.

    `edges` (B + 1,) and `counts` (B,) are its histogram; what lies beyond the first and the last edge is in the bins
    there. `low` and `high` are the rows at its ends, the outermost first; none where that end is the usual value.
    """

    figure: Figure
    known: int
    median: float
    lowest: float
    highest: float
    p5: float
    p95: float
    edges: np.ndarray
    counts: np.ndarray
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True)
class Centre:
    """Where mouths are in their source frames: `counts` (rows, columns) of clips, between `x` and `y` (low, high), px.

    `far` are the rows farthest from the middle, in robust standard deviations, the farthest first.
    """

    known: int
    x: tuple[float, float]
    y: tuple[float, float]
    median: tuple[float, float]
    counts: np.ndarray
    far: tuple[int, ...]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: clips in an order. `group` is the field of a clip that has headings, `figure` what is told."""

    name: str
    title: str
    about: str
    rows: tuple[int, ...]
    group: str | None = None
    figure: str | None = None


@dataclass(frozen=True)
class Gathered:
    """All that is chosen for the page, before any picture is read; averages are made of the rows `averaged`."""

    counts: dict[str, int]
    spreads: tuple[Spread, ...]
    centre: Centre | None
    sheets: tuple[Sheet, ...]
    averaged: tuple[int, ...]
    reasons: Mapping[int, tuple[str, ...]]

    @property
    def shown(self) -> list[int]:
        """The rows of all sheets, each once, in the order of the sheets."""
        return list(dict.fromkeys(row for sheet in self.sheets for row in sheet.rows))


def gather(table: ClipTable, suspects: Sequence[Suspect]) -> Gathered:
    """Choose what the page shows of a table whose clips `suspects` has in the order of suspicion."""
    is_ok = np.array([kind == OK for kind in table.kinds], bool)
    can_see = np.array([place is not None for place in table.crops], bool)
    best = can_see & is_ok if (can_see & is_ok).any() else is_ok  # without crops, cards without pictures
    order = np.random.default_rng(table.manifest.seed % (1 << 64)).permutation(len(table.clips))
    mixed = order[best[order]]
    spreads = tuple(
        spread for figure in FIGURES if (spread := _spread(figure, table.columns.get(figure.name), best)) is not None
    )
    centre = _centre(table, best)
    sheets = [
        Sheet(
            "suspicious",
            "Most suspicious",
            "What deserves a look first, with reasons.",
            tuple(s.index for s in suspects if best[s.index])[:SUSPICIOUS],
        ),
        Sheet("random", "Random", "Drawn from all clips, always the same ones.", tuple(mixed[:RANDOM].tolist())),
        _grouped(table, mixed, "word", "By word", _WORDS),
        _grouped(table, mixed, "speaker", "By speaker", _SPEAKERS),
        Sheet("failed", "Failed", "Clips that are in no shard.", _failed(table, suspects)),
    ]
    for spread in spreads:
        for end in spread.figure.ends:
            title, name = spread.figure.title, spread.figure.name.replace("_", "-")
            about = f"{'Lowest' if end == 'low' else 'Highest'} first. {spread.figure.about}"
            rows = spread.low if end == "low" else spread.high
            sheets.append(Sheet(f"{name}-{end}", f"{title}, {end}", about, rows, figure=title))
    if centre is not None:
        about = "Mouths farthest from where most are in the source."
        sheets.append(Sheet("centre-far", "Mouth centre, far", about, centre.far, figure="Mouth centre"))
    return Gathered(
        counts=dict(Counter(table.kinds).most_common()),
        spreads=spreads,
        centre=centre,
        sheets=tuple(sheet for sheet in sheets if sheet.rows),
        averaged=_averaged(table, order[(can_see & is_ok)[order]]),
        reasons={s.index: tuple(s.reasons) for s in suspects},
    )


def _spread(figure: Figure, column: np.ndarray | None, best: np.ndarray) -> Spread | None:
    # column, best: (N,)
    if column is None or not (known := np.isfinite(column)).any():
        return None
    values = column[known]
    median, p5, p95 = (float(v) for v in np.percentile(values, [50, 5, 95]))
    low, high = np.percentile(values, _USUAL)
    whole = (values == np.round(values)).all()
    if whole and high - low < BINS:
        edges = np.arange(np.floor(low), np.floor(high) + 2) - 0.5
    else:
        room = 0.05 * (high - low) or 0.5 * max(abs(high), 1e-3)
        low, high = max(low - room, values.min()), min(high + room, values.max())
        edges = np.linspace(low, high if high > low else low + 1e-3, BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    rows = np.flatnonzero(known & best)
    rows = rows[np.argsort(column[rows], kind="stable")]
    ends = {
        "low": [r for r in rows[:AN_END].tolist() if column[r] < median],
        "high": [r for r in rows[::-1][:AN_END].tolist() if column[r] > median],
    }
    kept = {end: tuple(found) if end in figure.ends else () for end, found in ends.items()}
    return Spread(
        figure, int(known.sum()), median, float(values.min()), float(values.max()), p5, p95, edges, counts, **kept
    )


def _centre(table: ClipTable, best: np.ndarray) -> Centre | None:
    x, y = table.columns.get("centre_x"), table.columns.get("centre_y")
    if x is None or y is None or not (known := np.isfinite(x) & np.isfinite(y)).any():
        return None
    points_N2 = np.stack([x, y], axis=1)
    median_2 = np.median(points_N2[known], axis=0)
    scale_2 = np.median(np.abs(points_N2[known] - median_2), axis=0) * 1.4826  # as a normal spread's deviation
    far_N = np.hypot(*((points_N2 - median_2) / np.maximum(scale_2, 0.5)).T)
    rows = np.flatnonzero(known & best)
    rows = rows[np.argsort(-far_N[rows], kind="stable")][:AN_END]
    low_2, high_2 = np.percentile(points_N2[known], _MOST, axis=0)
    reach = max(float((high_2 - low_2).max()), 4.0)  # a square: x and y to one scale
    middle_2 = (low_2 + high_2) / 2
    (x0, y0), (x1, y1) = middle_2 - reach, middle_2 + reach
    inside_N2 = np.clip(points_N2[known], [x0, y0], [x1, y1])
    counts, _, _ = np.histogram2d(inside_N2[:, 1], inside_N2[:, 0], bins=BINS, range=[[y0, y1], [x0, x1]])
    far = tuple(r for r in rows.tolist() if far_N[r] > 0)
    return Centre(
        int(known.sum()), (x0, x1), (y0, y1), (float(median_2[0]), float(median_2[1])), counts.astype(int), far
    )


def _grouped(table: ClipTable, mixed: np.ndarray, field: str, title: str, size: tuple[int, int, int]) -> Sheet:
    """Some clips of each value of a field, the values in their order; of many values evenly spread ones."""
    total, most, groups = size
    found: dict[str, list[int]] = defaultdict(list)
    for row in mixed.tolist():
        if (value := getattr(table.clips[row], field)) is not None and len(mine := found[value]) < most:
            mine.append(row)
    values = sorted(found)
    if len(values) > groups:
        values = [values[i] for i in np.linspace(0, len(values) - 1, groups).astype(int)]
    each = max(1, min(most, total // max(1, len(values))))
    rows = tuple(row for value in values for row in found[value][:each])
    return Sheet(f"{field}s", title, f"{each} of each {field}, drawn from all its clips.", rows, group=field)


def _failed(table: ClipTable, suspects: Sequence[Suspect]) -> tuple[int, ...]:
    """Failed clips, the commonest class first, as many of each as there is room for."""
    rows: dict[str, list[int]] = defaultdict(list)
    for suspect in suspects:
        if (kind := table.kinds[suspect.index]) in FAILURES:
            rows[kind].append(suspect.index)
    each = max(1, FAILED // max(1, len(rows)))
    ordered = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(row for _, mine in ordered for row in mine[:each])


def _averaged(table: ClipTable, mixed: np.ndarray) -> tuple[int, ...]:
    """The clips that averages are made of: the same number of each word, where it has as many."""
    each = max(1, min(_A_WORD, _AVERAGED // max(1, len(table.manifest.labels))))
    taken: Counter = Counter()
    rows = []
    for row in mixed.tolist():
        label = table.clips[row].label
        if taken[label] < each:
            taken[label] += 1
            rows.append(row)
    return tuple(rows)


def summaries(gathered: Gathered) -> dict[str, dict]:
    """Each figure's spread in a few numbers."""
    plain = {
        s.figure.name: {
            "known": s.known,
            "min": round(s.lowest, 4),
            "p5": round(s.p5, 4),
            "median": round(s.median, 4),
            "p95": round(s.p95, 4),
            "max": round(s.highest, 4),
        }
        for s in gathered.spreads
    }
    if (centre := gathered.centre) is not None:
        plain["centre"] = {"known": centre.known, "median": [round(v, 4) for v in centre.median]}
    return plain
