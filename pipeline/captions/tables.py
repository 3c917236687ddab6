"""Timings in lines of fields: GRID's .align, and CTM."""

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.timing import Timing, seconds, shown, timing

ALIGN_UNITS = 25_000  # a second: 1000 a frame


def parse_align(text: str) -> list[Timing]:
    """`start end word` in units of 1/25000 s (GRID). Raises ValueError, naming the line, for another."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            first, last, word = line.split()
            found.append(timing(word, int(first) / ALIGN_UNITS, int(last) / ALIGN_UNITS, where=f"line {number}"))
        except (ValueError, OverflowError):
            raise UserError(f"line {number}: {shown(line)} is not `start end word`") from None
    return found


def parse_ctm(text: str) -> dict[str, list[Timing]]:
    """`file channel start duration word [confidence]`: the words of each file. Lines that begin with ;; are comments.

    Raises ValueError, naming the line, for another.
    """
    found: dict[str, list[Timing]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split()
        if not fields or line.lstrip().startswith(";;"):
            continue
        where = f"line {number}"
        if len(fields) < 5:
            raise UserError(f"{where}: {shown(line)} is not `file channel start duration word`")
        name, _, start, duration, word = fields[:5]
        if word in ("<ALT_BEGIN>", "<ALT>", "<ALT_END>") or start == "*":
            raise UserError(f"{where}: alternatives are not read: keep one of them")
        begins = seconds(start, where)
        sure = fields[5] if len(fields) > 5 and fields[5] != "NA" else None
        ends = begins + seconds(duration, where)
        found.setdefault(name, []).append(timing(word, begins, ends, where=where, confidence=sure))
    return found
