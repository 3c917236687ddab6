"""What it costs to be large: a million clips in a manifest, a hundred thousand small ones made, more workers, engines.

Each part can be taken by itself: `python benchmarks/scale.py rows`, `clips`, `workers`, `engines`. Nothing else should
be running.
"""

import contextlib
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import av
import click
import numpy as np

from lipprep.pipeline.engines import Engine, open_cluster
from lipprep.pipeline.pool import pool, run_all

BUILD = Path("build/scale")
LINKS = 40_000  # to one file: file systems have a limit
SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}


def measured(*arguments: object) -> tuple[float, float]:
    """Seconds and the most memory, MB, of a command, by the system's own account of a child."""
    code = (
        "import resource, subprocess, sys, time; began = time.perf_counter();"
        "subprocess.run([sys.executable, '-m', 'lipprep', *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL,"
        "stderr=subprocess.DEVNULL); seconds = time.perf_counter() - began;"
        "print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True)
    seconds, peak = map(float, out.stdout.split())
    return seconds, peak


def small_video(path: Path, frames: int = 3, side: int = 32) -> Path:
    """A video that takes next to nothing to decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for n in range(frames):
            picture = np.full((side, side, 3), 40 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode())
    return path


def small_corpus(count: int) -> tuple[Path, Path]:
    """So many links to a small video, and the table that lists them."""
    folder, table = BUILD / f"videos-{count}", BUILD / f"clips-{count}.csv"
    if not table.exists():
        shutil.rmtree(folder, ignore_errors=True)
        with table.with_suffix(".tmp").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["video", "word", "split", "duration", "word_start", "word_end"])
            base = None
            for n in range(count):
                if n % LINKS == 0:
                    base = small_video(folder / f"base{n}.mp4")
                word, where = f"W{n % 500:03d}", n // 500 / max(1, count // 500)
                split = "train" if where < SPLITS["train"] else "val" if where < 1 - SPLITS["test"] else "test"
                path = folder / word / split / f"{word}_{n:07d}.mp4"
                if n < 500 * 3 or not path.parent.is_dir():
                    path.parent.mkdir(parents=True, exist_ok=True)
                os.link(base, path)
                out.writerow([path.relative_to(folder), word, split, 0.45, 0.355, 0.805])
        table.with_suffix(".tmp").rename(table)
    return folder, table


@click.group()
def main() -> None:
    """Time what grows with the corpus and with the machines."""
    BUILD.mkdir(parents=True, exist_ok=True)


@main.command()
@click.option("-n", "count", default=1_000_000, show_default=True)
def rows(count: int) -> None:
    """A manifest of very many rows: made, looked at; asked are 15 s and 1 GB each."""
    folder, table = small_corpus(count)
    manifest = BUILD / "rows.jsonl"
    for name, arguments in (
        ("manifest csv", ["manifest", "csv", table, "--root", folder, "-o", manifest]),
        ("status", ["status", "-m", manifest, "-w", BUILD / "work"]),
    ):
        runs = [measured(*arguments) for _ in range(3)]
        seconds, peak = statistics.median(s for s, _ in runs), max(p for _, p in runs)
        click.echo(f"{name:14} of {count} rows: {seconds:5.1f} s, {peak:4.0f} MB")


@main.command()
@click.option("-n", "counts", multiple=True, type=int, default=(1_000, 10_000, 100_000), show_default=True)
def clips(counts: tuple[int, ...]) -> None:
    """The cost of a clip and a worker's memory, over more and more clips: both should be flat."""
    for count in counts:
        folder, table = small_corpus(count)
        manifest, work, out = BUILD / f"clips-{count}.jsonl", BUILD / f"work-{count}", BUILD / f"shards-{count}"
        measured("manifest", "csv", table, "--root", folder, "-o", manifest)
        for path in (work, out):
            shutil.rmtree(path, ignore_errors=True)
        box = ["--profile", "fixed", "--box", "0,0,16,16"]
        seconds, peak = measured(
            "shards", "-m", manifest, "-w", work, "-o", out, *box, "--engine", "serial", "--codec", "npy"
        )
        status, _ = measured("status", "-m", manifest, "-w", work, "-o", out)
        click.echo(f"{count:7} clips: {1e3 * seconds / count:6.2f} ms a clip, {peak:4.0f} MB, status {status:5.2f} s")


@main.command()
@click.option("-n", "count", default=600, show_default=True, help="Clips of the sample corpus.")
@click.option("--rounds", default=3, show_default=True)
def workers(count: int, rounds: int) -> None:
    """How much faster two workers are than one, start-up and all: asked are 1.9."""
    videos, manifest = BUILD / f"sample-{count}", BUILD / f"sample-{count}.jsonl"
    measured("sample", videos, "-n", count)
    measured("manifest", "lrw", videos, "-o", manifest)
    ratios = []
    for _ in range(rounds):
        took = {}
        for number in (1, 2):
            work = BUILD / f"work-{number}"
            shutil.rmtree(work, ignore_errors=True)
            took[number], _ = measured("landmarks", "-m", manifest, "-w", work, "-j", number)
        ratios.append(took[1] / took[2])
        click.echo(f"landmarks of {count} clips: {took[1]:.1f} s by one worker, {took[2]:.1f} s by two")
    click.echo(f"two workers: {statistics.median(ratios):.2f} times the throughput of one")


@main.command()
@click.option("-n", "count", default=500, show_default=True, help="Tasks.")
@click.option("--seconds", default=1.0, show_default=True, help="That each takes.")
@click.option("-j", "workers", default=8, show_default=True, help="Worker processes; the tasks sleep.")
def engines(count: int, seconds: float, workers: int) -> None:
    """What handing out chunks costs on Dask, beside loky: asked is 5 % at most."""
    ideal = count * seconds / workers
    took = {}
    for name in ("loky", "dask"):
        with _open(name, workers) as (executor, ahead, result):
            for _ in run_all(executor, time.sleep, [0.0] * workers, ahead=lambda: workers):
                pass  # the workers are there, and have imported what they need
            began = time.perf_counter()
            for _, future in run_all(executor, time.sleep, [seconds] * count, ahead=ahead):
                result(future)
            took[name] = time.perf_counter() - began
        click.echo(
            f"{name}: {count} tasks of {seconds:g} s by {workers} workers in {took[name]:.2f} s ({ideal:.2f} s ideal)"
        )
    click.echo(f"dask / loky: {took['dask'] / took['loky']:.3f}")


@contextlib.contextmanager
def _open(name: str, workers: int) -> Iterator[tuple]:
    if name == "loky":
        with pool(workers) as executor:
            yield executor, partial(int, 2 * workers), Future.result
    else:
        with open_cluster(Engine(name, workers), BUILD) as cluster:
            yield cluster, cluster.ahead, cluster.result


if __name__ == "__main__":
    main()
