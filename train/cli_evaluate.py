"""The command evaluate. What is slow to import is imported when it runs."""

import json
from pathlib import Path

import click

from lipprep.command import Command
from lipprep.stages.remote import RemotePath
from lipprep.train.cli import CACHE, CACHE_SIZE, DEVICE, SHARDS, ask


@click.command(cls=Command, resumes=False)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@SHARDS
@CACHE
@CACHE_SIZE
@click.option("--split", default="test", show_default=True, help="train, val, test or unseen.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Fit a temperature and a threshold to abstain by on this split, and store them in the checkpoint: of a run "
    "that was imported, is older, or is to read other videos than it was trained on.",
)
@click.option(
    "--groups",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Groups of words, one a line: also report accuracy where the word's group is known.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Default: RUN/evaluate-SPLIT, of several RUN/evaluate-SPLIT-ensemble in the first.",
)
@DEVICE
@click.option("--batch-size", type=click.IntRange(1), help="Clips at once. Default: the run's batch size.")
@click.option("--skip-corrupt", is_flag=True, help="Leave out clips that cannot be read: up to 0.1 % of them, or one.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def evaluate(
    runs: tuple[Path, ...],
    shards: Path | RemotePath,
    cache: Path | None,
    cache_size: int | None,
    split: str,
    calibrate: bool,
    groups: Path | None,
    out: Path | None,
    device: str,
    batch_size: int | None,
    skip_corrupt: bool,
    as_json: bool,
) -> None:
    """Measure a trained lip reader on a split of the shards.

    RUN is a run folder (its best.pt) or a checkpoint file. Prints top-1 with its 95 % interval, top-5 and how
    far confidence is from accuracy, and writes a table of the words and the confusion matrix (CSV and PNG).
    Several RUNs are an ensemble: the mean of their probabilities.

    \b
    Examples:
      lipprep evaluate runs/small --shards shards/
      lipprep evaluate runs/small --shards shards/ --split unseen --groups groups.txt --json
      lipprep evaluate runs/imported --shards shards/ --split val --calibrate
      lipprep evaluate runs/student-1 runs/student-2 runs/student-3 --shards shards/
    """
    ask(shards)
    from lipprep.train.evaluate import evaluate as measure

    kept = {"cache": cache, "cache_size": cache_size, "skip_corrupt": skip_corrupt}
    where = {"groups": groups, "out": out, "device": device, "batch_size": batch_size}
    results = measure(*runs, shards=shards, split=split, calibrate=calibrate, **where, **kept)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    if len(runs) == 1:
        what = f"{results['checkpoint']}, step {results['step']}"
    else:
        what = f"ensemble of {len(runs)}"
        for member in results["members"]:
            top1 = _percent(member["top1"], member["top1_interval95"])
            if "without_boundary" in member:
                top1 += f", word boundaries untold {_percent(member['without_boundary']['top1'])}"
            click.echo(f"{member['checkpoint']}, step {member['step']}: top-1 {top1}")
    click.echo(f"{what}; split {split}, {results['words']} words")
    click.echo(f"top-1 {_percent(results['top1'], results['top1_interval95'])}, {results['clips']} clips")
    click.echo(f"top-5 {_percent(results['top5'])}")
    if calibrate:
        click.echo(f"calibrated on split {split}, and stored in {results['checkpoint']}")
    if "without_boundary" not in results:
        click.echo("\n".join(_confidence(results, results)))
    else:
        untold, known = results["without_boundary"], results["boundaries_known"]
        click.echo(
            f"these with word boundaries, known for {known} of {results['clips']} clips; without, as in the wild:"
        )
        click.echo(f"top-1 {_percent(untold['top1'], untold['top1_interval95'])}")
        click.echo(f"top-5 {_percent(untold['top5'])}")
        click.echo("\n".join(_confidence(untold, results)))
        if groups and untold["all_groups"]:
            group = untold["all_groups"]
            click.echo(f"within the word's group {_percent(group['accuracy'], group['interval95'])}")
        click.echo("The tables below are of the answers with word boundaries.")
    if results["damaged"]:
        click.echo(f"{results['damaged']} clips are damaged, and not counted")
    if missing := results["not_in_shards"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(missing.items()))
        click.echo(f"{sum(missing.values())} clips of the split are in no shard, and not counted: {kinds}")
    if groups:
        click.echo("within the word's group:")
        overall = results["all_groups"]
        rows = [(" ".join(row["words"]), row) for row in results["groups"]]
        for name, row in [*rows, ("all groups", overall)] if overall else []:
            figures = f"{_percent(row['accuracy'], row['interval95'])}, {row['clips']} clips"
            click.echo(f"  {name}: {figures}, chance {_percent(row['chance'])}")
    for path in results["files"]:
        click.echo(path)


def _confidence(figures: dict, about: dict) -> list[str]:
    """What there is to say of the confidence of a reader, or of an ensemble, which `about` is of."""
    error = f"calibration error (ECE) {_percent(figures['ece'])}"
    if "ece_calibrated" not in figures:
        return [f"{error}, not calibrated: --split val --calibrate does that{', by member' * ('members' in about)}"]
    if "members" in about:
        return [f"{error}, {_percent(figures['ece_calibrated'])} with the members' temperatures"]
    kept = _percent(figures["kept"])
    right = f", {_percent(figures['kept_top1'])} of these right" if "kept_top1" in figures else ""
    return [
        f"{error}, {_percent(figures['ece_calibrated'])} with the temperature {about['temperature']:.3g}",
        f"confidence of {about['threshold']:.4g}, the threshold, or more: {kept} of the clips{right}",
    ]


def _percent(part: float, interval: list[float] | None = None) -> str:
    text = f"{100 * part:.1f} %"
    return f"{text} (95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else text
