"""The command import-checkpoint. What is slow to import is imported when it runs."""

from pathlib import Path

import click

from lipprep.command import Command, LocalFolder


@click.command("import-checkpoint", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--run", "run", metavar="RUN", required=True, type=LocalFolder(), help="The run folder to write.")
@click.option(
    "--config",
    metavar="NAME|FILE",
    help="Its network: a recipe's name, a recipe file, or the configuration file that it was trained with. "
    "Default: the recipe whose network has these shapes.",
)
@click.option(
    "--labels",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Its words, one a line, in the order of its classifier. Default, for 500: LRW's.",
)
@click.option("--profile", metavar="NAME", help="The alignment of the crops it was trained on. Default: the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one line of JSON.")
def import_checkpoint(
    file: Path, run: Path, config: str | None, labels: Path | None, profile: str | None, as_json: bool
) -> None:
    """Make a run of a published checkpoint, to evaluate, predict, embed or export, or to begin a training with
    (init_from=RUN).

    Reads mpc001's (.pth, .pth.tar), those of its fork lipreading-snu (ckpt-step-N), VIPL's and euan's. Nothing in the
    file is executed. What does not fit the network is listed key by key.

    \b
    Examples:
      lipprep import-checkpoint lrw_resnet18_mstcn_adamw_s3.pth.tar -o runs/mstcn
      lipprep import-checkpoint ckpt.best.pth -o runs/mine --config my_config.json --labels words.txt --profile lrw2022
      lipprep evaluate runs/mstcn --shards shards/
    """
    from lipprep.train import importing

    imported = importing.import_checkpoint(file, run, config=config, labels=labels, profile=profile)
    click.echo(importing.as_json(imported) if as_json else "\n".join(importing.told(imported)))
