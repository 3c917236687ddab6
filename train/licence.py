"""Whether the agreement by which the BBC gives LRW binds weights: for research only, and not to be passed on.

It binds those of networks that began with such weights, or learnt from what they answer, too.
"""

from collections.abc import Iterable, Mapping
from importlib import resources

from lipprep.train.checkpoint import Checkpoint


def is_lrw(labels: Iterable[str], names: Iterable[str] = ()) -> bool:
    """Whether a data set is LRW or a part of it: all of its words are LRW's (of two or more), or a name says so."""
    words = (resources.files("lipprep.stages") / "data" / "lrw_words.txt").read_text(encoding="utf-8").split()
    ours = {label.upper() for label in labels}
    return (len(ours) > 1 and ours <= set(words)) or any("lrw" in name.lower() for name in names)


def is_of_lrw(checkpoint: Checkpoint, names: Iterable[str] = ()) -> bool:
    """Whether a checkpoint's weights come from LRW, by its words, the `names` of its data set, or its origin.

    The origin is the name of the file that was imported, or what its run knew of the weights that it learnt from.
    """
    resolved = checkpoint.config.get("resolved")
    if not isinstance(resolved, Mapping):
        resolved = {}
    return resolved.get("of_lrw") is True or is_lrw(checkpoint.labels, [*names, str(resolved.get("imported", ""))])
