"""Numbers drawn as inline SVG, in the page's own colours. All text in them is lipprep's or a number's."""

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from lipprep.pipeline.report.gather import Centre, Spread

_WIDE, _HIGH = 320, 96  # of a histogram, in units of its own
PARTS = 8  # colours of a bar's parts


def histogram(spread: Spread) -> Markup:
    """A figure's histogram, with marks at the median and at the 5th and 95th percentile."""
    counts, edges = spread.counts, spread.edges
    width, top = _WIDE / len(counts), max(1, int(counts.max()))
    # The square root lets single clips be seen beside hundreds of thousands.
    heights = np.sqrt(counts / top) * _HIGH
    bars = "".join(
        f'<rect x="{n * width:.2f}" y="{_HIGH - h:.2f}" width="{max(width - 1, 0.5):.2f}" height="{h:.2f}"/>'
        for n, h in enumerate(heights)
        if h > 0
    )

    def at(value: float) -> float:
        return float(np.clip((value - edges[0]) / (edges[-1] - edges[0]), 0, 1) * _WIDE)

    span = f'<rect class="usual" x="{at(spread.p5):.2f}" y="{_HIGH + 3}" height="3" '
    span += f'width="{max(at(spread.p95) - at(spread.p5), 2):.2f}"/>'
    mark = f'<rect class="median" x="{at(spread.median) - 1:.2f}" y="0" width="2" height="{_HIGH + 6}"/>'
    say = spread.figure.say
    label = (
        f"{spread.figure.title}: median {say(spread.median)}, 90 % of the clips from {say(spread.p5)} to "
        f"{say(spread.p95)}"
    )
    head = f'<svg class="histogram" viewBox="0 0 {_WIDE} {_HIGH + 8}" role="img" '
    return Markup(f'{head}aria-label="{{}}">{bars}{span}{mark}</svg>').format(label)


def heat(centre: Centre) -> Markup:
    """Where mouths are in their source frames, darker where there are more."""
    rows, columns = centre.counts.shape
    top = max(1, int(centre.counts.max()))
    cells = "".join(
        f'<rect x="{c}" y="{r}" width="1" height="1" opacity="{0.15 + 0.85 * (n / top) ** 0.5:.2f}"/>'
        for (r, c), n in np.ndenumerate(centre.counts)
        if n
    )
    label = f"Mouth centres, the median at {centre.median[0]:.0f}, {centre.median[1]:.0f} pixels"
    return Markup(
        f'<svg class="heat" viewBox="0 0 {columns} {rows}" role="img" aria-label="{{}}">'
        f'<rect class="ground" width="{columns}" height="{rows}"/>{cells}</svg>'
    ).format(label)


def bar(parts: Mapping[str, float], *, label: str) -> Markup:
    """A bar cut into parts by size, from the left."""
    total, x, pieces = sum(parts.values()) or 1, 0.0, ""
    for n, size in enumerate(parts.values()):
        wide = size / total * 1000
        pieces += f'<rect class="part{n % PARTS}" x="{x:.1f}" width="{max(wide - 2, 0.5):.1f}" height="14"/>'
        x += wide
    return Markup(
        f'<svg class="bar" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" aria-label="{{}}">{pieces}</svg>'
    ).format(label)
