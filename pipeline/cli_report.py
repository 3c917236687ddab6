"""`lipprep report`: see the data, on one page."""

from pathlib import Path

import click

from lipprep.command import Command, Place
from lipprep.io.errors import UserError
from lipprep.pipeline.options import MANIFEST, ROOT, WORK, cores, open_data_set, options

TOLD = 10_000  # clips, the most suspicious ones, that --json lists


@click.command(cls=Command)
@options(MANIFEST, ROOT, WORK)
@click.option(
    "--shards",
    type=Place(),
    default=Path("shards"),
    show_default=True,
    help="Where the shards are, if there are any: a path or URL.",
)
@click.option("-o", "--out", type=Place(), help="The page to write.  [default: report.html; with --json none]")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help=f"Print counts, figures and the order of suspicion (its first {TOLD:,} clips) as one line of JSON.",
)
def report(manifest_path, root, work, shards, out, as_json: bool) -> None:
    """Write one HTML page, which needs no network, that shows a data set.

    On it: what was made and what failed, mouth crops that play (random, by word, by speaker, the most suspicious),
    how figures are spread, and their outliers, average mouths, landmarks, throughput, parameters and commands.
    It shows what there is: landmarks, crops or shards, finished or not.

    \b
    Example:
      lipprep report -o report.html
      lipprep report --json
    """
    import json

    from lipprep.pipeline.report.page import look, write_page
    from lipprep.pipeline.wanted import wanted_of
    from lipprep.stages.untrusted import printable

    if isinstance(out, Path) and out.is_dir():
        raise UserError(f"{printable(out)} is a folder: name the page, as {printable(out / 'report.html')}")
    listed, layout = open_data_set(manifest_path, root, work, shards)
    found = look(listed, layout, wanted_of(layout, listed.name))
    if out is None and not as_json:
        out = Path("report.html")
    if out is not None:
        named = {"work": work, "shards": shards, "root": root}
        size = write_page(out, found, named=named, workers=cores())
        click.echo(f"{printable(out)}: {size / 1e6:.1f} MB, {found.shown} clips shown", err=as_json)
    if as_json:
        click.echo(json.dumps(found.plain(TOLD)))
