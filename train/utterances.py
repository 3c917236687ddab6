"""Words over time: windows that agree are one utterance.

Windows overlap, and each answers for its middle: for the time that is nearer to its middle than to another window's.
The first and the last answer for all up to their ends.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lipprep.train.predict import WindowReading, Words


@dataclass(frozen=True)
class Utterance:
    """A word from `start` to `stop`, seconds; None where the reader abstains.

    `words` are those of its surest window, the likeliest first: neighbours see the word less whole than it does.
    """

    word: str | None
    start: float
    stop: float
    words: Words

    @property
    def confidence(self) -> float:
        """The probability of the likeliest word."""
        return self.words[0][1]


def spans(windows: Sequence[WindowReading], *, fps: float) -> list[tuple[float, float]]:
    """The time (from, to) in seconds that each window of a face answers for."""
    starts, stops = [w.start for w in windows], [w.stop for w in windows]
    for n, (a, b) in enumerate(itertools.pairwise(windows)):
        if b.start < a.stop:
            stops[n] = starts[n + 1] = (a.start + a.stop + b.start + b.stop) / 4
    return [(start / fps, stop / fps) for start, stop in zip(starts, stops, strict=True)]


def utterances(windows: Sequence[WindowReading], *, fps: float) -> list[Utterance]:
    """The windows of one face, in order, with neighbours that agree made one."""
    merged: list[Utterance] = []
    for window, (start, stop) in zip(windows, spans(windows, fps=fps), strict=True):
        one = Utterance(window.words[0][0] if window.known else None, start, stop, window.words)
        before = merged[-1] if merged else None
        if before is not None and before.word == one.word and before.stop == one.start:
            surest = max(before, one, key=lambda u: u.confidence)
            merged[-1] = Utterance(one.word, before.start, one.stop, surest.words)
        else:
            merged.append(one)
    return merged
