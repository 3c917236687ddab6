"""`make bench-predict`: how long `lipprep predict` takes for ten seconds of 720p, beside those ten seconds.

The video is made of the sample's clips, scaled to a face of 250 pixels. The network is `compact` with 500 words; its
weights are as they were drawn, which takes no less time than others. Nothing else should be running.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import av
import click
import cv2
import numpy as np
from scale import measured

from lipprep.pipeline.options import cores
from lipprep.stages.video import read_frames
from lipprep.train.checkpoint import BEST, Checkpoint, save_checkpoint
from lipprep.train.config import as_plain, load_recipe
from lipprep.train.device import new_model
from lipprep.train.predict import load_reader

BUILD = Path("build/bench-predict")
SECONDS, FPS, WIDTH, HEIGHT, SIDE = 10, 25, 1280, 720, 640
WORDS = 500
LIMIT = 10.0  # seconds for the whole command


def model(recipe: str) -> Path:
    """A run of untrained weights."""
    run = BUILD / recipe
    config = load_recipe(recipe)
    weights = new_model(config.model, num_classes=WORDS).state_dict()
    more = {"config": as_plain(config), "labels": [f"WORD{n}" for n in range(WORDS)], "fps": float(FPS), "dataset": ""}
    parameters = {"profile": config.profile or "lrw2021", "crop_size": 96}
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(weights, {}, step=0, epoch=0, batch=0, best=None, parameters=parameters, **more)
    save_checkpoint(run / BEST, checkpoint)
    return run


def video() -> Path:
    """Ten seconds of one face after another."""
    clips, path = BUILD / "clips", BUILD / "720p.mp4"
    if not clips.exists():
        measured("sample", clips, "-n", 30)
    faces = itertools.chain.from_iterable(read_frames(clip, color=True) for clip in sorted(clips.rglob("*.mp4")))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for face in itertools.islice(faces, SECONDS * FPS):
            frame = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
            frame[40 : 40 + SIDE, 320 : 320 + SIDE] = cv2.resize(face, (SIDE, SIDE))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))
    return path


def command(*arguments: object) -> tuple[float, float]:
    """Seconds that `lipprep predict` takes as a process of its own, and those of all cores together."""
    began, before = time.perf_counter(), os.times()
    words = [str(argument) for argument in arguments]
    subprocess.run([sys.executable, "-m", "lipprep", "predict", *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, busy


def reading(run: Path, path: Path, *, all_faces: bool) -> tuple[float, float]:
    """The same of reading alone, in a process that has started."""
    reader = load_reader(run, device="cpu")
    began, before = time.perf_counter(), time.process_time()
    reader.read_video(path, all_faces=all_faces, mouth_every=0)
    return time.perf_counter() - began, time.process_time() - before


@click.command()
@click.option("--recipe", default="compact", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="The figures are medians of so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def main(recipe: str, rounds: int, as_json: bool) -> None:
    """Time `lipprep predict`."""
    path, run = video(), model(recipe)
    given = (path, "--checkpoint", run, "--device", "cpu")
    ways = {
        "predict, all in all": lambda: command(*given),
        "predict --all-faces": lambda: command(*given, "--all-faces"),
        "predict --video --timeline": lambda: command(
            *given, "--video", BUILD / "out.mp4", "--timeline", BUILD / "out.png"
        ),
        "reading alone": lambda: reading(run, path, all_faces=False),
        "reading alone, all faces": lambda: reading(run, path, all_faces=True),
    }
    # seconds: {way: (on the clock, of all cores)}
    seconds = {}
    for name, way in ways.items():
        timed = [way() for _ in range(rounds)]
        seconds[name] = tuple(statistics.median(column) for column in zip(*timed, strict=True))
    if as_json:
        click.echo(json.dumps({"recipe": recipe, "cores": cores(), "load": os.getloadavg()[0], "seconds": seconds}))
        return
    click.echo(f"{SECONDS} s of {WIDTH}x{HEIGHT} at {FPS} fps, {recipe}, {cores()} cores")
    for name, (took, busy) in seconds.items():
        click.echo(f"{name:28} {took:6.2f} s, {busy:6.2f} s of a core, {SECONDS / took:5.2f} x real time")
    took = seconds["predict, all in all"][0]
    click.echo(f"predict takes {took:.2f} s: {'within' if took <= LIMIT else 'OVER'} its limit of {LIMIT:g} s")


if __name__ == "__main__":
    main()
