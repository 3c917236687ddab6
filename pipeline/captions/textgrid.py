"""Praat's TextGrid, in its long and its short form."""

import re

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.timing import Timing, seconds, shown, spread, timing

_WORDS = ("words", "word")
_INTERVALS = "IntervalTier"
# As Praat reads both forms: what counts are texts, flags, and numbers that stand by themselves. The rest is for people.
_TOKEN = re.compile(r'"(?:[^"]++|"")*+"|![^\n]*|[^\s"!]+')
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def parse_textgrid(text: str, tier: str | None = None) -> list[Timing]:
    """The words of a tier: of that called `tier`; else of those called words (or `NAME - words`, of many speakers);
    else of the first of intervals. Where an interval has several words they are spread over it, and rough.

    Raises ValueError, naming the line, for what is no TextGrid, and for a tier that is not there.
    """
    tokens = _Tokens(text)
    kinds = tokens.text(), tokens.text()
    if kinds[0] not in ("ooTextFile", "ooTextFile short") or kinds[1] != "TextGrid":
        raise UserError(f"line {tokens.line}: {shown(kinds)} is no TextGrid")
    tokens.number(), tokens.number()
    if tokens.flag() != "<exists>":
        return []
    tiers: dict[str, list[Timing]] = {}
    for n in range(tokens.count()):
        kind, name = tokens.text(), tokens.text()
        tokens.number(), tokens.number()
        if kind not in (_INTERVALS, "TextTier"):
            raise UserError(f"line {tokens.line}: {shown(kind)} is no kind of tier")
        marks = [tokens.interval() if kind == _INTERVALS else tokens.point() for _ in range(tokens.count())]
        if kind == _INTERVALS:  # points have no duration, and are no words
            tiers[name if name not in tiers else f"{name} ({n + 1})"] = [t for mark in marks for t in interval(*mark)]
    return choose_tiers(tiers, tier)


def interval(start: float, end: float, text: str, where: str) -> list[Timing]:
    """The words of an interval of a tier: one has its times, several are spread over it. An empty one is silence."""
    if len(text.split()) > 1:
        timing(text, start, end, where=where)
        return spread(text, start, end)
    return [timing(text.strip(), start, end, where=where)]


def choose_tiers(tiers: dict[str, list[Timing]], tier: str | None) -> list[Timing]:
    """The words of the tiers that are meant, see `parse_textgrid`. Raises ValueError where there are none."""
    names = ", ".join(map(shown, tiers))
    if tier is not None:
        if tier not in tiers:
            raise UserError(f"it has no tier {shown(tier)} of intervals (it has: {names or 'none'})")
        return tiers[tier]
    meant = [n for n in tiers if n.lower() in _WORDS or n.lower().endswith(tuple(f" - {w}" for w in _WORDS))]
    if not tiers:
        raise UserError("it has no tier of intervals")
    return [t for n in meant or [next(iter(tiers))] for t in tiers[n]]


class _Tokens:
    """What counts in a TextGrid, in order. What is asked for and not there raises ValueError with its line."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found = _TOKEN.finditer(text)
        self._counted, self.line = 0, 1

    def _next(self) -> str:
        for found in self._found:
            token = found[0]
            if token[0] == '"' or (token[0] == "<" and token[-1] == ">") or _NUMBER.fullmatch(token):
                self.line += self._text.count("\n", self._counted, found.start())
                self._counted = found.start()
                return token
        self.line += self._text.count("\n", self._counted)
        raise UserError(f"line {self.line}: it ends too early")

    def text(self) -> str:
        token = self._next()
        if token[0] != '"' or len(token) < 2:
            raise UserError(f"line {self.line}: {shown(token)} is no text in quotes")
        return token[1:-1].replace('""', '"')

    def flag(self) -> str:
        return self._next()

    def number(self) -> float:
        token = self._next()
        return seconds(token, f"line {self.line}")

    def count(self) -> int:
        token = self._next()
        if not token.isdecimal() or len(token) > 9:
            raise UserError(f"line {self.line}: {shown(token)} is no number of tiers or intervals")
        return int(token)

    def interval(self) -> tuple[float, float, str, str]:
        return self.number(), self.number(), self.text(), f"line {self.line}"

    def point(self) -> tuple[float, str]:
        return self.number(), self.text()
