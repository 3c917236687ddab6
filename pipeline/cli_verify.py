"""`lipprep verify`: whether shards are whole, and are what their records and index say."""

import json
import sys
from pathlib import Path

import click

from lipprep.command import Command
from lipprep.pipeline.options import FOLDER, JSON, WORKERS, cores


@click.command(cls=Command)
@click.argument("folder", type=FOLDER, default=Path("shards"))
@click.option(
    "--deep",
    is_flag=True,
    help="Decode every clip too: shapes, labels, black, frozen and duplicate clips, videos in two splits.",
)
@WORKERS
@JSON
def verify(folder: Path, deep: bool, workers: int | None, as_json: bool) -> None:
    """Read every byte of FOLDER (default: shards) and hold tars, records and index against each other.

    Landmarks and crops (work/NAME/landmarks) are verified as well as shards. Exits with 1 where anything is
    found; each finding says what to do.

    \b
    Example:
      lipprep verify
      lipprep verify work/lrw/landmarks --deep
    """
    from lipprep.pipeline.verify import as_json as plain
    from lipprep.pipeline.verify import summary
    from lipprep.pipeline.verify import verify as check

    verified = check(folder, deep=deep, workers=workers or cores())
    click.echo(json.dumps(plain(verified)) if as_json else summary(verified))
    if verified.findings:
        sys.exit(1)
