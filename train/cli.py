"""The commands train and recipes. What is slow to import is imported when a command runs."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import click

from lipprep.command import INTERRUPTED, Command, LocalFolder, Place, log_to
from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath


class Size(click.ParamType):
    """A number of bytes."""

    name = "size"

    def convert(self, value: str, param: object, ctx: object) -> int:
        from lipprep.train.cache import parse_size

        try:
            return parse_size(value)
        except UserError as error:
            self.fail(str(error))


_SHARDS = {
    "metavar": "DIR|URL",
    "type": Place(),
    "help": "Folder with the shards and their index.json, or its URL: s3://BUCKET/FOLDER.",
}
SHARDS = click.option("--shards", required=True, **_SHARDS)
CACHE = click.option(
    "--cache",
    metavar="DIR",
    type=LocalFolder(),
    help="Shards of a URL: where what was read is kept for the next epoch. Default: ~/.cache/lipprep.",
)
CACHE_SIZE = click.option(
    "--cache-size",
    metavar="SIZE",
    type=Size(),
    help="How much is kept, as in 20GB. Default: 50GB, or less: a tenth of the disk, or half of what is free there.",
)
CHECKPOINT = click.option(
    "--checkpoint",
    required=True,
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="A run folder (its best.pt) or a checkpoint file.",
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU if any."
)


@click.command(cls=Command)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--shards", **_SHARDS)
@CACHE
@CACHE_SIZE
@click.option("--recipe", metavar="NAME", help="A recipe's name, or FILE.yaml. Default: lrw_resnet18_mstcn_prelu.")
@click.option(
    "--run",
    "--run-dir",  # torchrun takes --run for its own --run-path
    "run",
    metavar="DIR",
    type=LocalFolder(),
    help="Where config, metrics and checkpoints go. Default: runs/DATE-RECIPE.",
)
@DEVICE
@click.option("--resume", metavar="auto|PATH", help="Go on where --run stopped, or from a run or a checkpoint file.")
@click.option("--overfit", metavar="N", type=click.IntRange(1), help="Learn N clips by heart, to see that it can.")
@click.option("--dry-run", is_flag=True, help="One batch through everything: print its times and memory, keep nothing.")
@click.option("--skip-corrupt", is_flag=True, help="Leave out clips that cannot be read: up to 0.1 % of them, or one.")
@click.option("--other-shards", is_flag=True, help="Resume although these are not the shards that the run began with.")
@click.option("--trace", is_flag=True, help="Write RUN/trace.json, for Perfetto: what a step spends its time on.")
@click.option("--show-config", is_flag=True, help="Print the settings, as YAML that --recipe reads, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one line of JSON, the last one.")
def train(
    overrides: tuple[str, ...],
    shards: Path | RemotePath | None,
    cache: Path | None,
    cache_size: int | None,
    recipe: str | None,
    run: Path | None,
    device: str,
    resume: str | None,
    overfit: int | None,
    dry_run: bool,
    skip_corrupt: bool,
    other_shards: bool,
    trace: bool,
    show_config: bool,
    as_json: bool,
) -> None:
    """Train a lip reader from shards.

    KEY=VALUE replaces settings of the recipe; --show-config lists them all. Training with
    --resume auto goes on after a crash or Ctrl-C as if nothing had happened, and starts where there is
    nothing to go on from.

    \b
    Examples:
      lipprep train --shards shards/
      lipprep train --shards shards/ --recipe compact --run runs/small epochs=20 lr=1e-3
      lipprep train --shards shards/ --run runs/small --resume auto
      lipprep train --shards shards/ --dry-run
      lipprep train --recipe compact lr=1e-3 --show-config > mine.yaml
      lipprep train --shards s3://bucket/shards --cache-size 20GB
      torchrun --nproc-per-node 8 -m lipprep.train --shards shards/ --run-dir runs/large batch_size=256
    """
    if overfit is not None:
        from lipprep.train.config import overfitting

        overrides = (*overfitting(overfit), *overrides)
    if show_config:
        from lipprep.train.config import config_text, load_config
        from lipprep.train.run import CONFIG, open_run

        if resume is None and recipe is None and run is not None and (run / CONFIG).is_file():
            config = load_config(run / CONFIG, overrides)
        else:
            config = open_run(run if resume else None, recipe=recipe, overrides=overrides, resume=resume)[1]
        import torch

        from lipprep.train.device import new_model

        with torch.device("meta"):  # is there such a network?
            new_model(config.model, num_classes=2)
        click.echo(config_text(config), nl=False)
        return
    if shards is None:
        raise click.UsageError("Missing option '--shards': name the folder with the shards, or its URL.")
    ask(shards)
    from lipprep.train.loop import train as run_training
    from lipprep.train.ranks import join
    from lipprep.train.run import open_run

    kept = {"cache": cache, "cache_size": cache_size, "skip_corrupt": skip_corrupt, "other_shards": other_shards}
    if dry_run:
        if trace:
            raise click.UsageError("--dry-run takes too few steps for a --trace: give one or the other.")
        from lipprep.train.rehearse import rehearse, told

        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise click.UsageError(
                "--dry-run is for one process. To see what one of W takes, run it without torchrun, and with a W-th of "
                "the batch_size."
            )
        _, config, checkpoint = open_run(run if resume else None, recipe=recipe, overrides=overrides, resume=resume)
        rehearsal = rehearse(config, shards=shards, device=device, resume=checkpoint, **kept)
        click.echo(json.dumps(dataclasses.asdict(rehearsal)) if as_json else "\n".join(told(rehearsal)))
        return
    with join(device) as ranks:
        folder, config, checkpoint = ranks.of_main(
            lambda: open_run(run, recipe=recipe, overrides=overrides, resume=resume)
        )
        log_to(folder)
        if resume == "auto" and checkpoint is None and ranks.main:
            click.echo(f"nothing to resume in {folder}: starting from the beginning")
        try:
            kept |= {"device": device, "trace": trace, "ranks": ranks}
            outcome = run_training(config, shards=shards, run=folder, resume=checkpoint, **kept)
        except KeyboardInterrupt:
            if ranks.main:
                again = f"lipprep train --shards {shards} --run {folder} --resume auto"
                click.echo(f"\nInterrupted. Go on with: {again}", err=True)
            sys.exit(INTERRUPTED)
    if not ranks.main:
        return
    if as_json:
        files = [str(path) for path in outcome.files]
        plain = {"steps": outcome.steps, "best_val_top1": outcome.best, "seconds": outcome.seconds}
        click.echo(json.dumps({**plain, "ended": outcome.ended, "files": files}))
        return
    click.echo(f"trained to step {outcome.steps} in {outcome.seconds / 60:.1f} minutes")
    if outcome.ended == "max_time":
        click.echo(f"max_time is over; to go on: lipprep train --shards {shards} --run {folder} --resume auto")
    if config.overfit:
        learnt = "they are learnt" if outcome.ended == "learned" else "they are not learnt: look at lr, data and labels"
        click.echo(f"{outcome.validated} clips by heart: {learnt}")
    if outcome.best is not None:
        click.echo(f"best validation accuracy: {100 * outcome.best:.1f} %")
    for path in outcome.files:
        click.echo(path)


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print every setting of each recipe as JSON.")
def recipes(as_json: bool) -> None:
    """List the recipes to train with, and what each is.

    \b
    Example:
      lipprep recipes
      lipprep train --shards shards/ --recipe compact
    """
    from lipprep.train import config

    if as_json:
        known = {name: config.as_plain(config.load_recipe(name)) for name in config.recipes()}
        click.echo(
            json.dumps({name: {"about": config.about(name), **plain} for name, plain in known.items()}, indent=1)
        )
        return
    for name in config.recipes():
        click.echo(f"{name}{' (default)' if name == config.DEFAULT_RECIPE else ''}")
        click.echo(click.wrap_text(config.about(name), 100, "  ", "  "))


def ask(shards: Path | RemotePath) -> None:
    """Raise RemoteError where the store of `shards` is at fault: told before torch is imported, which takes seconds."""
    if isinstance(shards, RemotePath):
        (shards / "index.json").is_file()
