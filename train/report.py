"""What a run leaves for a person to look at: the first batch as the network sees it, learning curves, a summary.

Shapes: B clips, T frames, H and W pixels.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lipprep.stages.atomic import replacing, write_text
from lipprep.train.augment import AugmentedBatch
from lipprep.train.metrics import read_metrics, warn

SUMMARY, CURVES, FIRST_BATCH = "summary.json", "curves.png", "first_batch.png"
_CLIPS, _FRAMES = 12, 8  # of the picture of a batch: rows and columns


@contextlib.contextmanager
def harmless(name: str) -> Iterator[None]:
    """Let no picture end a run: say that it could not be drawn."""
    try:
        yield
    except Exception as error:
        warn(f"{name} could not be drawn: {error!r}")


@harmless(FIRST_BATCH)
def draw_batch(batch: AugmentedBatch, labels_R: torch.Tensor, words: list[str], path: Path) -> None:
    """Draw clips of an augmented batch as a PNG: a row a clip, its word on the left, frames from first to last.

    The range of gray is that of all that is shown: zero, the padding, is the same gray everywhere.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x_BTHW = batch.x_B1THW[:_CLIPS, 0].float().cpu().numpy()
    B, T, H, W = x_BTHW.shape
    frames = np.unique(np.linspace(0, T - 1, min(T, _FRAMES)).round().astype(int))
    low, high = np.percentile(x_BTHW, [0.5, 99.5])
    strip = np.concatenate(np.concatenate(x_BTHW[:, frames], axis=1).reshape(len(frames), B * H, W), axis=1)
    lengths, labels, share = batch.lengths_B.tolist(), labels_R.tolist(), batch.share_B.tolist()
    partner = None if batch.partner_B is None else batch.partner_B.tolist()
    names = []
    for row in range(B):
        name = words[labels[row]]
        if partner is not None:
            name = f"{100 * share[row]:.0f} % {name}\n{100 * (1 - share[row]):.0f} % {words[labels[partner[row]]]}"
        names.append(f"{name}\n{lengths[row]} frames")
    figure = Figure(figsize=(3.2 + len(frames) * 0.9, 0.6 + B * 0.9), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(strip, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks((np.arange(B) + 0.5) * H, names, fontsize=7, parse_math=False)
    axes.set_xticks((np.arange(len(frames)) + 0.5) * W, [str(f) for f in frames], fontsize=7)
    axes.set(xlabel="frame")
    axes.set_title(f"what the network sees first: {B} of {len(batch.x_B1THW)} clips", fontsize=9)
    for edge in range(1, B):
        axes.axhline(edge * H - 0.5, color="white", linewidth=0.8)
    figure.colorbar(picture, ax=axes, shrink=0.5, label="normalised gray").ax.tick_params(labelsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png")


@harmless(CURVES)
def draw_curves(run: Path) -> None:
    """Draw the learning curves of a run from its metrics.jsonl to its curves.png: loss, accuracy and rate by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    training = [row for row in rows if "split" not in row]
    val = [row for row in rows if row.get("split") == "val" and "top1" in row]
    figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])

    def line(axes, found: list[dict], key: str, label: str, *, factor: float = 1, **style) -> None:
        points = [(r["step"], factor * r[key]) for r in found if key in r]
        axes.plot(*zip(*points, strict=True), label=label, **{"marker": "." if len(points) < 50 else None, **style})

    line(loss, training, "mean_loss", "training, as augmented", color="tab:gray", linewidth=1)
    line(accuracy, training, "accuracy", "training, as augmented", factor=100, color="tab:gray", linewidth=1)
    line(rate, training, "lr", "", color="tab:gray")
    if val:
        line(loss, val, "loss", "validation", color="tab:blue")
        line(accuracy, val, "top1", "validation top-1", factor=100, color="tab:blue")
        line(accuracy, val, "top5", "validation top-5", factor=100, color="tab:cyan", linewidth=1)
        best = max(val, key=lambda row: (row["top1"], row["step"]))
        title = f"best validation top-1: {100 * best['top1']:.1f} %, last at step {best['step']}"
        accuracy.set_title(title, fontsize=9, loc="left")
    loss.set(ylabel="loss", ylim=(0, None))
    accuracy.set(ylabel="accuracy in %", ylim=(0, 102))
    rate.set(ylabel="rate", xlabel="step", ylim=(0, None))
    for axes in (loss, accuracy):
        axes.legend(loc="best", fontsize=8)
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    with replacing(run / CURVES) as file:
        figure.savefig(file, format="png")


def write_summary(run: Path, summary: dict) -> Path:
    """Write what a run came to as JSON."""
    write_text(run / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return run / SUMMARY
