"""When a word is said, as a file of timings has it."""

import re
from itertools import accumulate, pairwise

import msgspec

from lipprep.io.errors import UserError
from lipprep.stages.untrusted import printable

MAX_SECONDS = 1e6  # eleven days: more is no time in a video
# What is one word to a reader of subtitles: a remark in brackets ([heavy music]) is one, of which nothing is said.
_TOKEN = re.compile(r"\[[^\][]*\]|\([^()]*\)|[^\s(\[]+|[(\[]")


class Timing(msgspec.Struct, frozen=True, gc=False):
    """A word with its start and end in seconds; both None where the aligner did not find it.

    `rough`: the times were guessed from those of a longer text. `confidence` is in 0..1, None where the format has
    none.
    """

    word: str
    start: float | None
    end: float | None
    rough: bool = False
    confidence: float | None = None


def timing(word: object, start: object, end: object, *, where: str, confidence: object = None) -> Timing:
    """A word as a file has it, checked. Raises ValueError, beginning with `where`, for times that none can be."""
    if not isinstance(word, str):
        raise UserError(f"{where}: the word is {shown(word)}, no text")
    begins, ends = seconds(start, where), seconds(end, where)
    if ends < begins:
        raise UserError(f"{where}: {shown(word)} ends at {ends:g} s, before it starts at {begins:g} s")
    return Timing(word, begins, ends, confidence=None if confidence is None else _share(confidence, where))


def seconds(value: object, where: str) -> float:
    """A time in seconds of a number or its text. Raises ValueError, beginning with `where`, for what is none."""
    found = _number(value)
    if found is None or not 0 <= found <= MAX_SECONDS:
        raise UserError(f"{where}: {shown(value)} is no time in seconds")
    return found


def _share(value: object, where: str) -> float:
    found = _number(value)
    if found is None or not 0 <= found <= 1:
        raise UserError(f"{where}: {shown(value)} is no confidence, from 0 to 1")
    return found


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and "_" in value):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def shown(value: object) -> str:
    """A value of a file for a message: short, on one line."""
    return printable(repr(value)[:60])


def spread(text: str, start: float, end: float, *, rough: bool = True) -> list[Timing]:
    """The words of a text that is said from `start` to `end` seconds, each with time in proportion to its letters.

    >>> [(t.word, t.end) for t in spread("so, we go", 0.0, 3.0)]
    [('so,', 1.0), ('we', 2.0), ('go', 3.0)]
    """
    words = spoken(text)
    letters = list(accumulate(sum(c.isalnum() for c in word) for word in words))
    # The last edge is the end itself, not what floats make of it.
    edges = [start, *(start + (end - start) * before / letters[-1] for before in letters[:-1]), end]
    return [Timing(word, *times, rough) for word, times in zip(words, pairwise(edges), strict=False)]


def spoken(text: str) -> list[str]:
    """The words of a text; what is in brackets is one, and what has no letter or digit is none."""
    return [token for token in _TOKEN.findall(text) if any(c.isalnum() for c in token)]
