"""The commands that make a data set: sample, landmarks, crops, shards (others stand beside this file).

Nothing heavy is imported before a command runs: `--help` must answer at once.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from lipprep.command import CONTEXT, Command, LocalFolder, Number
from lipprep.io.errors import UserError
from lipprep.pipeline.cli_crops import FROM_CROPS, open_crops, tell
from lipprep.pipeline.cli_manifest import manifest
from lipprep.pipeline.cli_status import failures, status
from lipprep.pipeline.cli_verify import verify
from lipprep.pipeline.engines import ENGINES, Engine, reach
from lipprep.pipeline.options import (
    CROPS,
    FILE,
    JSON,
    MANIFEST,
    OUT,
    PUBLISHED,
    ROOT,
    WORK,
    WORKERS,
    MaxFailures,
    SliceParam,
    cores,
    crop_flags,
    open_data_set,
    options,
)

DETECTORS = ("mesh", "fan", "dlib", "archive")
CODECS = ("jpeg", "npy")

RUN = options(
    MANIFEST,
    ROOT,
    WORK,
    WORKERS,
    click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="loky",
        show_default=True,
        help="Where chunks are made: processes here, a Dask or Ray cluster, or (serial, to debug) this process.",
    ),
    click.option(
        "--address",
        help="Of the cluster: tcp://HOST:8786 for dask, HOST:6379 or auto for ray.  [default: one made for the run]",
    ),
    click.option(
        "--slice",
        "part",
        type=SliceParam(),
        default="1/1",
        help="Make the N-th of M parts of the chunks, as --slice 3/64 in a job array; `lipprep index` finishes shards.",
    ),
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
    click.option(
        "--clip-timeout",
        type=Number(min=0, min_open=True),
        default=120.0,
        show_default=True,
        metavar="SECONDS",
        help="A clip that takes longer fails as timeout (not with --engine serial).",
    ),
    click.option("--deep", is_flag=True, help="Notice videos whose content changed under the same size and time."),
    JSON,
)


def _want(before, flags: dict):
    """Return what is wanted: the flags given on top of what was wanted `before`; checked."""
    from lipprep.pipeline.wanted import Wanted, crop_parameters, load_mean_face
    from lipprep.stages.shard.codec import check_codec

    if flags.get("from_crops") and not before.from_crops:
        before = Wanted(box=None)  # what was said of videos says nothing of crops
    wanted = dataclasses.replace(before, **{k: v for k, v in flags.items() if v is not None})
    if wanted.mean_face == PUBLISHED:
        wanted = dataclasses.replace(wanted, mean_face=None)
    if wanted.from_crops and flags.get("exact") is not None:
        raise UserError("--exact and --luma say how crops are cut, and those in files are: leave them out")
    fixed = wanted.profile == "fixed"
    if flags.get("box") is not None and not fixed:
        raise UserError(f"--box is for --profile fixed, and the profile is {wanted.profile}")
    if wanted.from_crops and fixed and wanted.box is not None and wanted.box[2] != wanted.crop_size:
        raise UserError(
            f"the box {','.join(map(str, wanted.box))} is {wanted.box[2]} pixels wide, and the crops in the files are "
            f"of {wanted.crop_size}: give --box as they were cut; leave it out where it is not known, or where they "
            "were resized after"
        )
    if flags.get("crop_size") is None and not wanted.from_crops and (fixed or before.profile == "fixed"):
        # A box has its own size, which says nothing of other profiles'.
        wanted = dataclasses.replace(wanted, crop_size=wanted.box[2] if fixed else Wanted.crop_size)
    if wanted.detector != "archive":
        wanted = dataclasses.replace(wanted, archive=None, persons=None)
    elif wanted.archive is None:
        raise UserError("--detector archive needs --archive DIR, the folder of the landmark files")
    crop_parameters(wanted)
    if wanted.mean_face is not None:
        load_mean_face(Path(wanted.mean_face))
    if "codec" in flags:
        check_codec(wanted.codec, wanted.crop_size)
    return wanted


def _want_shards(before, flags: dict, out, dataset: str, *, replace: bool):
    """Return what is wanted of shards: finished ones stay what their index says, unless flags are to `replace` them."""
    from lipprep.pipeline.plan import differences, index_parameters
    from lipprep.pipeline.wanted import finished_index, with_parameters

    if (index := finished_index(out, dataset)) is None:
        return _want(before, flags)
    wanted = _want(with_parameters(before, index.parameters), flags)
    now = index_parameters(wanted)
    # An index has parameters of the landmarks, too: shards are made anew where those were.
    there = {name: index.parameters.get(name) for name in now}
    if there != now and not replace:
        raise UserError(
            f"{out} holds finished shards, which would be made anew ({differences(there, now)}): choose another -o, or "
            "add --replace"
        )
    if not any(flag is not None for flag in flags.values()) and (last := differences(now, index_parameters(before))):
        click.echo(
            f"{out} stays as its index says. What was wanted last differs ({last}): to make these shards so, give the "
            "flags and --replace",
            err=True,
        )
    return wanted


def _run(options: dict, **more):
    """How a stage is run, of the options that its commands share: before anything is read, so that it is told early."""
    from lipprep.pipeline.run import Run
    from lipprep.stages.failures import check_class

    if options["retry_failed"]:
        check_class(options["retry_failed"])
    engine = Engine(options["engine"], options["workers"] or cores(), options["address"])
    _warn_of_idle(engine)
    reach(engine)
    names = ("part", "clip_timeout", "deep")
    return Run(
        engine=engine,
        retry=options["retry_failed"],
        **{name: options[name] for name in names},
        **more,
    )


def _warn_of_idle(engine: Engine) -> None:
    """Say which options were given that do nothing with this engine."""
    source = click.get_current_context().get_parameter_source
    serial = engine.name == "serial"
    if source("workers") is not ParameterSource.DEFAULT and (serial or engine.address is not None):
        click.echo(f"warning: -j does nothing with {'--engine serial' if serial else '--address'}", err=True)
    if source("clip_timeout") is not ParameterSource.DEFAULT and serial:
        click.echo(
            "warning: with --engine serial --clip-timeout does nothing: a clip that hangs is waited for", err=True
        )


def _finish(manifest, layout, report, run, max_failures: Callable[[int], float], as_json: bool) -> None:
    from lipprep.pipeline.accounts import as_json as plain
    from lipprep.pipeline.accounts import failed_classes, keep_report, summary

    if run.part.whole:
        keep_report(layout.work.parent / "report.json", manifest, report)
    elif not as_json:
        click.echo(f"slice {run.part} of ", nl=False)
    click.echo(json.dumps(plain(report)) if as_json else summary(report))
    if report.failures > max_failures(report.planned):
        raise click.ClickException(
            f"{report.failures} of {report.planned} clips failed, more than --max-failures allows; what was made "
            "stays. `lipprep failures` lists them:\n" + "\n".join(failed_classes(report)[:3])
        )


def _persons(wanted) -> dict[str, int] | None:
    if wanted.persons is None:
        return None
    from lipprep.stages.landmarks.archive import read_persons

    return read_persons(Path(wanted.persons))


@click.command(cls=Command)
@click.argument("out", type=LocalFolder())
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


@click.command(cls=Command)
@RUN
@click.option(
    "--detector",
    type=click.Choice(DETECTORS),
    help="Where landmarks come from; mesh is built in.  [default: mesh]",
)
@click.option(
    "--archive", type=LocalFolder(), help="For --detector archive: the folder of published .npz or .pkl files."
)
@click.option("--persons", type=FILE, help="For --detector archive: a CSV of clip and person index.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="For detectors mesh and fan: a torch device, e.g. cuda; -j N processes share it.",
)
def landmarks(
    manifest_path,
    root,
    work,
    max_failures,
    as_json,
    detector,
    archive,
    persons,
    device,
    **run,
):
    """Find 68 face landmarks in every frame.

    \b
    Example:
      lipprep landmarks -m manifests/lrw.jsonl
      lipprep landmarks --detector archive --archive LRW_landmarks --persons lrw500_detected_face.csv
    """
    from lipprep.pipeline.run import run_stage
    from lipprep.pipeline.wanted import read_wanted
    from lipprep.stages.landmarks import load_detector

    run = _run(run, device=device)
    listed, layout = open_data_set(manifest_path, root, work)
    if archive is not None and not archive.is_dir():
        raise UserError(f"there is no folder {archive} of landmark files")
    if persons is not None and not persons.is_file():
        raise UserError(f"there is no table of persons {persons}")
    if (archive or persons) and detector not in (None, "archive"):
        raise UserError(f"--archive and --persons are for --detector archive, not {detector}")
    detector = detector or ("archive" if archive else read_wanted(layout.plan).detector)
    if detector == "archive" and device != "cpu":
        raise UserError("--device is for the detectors mesh and fan, not for an archive")
    # What the detector lacks is said here, once, not by every clip. The device may be one that only a cluster has.
    here = "cpu" if run.engine.is_cluster and detector != "dlib" else device
    identity = None if detector == "archive" else load_detector(detector, device=here).identity
    flags = {
        "detector": detector,
        "identity": identity,
        "archive": archive and str(archive.resolve()),
        "persons": persons and str(persons.resolve()),
    }
    wanted = _want(read_wanted(layout.plan), flags)
    run = dataclasses.replace(run, persons=_persons(wanted))
    _finish(listed, layout, run_stage("landmarks", listed, layout, wanted, run), run, max_failures, as_json)


@click.command(cls=Command)
@RUN
@CROPS
def crops(manifest_path, root, work, max_failures, as_json, profile, crop_size, exact, mean_face, box, **run):
    """Align to the mean face and cut mouth crops, kept without loss in WORK/NAME/crops.

    `lipprep shards` cuts them in passing where this was not run.

    \b
    Example:
      lipprep crops -m manifests/lrw.jsonl
      lipprep crops --profile lrw2022 --crop-size 88
    """
    from lipprep.pipeline.run import run_stage
    from lipprep.pipeline.wanted import read_wanted

    run = _run(run)
    listed, layout = open_data_set(manifest_path, root, work)
    wanted = _want(read_wanted(layout.plan), crop_flags(profile, crop_size, exact, mean_face, box))
    _finish(listed, layout, run_stage("crops", listed, layout, wanted, run), run, max_failures, as_json)


@click.command(cls=Command)
@RUN
@OUT
@FROM_CROPS
@CROPS
@click.option("--codec", type=click.Choice(CODECS), help="A JPEG strip a clip, or raw arrays.  [default: jpeg]")
@click.option("--quality", type=click.IntRange(1, 100), help="Of the JPEG strips.  [default: 95]")
@click.option("--replace", is_flag=True, help="Replace the shards of another data set in OUT.")
@click.option(
    "--licence",
    metavar="TEXT",
    help='For those who pass the shards on: the licence that their card OUT/README.md states, as "CC BY 4.0".',
)
def shards(
    manifest_path,
    root,
    work,
    max_failures,
    as_json,
    out,
    from_crops,
    annotations,
    labels,
    codec,
    quality,
    replace,
    licence,
    profile,
    crop_size,
    exact,
    mean_face,
    box,
    **run,
):
    """Pack mouth crops into WebDataset shards with an index and a card; crops that are not stored are cut in passing.

    With --from-crops no videos and no landmarks are needed.

    \b
    Example:
      lipprep shards -m manifests/lrw.jsonl -o shards
      lipprep shards --codec npy --profile lrw2022
      lipprep shards --from-crops LRW_h96w96_mouth_crop_gray --profile lrw2021 --annotations lipread_mp4
      lipprep shards --from-crops vipl_crops --profile fixed --box 79,115,96,96
    """
    from lipprep.pipeline.card import check_licence
    from lipprep.pipeline.from_crops import keep_manifest
    from lipprep.pipeline.run import check_out, run_stage
    from lipprep.pipeline.wanted import read_wanted

    run = _run(run, replace=replace)
    flags = {**crop_flags(profile, crop_size, exact, mean_face, box), "codec": codec, "quality": quality}
    if licence is not None:
        check_licence(licence)
        flags["licence"] = licence
    if from_crops is not None:
        if root is not None:
            raise UserError("--root says where listed files have moved, and --from-crops lists them: give one")
        listing = {"annotations": annotations, "labels": labels}
        listed, layout, flags = open_crops(from_crops, manifest_path, work, out, flags=flags, **listing)
    elif annotations is not None or labels is not None:
        raise UserError("--annotations and --labels are for --from-crops DIR, which is listed with them")
    else:
        listed, layout = open_data_set(manifest_path, root, work, out)
    check_out(listed, out, replace=replace)
    before = read_wanted(layout.plan)
    wanted = _want_shards(before, flags, layout.out, listed.name, replace=replace)
    plan = wanted if any(flag is not None for flag in flags.values()) else before
    if from_crops is not None:
        keep_manifest(listed)
        tell(listed)
    report = run_stage("shards", listed, layout, wanted, run, plan=plan)
    _finish(listed, layout, report, run, max_failures, as_json)


@click.command(cls=Command)
@options(MANIFEST, ROOT, WORK, OUT)
@JSON
def index(manifest_path, root, work, out, as_json: bool) -> None:
    """Write the index of shards that were made in slices, once all of them are there.

    \b
    Example:
      lipprep shards --slice 1/2 && lipprep shards --slice 2/2 && lipprep index
    """
    from lipprep.pipeline.run import Run, check_out, finish
    from lipprep.pipeline.wanted import wanted_of

    listed, layout = open_data_set(manifest_path, root, work, out)
    check_out(listed, out)
    report = finish(listed, layout, wanted_of(layout, listed.name))
    _finish(listed, layout, report, Run(), lambda planned: planned, as_json)


@click.group(context_settings=CONTEXT)
def main() -> None:
    """The commands that make a data set (all of them: lipprep --help)."""


for _command in (sample, manifest, landmarks, crops, shards, index, status, failures, verify):
    main.add_command(_command)

if __name__ == "__main__":
    main()
