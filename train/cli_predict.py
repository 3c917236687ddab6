"""The command predict. What is slow to import is imported when it runs."""

import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import Command, Number, Place
from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import printable
from lipprep.train.cli import CHECKPOINT, DEVICE

if TYPE_CHECKING:
    from lipprep.train.predict import FaceReading, Reader, WindowReading, Words

_ENDINGS = {"--video": (".mp4",), "--timeline": (".png",), "--subtitles": (".srt", ".vtt")}
_MOUTH_EVERY = 10  # frames between two crops that are kept for a timeline: of an hour they take 80 MB


def _output(name: str, metavar: str, help: str):
    return click.option(f"--{name}", metavar=metavar, type=click.Path(path_type=Path, dir_okay=False), help=help)


@click.command(cls=Command, resumes=False)
@click.argument("videos", nargs=-1, metavar="[VIDEO|FOLDER|URL]...", type=Place())
@CHECKPOINT
@click.option("--camera", metavar="N", type=click.IntRange(0), help="Read from the system's camera N, the first is 0.")
@click.option("--seconds", type=Number(0, min_open=True), help="How long to read from it. Default: to Ctrl-C.")
@click.option("--all-faces", is_flag=True, help="Read every face, each followed over time; else the largest.")
@click.option("--step", default=5, show_default=True, type=click.IntRange(1), help="Frames from a window to the next.")
@click.option(
    "--threshold",
    metavar="P",
    type=Number(0, 1),
    help="Confidence below which a word counts as unknown: -. Default: the checkpoint's, if it is calibrated, else 0.",
)
@click.option("-k", "count", default=5, show_default=True, type=click.IntRange(1), help="How many words to list.")
@_output("video", "FILE.mp4", "Write the video with words, confidence, faces and landmarks drawn in.")
@_output("timeline", "FILE.png", "Draw words and confidence over time, and the mouth below.")
@_output("subtitles", "FILE.srt|.vtt", "Write the words that are known as subtitles.")
@click.option("--replace", is_flag=True, help="Replace a video, timeline or subtitles that are there already.")
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print each window as a line of JSON.")
def predict(
    videos: tuple[Path | RemotePath, ...],
    checkpoint: Path,
    camera: int | None,
    seconds: float | None,
    all_faces: bool,
    step: int,
    threshold: float | None,
    count: int,
    video: Path | None,
    timeline: Path | None,
    subtitles: Path | None,
    replace: bool,
    device: str,
    as_json: bool,
) -> None:
    """Read the words in any video, or before a camera.

    Takes videos of any size, frame rate and length, folders of them and URLs. Windows as long as a training
    clip (LRW's have 29 frames), at the frame rate of the training, slide over the video, and each is read by itself;
    neighbours that agree are one line. A network knows the words that it was trained on and no others: look at the
    confidence.

    \b
    Examples:
      lipprep predict me.mp4 --checkpoint runs/small
      lipprep predict interview.mp4 --checkpoint runs/small --all-faces --video read.mp4 --timeline read.png
      lipprep predict recordings/ --checkpoint runs/small -k 3 --json
      lipprep predict s3://bucket/recordings --checkpoint runs/small --threshold 0.6
      lipprep predict --camera 0 --checkpoint runs/small
    """
    outputs = {"--video": video, "--timeline": timeline, "--subtitles": subtitles}
    _check_usage(videos, camera, seconds, outputs)
    if camera is None:
        from lipprep.train.videos import find_videos

        found = find_videos(videos)  # before torch is imported, which takes seconds
        _check_outputs(outputs, found, replace=replace)
    else:
        from lipprep.train.camera import camera_frames, open_camera, read_camera

        capture = open_camera(camera)
    from tqdm import tqdm

    from lipprep.train.predict import load_reader

    reader = load_reader(checkpoint, device=device)
    if threshold is not None:
        reader = dataclasses.replace(reader, threshold=threshold)
    if not as_json:
        click.echo(_about(reader))
    how = {"all_faces": all_faces, "count": count, "step": step}
    if camera is not None:
        frames = camera_frames(capture, fps=reader.fps, seconds=seconds)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(frames):
            click.echo(f"camera {camera}: Ctrl-C ends it", err=True)
            _print_live(f"camera {camera}", read_camera(reader, frames, **how), reader, as_json=as_json)
        return
    failed = False
    bar = {"leave": False, "dynamic_ncols": True}
    for path in tqdm(found, unit="video", desc="predict", disable=len(found) == 1 or None, **bar):
        watched = functools.partial(tqdm, unit="frame", desc=printable(path.name), disable=None, delay=1, **bar)
        try:
            readings = reader.read_video(path, mouth_every=_MOUTH_EVERY if timeline else 0, watched=watched, **how)
        except (UserError, OSError, RemoteError) as error:
            failed = True
            if as_json:
                click.echo(json.dumps({"video": str(path), "error": str(error)}))
            named = "" if str(path) in str(error) else f"{printable(path)}: "
            tqdm.write(f"{named}{printable(error)}", file=sys.stderr)
            continue
        for line in _json_lines(path, readings, reader) if as_json else _table(path, readings, reader):
            tqdm.write(line)
        _write(outputs, path, readings, reader, watched)
        for made in [] if as_json else filter(None, outputs.values()):
            tqdm.write(printable(made))
    if failed:
        sys.exit(1)


