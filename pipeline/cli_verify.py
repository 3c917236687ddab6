"""`lipprep verify`: whether shards are whole, and are what their records and index say."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import Command, Place
from lipprep.pipeline.options import JSON, WORKERS, cores
from lipprep.stages.remote import RemotePath

if TYPE_CHECKING:
    from lipprep.pipeline.verify import Verified
    from lipprep.pipeline.verify_chunk import Finding

LISTED = 20  # findings of a kind that are printed


@click.command(cls=Command)
@click.argument("folder", type=Place(), default=Path("shards"))
@click.option(
    "--deep",
    is_flag=True,
    help="Decode every clip too: shapes, labels, black, frozen and duplicate clips, videos in two splits.",
)
@WORKERS
@JSON
def verify(folder: Path | RemotePath, deep: bool, workers: int | None, as_json: bool) -> None:
    """Read every byte of FOLDER (default: shards) and hold tars, records and index against each other.

    Landmarks and crops (work/NAME/landmarks) are verified as well as shards. Exits with 1 where anything is
    found; each finding says what to do.

    \b
    Example:
      lipprep verify
      lipprep verify work/lrw/landmarks --deep
      lipprep verify s3://bucket/shards
    """
    from lipprep.pipeline.verify import verify as check

    verified = check(folder, deep=deep, workers=workers or cores())
    click.echo(json.dumps(_plain(verified)) if as_json else _summary(verified))
    if verified.findings:
        sys.exit(1)


def _plain(verified: "Verified") -> dict:
    """All of it in plain containers."""
    kinds = dict(sorted(Counter(f.kind for f in verified.findings).items()))
    return {**asdict(verified), "gb_per_second": verified.bytes / 1e9 / verified.seconds, "kinds": kinds}


def _summary(verified: "Verified") -> str:
    """The findings by kind, LISTED of each, and a line of what was read."""
    lines = []
    by_kind: dict[str, list[Finding]] = {}
    for finding in verified.findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    for kind, found in sorted(by_kind.items()):
        lines.append(f"{kind}: {len(found)}")
        for f in found[:LISTED]:
            clip = f", clip {f.key}" if f.key else ""
            lines.append(f"  {f.file}{clip}: {f.message}: {f.remedy}")
        if len(found) > LISTED:
            lines.append(f"  ... and {len(found) - LISTED} more: --json lists all")
    lines += [f"note: {note}" for note in verified.notes]
    kinds = ", ".join(f"{kind} {len(found)}" for kind, found in sorted(by_kind.items()))
    lines.append(
        f"{verified.folder}: {verified.clips} clips in {verified.shards} tars of {verified.stage}, "
        f"{verified.bytes / 1e9:.3f} GB {'decoded' if verified.deep else 'read'} in {verified.seconds:.1f} s "
        f"({verified.bytes / 1e9 / verified.seconds:.2f} GB/s): "
        + (f"{len(verified.findings)} findings ({kinds})" if verified.findings else "sound")
    )
    return "\n".join(lines)
