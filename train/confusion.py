"""Which words are taken for which: the confusion matrix as a table, as a row a word, and as a picture.

Shapes: N clips, C words (classes).
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.untrusted import cell

CONFUSION_FILES = ("words.csv", "confusion.csv", "confusion.png")


def confusion(answers_N: np.ndarray, labels_N: np.ndarray, *, words: int) -> np.ndarray:
    """How often each word is taken for each, (C, C) int64; rows: the word, columns: the answer."""
    confusion_CC = np.zeros((words, words), np.int64)
    np.add.at(confusion_CC, (labels_N, answers_N), 1)
    return confusion_CC


def write_confusion(confusion_CC: np.ndarray, labels: Sequence[str], folder: Path, *, title: str) -> None:
    """Write the matrix to the CONFUSION_FILES of a folder."""
    matrix = [["", *labels]]
    matrix += [[word, *row] for word, row in zip(labels, confusion_CC.tolist(), strict=True)]
    write_text(folder / "words.csv", _csv(word_table(confusion_CC, labels)))
    write_text(folder / "confusion.csv", _csv(matrix))
    draw_confusion(confusion_CC, labels, folder / "confusion.png", title=title)


def word_table(confusion_CC: np.ndarray, labels: Sequence[str]) -> list[list]:
    """A row a word: its clips, how many were read, and the word it was taken for most often."""
    rows: list[list] = [["word", "clips", "correct", "accuracy", "taken_for", "times"]]
    for i, word in enumerate(labels):
        clips, correct = int(confusion_CC[i].sum()), int(confusion_CC[i, i])
        wrong = np.where(np.arange(len(labels)) == i, 0, confusion_CC[i])
        other, times = int(wrong.argmax()), int(wrong.max())
        accuracy = f"{correct / clips:.4f}" if clips else ""
        rows.append([word, clips, correct, accuracy, labels[other] if times else "", times])
    return rows


def draw_confusion(confusion_CC: np.ndarray, labels: Sequence[str], path: Path, *, title: str) -> None:
    """Draw a confusion matrix (rows: the word, columns: the answer) as a PNG, each row in parts of its clips.

    Up to 60 words are all named; of more, some are, and the commonest confusions are listed beside.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    C = len(labels)
    parts_CC = confusion_CC / np.maximum(confusion_CC.sum(axis=1, keepdims=True), 1)
    named = C <= 60
    side = min(12.0, max(5.0, 0.28 * C)) if named else 12.0
    figure = Figure(figsize=(side + (0.6 if named else 2.6), side), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # The square root of the part: confusions are rare, and would all look white beside the diagonal.
    picture = axes.imshow(parts_CC, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    ticks = np.arange(0, C, 1 if named else -(-C // 50))
    size = float(np.clip(72 * side / C * 0.55, 6, 11)) if named else 8
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=size, parse_math=False)
    axes.set(xlabel="answer", ylabel="word")
    clips = max(int(confusion_CC.sum()), 1)
    accuracy = f"{100 * np.trace(confusion_CC) / clips:.1f} % of {confusion_CC.sum()} clips"
    axes.set_title(f"{title}: {accuracy}", parse_math=False)
    if C <= 30:
        for i, j in zip(*np.nonzero(confusion_CC), strict=True):
            dark = parts_CC[i, j] > 0.4
            text = f"{100 * parts_CC[i, j]:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=size * 0.7, color="white" if dark else "black")
    if not named:
        wrong_CC = confusion_CC * (1 - np.eye(C, dtype=np.int64))
        commonest = [divmod(int(i), C) for i in np.argsort(-wrong_CC, axis=None, kind="stable")[:40]]
        lines = [f"{labels[i]} → {labels[j]}  {wrong_CC[i, j]}" for i, j in commonest if wrong_CC[i, j]]
        text = "\n".join(["taken for another word most often:", "", *lines])
        axes.annotate(text, (1.02, 1), xycoords="axes fraction", va="top", fontsize=8, parse_math=False)
    else:
        figure.colorbar(picture, ax=axes, shrink=0.6, ticks=[0, 0.05, 0.25, 0.5, 1], label="part of the word's clips")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _csv(rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()
