"""The commands that make a data set: sample, manifest, landmarks, crops, shards, status.

Nothing heavy is imported before a command runs: `--help` must answer at once.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from lipprep.command import CONTEXT, Command

PROFILES = ("lrw2021", "lrw2022", "unaligned", "fixed")
DETECTORS = ("mesh", "fan", "dlib", "archive")
CODECS = ("jpeg", "npy")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator, in the order that `--help` shows them."""
    return lambda f: functools.reduce(lambda g, d: d(g), reversed(decorators), f)


FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
MANIFEST = click.option(
    "-m",
    "--manifest",
    "manifest_path",
    type=FILE,
    help="The manifest.  [default: the only one in manifests/]",
)
ROOT = click.option("--root", type=FOLDER, help="Where the manifest's videos lie, if they have moved.")
WORK = click.option(
    "-w",
    "--work",
    type=FOLDER,
    default=Path("work"),
    show_default=True,
    help="Artefacts go to WORK/NAME/STAGE.",
)
OUT = click.option("-o", "--out", type=FOLDER, default=Path("shards"), show_default=True, help="Where shards go.")
WORKERS = click.option("-j", "--workers", type=click.IntRange(1), help="Processes.  [default: all cores]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")


class MaxFailures(click.ParamType):
    """A share of the planned clips (`5%`) or a number of clips."""

    name = "N|P%"

    def convert(self, value: object, param: object, ctx: object) -> Callable[[int], float]:
        if callable(value):
            return value
        try:
            number = float(str(value).rstrip("%"))
        except ValueError:
            number = -1.0
        if number < 0:
            self.fail(f"{value!r} is neither a share such as 5% nor a number of clips")
        return (lambda planned: planned * number / 100) if str(value).endswith("%") else (lambda planned: number)


RUN = options(
    MANIFEST,
    ROOT,
    WORK,
    WORKERS,
    click.option(
        "--max-failures",
        type=MaxFailures(),
        default="5%",
        show_default=True,
        help="More failed clips than this make the run a failed one (exit 1); what was made stays.",
    ),
    click.option(
        "--retry-failed",
        is_flag=False,
        flag_value="",
        metavar="[CLASS]",
        help="Try failed clips again: all, or those of one class, as --retry-failed=no_face.",
    ),
    JSON,
)
CROPS = options(
    click.option(
        "--profile",
        type=click.Choice(PROFILES),
        help="How crops are aligned; weights are tied to it.  [default: lrw2021]",
    ),
    click.option("--crop-size", type=int, help="Side of the crop in the aligned 256x256 frame, pixels.  [default: 96]"),
    click.option(
        "--exact/--luma",
        default=None,
        help="Decode colour and convert where the reference does (7 times slower), or the luma plane.  [default: luma]",
    ),
    click.option("--mean-face", type=FILE, help="Another mean face: .npy, (68, 2), pixels in a 256x256 frame."),
    click.option("--box", metavar="X,Y,W,H", help="The box of profile fixed, pixels.  [default: 80,116,96,96]"),
)


