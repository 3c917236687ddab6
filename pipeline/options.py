"""The options that several commands share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import Place, log_to
from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath

if TYPE_CHECKING:
    from lipprep.pipeline.plan import Layout, Slice


def cores() -> int:
    """The cores that this process may use: its affinity and a container's share are counted.

    Raises ValueError for a LOKY_MAX_CPU_COUNT that is no number.
    """
    from loky import cpu_count

    try:
        return cpu_count()
    except ValueError as error:
        raise UserError("LOKY_MAX_CPU_COUNT must be a number of cores: set it to one, or unset it") from error


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
ROOT = click.option("--root", type=Place(), help="Where the manifest's videos lie, if they have moved: path or URL.")
WORK = click.option(
    "-w",
    "--work",
    type=Place(),
    default=Path("work"),
    show_default=True,
    help="Artefacts go to WORK/NAME/STAGE; a path or URL, as s3://bucket/work.",
)
OUT = click.option(
    "-o", "--out", type=Place(), default=Path("shards"), show_default=True, help="Where shards go: a path or URL."
)
WORKERS = click.option("-j", "--workers", type=click.IntRange(1), help="Processes.  [default: all cores]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
FROM = click.argument("root", type=Place())
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
PROFILES = ("lrw2021", "lrw2022", "unaligned", "fixed")
PUBLISHED = "published"
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
    click.option(
        "--mean-face",
        type=FILE,
        help="Another mean face: .npy, (68, 2), pixels in a 256x256 frame; or `published`.  [default: published]",
    ),
    click.option(
        "--box",
        metavar="X,Y,W,H",
        help="The box of profile fixed, pixels; of crops that exist, the one that they were cut with.  [default: "
        "80,116,96,96; of those, not known]",
    ),
)


def words_of(text: str | None) -> set[str] | None:
    """The words that --words gives: a comma list, or a file of them. Raises ValueError where there are none."""
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
        raise UserError(f"--words {text!r} names no words")
    return words


def _box(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box {text} is not of the form X,Y,W,H") from None
    return x, y, w, h


def crop_flags(profile: str | None, crop_size: int | None, exact: bool | None, mean_face: Path | None, box: str | None):
    flags = {"profile": profile, "crop_size": crop_size, "exact": exact, "box": _box(box)}
    if mean_face is not None:
        flags["mean_face"] = PUBLISHED if str(mean_face) == PUBLISHED else str(mean_face.resolve())
    return flags


def open_data_set(
    manifest_path: Path | None,
    root: Path | RemotePath | None,
    work: Path | RemotePath,
    out: Path | RemotePath | None = None,
):
    """The manifest, found where none is named, and where its artefacts stand."""
    from lipprep.pipeline.manifest import find_manifest, load_manifest

    manifest = load_manifest(manifest_path or find_manifest(), root=root)
    layout = layout_of(manifest.name, work, out or Path("shards"))
    log_to(layout.logs)
    return manifest, layout


def layout_of(name: str, work: Path | RemotePath, out: Path | RemotePath) -> "Layout":
    """Where the artefacts of the manifest called `name` stand."""
    from lipprep.pipeline.plan import Layout

    # Absolute: workers need not stand where this process does.
    return Layout((work / name).absolute(), out.absolute())


class SliceParam(click.ParamType):
    """`N/M`: the N-th of M parts, from 1."""

    name = "N/M"

    def convert(self, value: object, param: object, ctx: object) -> "Slice":
        from lipprep.pipeline.plan import Slice

        if isinstance(value, Slice):
            return value
        number, _, of = str(value).partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            example = f"1/{of} to {of}/{of}" if of.isdecimal() and int(of) else "1/64 to 64/64"
            self.fail(f"{value!r} is no slice: {example}")
        return Slice(int(number), int(of))


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
        if not 0 <= number < float("inf"):
            self.fail(f"{value!r} is neither a share such as 5% nor a number of clips")
        return (lambda planned: planned * number / 100) if str(value).endswith("%") else (lambda planned: number)
