"""`make bench`: the speed of the stages against their lower bounds and the common practice, and a worker's memory.

All sides of a ratio are timed in the same run, in turn, in this one process on one core, on the same clips; the figure
is the median of the rounds' ratios, and not the ratio of the medians. Nothing else should be running.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import click
import cv2
import msgspec
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from practice import crop as crop_as_usual

from lipprep.pipeline import chunk, stock
from lipprep.pipeline.chunk import run_job
from lipprep.pipeline.manifest import load_manifest, save_manifest
from lipprep.pipeline.options import cores
from lipprep.pipeline.plan import Layout, survey
from lipprep.pipeline.run import make_jobs
from lipprep.pipeline.sample import make_sample
from lipprep.pipeline.sources import lrw, make_manifest
from lipprep.pipeline.wanted import Wanted
from lipprep.stages import atomic
from lipprep.stages.crop import CropParameters, Window, crop_clips
from lipprep.stages.shard import writer
from lipprep.stages.shard.codec import encode_mouth, npy_array
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.video import read_frames

BUILD = Path("build/bench")
ROUNDS = 5
FRAMES = 29
LRW = 538_766  # clips
DECODING, CROPS, LANDMARKS = "decoding alone", "crop stage", "landmark stage"
LIMIT, PRACTICE = "decoding, 30 invocations", "common practice for crops"


def decode(videos: list[Path]) -> None:
    """What any reader must do: PyAV, one thread, the luma plane touched."""
    for video in videos:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for frame in container.decode(stream):
                np.frombuffer(frame.planes[0], np.uint8)[:1]


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def mesh_network() -> Interpreter:
    """The mesh network alone, on one thread."""
    network = Interpreter(str(files("lipprep.stages") / "data" / "face_landmarks_detector.tflite"), num_threads=1)
    network.allocate_tensors()
    return network


def run_stage_here(stage: str, manifest_path: Path, work: Path, wanted: Wanted) -> None:
    """One stage over all chunks in this process, from nothing."""
    manifest, layout = load_manifest(manifest_path), Layout(work, work / "shards")
    shutil.rmtree(layout.folder(stage), ignore_errors=True)
    chunks = [c for c in survey(manifest, layout, wanted) if c.stage == stage]
    for job in make_jobs(stage, manifest, layout, wanted, chunks):
        run_job(job)


class _NoJournal:
    """Stands in for the journal where its cost is left out."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "_NoJournal":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def working(self, *_: object) -> None:
        pass

    reading = clock = working

    def rest(self) -> None:
        pass

    def done(self, *_: object) -> None:
        pass


class _NoHash:
    """Stands in for sha256 where its cost is left out."""

    def update(self, _: bytes) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


@contextlib.contextmanager
def without_safety() -> Iterator[None]:
    """Leave out records, journals, hashing and fsync: what the promises cost is the difference."""

    def publish(tar: writer.TarWriter, header: dict, _: object) -> dict:
        tar.publish()
        return header

    with contextlib.ExitStack() as patches:
        for module, name, stand_in in (
            (chunk, "commit", publish),
            (chunk, "Journal", _NoJournal),
            (chunk, "crc32", lambda _: 0),
            (chunk, "digest", lambda _: ""),
            (stock, "file_digest", lambda tar: stock.read_header(tar)["tar"]["sha256"]),
            (writer, "sync", lambda file: file.flush()),
            (atomic, "fsync_folder", lambda _: None),
            (writer, "hashlib", SimpleNamespace(sha256=_NoHash)),
        ):
            patches.enter_context(mock.patch.object(module, name, stand_in))
        yield


def peak_memory(stage: str, manifest_path: Path, work: Path) -> float:
    """The peak of a process that runs one stage over a manifest, MB."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import bench; from pathlib import Path;"
        f"bench.run_stage_here({stage!r}, Path({str(manifest_path)!r}), Path({str(work)!r}), bench.Wanted());"
        "bench.print_peak()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak() -> None:
    """Print this process's peak memory, MB. Linux hands a parent's ru_maxrss down, so its own count comes first."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
        click.echo(int(peak) / 1024)
    else:
        import resource

        click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)  # macOS counts bytes


def corpus(clips: int) -> tuple[Path, list[Path]]:
    """A manifest of the sample corpus's first `clips` clips, and their videos."""
    videos = BUILD / "videos"
    if len(list(videos.rglob("*.mp4"))) < clips:
        shutil.rmtree(videos, ignore_errors=True)
        make_sample(videos, clips=clips, workers=cores())
    path = BUILD / f"sample{clips}.jsonl"
    rows = sorted(lrw(videos), key=lambda r: r.video.rpartition("_")[2])[:clips]
    made = make_manifest(path, [msgspec.structs.replace(r, split="train") for r in rows], root=videos)
    # One chunk, as LRW's are of 512 clips: what a chunk costs once is not spread over two or three clips.
    save_manifest(dataclasses.replace(made, clips=tuple(msgspec.structs.replace(c, chunk=0) for c in made.clips)))
    return path, [videos / r.video for r in rows]


