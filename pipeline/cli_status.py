"""`lipprep status` and `lipprep failures`: what is there, and what is not, and why."""

import json

import click

from lipprep.command import Command
from lipprep.io.errors import UserError
from lipprep.pipeline.options import JSON, MANIFEST, OUT, ROOT, WORK, open_data_set, options

DATA_SET = options(MANIFEST, ROOT, WORK, OUT)


@click.command(cls=Command)
@DATA_SET
@click.option("--timing", is_flag=True, help="Also print where the time went.")
@click.option("--deep", is_flag=True, help="Compare the videos' contents, not their sizes and times alone.")
@JSON
def status(manifest_path, root, work, out, timing: bool, deep: bool, as_json: bool) -> None:
    """Say what is fresh, stale or missing of every stage, and why.

    \b
    Example:
      lipprep status
      lipprep status --deep --timing
    """
    from lipprep.pipeline.plan import stages_of, survey
    from lipprep.pipeline.status import as_json as plain
    from lipprep.pipeline.status import table
    from lipprep.pipeline.wanted import wanted_of

    listed, layout = open_data_set(manifest_path, root, work, out)
    wanted = wanted_of(layout, listed.name)
    rows = plain(survey(listed, layout, wanted, stages_of(wanted), deep=deep), timing=timing)
    click.echo(json.dumps(rows) if as_json else table(rows))


@click.command(cls=Command)
@DATA_SET
@click.option("--class", "kind", help="Only those of one class, as no_face.")
@JSON
def failures(manifest_path, root, work, out, kind: str | None, as_json: bool) -> None:
    """List the clips that are in no shard, with class, cause and file.

    They are those of the furthest stage that was run; each names the stage that it failed in.

    \b
    Example:
      lipprep failures
      lipprep failures --class truncated --json
    """
    from lipprep.pipeline.accounts import count_classes, list_failures
    from lipprep.pipeline.plan import stages_of, survey
    from lipprep.pipeline.wanted import wanted_of
    from lipprep.stages.failures import check_class
    from lipprep.stages.untrusted import cell, printable

    if kind is not None:
        check_class(kind)
    listed, layout = open_data_set(manifest_path, root, work, out)
    wanted = wanted_of(layout, listed.name)
    stages = stages_of(wanted)
    chunks = survey(listed, layout, wanted, stages)
    furthest = {(c.split, c.number): c for c in chunks if c.state == "fresh"}  # stages are in their order
    if not furthest:
        raise UserError(f"nothing is made of {listed.path} yet, or all of it is stale: run `lipprep {stages[0]}`")
    listing = list(list_failures(list(furthest.values()), kind))
    if as_json:
        click.echo(json.dumps(listing))
        return
    for failure in listing:
        told = (failure["class"], failure["stage"], failure["video"], failure["message"])
        click.echo("\t".join(str(cell(printable(text, 5000))) for text in told))
    counts = ", ".join(f"{name} {count}" for name, count in count_classes(listing).items())
    click.echo(f"{len(listing)} of {len(listed.clips)} clips failed{f': {counts}' if counts else ''}", err=True)
