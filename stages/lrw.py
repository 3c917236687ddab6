"""Whether a data set is LRW, which the BBC gives by an agreement: for research only, and not to be passed on."""

from collections.abc import Iterable
from importlib import resources


def is_lrw(labels: Iterable[str], names: Iterable[str] = ()) -> bool:
    """Whether a data set is LRW or a part of it: all of its words are LRW's (of two or more), or a name says so."""
    words = (resources.files("lipprep.stages") / "data" / "lrw_words.txt").read_text(encoding="utf-8").split()
    ours = {label.upper() for label in labels}
    return (len(ours) > 1 and ours <= set(words)) or any("lrw" in name.lower() for name in names)
