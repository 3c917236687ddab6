"""A picture of what was read of a video: words and confidence over time, the mouth below."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lipprep.stages.atomic import replacing
from lipprep.train.predict import FaceReading
from lipprep.train.utterances import Utterance, utterances

_SECONDS = 10.0  # of a row, or more where there would be more than _ROWS of them
_ROWS = 12
_PANELS = 120  # in a picture, which may have 65,535 pixels a side and takes seconds: of many faces the largest
_WIDTH, _PIXELS = 12.0, 100  # inches, and pixels of each
_PANEL, _LEFT = 2.3, 0.8  # inches: the height of a row, and its left margin
_SHOWN = 28  # mouths in a row
_KNOWN, _UNKNOWN = "#1f77b4", "#b0b0b0"


def draw_timeline(
    readings: Sequence[FaceReading], path: Path, *, fps: float, title: str, threshold: float | None, calibrated: bool
) -> None:
    """Write the picture as a PNG: rows of 10 seconds or more, and in each the faces that it has, one below the other.

    A bar is an utterance, as high as its confidence, and gray where the reader abstains. Raises OSError where it cannot
    be written. Crops must have been kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = max(reading.start + len(reading.points_TKD) for reading in readings) / fps
    rows = min(_ROWS, max(1, math.ceil(total / _SECONDS - 1e-6)))
    seconds = total / rows if rows == _ROWS or rows == 1 else _SECONDS
    panels = _panels(readings, rows, seconds * fps)
    height = 0.8 + _PANEL * len(panels)
    figure = Figure(figsize=(_WIDTH, height), dpi=_PIXELS)
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.25 / height, title, ha="center", fontsize=11, parse_math=False)
    for n, (row, reading) in enumerate(panels):
        begin, end = row * seconds, (row + 1) * seconds
        bottom = height - 0.4 - _PANEL * (n + 1)
        strip, bars = (
            figure.add_axes((_LEFT / _WIDTH, (bottom + up) / height, 1 - (_LEFT + 0.1) / _WIDTH, tall / height))
            for up, tall in ((0.35, 0.4), (0.78, 1.4))
        )
        _draw_words(bars, utterances(reading.windows, fps=fps), begin, end)
        if threshold:
            bars.axhline(100 * threshold, color="black", linewidth=0.8, linestyle=":")
        ylabel = "confidence, %" if calibrated else "confidence, %\n(not calibrated)"
        bars.set(xlim=(begin, end), ylim=(0, 118), yticks=[0, 50, 100], xticks=[])
        bars.set_ylabel(f"face {reading.face}\n{ylabel}" if len(readings) > 1 else ylabel, fontsize=8)
        bars.tick_params(labelsize=8)
        _draw_mouths(strip, reading, begin, end, fps=fps)
        strip.tick_params(labelsize=8)
    told = f"     gray: unknown, less than {100 * threshold:.0f} % likely" if threshold else ""
    if len(shown := {reading.face for _, reading in panels}) < len(readings):
        told += f"     the largest {len(shown)} of {len(readings)} faces"
    strip.set_xlabel(f"seconds{told}", fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _panels(readings: Sequence[FaceReading], rows: int, frames: float) -> list[tuple[int, FaceReading]]:
    """Which face to draw in which row of that many frames: the first ones, as many as a picture holds."""
    panels: list[tuple[int, FaceReading]] = []
    for reading in readings:
        stop = reading.start + len(reading.points_TKD)
        own = [(row, reading) for row in range(rows) if reading.start < (row + 1) * frames and stop > row * frames]
        if len(panels) + len(own) > _PANELS:
            break
        panels += own
    return sorted(panels, key=lambda panel: (panel[0], panel[1].face))


def _draw_words(axes, said: Sequence[Utterance], begin: float, end: float) -> None:
    for one in said:
        if one.stop <= begin or one.start >= end:
            continue
        start, stop = max(one.start, begin), min(one.stop, end)
        colour = _UNKNOWN if one.word is None else _KNOWN
        height = 100 * one.confidence
        axes.bar(start, height, width=stop - start, align="edge", color=colour, edgecolor="white", linewidth=0.8)
        word = "-" if one.word is None else one.word
        # As large as fits into its bar, letters being up to 0.75 of their size wide; or upright inside it.
        width = (stop - start) / (end - begin) * (_WIDTH - _LEFT) * 72
        size = min(10.0, width / (0.75 * len(word)))
        middle, how = (start + stop) / 2, {"ha": "center", "va": "bottom", "parse_math": False}
        if size >= 6:
            axes.text(middle, height + 2, word, fontsize=size, **how)
        elif width >= 7:
            axes.text(middle, 3, word, fontsize=7, rotation=90, color="white", **how)


def _draw_mouths(axes, reading: FaceReading, begin: float, end: float, *, fps: float) -> None:
    """The mouth crops nearest to evenly spaced times, as many as fit side by side."""
    S = reading.mouth_TSS.shape[1]
    strip = np.full((S, _SHOWN * S), 230, np.uint8)
    for k in range(_SHOWN):
        frame = round((begin + (k + 0.5) * (end - begin) / _SHOWN) * fps) - reading.start
        row = min(round(frame / reading.mouth_every), len(reading.mouth_TSS) - 1)
        if 0 <= frame < len(reading.points_TKD) and reading.mouth_TSS[row].any():
            strip[:, k * S : (k + 1) * S] = reading.mouth_TSS[row]
    axes.imshow(strip, cmap="gray", vmin=0, vmax=255, extent=(begin, end, 0, 1), aspect="auto")
    axes.set(yticks=[])
