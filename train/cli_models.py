"""The command models. What is slow to import is imported when it runs."""

import dataclasses
import json

import click

from lipprep.command import Command
from lipprep.train.cli import DEVICE


@click.command(cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--measure", is_flag=True, help="Time each network, too: evaluation in fp32, 8 clips at once.")
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@click.option("--markdown", is_flag=True, help="Print the table as it stands in docs/models.md.")
def models(names: tuple[str, ...], measure: bool, device: str, as_json: bool, markdown: bool) -> None:
    """List every network that comes with lipprep, with its size, its cost and its published accuracy.

    NAME is a recipe, or FILE.yaml; all that `lipprep recipes` lists by default. Multiply-adds are those of a clip of 29
    frames, in evaluation, and as published: with the frames that the published code computes and cuts off.
    Accuracies on LRW are their authors'. --device is where --measure times.

    \b
    Examples:
      lipprep models
      lipprep models lrw_resnet18_mstcn lrw_snv1x_tcn1x --measure --device cpu
      lipprep models --json
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two forms of one table: give one or the other.")
    from tqdm import tqdm

    from lipprep.train import table
    from lipprep.train.config import recipes
    from lipprep.train.device import choose_device

    names = names or tuple(recipes())
    timed_on = choose_device(device) if measure else None
    # On a terminal alone: it takes seconds, and minutes where it measures.
    waiting = tqdm(table.rows(names, device=timed_on), total=len(names), unit="network", leave=False, disable=None)
    found = list(waiting)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
    else:
        click.echo("\n".join(table.as_markdown(found) if markdown else table.as_text(found)))