def _check_usage(videos: tuple, camera: int | None, seconds: float | None, outputs: Mapping[str, Path | None]) -> None:
    """Raise UsageError for what does not go together."""
    if camera is None and not videos:
        raise click.UsageError("Name a video, a folder of them or a URL, or a camera: --camera 0.")
    if camera is None:
        if seconds is not None:
            raise click.UsageError("--seconds says how long to read from a camera: it goes with --camera.")
        return
    if videos:
        raise click.UsageError("Give videos or --camera, not both: each is read by itself.")
    for name, path in outputs.items():
        if path is not None:
            raise click.UsageError(f"{name} is made of a file: record the camera first, and give the recording.")


def _check_outputs(outputs: Mapping[str, Path | None], found: Sequence, *, replace: bool) -> None:
    """Raise ValueError or OSError where an output could not be written: told before hours of reading."""
    for name, path in outputs.items():
        if path is None:
            continue
        if len(found) > 1:
            raise UserError(f"{name} {path} is one file, of one video, but there are {len(found)}: name one of them")
        if path.suffix.lower() not in _ENDINGS[name]:
            raise UserError(f"{name} {path} should end in {' or '.join(_ENDINGS[name])}, which says what it is")
        if str(path.resolve()) == str(Path(str(found[0])).resolve()):
            raise UserError(f"{name} {path} is the video that is read: name another file")
        if path.exists() and not replace:
            raise UserError(f"{name} {path} exists: add --replace to write it anew, or name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _about(reader: "Reader") -> str:
    """What the confidences are worth."""
    if reader.temperature is None:
        told = "Confidences are not calibrated on validation clips: the network may be surer than it is right."
    else:
        told = f"Confidences are calibrated, on clips of one known word (temperature {reader.temperature:.2f})."
    if reader.threshold:
        told += f" Below {100 * reader.threshold:.1f} % a word counts as unknown: -"
    return told


def _table(path: Path | RemotePath, readings: Sequence["FaceReading"], reader: "Reader") -> Iterator[str]:
    """The lines for people: each utterance with its seconds, its word, and what else it may be."""
    from lipprep.train.utterances import utterances

    yield printable(path)
    for reading in readings:
        if len(readings) > 1:
            stop = reading.start + len(reading.points_TKD)
            yield f"  face {reading.face}, {reading.start / reader.fps:.2f} to {stop / reader.fps:.2f} s"
        said = utterances(reading.windows, fps=reader.fps)
        if not said:
            yield "  the face is seen too seldom to be read"
        width = max([8, *(len(printable(one.word or "-")) for one in said)])
        for one in said:
            yield "  " + _row(one.start, one.stop, one.word, one.words, width)


def _row(start: float, stop: float, word: str | None, words: "Words", width: int) -> str:
    listed = words if word is None else words[1:]
    others = ", ".join(f"{printable(other)} {100 * p:.1f}" for other, p in listed)
    line = f"{start:8.2f} {stop:8.2f}  {100 * words[0][1]:5.1f} %  {printable(word or '-'):{width}}"
    return f"{line}  ({others})" if others else line.rstrip()


def _json_lines(path: Path | RemotePath, readings: Sequence["FaceReading"], reader: "Reader") -> Iterator[str]:
    for reading in readings:
        for window in reading.windows:
            yield _json_line(str(path), reading.face, window, reader)


def _json_line(video: str, face: int, window: "WindowReading", reader: "Reader") -> str:
    """A window as a line for programs."""
    return json.dumps(
        {
            "video": video,
            "face": face,
            "from": round(window.start / reader.fps, 3),
            "to": round(window.stop / reader.fps, 3),
            "word": window.words[0][0] if window.known else None,
            "calibrated": reader.temperature is not None,
            "words": [{"word": word, "probability": probability} for word, probability in window.words],
        }
    )


def _print_live(name: str, windows: Iterable[tuple[int, "WindowReading"]], reader: "Reader", *, as_json: bool) -> None:
    """Print what a camera shows as it comes: a line where the word changes, or of each window for programs."""
    last: dict[int, str | None] = {}
    try:
        for face, window in windows:
            word = window.words[0][0] if window.known else None
            if as_json:
                click.echo(_json_line(name, face, window, reader))
            elif last.get(face, "") != word:
                row = _row(window.start / reader.fps, window.stop / reader.fps, word, window.words, 8)
                click.echo(f"  face {face} {row}" if len(last.keys() | {face}) > 1 else f"  {row}")
            last[face] = word
    finally:  # Ctrl-C is how it mostly ends
        if not last:
            click.echo(f"{name}: nothing was read, as no face was seen for a second or longer", err=True)


def _write(
    outputs: Mapping[str, Path | None],
    path: Path | RemotePath,
    readings: Sequence["FaceReading"],
    reader: "Reader",
    watched: Callable,
) -> None:
    """Write the pictures and subtitles that are asked for."""
    if (picture := outputs["--timeline"]) is not None:
        from lipprep.train.timeline import draw_timeline

        calibrated = reader.temperature is not None
        title = printable(path.name)
        draw_timeline(readings, picture, fps=reader.fps, title=title, threshold=reader.threshold, calibrated=calibrated)
    if (text := outputs["--subtitles"]) is not None:
        from lipprep.train.subtitles import write_subtitles
        from lipprep.train.utterances import utterances

        said = [one for reading in readings for one in utterances(reading.windows, fps=reader.fps)]
        write_subtitles(sorted(said, key=lambda one: one.start), text)
    if (copy := outputs["--video"]) is not None:
        from lipprep.train.subtitles import write_video

        write_video(path, readings, copy, fps=reader.fps, watched=watched)
