"""The command embed. What is slow to import is imported when it runs."""

import json
import sys
from pathlib import Path

import click

from lipprep.command import INTERRUPTED, Command, Place
from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.train.cli import CACHE, CACHE_SIZE, CHECKPOINT, DEVICE
from lipprep.train.videos import SUFFIXES, keyed_videos


@click.command(cls=Command)
@click.argument("inputs", nargs=-1, required=True, metavar="VIDEO...|SHARDS", type=Place())
@CHECKPOINT
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="DIR|FILE.parquet",
    type=Place(),
    help="A folder, which gets a .npz for each clip, or one table of all (needs lipprep[parquet]).",
)
@click.option("--split", "splits", multiple=True, help="Of shards: train, val, test or unseen; all if not given.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16"]),
    help="Of the features; float16 takes half the room.",
)
@DEVICE
@click.option(
    "--batch-size",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Clips of the usual length at once, or as many frames of longer ones.",
)
@CACHE
@CACHE_SIZE
@click.option("--replace", is_flag=True, help="Remove the features that are there, and begin anew.")
@click.option("--json", "as_json", is_flag=True, help="Print counts and files as JSON.")
def embed(
    inputs: tuple[Path | RemotePath, ...],
    checkpoint: Path,
    out: Path | RemotePath,
    splits: tuple[str, ...],
    dtype: str,
    device: str,
    batch_size: int,
    cache: Path | None,
    cache_size: int | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Write the features that a trained network has of each frame, (T, C) a clip, for systems downstream.

    Takes whole videos of any size, frame rate and length, folders of them and URLs, or a folder of shards.
    The features are those before the network looks at more than five frames: 512 of a ResNet-18. A folder goes on
    where it was stopped. Clips that fail are listed in failures.jsonl there, and the exit code is 1.
    Videos are read one after another, in one process: of a corpus make shards first, which uses all cores.

    \b
    Examples:
      lipprep embed shards/ --checkpoint runs/lrw -o features --split test
      lipprep embed recordings/ --checkpoint runs/lrw -o features.parquet --dtype float16
      lipprep embed s3://bucket/interview.mp4 --checkpoint runs/lrw -o features --json
    """
    if isinstance(out, RemotePath):
        raise UserError(f"{out} is a URL: name a local folder or file")
    folders = [place for place in inputs if place.suffix.lower() not in SUFFIXES]
    sharded = [folder for folder in folders if (folder / "index.json").is_file()]
    if sharded and len(inputs) > 1:
        raise UserError(f"{sharded[0]} is a folder of shards: name it alone, other shards and videos by themselves")
    how = {"out": out, "dtype": dtype, "device": device, "batch_size": batch_size, "replace": replace}
    if sharded:
        how |= {"splits": splits, "cache": cache, "cache_size": cache_size}
    else:
        for flag, given in (("--split", splits), ("--cache", cache), ("--cache-size", cache_size)):
            if given:
                raise UserError(f"{flag} is of shards, and {inputs[0]} is none (no index.json is there)")
        videos = keyed_videos(inputs)  # before torch is imported
    from lipprep.train.embed import embed_shards, embed_videos

    try:
        told = embed_shards(checkpoint, sharded[0], **how) if sharded else embed_videos(checkpoint, videos, **how)
    except KeyboardInterrupt:
        if out.suffix != ".parquet":
            raise
        click.echo("\nStopped. A table is written as a whole, and nothing of it is kept; a folder goes on.", err=True)
        sys.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(f"{told['clips']} clips, {told['frames']} frames of {told['channels']} features")
        if told["present"]:
            click.echo(f"{told['present']} clips were there already")
        if told["failed"]:
            click.echo(f"{told['failed']} clips failed")
        for path in told["files"]:
            click.echo(path)
    if told["failed"]:
        sys.exit(1)
