"""Whether the agreement by which the BBC gives LRW binds weights: for research only, and not to be passed on.

It binds those of networks that began with such weights, or learnt from what they answer, too.
"""

from collections.abc import Iterable, Mapping

from lipprep.stages.lrw import is_lrw
from lipprep.train.checkpoint import Checkpoint


def is_of_lrw(checkpoint: Checkpoint, names: Iterable[str] = ()) -> bool:
    """Whether a checkpoint's weights come from LRW, by its words, the `names` of its data set, or its origin.

    The origin is the name of the file that was imported, or what its run knew of the weights that it learnt from.
    """
    resolved = checkpoint.config.get("resolved")
    if not isinstance(resolved, Mapping):
        resolved = {}
    return resolved.get("of_lrw") is True or is_lrw(checkpoint.labels, [*names, str(resolved.get("imported", ""))])
