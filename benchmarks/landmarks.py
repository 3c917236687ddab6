"""What cheaper ways to the landmarks of `mesh` would buy, and what they would cost in agreement (landmarks.md).

Every way is timed against the present one in the same run, clip by clip in turn. Agreement is that of the crops of
profile lrw2021. The clips are the sample corpus's and, where LIPPREP_GRID names a folder of GRID videos (Cooke et al.
2006), the middle 29 frames of some of those, as many of each speaker.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, zip_longest
from pathlib import Path
from unittest import mock

import click
import cv2
import numpy as np
import torch
from bench import FRAMES, corpus, decode, mesh_network
from variants import NETWORK, Alone, Frames, float_model, patches_seen, quantised, smaller_input, tracking, ways

from lipprep.stages.align import find_profile, mean_face, repair
from lipprep.stages.landmarks import track
from lipprep.stages.landmarks.facemesh import FaceMesh
from lipprep.stages.landmarks.mesh import IBUG_68, Mesh
from lipprep.stages.landmarks.torch_mesh import TorchMesh
from lipprep.stages.video import read_frames

CROP = 96


# The clips


def real_videos(root: Path, count: int) -> list[Path]:
    """`count` videos of a folder of GRID, from one speaker after the other."""
    by_speaker = defaultdict(list)
    for video in sorted((root / "video").rglob("*.mpg")):
        by_speaker[video.parent].append(video)
    turns = chain.from_iterable(zip_longest(*by_speaker.values()))
    return [video for video in turns if video is not None][:count]


def middle(video: Path) -> list[np.ndarray]:
    frames = [np.asarray(frame) for frame in read_frames(video)]
    first = max(0, (len(frames) - FRAMES) // 2)
    return frames[first : first + FRAMES]


def with_cuts(clips: list[Frames]) -> list[Frames]:
    """Clips whose second half shows the next clip's speaker, a third of the frame to the side."""
    cut = FRAMES // 2
    other = [[np.roll(frame, frame.shape[1] // 3, axis=1) for frame in clip[cut:]] for clip in clips]
    return [[*a[:cut], *b] for a, b in zip(clips, other[1:] + other[:1], strict=True)]


# Agreement


def patches_of(points: np.ndarray) -> np.ndarray:
    """Matrices (T, 3, 3) from the source into the crop of lrw2021, before its corner is rounded to whole pixels."""
    matrix, centre = find_profile("lrw2021").align(repair(points), mean_face())
    square = np.tile(np.eye(3), (len(points), 1, 1))
    square[:, :2] = matrix
    square[:, :2, 2] -= centre - CROP / 2
    return square


def differences(points: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far apart the centres (T,) of two crops lie, and what their scales move at the crop's border: pixels."""
    between = patches_of(points) @ np.linalg.inv(patches_of(present))
    middle_of_crop = np.array([CROP / 2, CROP / 2, 1])
    centre = np.linalg.norm((between @ middle_of_crop)[:, :2] - middle_of_crop[:2], axis=1)
    scale = np.sqrt(np.linalg.det(between[:, :2, :2])) - 1
    return centre, np.abs(scale) * CROP / 2


def jitter(points: np.ndarray, which: Sequence[int] | slice) -> float:
    """Mean second difference in pixels of the source."""
    return float(np.nanmean(np.linalg.norm(np.diff(points[:, which], n=2, axis=0), axis=2)))


def agreement(found: list[np.ndarray], present: list[np.ndarray]) -> dict:
    both = [(a, b) for a, b in zip(found, present, strict=True) if np.isfinite(a).any() and np.isfinite(b).any()]
    centre, scale = (np.concatenate(part) for part in zip(*(differences(a, b) for a, b in both), strict=True))
    return {
        "centre": float(centre.mean()),
        "centre_p95": float(np.percentile(centre, 95)),
        "scale": float(scale.mean()),
        "scale_p95": float(np.percentile(scale, 95)),
        "jitter_eyes": statistics.fmean(jitter(points, [36, 45]) for points in found),
        "jitter_mouth": statistics.fmean(jitter(points, slice(48, 68)) for points in found),
        "missed": int(sum(np.isnan(points).any(axis=(1, 2)).sum() for points in found)),
    }


# Time


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Wall and CPU seconds, (rounds, 2), of each call; every other round runs backwards."""
    seconds = {name: np.empty((rounds, 2)) for name in calls}
    for n in range(rounds):
        for name, call in list(calls.items())[:: 1 if n % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            seconds[name][n] = time.perf_counter() - wall, time.process_time() - cpu
    return seconds


def against(seconds: list[np.ndarray], present: list[np.ndarray]) -> dict:
    """Ratios to the present way of seconds (rounds, 2), one array for each clip.

    Medians over neighbours in time, of wall and CPU time, and the ratio of the least wall times, which other work on
    the machine disturbs least; and the median itself.
    """
    each, base = np.concatenate(seconds), np.concatenate(present)
    wall, cpu = np.median(each / np.maximum(base, 1e-9), axis=0)
    least = sum(taken[:, 0].min() for taken in seconds) / sum(taken[:, 0].min() for taken in present)
    return {"wall": float(wall), "cpu": float(cpu), "least": float(least), "ms": 1e3 * float(np.median(each[:, 0]))}


def tracking_ways(clips: list[Frames], rounds: int) -> dict[str, dict]:
    """Time and agreement of each way to track, the milliseconds for each frame."""
    candidates, seconds, found = ways(), defaultdict(list), defaultdict(list)
    for clip in clips:
        for name, way in candidates.items():
            found[name].append(way(clip))
        for name, taken in in_turn({n: partial(w, clip) for n, w in candidates.items()}, rounds).items():
            seconds[name].append(taken / len(clip))
    rows = {
        name: against(seconds[name], seconds["present"]) | agreement(found[name], found["present"])
        for name in candidates
    }
    port = [result.points for result in TorchMesh(device="cpu").track_clips(clips)]
    rows["torch port, all clips together"] = agreement(port, found["present"])
    return rows


def after_cuts(clips: list[Frames]) -> dict[str, int]:
    """Frames after a cut whose mouth is more than 5 pixels from where it is when tracking begins at the cut."""
    cut, wrong = FRAMES // 2, {}
    candidates = ways()
    for name in ("present", "no detector after the first frame"):
        wrong[name] = 0
        for clip in with_cuts(clips):
            expected = candidates["present"](clip[cut:])[:, 48:].mean(axis=1)
            off = np.linalg.norm(candidates[name](clip)[cut:, 48:].mean(axis=1) - expected, axis=1)
            wrong[name] += int((~(off < 5)).sum())
    return wrong


def whole_chain(videos: list[Path], rounds: int) -> dict[str, dict]:
    """Decoding and tracking against decoding and 30 bare invocations, milliseconds for each clip.

    `track` has some frames decoded in a row; frame by frame is without that, and a whole clip's frames are its limit.
    """
    network, mesh, seconds = mesh_network(), Mesh(), defaultdict(list)

    def one_by_one(video: Path) -> None:
        track(map(np.asarray, read_frames(video)), mesh)

    def frame_by_frame(video: Path) -> None:
        with mock.patch.object(tracking, "_AT_ONCE", 1):
            one_by_one(video)

    def decoded_first(video: Path) -> None:
        track([np.asarray(frame) for frame in read_frames(video)], mesh)

    for video in videos:
        calls = {
            "decoding": partial(decode, [video]),
            "30 bare invocations": lambda: [network.invoke() for _ in range(FRAMES + 1)],
            "decoding and tracking": partial(one_by_one, video),
            "the same, frame by frame": partial(frame_by_frame, video),
            "the clip decoded first, then tracked": partial(decoded_first, video),
        }
        for call in calls.values():
            call()
        for name, taken in in_turn(calls, rounds).items():
            seconds[name].append(taken)
    limit = [a + b for a, b in zip(seconds["decoding"], seconds["30 bare invocations"], strict=True)]
    return {name: against(taken, limit) for name, taken in seconds.items()}


@cache
def _clips_here(videos: tuple[Path, ...]) -> tuple[list[Frames], Mesh]:
    return [middle(video) for video in videos], Mesh()


def track_here(videos: tuple[Path, ...]) -> None:
    clips, mesh = _clips_here(videos)
    for clip in clips:
        track(clip, mesh)


def two_cores(videos: list[Path], rounds: int) -> dict[str, dict]:
    """One process, one process of two threads, and two processes, milliseconds for each clip."""
    halves = tuple(videos[::2]), tuple(videos[1::2])
    clips, two_threads = [middle(video) for video in videos], ways()["2 threads in the interpreter"]
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in halves]

        def two_processes() -> None:
            for future in [pool.submit(track_here, half) for pool, half in zip(pools, halves, strict=True)]:
                future.result()

        calls = {
            "1 process": lambda: track_here(tuple(videos)),
            "1 process, 2 threads": lambda: [two_threads(clip) for clip in clips],
            "2 processes": two_processes,
        }
        for call in calls.values():
            call()
        seconds = {name: taken / len(videos) for name, taken in in_turn(calls, rounds).items()}
    rows = {name: against([taken], [seconds["1 process"]]) for name, taken in seconds.items()}
    del rows["2 processes"]["cpu"]  # it is spent elsewhere
    return rows


# The network alone


def networks(clips: list[Frames], rounds: int) -> dict[str, dict]:
    """Time of the bare network, milliseconds for each picture, and what its points move in pixels of the patch.

    Judged on every other clip; int8 is calibrated on the clips between.
    """
    pictures = patches_seen(clips[1::2], 32)
    alone = {"shipped": Alone(model_path=str(NETWORK))}
    alone |= {f"shipped, batch {n}": Alone(batch=n, model_path=str(NETWORK)) for n in (4, 8, 16)}
    alone["one channel"] = Alone(channels=1, model_content=float_model(channels=1))
    alone |= {name: Alone(model_content=made) for name, made in quantised(patches_seen(clips[::2], 32)).items()}
    expected = alone["shipped"](pictures)
    moved = {name: np.linalg.norm(network(pictures) - expected, axis=2) for name, network in alone.items()}
    # As many pictures on every side.
    calls = {
        name: partial(lambda net: [net.interpreter.invoke() for _ in range(16 // net.batch)], network)
        for name, network in alone.items()
    }
    torch.set_num_threads(1)
    port = FaceMesh(NETWORK)
    gray = torch.from_numpy(pictures[..., 0])
    for batch in (1, 16):
        calls[f"torch port, batch {batch}"] = partial(
            lambda size: [port(part) for part in gray[:16].split(size)], batch
        )
        moved[f"torch port, batch {batch}"] = np.linalg.norm(port(gray)[0][:, IBUG_68].numpy() - expected, axis=2)
    for call in calls.values():
        call()
    seconds = {name: taken / 16 for name, taken in in_turn(calls, rounds).items()}
    return {
        name: against([taken], [seconds["shipped"]])
        | {"points": float(moved[name].mean()), "points_p95": float(np.percentile(moved[name], 95))}
        for name, taken in seconds.items()
    }


# The table

COLUMNS = {
    "wall": ("wall x", 3),
    "cpu": ("CPU x", 3),
    "least": ("least x", 3),
    "ms": ("ms", 2),
    "centre": ("centre", 3),
    "centre_p95": ("p95", 3),
    "scale": ("scale", 3),
    "scale_p95": ("p95", 3),
    "jitter_eyes": ("j eyes", 3),
    "jitter_mouth": ("j mouth", 3),
    "missed": ("missed", 0),
    "points": ("points", 4),
    "points_p95": ("p95", 4),
    "frames": ("frames", 0),
    "wrong": ("wrong", 0),
}


def show(title: str, rows: dict[str, dict]) -> None:
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    click.echo(f"\n{title}\n{'':42}" + "".join(f"{COLUMNS[c][0]:>9}" for c in columns))
    for name, row in rows.items():
        cells = (f"{row[c]:9.{COLUMNS[c][1]}f}" if c in row else f"{'-':>9}" for c in columns)
        click.echo(f"{name:42}" + "".join(cells))


def machine() -> dict[str, object]:
    """The machine in general terms, and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # /proc is Linux's
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    about = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    for name in ("ai-edge-litert", "ai-edge-quantizer", "av", "numpy", "opencv-python", "torch"):
        with contextlib.suppress(PackageNotFoundError):  # without the quantiser the rows of int8 are left out
            about[name] = version(name)
    return about


TWO = click.IntRange(2)  # int8 is calibrated on one and judged on another


@click.command()
@click.option("-n", "samples", type=TWO, default=8, show_default=True, help="Clips of the sample corpus.")
@click.option(
    "--real", type=TWO, default=12, show_default=True, help="Videos of the folder LIPPREP_GRID, if it is set."
)
@click.option("--rounds", default=5, show_default=True, help="How often each side is timed on each clip.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def main(samples: int, real: int, rounds: int, as_json: bool) -> None:
    """Time other ways to the landmarks, and say how far their crops are from the present ones."""
    cv2.setNumThreads(1)
    torch.set_grad_enabled(False)
    sample = corpus(60)[1][:samples]
    sets = {"sample corpus": sample}
    if os.environ.get("LIPPREP_GRID"):
        sets["real videos"] = real_videos(Path(os.environ["LIPPREP_GRID"]), real)
    figures: dict[str, dict] = {"machine": machine()}

    def table(name: str, unit: str, rows: dict[str, dict]) -> None:
        figures[name] = rows
        if not as_json:
            show(f"{name} ({unit})", rows)

    if not as_json:
        click.echo(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    table("The limit, sample corpus", "ms a clip; x: of the first two rows together", whole_chain(sample, rounds))
    for name, videos in sets.items():
        clips = [middle(video) for video in videos]
        table(
            f"Tracking, {len(clips)} clips, {name}",
            "ms a frame; pixels of the aligned frame, jitter of the source",
            tracking_ways(clips, rounds),
        )
        wrong = after_cuts(clips)
        rows = {way: {"frames": len(clips) * (FRAMES - FRAMES // 2), "wrong": count} for way, count in wrong.items()}
        table(f"After a cut, {name}", "frames whose mouth is more than 5 pixels off", rows)
    table("Two cores", "ms a clip", two_cores(videos, rounds))
    table("The network alone", "ms a picture; points in pixels of the patch", networks(clips, rounds))
    figures["half the input"] = smaller_input()
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(f"\nHalf the input's side: {figures['half the input']}")


if __name__ == "__main__":
    main()
