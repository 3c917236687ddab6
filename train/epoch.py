"""The epoch as a plan: which samples make up which batch, known before anything is read.

A place is a pair (shard, position in the shard). Blocks of neighbouring samples are permuted over all
shards, then samples are permuted inside a window of blocks: a shuffle that needs no buffer at run time, and
whose reads stay near each other while a window lasts. Because the plan is a list, training goes on at batch
k by starting there, and any number of processes may read parts of it without changing it.
"""

from collections.abc import Sequence

import numpy as np

BLOCK = 16  # neighbouring samples: about 1 MB of JPEG strips
WINDOW = 64  # blocks that are mixed with one another: 1,024 samples


def places(counts: Sequence[int]) -> np.ndarray:
    """All places of shards with `counts` samples, in order, (samples, 2) int64."""
    counts = np.asarray(counts, np.int64)
    # starts: (shards,), the number of samples before each shard
    starts = np.cumsum(counts) - counts
    shard = np.repeat(np.arange(len(counts)), counts)
    return np.stack([shard, np.arange(len(shard)) - starts[shard]], axis=1)


def training_plan(counts: Sequence[int], *, seed: int, epoch: int, batch_size: int, parts: int = 1) -> list[np.ndarray]:
    """The batches of one epoch of training, each (batch_size, 2) int64 of places.

    A pure function of its arguments. The samples that fill no whole batch are left out, others in every
    epoch; where there are fewer samples than one batch takes, all of them make one smaller batch, but for those that
    would not go into `parts` equal ones.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    ordered = places(counts)
    if len(ordered) < batch_size:
        few = random.permutation(ordered)[: len(ordered) - len(ordered) % parts]
        return [few] if len(few) else []
    # block: (samples,), the block a sample belongs to; none reaches over the end of a shard
    blocks_before = np.cumsum([0, *(-(-np.asarray(counts, np.int64) // BLOCK))])
    block = blocks_before[ordered[:, 0]] + ordered[:, 1] // BLOCK
    window = random.permutation(blocks_before[-1])[block] // WINDOW
    shuffled = ordered[np.lexsort((random.random(len(ordered)), window))]
    whole = len(shuffled) - len(shuffled) % batch_size
    return np.split(shuffled[:whole], whole // batch_size)


def evaluation_plan(ordered: np.ndarray, *, batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """The places (samples, 2) in order, in batches of `batch_size` and a last one of what remains; a rank's part."""
    ordered = rank_places(ordered, rank=rank, world=world)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def rank_rows(count: int, *, rank: int, world: int) -> np.ndarray:
    """The rows of a global batch of `count` clips that a rank takes: slice `rank` of `world` equal ones."""
    share = count // world
    return np.arange(rank * share, (rank + 1) * share)


def rank_places(ordered: np.ndarray, *, rank: int, world: int) -> np.ndarray:
    """Of the places (samples, 2) those that a rank evaluates, (ceil(samples / world), 2): as many on each.

    The last one is repeated where there are too few. What the ranks say of row i, one rank after another, is of
    samples `world * i`, `world * i + 1` and so on; what is beyond the last one counts for nothing.
    """
    short = -len(ordered) % world
    return np.concatenate([ordered, ordered[len(ordered) - 1 :].repeat(short, axis=0)])[rank::world]
