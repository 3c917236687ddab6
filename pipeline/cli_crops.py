"""`lipprep shards --from-crops`: crops that exist are listed, and what is wanted of them is told from their files."""

from pathlib import Path

import click

from lipprep.command import Place, log_to
from lipprep.io.errors import UserError
from lipprep.pipeline.options import FILE, layout_of, options
from lipprep.stages.remote import RemotePath

FROM_CROPS = options(
    click.option(
        "--from-crops",
        type=Place(),
        metavar="DIR",
        help="Pack crops that exist: DIR/WORD/{train,val,test}/NAME.npz (array `data`, uint8) or .npy; with --profile.",
    ),
    click.option(
        "--annotations",
        type=Place(),
        metavar="DIR",
        help="For --from-crops: DIR/WORD/SPLIT/NAME.txt with the words' durations.  [default: beside the crops]",
    ),
    click.option("--labels", type=FILE, help="For --from-crops: a label file, a word a line.  [default: sorted words]"),
)


def open_crops(
    folder: Path | RemotePath,
    manifest_path: Path | None,
    work: Path | RemotePath,
    out: Path | RemotePath,
    *,
    flags: dict,
    annotations: Path | RemotePath | None,
    labels: Path | None,
):
    """The manifest of the crops in `folder`, which is not written yet, where its artefacts stand, and `flags` with what
    is wanted beside them. What plan.yaml has of an earlier listing is taken from there.
    """
    from lipprep.pipeline.from_crops import common_size, list_crops, manifest_of
    from lipprep.pipeline.manifest import load_manifest
    from lipprep.pipeline.wanted import read_wanted
    from lipprep.stages.untrusted import is_file, printable

    path = manifest_path or manifest_of(folder)
    layout = layout_of(path.stem, work, out)
    log_to(layout.logs)
    before = read_wanted(layout.plan)
    if flags["profile"] is None and not before.from_crops:
        raise UserError(
            "say how these crops were aligned, e.g. --profile lrw2021: weights are tied to it, and files do not tell"
        )
    given = {"annotations": annotations and str(annotations.resolve()), "labels": labels and str(labels.resolve())}
    kept = {name: given[name] or getattr(before, name) for name in given}
    if is_file(path) and load_manifest(path).filtered is not None:
        raise UserError(
            f"{printable(path)} was filtered, and to list {printable(folder)} again would undo it: leave out "
            f"--from-crops (`lipprep shards -m {printable(path)}`), or name another manifest"
        )
    listed = list_crops(folder, path, **kept)
    flags = {**flags, **kept, "from_crops": True}
    if flags["crop_size"] is None and not before.from_crops:
        flags["crop_size"] = common_size(listed, flags["profile"])
    return listed, layout, flags


def tell(listed) -> None:
    """Say what was listed, and what is missing."""
    click.echo(f"{len(listed.clips)} clips of {len(listed.labels)} words in {listed.path}", err=True)
    if timeless := sum(c.duration is None for c in listed.clips):
        click.echo(
            f"{timeless} clips have no word duration (--annotations DIR reads LRW's .txt): they are trained on at full "
            "length",
            err=True,
        )
