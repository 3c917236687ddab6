"""Subtitles: WebVTT, with times word by word or without, and SRT."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import msgspec

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.timing import Timing, shown, spoken, spread

_STAMP = r"(?:[0-9]{1,4}:)?[0-9]{1,2}:[0-9]{1,2}[.,][0-9]{1,6}"
_WHOLE_STAMP = re.compile(_STAMP)
_INLINE = re.compile(f"<({_STAMP})>")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
_LINES = 8  # that stand on a screen at once, at most
_ADJACENT = 0.1  # seconds between cues of which one still shows a line of the other


@dataclass(frozen=True)
class Cue:
    """A text on the screen from `start` to `end` seconds; `number` is the line that its times stand in."""

    number: int
    start: float
    end: float
    lines: list[str] = field(default_factory=list)


def parse_vtt(text: str) -> list[Timing]:
    """The words of WebVTT. Raises ValueError, naming the line, for what is none.

    Times inside a text (`<00:00:01.000>`, as automatic captions have) are those of the words behind them; a word ends
    where the next one starts, the last one with its cue. A line that stands on the screen while the next one comes is
    in two cues or three, and counts once. Without such times words are spread over their cue, and rough.
    """
    if text.split("\n", 1)[0].split(maxsplit=1)[:1] != ["WEBVTT"]:
        raise UserError("line 1: it does not begin with WEBVTT")
    return _words(text, blank_ends=True)


def parse_srt(text: str) -> list[Timing]:
    """The words of SRT, spread over their cues in proportion to their letters, and rough.

    Raises ValueError, naming the line, for what is none.
    """
    found = _words(text, blank_ends=False)
    if not found and "-->" not in text:
        raise UserError("line 1: no line has times (00:00:01,000 --> 00:00:02,000)")
    return found


def stamp(text: str) -> float | None:
    """Seconds of `hh:mm:ss.mmm` or `mm:ss.mmm`, with a point or a comma; None for another text.

    >>> stamp("01:00:02,500")
    3602.5
    """
    if not _WHOLE_STAMP.fullmatch(text):
        return None
    hours, minutes, rest = ("0:" + text if text.count(":") == 1 else text).split(":")
    whole, fraction = re.split("[.,]", rest)
    if int(minutes) > 59 or int(whole) > 59:
        return None
    return int(hours) * 3600 + int(minutes) * 60 + int(whole) + int(fraction) / 10 ** len(fraction)


def _words(text: str, *, blank_ends: bool) -> list[Timing]:
    exact = _INLINE.search(text) is not None
    found: list[Timing] = []
    before: list[str] = []
    ended = -1.0
    for cue in _cues(text, blank_ends=blank_ends):
        plain = [_plain(line).strip() for line in cue.lines]
        new = _carried(before, plain) if cue.start <= ended + _ADJACENT else 0
        found += _cue_words("\n".join(cue.lines[new:]), cue, exact=exact)
        before, ended = plain, cue.end
    # A line may stand on while the next one is spoken: its last word does not last as long.
    return [_until(word, later) if exact else word for word, later in zip_longest(found, found[1:])]


def _until(word: Timing, later: Timing | None) -> Timing:
    """A word that ends where the next one starts at the latest."""
    if later is None or not word.start < later.start < word.end:
        return word
    return msgspec.structs.replace(word, end=later.start)


def _cues(text: str, *, blank_ends: bool) -> Iterator[Cue]:
    """The cues. `blank_ends`: with an empty line; else with the next one's times, before which its number stands."""
    cue: Cue | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if "-->" in line:
            if cue is not None:
                yield _closed(cue, numbered=True)
            cue = Cue(number, *_times(line, number))
        elif cue is not None and not line and blank_ends:
            yield _closed(cue, numbered=False)
            cue = None
        elif cue is not None:
            cue.lines.append(line)
    if cue is not None:
        yield _closed(cue, numbered=False)


def _closed(cue: Cue, *, numbered: bool) -> Cue:
    lines = cue.lines
    if numbered and lines and lines[-1].strip().isdecimal():  # the next cue's
        lines.pop()
    lines[:] = [line for line in lines if _plain(line).strip()]
    return cue


def _times(line: str, number: int) -> tuple[float, float]:
    left, _, right = line.partition("-->")
    start, end = stamp(left.strip()), stamp((right.split(maxsplit=1) or [""])[0])
    if start is None or end is None:
        raise UserError(f"line {number}: {shown(line)} is not of the form 00:00:01.000 --> 00:00:02.000")
    if end < start:
        raise UserError(f"line {number}: {shown(line)} ends before it starts")
    return start, end


def _plain(line: str) -> str:
    return html.unescape(_TAG.sub("", line))


def _carried(before: list[str], lines: list[str]) -> int:
    """How many of a cue's first lines are the last ones of the cue before."""
    most = min(len(before), len(lines), _LINES)
    return next((n for n in range(most, 0, -1) if before[-n:] == lines[:n]), 0)


def _cue_words(text: str, cue: Cue, *, exact: bool) -> list[Timing]:
    """The words of a cue's new text. `exact`: the file has times word by word, so that a word by itself has its own."""
    pieces = _INLINE.split(text)
    times = [cue.start]
    for inner in pieces[1::2]:
        at = stamp(inner)
        if at is None:
            raise UserError(f"line {cue.number}: the cue has the time {shown(inner)}, which is none")
        # Some writers' times leave their cue; what that leaves of a word is too short to be kept.
        times.append(min(max(at, times[-1]), cue.end))
    times.append(cue.end)
    found: list[Timing] = []
    for n, piece in enumerate(pieces[::2]):
        plain = _plain(piece)
        found += spread(plain, times[n], times[n + 1], rough=not (exact and len(spoken(plain)) == 1))
    return found
