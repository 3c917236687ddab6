"""How well the plan of an epoch mixes: how often two clips of one batch meet again in the next epoch.

Prints the table of docs/training.md: python benchmarks/mixing.py
"""

import click
import numpy as np

from lipprep.train.epoch import BLOCK, training_plan

CHUNK = 512  # clips a shard


def mixing(clips: int, batch_size: int, *, seed: int = 1) -> tuple[float, float]:
    """Of the pairs in a batch, the share that is in one batch in the next epoch, too, and the share of one block."""
    counts = [CHUNK] * (clips // CHUNK) + [clips % CHUNK] * bool(clips % CHUNK)
    starts = np.cumsum([0, *counts])
    first, second = (training_plan(counts, seed=seed, epoch=epoch, batch_size=batch_size) for epoch in (0, 1))
    batch_of = np.full(clips, -1)
    for number, batch in enumerate(second):
        batch_of[starts[batch[:, 0]] + batch[:, 1]] = number
    again = neighbours = pairs = 0
    for batch in first:
        met = batch_of[starts[batch[:, 0]] + batch[:, 1]]
        again += _pairs(met[met >= 0])
        neighbours += _pairs(batch[:, 0] * CHUNK + batch[:, 1] // BLOCK)
        pairs += len(batch) * (len(batch) - 1) // 2
    return again / pairs, neighbours / pairs


def _pairs(values: np.ndarray) -> int:
    _, counts = np.unique(values, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


@click.command()
def main() -> None:
    """Print, for some sizes, how often two clips meet again, beside a shuffle of everything."""
    click.echo("clips    batch  meet again  full shuffle  mates again  full    of one block")
    for clips, batch_size in ((488_766, 32), (488_766, 256), (50_000, 32), (4_630, 32)):
        again, neighbours = mixing(clips, batch_size)
        full, mates = (batch_size - 1) / (clips - 1), batch_size - 1
        click.echo(
            f"{clips:7} {batch_size:6} {again:11.3%} {full:13.4%} {again * mates:12.3f} {full * mates:7.3f} "
            f"{neighbours:13.2%}"
        )


if __name__ == "__main__":
    main()
