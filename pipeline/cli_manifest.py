"""`lipprep manifest`: a corpus's clips, listed."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import CONTEXT, Command, Place
from lipprep.pipeline.options import FILE, JSON, MANIFEST, ROOT, WORKERS, cores, options

if TYPE_CHECKING:
    from lipprep.pipeline.sources import Row


@click.group(context_settings=CONTEXT)
def manifest() -> None:
    """List the clips of a corpus, one line each, with their splits, labels and chunks.

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
      lipprep manifest check
    """


LISTING = options(
    click.option("-o", "--out", type=FILE, required=True, help="The manifest to write, e.g. manifests/lrw.jsonl."),
    click.option("--root", "base", type=Place(), help="What the videos' paths start at: ROOT or a folder above."),
    click.option("--words", help="Only these words: a comma list, or a file with a word a line."),
    click.option("--labels", type=FILE, help="A label file, a word a line.  [default: the sorted words]"),
    click.option(
        "--chunk-size", type=click.IntRange(1), default=512, show_default=True, help="Clips a shard, at most."
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the shuffle, and of splits that are drawn."
    ),
)
_MAX_WORDS = 1 << 24  # bytes of a list of words
FROM = click.argument("root", type=Place())


def _words(text: str | None) -> set[str] | None:
    if text is None:
        return None
    # A word may be called like a folder here; anything else of that name is meant.
    if os.path.lexists(text) and not os.path.isdir(text):  # noqa: PTH112 (pathlib's raise for a long list)
        from lipprep.stages.untrusted import read_text

        listed = read_text(Path(text), "list of words", limit=_MAX_WORDS).split()
    else:
        listed = text.split(",")
    words = {word.strip() for word in listed if word.strip()}
    if not words:
        raise ValueError(f"--words {text!r} names no words")
    return words


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
) -> None:
    from tqdm import tqdm

    from lipprep.pipeline.manifest import save_manifest
    from lipprep.pipeline.sources import make_manifest, read_labels, relative_to

    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    known = None if labels is None else read_labels(labels)
    wanted = _words(words)
    rows = list(tqdm(rows_of(wanted), desc="clips", unit="clip"))
    if wanted and (absent := wanted - {r.word for r in rows}):
        raise ValueError(f"no clip of the words {', '.join(sorted(absent)[:8])} was found below {root}")
    if base is not None:
        rows = relative_to(base, root, rows)
    made = make_manifest(out, rows, root=base or root, labels=known, seed=seed, chunk_size=chunk_size)
    save_manifest(made)
    splits = ", ".join(f"{name} {count}" for name, count in Counter(c.split for c in made.clips).items())
    click.echo(f"{len(made.clips)} clips of {len(made.labels)} words in {out} ({splits}; {len(made.chunks())} chunks)")
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
def manifest_folders(root: Path, **how) -> None:
    """ROOT/word/{train,val,test}/video.mp4, or ROOT/word/video.mp4 with a drawn split.

    \b
    Example:
      lipprep manifest folders recordings -o manifests/mine.jsonl
    """
    from lipprep.pipeline.sources import folders

    _make(lambda chosen: folders(root, chosen), root=root, **how)


@manifest.command("grid", cls=Command)
@FROM
@LISTING
@click.option("--unseen-speakers", default="", help="Speakers kept for the split `unseen`: a comma list.")
def manifest_grid(root: Path, unseen_speakers: str, **how) -> None:
    """ROOT/video/SPEAKER/CODE.mpg with ROOT/align/SPEAKER/CODE.align: a window a word (GRID).

    \b
    Example:
      lipprep manifest grid data/grid -o manifests/grid.jsonl --unseen-speakers s2,s3
    """
    from lipprep.pipeline.sources import grid

    unseen = [s.strip() for s in unseen_speakers.split(",") if s.strip()]
    _make(lambda chosen: grid(root, chosen, unseen_speakers=unseen), root=root, **how)


@manifest.command("csv", cls=Command)
@click.argument("table", type=FILE)
@LISTING
def manifest_csv(table: Path, base: Path | None, **how) -> None:
    """A table with the columns video and word, and any of split, start, num_frames, duration, speaker ...

    Videos are relative to --root, or to the table's folder.

    \b
    Example:
      lipprep manifest csv clips.csv --root videos -o manifests/mine.jsonl
    """
    from lipprep.pipeline.sources import read_csv

    _make(lambda chosen: read_csv(table, chosen), root=base or table.resolve().parent, base=None, **how)


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