def ratios(rounds: int, below: Callable[[], float], stage: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of the lower bound, the stage, and the ratio of neighbours in time, after one round to warm up."""
    pairs = [(below(), stage()) for _ in range(rounds + 1)][1:]
    return (
        statistics.median(b for b, _ in pairs),
        statistics.median(s for _, s in pairs),
        statistics.median(s / b for b, s in pairs),
    )


@click.command()
@click.option("-n", "clips", default=60, show_default=True, help="Clips of the sample corpus.")
@click.option("--rounds", default=ROUNDS, show_default=True, help="How often each side is timed.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def main(clips: int, rounds: int, as_json: bool) -> None:
    """Time the stages against their lower bounds and print each figure beside its limit."""
    cv2.setNumThreads(1)
    manifest, videos = corpus(clips)
    if hasattr(os, "sched_setaffinity"):  # what reads ahead is to share the core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    smaller, _ = corpus(max(clips // 3, 1))
    wanted, work = Wanted(), BUILD / "work"
    run_stage_here("landmarks", manifest, work, wanted)
    network = mesh_network()

    def decoding() -> float:
        return timed(lambda: decode(videos)) / clips

    def decoding_and_mesh() -> float:
        invocations = timed(lambda: [network.invoke() for _ in range(200)]) / 200
        return decoding() + (FRAMES + 1) * invocations

    def stage(name: str) -> float:
        return timed(lambda: run_stage_here(name, manifest, work, wanted)) / clips

    figures = []

    def figure(name: str, value: float, limit: float, unit: str, detail: str, *, least: bool = False) -> None:
        figures.append({"figure": name, "value": round(value, 3), "limit": limit, "unit": unit, "detail": detail})
        if not as_json:
            verdict = "ok" if (value >= limit if least else value <= limit) else "MISSED"
            told = f"{'at least' if least else 'at most':8} {limit:6.2f}  {verdict:6}"
            click.echo(f"{name:46} {value:8.2f} {unit:3} {told}  {detail}")

    marks = landmarks_of(work, manifest)
    practice_out = BUILD / "practice"

    def practice() -> float:
        return timed(lambda: [crop_as_usual(v, p, practice_out / f"{v.stem}.npz") for v, p in marks.items()]) / clips

    def cutting_in_passing() -> float:
        shutil.rmtree(work / "crops", ignore_errors=True)
        return stage("shards")

    def encoding() -> float:
        return timed(lambda: store_strips(mouths, BUILD / "strips.tar")) / clips

    mouths = mouths_of(marks)
    sides = {
        DECODING: decoding,
        CROPS: lambda: stage("crops"),
        "JPEG strips and their tar": encoding,
        "shards, cut in passing": cutting_in_passing,
        PRACTICE: practice,
        LIMIT: decoding_and_mesh,
        LANDMARKS: lambda: stage("landmarks"),
    }
    turns = [{name: side() for name, side in sides.items()} for _ in range(rounds + 1)][1:]  # one to warm up
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}

    def ratio(above: str, below: str) -> float:
        return statistics.median(turn[above] / turn[below] for turn in turns)

    table = [
        {
            "": name,
            "ms a clip": f"{1e3 * seconds[name]:.2f}",
            "clips/s a core": f"{1 / seconds[name]:.1f}",
            "x decoding": f"{ratio(name, DECODING):.2f}",
            "x faster than practice": f"{ratio(PRACTICE, name):.1f}",
            "core-hours for LRW": f"{seconds[name] * LRW / 3600:.1f}",
        }
        for name in sides
    ]
    if not as_json:
        click.echo("  ".join(f"{name:>16}" if name else " " * 28 for name in table[0]))
        for row in table:
            click.echo(
                "  ".join(f"{cell:>{max(16, len(name))}}" if name else f"{cell:28}" for name, cell in row.items())
            )
        if seconds[DECODING] < 0.005:
            click.echo("    (these clips decode in under 5 ms: the ratios say little)")
        click.echo()
    for name, above, below, limit in (
        ("crop stage / decoding", CROPS, DECODING, 1.25),
        ("landmark stage / (decoding + 30 mesh)", LANDMARKS, LIMIT, 1.2),
        ("common practice / crop stage", PRACTICE, CROPS, 12.0),
    ):
        both = f"{1e3 * seconds[above]:.1f} ms / {1e3 * seconds[below]:.1f} ms a clip"
        figure(name, ratio(above, below), limit, "x", both, least=above == PRACTICE)

    def unsafe_crops() -> float:
        with without_safety():
            return stage("crops")

    lower, upper, safety = ratios(rounds, unsafe_crops, lambda: stage("crops"))
    both = f"{1e3 * upper:.1f} ms / {1e3 * lower:.1f} ms a clip"
    figure("crop stage / without records, hashes, fsync", safety, 1.03, "x", both)
    for name in ("landmarks", "crops", "shards"):
        few, many = (peak_memory(name, path, BUILD / f"work-{path.stem}") for path in (smaller, manifest))
        figure(f"memory of a worker, {name}", many, 600, "MB", f"{few:.0f} MB after a third of the clips")
    if as_json:
        click.echo(json.dumps({"seconds a clip": seconds, "figures": figures}))


def landmarks_of(work: Path, manifest_path: Path) -> dict[Path, np.ndarray]:
    """The landmarks (T, 68, 2) of each video, by its path, as the landmark stage has made them."""
    manifest, found = load_manifest(manifest_path), {}
    for tar in (work / "landmarks").glob("*.tar"):
        with TarMembers(tar) as members:
            for clip in manifest.clips:
                found[manifest.root / clip.video] = npy_array(members.read(f"{clip.key}.landmarks.npy"))
    return found


def mouths_of(marks: dict[Path, np.ndarray]) -> list[np.ndarray]:
    """The mouth crops (T, 96, 96) of each video."""
    parameters = CropParameters()
    return [crop_clips(read_frames(v), [Window(None, len(p), p)], parameters)[0].mouth for v, p in marks.items()]


def store_strips(mouths: list[np.ndarray], out: Path) -> None:
    """Encode mouth crops and write them to a tar."""
    with writer.TarWriter(out) as tar:
        for n, mouth in enumerate(mouths):
            extension, payload = encode_mouth(mouth)
            tar.add(f"{n}.{extension}", payload)
        tar.close()
        tar.publish()


if __name__ == "__main__":
    main()
