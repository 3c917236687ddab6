"""A small corpus in LRW's layout, to try everything on: a photograph that speaks ten words.

The photograph is real (scikit-image ships it), so the real detector finds its face. The lips follow tracks of
visemes, the mouth shapes of a word's sounds, and every clip has its own speaker, manner, head motion, light and
noise. What a clip shows depends on (seed, word, split, number) alone.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import av
import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.talker import CANVAS, LOOKS, SIZE, VISEMES, speak
from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.untrusted import is_file

FPS, FRAMES = 25, 29  # LRW's
NOISE = 2.0  # standard deviation, gray levels: as a camera's, and as dear to decode
SHARES = {"train": 4 / 6, "val": 1 / 6, "test": 1 / 6}
_CHANNEL = b"Channel: lipprep sample"  # in the .txt of each clip
MIN_CLIPS = 30  # one clip of every word in every split

# Words of LRW, spelt in visemes; "*" after one holds it twice as long.
WORDS = {
    "ABOUT": "K P AA* UW T",
    "BLACK": "P L EH* K",
    "FAMILY": "F EH P K L IY*",
    "HOUSE": "AA* UW* T",
    "PEOPLE": "P IY* P AO L",
    "SPEECH": "T P IY* CH*",
    "VOICE": "F AO* IY T",
    "WATER": "UW AO* T CH",
    "WOMEN": "UW K P IY T",
    "YOUNG": "IY UW AA* K",
}


def make_sample(out: Path, *, clips: int = 240, seed: int = 0, workers: int = 1) -> int:
    """Write a corpus of `clips` clips to `out` on `workers` processes; the same seed gives the same bytes.

    OUT/WORD/{train,val,test}/WORD_00001.mp4, 256x256 H.264 at 25 fps, 29 frames, each with LRW's .txt. Returns
    the number of clips. Raises ValueError for fewer than 30, and where `out` holds videos of another corpus.
    """
    from tqdm import tqdm

    from lipprep.pipeline.pool import WorkerDied, pool, run_all

    if clips < MIN_CLIPS:
        raise UserError(f"{clips} clips are too few: {MIN_CLIPS} give every split of the {len(WORDS)} words one")
    jobs = _shares(clips)
    if strangers := {*Path(out).rglob("*.mp4")} - {_video(Path(out), *job) for job in jobs}:
        raise UserError(f"{out} holds videos of another corpus (e.g. {min(strangers)}): name an empty folder")
    for job in jobs:
        video = _video(Path(out), *job)
        if video.exists() and not (is_file(text := video.with_suffix(".txt")) and _CHANNEL in text.read_bytes()):
            raise UserError(f"{video} is of another corpus, and is never replaced: name an empty folder")
    try:
        with pool(workers) as executor, tqdm(total=len(jobs), desc="sample", unit="clip") as bar:
            for _, done in run_all(executor, partial(_write, out.absolute(), seed), jobs, ahead=lambda: 2 * workers):
                done.result()
                bar.update()
    except WorkerDied as death:
        raise UserError(f"a worker process was killed ({death}): run `lipprep sample` again") from death
    return len(jobs)


def _write(out: Path, seed: int, job: tuple[str, str, int]) -> None:
    write_clip(out, seed, *job)


def _shares(clips: int) -> list[tuple[str, str, int]]:
    """(word, split, number) of every clip: words in turn, each split at least one clip of every word."""
    jobs = []
    for n, word in enumerate(WORDS):
        mine = clips // len(WORDS) + (n < clips % len(WORDS))
        held = {split: max(1, round(SHARES[split] * mine)) for split in ("val", "test")}
        for split, count in {"train": mine - sum(held.values()), **held}.items():
            jobs += [(word, split, number) for number in range(1, count + 1)]
    return jobs


def _video(out: Path, word: str, split: str, number: int) -> Path:
    return out / word / split / f"{word}_{number:05d}.mp4"


def write_clip(out: Path, seed: int, word: str, split: str, number: int) -> None:
    """Draw one clip and write its video and its .txt."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, number, *f"{word}/{split}".encode()])
    duration = round(float(rng.uniform(0.32, 0.64)), 2)
    frames = draw_clip(word, duration, rng)
    path = _video(out, word, split, number)
    with replacing(path) as file:
        _encode(file, frames)
    lines = (
        f"Disk reference: {rng.integers(10**18, 9 * 10**18)} ",
        f"{_CHANNEL.decode()} ",
        "Program start: 2000-01-01 00:00:00 +0000 ",
        f"Clip start: {rng.uniform(0, 1800):.2f} seconds ",
        f"Duration: {duration:.2f} seconds ",
    )
    write_text(path.with_suffix(".txt"), "\n".join(lines))


