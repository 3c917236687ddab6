"""The command export. What is slow to import is imported when it runs."""

import json
from pathlib import Path

import click

from lipprep.command import Command


@click.command(cls=Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    required=True,
    metavar="NAME",
    help="onnx (a graph for onnxruntime and others), torch (torch.export's .pt2, for the CPU), safetensors (weights, "
    "and the network's configuration in FILE.json) or mpc001 (a checkpoint that mpc001's code loads, and its "
    "FILE.json).",
)
@click.option("-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The file to write.")
@click.option(
    "--card", metavar="FILE.md", type=click.Path(path_type=Path), help="Where the model card goes. Default: FILE.md."
)
@click.option("--replace", is_flag=True, help="Replace what is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one line of JSON.")
def export(run: Path, format_name: str, out: Path, card: Path | None, replace: bool, as_json: bool) -> None:
    """Write a trained lip reader for others to run, with a model card beside it.

    RUN is a run folder (its best.pt) or a checkpoint file; the moving average of the weights is taken where there is
    one. A graph reads any number of clips of any length, and is kept only if it answers what the network answers.

    \b
    Examples:
      lipprep export runs/small --format onnx -o reader.onnx
      lipprep export runs/small --format torch -o reader.pt2
      lipprep export runs/small --format safetensors -o reader.safetensors --replace
      lipprep export runs/lrw --format mpc001 -o ckpt.best.pth
    """
    from lipprep.train.export import export as write

    written = write(run, format=format_name, out=out, card=card, replace=replace)
    if as_json:
        click.echo(json.dumps(written))
        return
    click.echo(f"{written['checkpoint']}, step {written['step']}: {written['words']} words")
    for path in written["files"]:
        click.echo(path)
    if written["lrw"]:
        click.echo(
            "By its words, its data set or the weights that it learnt from, it is of LRW: by the BBC's agreement for "
            "research only, and not to be passed on.",
            err=True,
        )
