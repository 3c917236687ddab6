"""`lipprep manifest`: a corpus's clips, listed."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import CONTEXT, Command, Place
from lipprep.io.errors import UserError
from lipprep.pipeline.cli_captions import captions
from lipprep.pipeline.cli_splits import SPEAKER_FROM, SPLIT_BY, tell_splits
from lipprep.pipeline.options import (
    FILE,
    FROM,
    JSON,
    LISTING,
    MANIFEST,
    ROOT,
    WORK,
    WORKERS,
    cores,
    layout_of,
    open_data_set,
    words_of,
)

if TYPE_CHECKING:
    from lipprep.pipeline.manifest import Manifest
    from lipprep.pipeline.sources import Row


@click.group(context_settings=CONTEXT)
def manifest() -> None:
    """List the clips of a corpus, one line each, with their splits, labels and chunks.

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
      lipprep manifest check
    """


def tell_listed(made: "Manifest") -> None:
    """Print what a manifest that was just written holds."""
    splits = ", ".join(f"{name} {count}" for name, count in Counter(c.split for c in made.clips).items())
    click.echo(
        f"{len(made.clips)} clips of {len(made.labels)} words in {made.path} ({splits}; {len(made.chunks())} chunks)"
    )


def _make(
    rows_of: Callable[[set[str] | None], Iterable["Row"]],
    *,
    root: Path,
    out: Path,
    base: Path | None,
    words: str | None,
    labels: Path | None,
    chunk_size: int,
    seed: int,
    split_by: str | None = None,
    speaker_from: str | None = None,
) -> None:
    from tqdm import tqdm

    from lipprep.pipeline.manifest import save_manifest
    from lipprep.pipeline.sources import make_manifest, read_labels, relative_to
    from lipprep.pipeline.splits import draw_splits

    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    known = None if labels is None else read_labels(labels)
    wanted = words_of(words)
    rows = list(tqdm(rows_of(wanted), desc="clips", unit="clip"))
    if wanted and (absent := wanted - {r.word for r in rows}):
        raise UserError(f"no clip of the words {', '.join(sorted(absent)[:8])} was found below {root}")
    if base is not None:
        rows = relative_to(base, root, rows)
    drawn = draw_splits(rows, seed=seed, by=split_by or "speaker")
    made = make_manifest(out, drawn.rows, root=base or root, labels=known, seed=seed, chunk_size=chunk_size)
    save_manifest(made)
    tell_listed(made)
    tell_splits(rows, drawn, split_by=split_by, speaker_from=speaker_from)
    if timeless := sum(c.duration is None for c in made.clips):
        click.echo(f"{timeless} clips have no word duration: they are trained on at full length", err=True)


@manifest.command("lrw", cls=Command)
@FROM
@LISTING
def manifest_lrw(root: Path, **how) -> None:
    """ROOT/WORD/{train,val,test}/WORD_00001.mp4, each with its .txt (LRW).

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
    """
    from lipprep.pipeline.sources import lrw

    _make(lambda chosen: lrw(root, chosen), root=root, **how)


@manifest.command("folders", cls=Command)
@FROM
@LISTING
@SPEAKER_FROM
@SPLIT_BY
def manifest_folders(root: Path, speaker_from: str | None, **how) -> None:
    """ROOT/word/{train,val,test}/video.mp4, or ROOT/word/video.mp4 with a drawn split.

    \b
    Example:
      lipprep manifest folders recordings -o manifests/mine.jsonl
      lipprep manifest folders recordings -o manifests/mine.jsonl --speaker-from '/(anna|ben|cem)_'
    """
    import msgspec

    from lipprep.pipeline.captions.match import speakers_of
    from lipprep.pipeline.sources import folders

    if speaker_from == "folder":
        raise UserError(
            "--speaker-from folder takes the first folder below ROOT, which is the word here: name a .csv, or a "
            "regular expression whose first group is the speaker"
        )

    def rows_of(chosen: set[str] | None) -> Iterable["Row"]:
        rows = list(folders(root, chosen))
        speakers = speakers_of((row.video for row in rows), speaker_from)
        return (msgspec.structs.replace(row, speaker=speakers.get(row.video)) for row in rows)

    _make(rows_of, root=root, speaker_from=speaker_from, **how)


@manifest.command("grid", cls=Command)
@FROM
@LISTING
@click.option("--unseen-speakers", default="", help="Speakers kept for the split `unseen`: a comma list.")
def manifest_grid(root: Path, unseen_speakers: str, **how) -> None:
    """ROOT/video/SPEAKER/CODE.mpg with ROOT/align/SPEAKER/CODE.align: a window a word (GRID).

    Splits are drawn by sentence, as GRID's benchmark does: each speaker is in all three.

    \b
    Example:
      lipprep manifest grid data/grid -o manifests/grid.jsonl --unseen-speakers s2,s3
    """
    from lipprep.pipeline.sources import grid

    unseen = [s.strip() for s in unseen_speakers.split(",") if s.strip()]
    _make(lambda chosen: grid(root, chosen, unseen_speakers=unseen), root=root, split_by="video", **how)


@manifest.command("csv", cls=Command)
@click.argument("table", type=FILE)
@LISTING
@SPLIT_BY
def manifest_csv(table: Path, base: Path | None, **how) -> None:
    """A table with the columns video and word, and any of split, start, num_frames, duration, speaker ...

    Videos are relative to --root, or to the table's folder. Clips without a split get one: no speaker is then in two.

    \b
    Example:
      lipprep manifest csv clips.csv --root videos -o manifests/mine.jsonl
    """
    from lipprep.pipeline.sources import read_csv

    _make(lambda chosen: read_csv(table, chosen), root=base or table.resolve().parent, base=None, **how)


manifest.add_command(captions)


@manifest.command("check", cls=Command)
@MANIFEST
@ROOT
@click.option("--min-frames", type=click.IntRange(1), default=1, show_default=True, help="Shorter videos are listed.")
@WORKERS
@JSON
def manifest_check(manifest_path: Path | None, root: Path | None, min_frames: int, workers, as_json: bool) -> None:
    """Open every video's header before hours of work; list what is missing, unreadable or too short.

    \b
    Example:
      lipprep manifest check -m manifests/lrw.jsonl --min-frames 29
    """
    from lipprep.pipeline.check import check_videos
    from lipprep.pipeline.manifest import find_manifest, load_manifest
    from lipprep.stages.untrusted import printable

    checked = load_manifest(manifest_path or find_manifest(), root=root)
    problems = check_videos(checked, min_frames=min_frames, workers=workers or cores())
    videos = len({c.video for c in checked.clips})
    if as_json:
        click.echo(json.dumps({"videos": videos, "problems": problems}))
    else:
        for problem in problems:
            click.echo(f"{problem['class']}: {printable(problem['video'])}: {printable(problem['message'])}")
        click.echo(f"{videos} videos checked, {len(problems)} with a problem")
    if problems:
        sys.exit(1)


@manifest.command("filter", cls=Command)
@click.argument("condition")
@MANIFEST
@WORK
@click.option(
    "--shards",
    type=Place(),
    default=Path("shards"),
    show_default=True,
    help="The shards that were made of the manifest, if any: their figures count, and they are copied from.",
)
@click.option("-o", "--out", type=FILE, required=True, help="The cleaner manifest.")
@JSON
def manifest_filter(condition: str, manifest_path: Path | None, work, shards, out: Path, as_json: bool) -> None:
    """Keep the clips whose figures fit a CONDITION, in the chunks that they are in.

    \b
    Figures: num_frames face_share max_faces face_size jitter rotation centre_x centre_y scale outside
    brightness black frozen sharpness movement jump; off_centre, how far the mouth lies from where other
    clips have it, in parts of the crop's side; and suspicion, the score of `lipprep report --json`.
    They are compared with numbers by < <= > >= == !=, and joined by and, or, not and brackets.

    Clips that failed, and those of which a figure in the condition is not known, do not stay. What was made of
    the others is not made again: the stages copy it when they are run with the new manifest.

    \b
    Example:
      lipprep manifest filter 'jitter < 2 and face_share > 0.9' -m manifests/mine.jsonl -o manifests/clean.jsonl
      lipprep landmarks -m manifests/clean.jsonl
      lipprep shards -m manifests/clean.jsonl -o clean-shards
    """
    from lipprep.pipeline.expression import parse_condition
    from lipprep.pipeline.figures import NUMBERS, read_table
    from lipprep.pipeline.filter import filter_manifest, lend_artefacts
    from lipprep.pipeline.manifest import save_manifest
    from lipprep.pipeline.suspicion import SUSPICION, scores
    from lipprep.stages.untrusted import printable

    parsed = parse_condition(condition, [*NUMBERS, SUSPICION])
    listed, layout = open_data_set(manifest_path, None, work, shards)
    table = read_table(listed, layout)
    if not layout.plan.exists():
        click.echo(f"warning: there is no {printable(layout.plan)}: does -w say where the stages were made?", err=True)
    columns = dict(table.columns)
    if SUSPICION in parsed.names:
        columns[SUSPICION] = scores(table)
    filtered = filter_manifest(table, parsed, columns, out)
    kept = filtered.manifest
    # The manifest comes last: where there is one, nothing is computed again.
    lend_artefacts(listed, layout, layout_of(kept.name, work, shards))
    save_manifest(kept)
    if as_json:
        told = {"clips": len(table), "kept": len(kept.clips), "left_out": filtered.left_out}
        click.echo(json.dumps({**told, "words": len({c.word for c in kept.clips}), "manifest": str(out)}))
        return
    click.echo(f"{len(kept.clips)} of {len(table)} clips in {out}, in {len(kept.chunks())} chunks")
    for why, count in filtered.left_out.items():
        click.echo(f"  {count} left out: {why}")
    if gone := sorted({c.word for c in listed.clips} - {c.word for c in kept.clips}):
        click.echo(f"no clip of these words is left: {', '.join(gone[:8])}{' ...' if len(gone) > 8 else ''}", err=True)