def _encode(file: BinaryIO, frames: Sequence[np.ndarray]) -> None:
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        # One thread: with more, the bytes depend on their number.
        stream.options = {"crf": "17", "preset": "veryfast", "x264-params": "threads=1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def word_track(word: str, duration: float, rng: np.random.Generator) -> np.ndarray:
    """The mouth's shape in every frame, (29, 5): the word in the middle, rest or a murmur before and after."""
    shapes, times = [], []
    spelling = [(v.rstrip("*"), 2.0 if v.endswith("*") else 1.0) for v in WORDS[word].split()]
    lengths = np.array([length for _, length in spelling]) * rng.uniform(0.85, 1.15, len(spelling))
    begin = FRAMES / FPS / 2 - duration / 2
    ends = begin + duration * np.cumsum(lengths) / lengths.sum()
    middles = (np.concatenate([[begin], ends[:-1]]) + ends) / 2
    manner = rng.uniform(0.85, 1.15)
    names = list(VISEMES)
    for side in (-1, 1):
        for distance in (0.16, 0.30, 0.44):
            time = FRAMES / FPS / 2 + side * (duration / 2 + distance)
            neighbour = np.array(VISEMES[names[rng.integers(len(names))]])
            share = 0.0 if distance == 0.16 else rng.uniform(0, 0.5)  # of another word, spoken more softly
            times.append(time)
            shapes.append((1 - share) * np.array(VISEMES["rest"]) + share * neighbour)
    for (name, _), time in zip(spelling, middles, strict=True):
        times.append(time + rng.normal(0, 0.008))
        shape = np.array(VISEMES[name]) * np.array([manner, 1, 1, 1, 1])
        shapes.append(shape + rng.normal(0, 0.04, 5) * (shape != 0))
    order = np.argsort(times)
    fine = np.arange(FRAMES * 4) / (FPS * 4)
    knots = np.array(times)[order]
    track = np.stack([np.interp(fine, knots, np.array(shapes)[order, n]) for n in range(5)], 1)
    # Co-articulation: a mouth does not turn corners. 0.035 s of smoothing keeps closures closed.
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / (0.035 * FPS * 4)) ** 2)
    padded = np.pad(track, ((12, 12), (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(padded[:, n], kernel / kernel.sum(), mode="valid") for n in range(5)], 1)
    return smooth[2::4]


def draw_clip(word: str, duration: float, rng: np.random.Generator) -> list[np.ndarray]:
    """29 frames (256, 256, 3) RGB uint8 of one speaker saying `word` for `duration` seconds."""
    look = int(rng.integers(len(LOOKS)))
    track = word_track(word, duration, rng)
    t = np.arange(FRAMES) / FPS
    motion = {
        name: size * np.sin(2 * np.pi * (rng.uniform(0.2, 0.9) * t + rng.uniform())) + rng.normal(0, 0.5 * size)
        for name, size in (("x", 3.0), ("y", 2.5), ("angle", 0.03), ("scale", 0.015))
    }
    light = 1 + 0.05 * np.sin(2 * np.pi * (rng.uniform(0.1, 0.6) * t + rng.uniform()))
    tilt = rng.uniform(-0.08, 0.08, 2)  # brighter on one side
    slope = np.linspace(-1, 1, SIZE)
    ramp = (1 + slope[:, None] * tilt[0] + slope * tilt[1]).astype(np.float32)[..., None]
    frames = []
    for n in range(FRAMES):
        face = speak(look, track[n])
        cos, sin = (1 + motion["scale"][n]) * np.array([math.cos(motion["angle"][n]), math.sin(motion["angle"][n])])
        turn = np.array([[cos, -sin], [sin, cos]])
        shift = np.array([SIZE / 2 + motion["x"][n], SIZE / 2 + motion["y"][n]]) - turn @ [CANVAS / 2, CANVAS / 2]
        frame = cv2.warpAffine(face, np.hstack([turn, shift[:, None]]), (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)
        noise = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * np.float32(NOISE)
        frames.append(np.clip(frame * (np.float32(light[n]) * ramp) + noise, 0, 255).astype(np.uint8))
    return frames