def _box(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--box {text} is not of the form X,Y,W,H") from None
    return x, y, w, h


def _crop_flags(
    profile: str | None, crop_size: int | None, exact: bool | None, mean_face: Path | None, box: str | None
):
    flags = {"profile": profile, "crop_size": crop_size, "exact": exact, "box": _box(box)}
    flags["mean_face"] = None if mean_face is None else str(mean_face.resolve())
    if box is not None and crop_size is None:
        flags["crop_size"] = flags["box"][2]
    return flags


def _open(manifest_path: Path | None, root: Path | None, work: Path, out: Path | None = None):
    from lipprep.pipeline.manifest import find_manifest, load_manifest
    from lipprep.pipeline.plan import Layout

    manifest = load_manifest(manifest_path or find_manifest(), root=root)
    return manifest, Layout(work / manifest.name, out or Path("shards"))


def _want(layout, flags: dict):
    """What is wanted: the flags given, then plan.yaml, then the defaults; checked, and kept in plan.yaml."""
    from lipprep.pipeline.chunk import crop_parameters, load_mean_face
    from lipprep.pipeline.plan import read_wanted, write_wanted
    from lipprep.stages.shard.codec import check_codec

    wanted = dataclasses.replace(read_wanted(layout.plan), **{k: v for k, v in flags.items() if v is not None})
    if wanted.detector != "archive":
        wanted = dataclasses.replace(wanted, archive=None, persons=None)
    elif wanted.archive is None:
        raise ValueError("--detector archive needs --archive DIR, the folder of the landmark files")
    crop_parameters(wanted)
    if wanted.mean_face is not None:
        load_mean_face(Path(wanted.mean_face))
    if "codec" in flags:
        check_codec(wanted.codec, wanted.crop_size)
    write_wanted(layout.plan, wanted)
    return wanted


def _finish(report, max_failures: Callable[[int], float], as_json: bool) -> None:
    from lipprep.pipeline.run import as_json as plain
    from lipprep.pipeline.run import summary

    click.echo(json.dumps(plain(report)) if as_json else summary(report))
    if report.failures > max_failures(report.planned):
        raise click.ClickException(
            f"{report.failures} of {report.planned} clips failed, more than --max-failures allows: see the classes "
            "above; what was made stays"
        )


def _persons(wanted) -> dict[str, int] | None:
    if wanted.persons is None:
        return None
    from lipprep.stages.landmarks.archive import read_persons

    return read_persons(Path(wanted.persons))


@click.command(cls=Command)
@click.argument("out", type=FOLDER)
@click.option("-n", "clips", type=int, default=240, show_default=True, help="How many clips, in LRW's three splits.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed makes another corpus.")
@WORKERS
def sample(out: Path, clips: int, seed: int, workers: int | None) -> None:
    """Make a small LRW-shaped corpus in OUT: a photograph that speaks ten words.

    \b
    Example:
      lipprep sample build/videos
      lipprep sample build/videos -n 60 --seed 3
    """
    from lipprep.pipeline.sample import make_sample

    count = make_sample(out, clips=clips, seed=seed, workers=workers or cores())
    click.echo(f"{count} clips in {out}")


@click.group(context_settings=CONTEXT)
def manifest() -> None:
    """List the clips of a corpus, one line each, with their splits, labels and chunks.

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
      lipprep manifest check
    """


SOURCE = options(
    click.argument("root", type=FOLDER),
    click.option("-o", "--out", type=FILE, required=True, help="The manifest to write, e.g. manifests/lrw.jsonl."),
    click.option("--words", help="Only these words: a comma list, or a file with a word a line."),
    click.option("--labels", type=FILE, help="A label file, a word a line.  [default: the sorted words]"),
    click.option(
        "--chunk-size", type=click.IntRange(1), default=512, show_default=True, help="Clips a shard, at most."
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the shuffle, and of splits that are drawn."
    ),
)


def _words(text: str | None) -> set[str] | None:
    if text is None:
        return None
    path = Path(text)
    listed = path.read_text(encoding="utf-8").split() if path.is_file() else text.split(",")
    words = {word.strip() for word in listed if word.strip()}
    if not words:
        raise ValueError(f"--words {text} names no words")
    return words


def _make(rows_of: Callable, root: Path, out: Path, words, labels, chunk_size, seed) -> None:
    from collections import Counter

    from tqdm import tqdm

    from lipprep.pipeline.manifest import save_manifest
    from lipprep.pipeline.sources import make_manifest, read_labels

    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    known = None if labels is None else read_labels(labels)
    wanted = _words(words)
    rows = list(tqdm(rows_of(wanted), desc="clips", unit="clip"))
    if wanted and (absent := wanted - {r.word for r in rows}):
        raise ValueError(f"no clip of the words {', '.join(sorted(absent)[:8])} was found below {root}")
    made = make_manifest(out, rows, root=root, labels=known, seed=seed, chunk_size=chunk_size)
    save_manifest(made)
    splits = Counter(c.split for c in made.clips)
    timeless = sum(c.duration is None for c in made.clips)
    click.echo(
        f"{len(made.clips)} clips of {len(made.labels)} words in {out} ("
        + ", ".join(f"{name} {count}" for name, count in splits.items())
        + f"; {len(made.chunks())} chunks)"
    )
    if timeless:
        click.echo(f"{timeless} clips have no word duration: they are trained on at full length", err=True)


@manifest.command("lrw", cls=Command)
@SOURCE
def manifest_lrw(root: Path, out: Path, words, labels, chunk_size, seed) -> None:
    """ROOT/WORD/{train,val,test}/WORD_00001.mp4, each with its .txt (LRW).

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
    """
    from lipprep.pipeline.sources import lrw

    _make(lambda chosen: lrw(root, chosen), root, out, words, labels, chunk_size, seed)


@manifest.command("folders", cls=Command)
@SOURCE
def manifest_folders(root: Path, out: Path, words, labels, chunk_size, seed) -> None:
    """ROOT/word/{train,val,test}/video.mp4, or ROOT/word/video.mp4 with a drawn split.

    \b
    Example:
      lipprep manifest folders recordings -o manifests/mine.jsonl
    """
    from lipprep.pipeline.sources import folders

    _make(lambda chosen: folders(root, chosen), root, out, words, labels, chunk_size, seed)


@manifest.command("grid", cls=Command)
@SOURCE
@click.option("--unseen-speakers", default="", help="Speakers kept for the split `unseen`: a comma list.")
def manifest_grid(root: Path, out: Path, words, labels, chunk_size, seed, unseen_speakers: str) -> None:
    """ROOT/video/SPEAKER/CODE.mpg with ROOT/align/SPEAKER/CODE.align: a window a word (GRID).

    \b
    Example:
      lipprep manifest grid data/grid -o manifests/grid.jsonl --unseen-speakers s2,s3
    """
    from lipprep.pipeline.sources import grid

    unseen = [s.strip() for s in unseen_speakers.split(",") if s.strip()]
    _make(lambda chosen: grid(root, chosen, unseen_speakers=unseen), root, out, words, labels, chunk_size, seed)


@manifest.command("csv", cls=Command)
@click.argument("table", type=FILE)
@click.option("--root", type=FOLDER, help="What the videos' paths are relative to.  [default: the table's folder]")
@options(*[click.option("-o", "--out", type=FILE, required=True, help="The manifest to write.")])
@click.option("--words", help="Only these words: a comma list, or a file with a word a line.")
@click.option("--labels", type=FILE, help="A label file, a word a line.  [default: the sorted words]")
@click.option("--chunk-size", type=click.IntRange(1), default=512, show_default=True, help="Clips a shard, at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle, and of splits that are drawn.")
def manifest_csv(table: Path, root: Path | None, out: Path, words, labels, chunk_size, seed) -> None:
    """A table with the columns video and word, and any of split, start, num_frames, duration, speaker ...

    \b
    Example:
      lipprep manifest csv clips.csv --root videos -o manifests/mine.jsonl
    """
    from lipprep.pipeline.sources import read_csv

    if not table.is_file():
        raise ValueError(f"there is no table {table}")
    folder = root or table.resolve().parent
    _make(lambda chosen: read_csv(table, chosen), folder, out, words, labels, chunk_size, seed)


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

    checked = load_manifest(manifest_path or find_manifest(), root=root)
    problems = check_videos(checked, min_frames=min_frames, workers=workers or cores())
    videos = len({c.video for c in checked.clips})
    if as_json:
        click.echo(json.dumps({"videos": videos, "problems": problems}))
    else:
        for problem in problems:
            click.echo(f"{problem['class']}: {problem['video']}: {problem['message']}")
        click.echo(f"{videos} videos checked, {len(problems)} with a problem")
    if problems:
        sys.exit(1)


@click.command(cls=Command)
@RUN
@click.option(
    "--detector",
    type=click.Choice(DETECTORS),
    help="Where landmarks come from; mesh is built in.  [default: mesh]",
)
@click.option("--archive", type=FOLDER, help="For --detector archive: the folder of published .npz or .pkl files.")
@click.option("--persons", type=FILE, help="For --detector archive: a CSV of clip and person index.")
@click.option("--device", default="cpu", show_default=True, help="For --detector fan: a torch device, e.g. cuda.")
def landmarks(
    manifest_path,
    root,
    work,
    workers,
    max_failures,
    retry_failed,
    as_json,
    detector,
    archive,
    persons,
    device,
):
    """Find 68 face landmarks in every frame.

    \b
    Example:
      lipprep landmarks -m manifests/lrw.jsonl
      lipprep landmarks --detector archive --archive LRW_landmarks --persons lrw500_detected_face.csv
    """
    from lipprep.pipeline.plan import read_wanted
    from lipprep.pipeline.run import run_stage
    from lipprep.stages.landmarks import load_detector

    listed, layout = _open(manifest_path, root, work)
    if archive is not None and not archive.is_dir():
        raise ValueError(f"there is no folder {archive} of landmark files")
    if persons is not None and not persons.is_file():
        raise ValueError(f"there is no table of persons {persons}")
    detector = detector or ("archive" if archive else read_wanted(layout.plan).detector)
    # What the detector lacks is said here, once, not by every clip.
    identity = None if detector == "archive" else load_detector(detector, device=device).identity
    flags = {
        "detector": detector,
        "identity": identity,
        "archive": archive and str(archive.resolve()),
        "persons": persons and str(persons.resolve()),
    }
    wanted = _want(layout, flags)
    report = run_stage(
        "landmarks",
        listed,
        layout,
        wanted,
        workers=workers or cores(),
        persons=_persons(wanted),
        device=device,
        retry=retry_failed,
    )
    _finish(report, max_failures, as_json)


@click.command(cls=Command)
@RUN
@CROPS
def crops(manifest_path, root, work, workers, max_failures, retry_failed, as_json, **flags):
    """Align to the mean face and cut mouth crops, kept without loss in WORK/NAME/crops.

    `lipprep shards` cuts them in passing where this was not run.

    \b
    Example:
      lipprep crops -m manifests/lrw.jsonl
      lipprep crops --profile lrw2022 --crop-size 88
    """
    from lipprep.pipeline.run import run_stage

    listed, layout = _open(manifest_path, root, work)
    wanted = _want(layout, _crop_flags(**flags))
    _finish(
        run_stage("crops", listed, layout, wanted, workers=workers or cores(), retry=retry_failed),
        max_failures,
        as_json,
    )


@click.command(cls=Command)
@RUN
@OUT
@CROPS
@click.option("--codec", type=click.Choice(CODECS), help="A JPEG strip a clip, or raw arrays.  [default: jpeg]")
@click.option("--quality", type=click.IntRange(1, 100), help="Of the JPEG strips.  [default: 95]")
@click.option("--replace", is_flag=True, help="Replace the shards of another data set in OUT.")
def shards(
    manifest_path,
    root,
    work,
    workers,
    max_failures,
    retry_failed,
    as_json,
    out,
    codec,
    quality,
    replace,
    **flags,
):
    """Pack mouth crops into WebDataset shards with an index; crops that are not stored are cut in passing.

    \b
    Example:
      lipprep shards -m manifests/lrw.jsonl -o shards
      lipprep shards --codec npy --profile lrw2022
    """
    from lipprep.pipeline.run import check_out, run_stage, write_index

    listed, layout = _open(manifest_path, root, work, out)
    if not replace:
        check_out(listed, out)
    wanted = _want(layout, {**_crop_flags(**flags), "codec": codec, "quality": quality})
    report = run_stage("shards", listed, layout, wanted, workers=workers or cores(), retry=retry_failed)
    write_index(listed, layout, wanted)
    _finish(report, max_failures, as_json)


@click.command(cls=Command)
@MANIFEST
@ROOT
@WORK
@OUT
@JSON
def status(manifest_path, root, work, out, as_json: bool) -> None:
    """Say what is fresh, stale or missing of every stage, and why.

    \b
    Example:
      lipprep status
    """
    from lipprep.pipeline.plan import read_wanted, survey
    from lipprep.pipeline.status import as_json as plain
    from lipprep.pipeline.status import table

    listed, layout = _open(manifest_path, root, work, out)
    chunks = survey(listed, layout, read_wanted(layout.plan))
    click.echo(json.dumps(plain(chunks)) if as_json else table(chunks))


@click.group(context_settings=CONTEXT)
def main() -> None:
    """The commands that make a data set (all of them: lipprep --help)."""


for _command in (sample, manifest, landmarks, crops, shards, status):
    main.add_command(_command)

if __name__ == "__main__":
    main()
