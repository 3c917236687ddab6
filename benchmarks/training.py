"""`make bench-train`: how fast clips are loaded, and how fast networks train and read, against what people do today.

All sides of a ratio are timed in the same run, in turn; the figure is the median of the rounds' ratios. Nothing else
should be running.
"""

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import click
import cv2
import networks
import numpy as np
import plain
import torch
from torch import nn
from torch.utils.data import DataLoader

from lipprep.stages.shard.codec import encode_mouth
from lipprep.stages.shard.index import Index, Shard, load_index, save_index
from lipprep.stages.shard.writer import TarWriter
from lipprep.train.config import load_recipe
from lipprep.train.config import recipes as known_recipes
from lipprep.train.device import choose_device, new_model, place
from lipprep.train.device import reading as reading_in
from lipprep.train.epoch import training_plan
from lipprep.train.loader import BatchLoader, ShardBatches
from lipprep.train.prepare import prepare
from lipprep.train.timing import PARTS, Clock, Waiting

BUILD = Path("build/bench-train")
CLIPS, FRAMES, SIDE, BATCH = 512, 29, 96, 32
WORDS = tuple(f"WORD{n:02d}" for n in range(26))
TRAINED = ("compact", "lrw_snv05x_tcn1x", "lrw_resnet18_mstcn_prelu")
READ_CLIPS, READ_WORDS, READ_SECONDS = 8, 500, 0.5  # of evaluation: a batch, LRW's words, the least that is timed


def mouths(count: int) -> Iterator[np.ndarray]:
    """Clips (29, 96, 96) that weigh as a JPEG what real mouth crops weigh, 63 to 66 KB: smooth shapes under grain."""
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.normal(0, 34, (12, 12)).astype(np.float32)
        still = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        frames = random.normal(0, 3.4, (FRAMES, SIDE, SIDE)) + 118
        for t, frame in enumerate(frames):
            frame += still
            cv2.ellipse(frame, (48, 52), (24, int(6 + 5 * np.sin(t / 3 + number))), 0, 0, 360, 60.0, -1)
        yield cv2.GaussianBlur(frames.transpose(1, 2, 0), (3, 3), 0.7).transpose(2, 0, 1).clip(0, 255).astype(np.uint8)


def make_shards(folder: Path, codec: str) -> Path:
    """One shard for training of CLIPS clips."""
    if (folder / "index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    name, offsets = "train-00000.tar", []
    with TarWriter(folder / name) as tar:
        for number, mouth in enumerate(mouths(CLIPS)):
            word = WORDS[number % len(WORDS)]
            extension, payload = encode_mouth(mouth, codec=codec)
            about = {"label": WORDS.index(word), "word": word, "duration": 0.4, "num_frames": FRAMES, "split": "train"}
            offsets.append(tar.offset)
            tar.add(f"{word}/train/{word}_{number:05d}.{extension}", payload)
            tar.add(f"{word}/train/{word}_{number:05d}.json", json.dumps(about).encode())
        offsets.append(tar.offset)
        tar.close()
        tar.publish()
    index = Index(
        dataset="bench",
        fingerprint=hashlib.sha256(tar.sha256.encode()).hexdigest(),
        labels=WORDS,
        fps=25.0,
        parameters={"profile": "lrw2021", "crop_size": SIDE, "codec": codec},
        failures={},
        shards=(Shard(name, "train", CLIPS, tar.bytes, tar.sha256),),
        offsets={name: np.array(offsets, np.int64)},
    )
    save_index(folder, index)
    return folder


def make_files(folder: Path) -> list[Path]:
    """The same clips, each in a compressed npz of its own."""
    paths = [folder / WORDS[n % len(WORDS)] / f"{n:05d}.npz" for n in range(CLIPS)]
    if not all(path.is_file() for path in paths):
        for path, mouth in zip(paths, mouths(CLIPS), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, data=mouth)
    return paths


def pin(cores: set[int]) -> None:
    """Keep this process, and what it starts from now on, on some cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def reading(loader: Callable[[], Iterable], cores: list[int]) -> float:
    """Clips a second through a loader whose one worker has a core to itself, once its first batches have come."""
    pin({cores[-1]})  # what is started now stays there
    batches = iter(loader())
    for _ in range(4):
        next(batches)
    pin(set(cores[:-1]) or set(cores))
    began, clips = time.perf_counter(), 0
    for batch in batches:
        video = batch["video"] if isinstance(batch, dict) else batch[0]
        clips += len(video)
    return clips / (time.perf_counter() - began)


def loaders(rounds: int) -> list[dict]:
    """Time the loaders against each other."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    files = make_files(BUILD / "npz")
    plans = {}
    for codec, epochs in (("jpeg", 3), ("npy", 10)):
        folder = make_shards(BUILD / codec, codec)
        batches = ShardBatches(folder, load_index(folder), "train")
        plan = [p for e in range(epochs) for p in training_plan(batches.counts, seed=1, epoch=e, batch_size=BATCH)]
        plans[codec] = batches, plan
    payloads = [cv2.imencode(".jpg", m.reshape(-1, SIDE), [cv2.IMWRITE_JPEG_QUALITY, 95])[1] for m in mouths(64)]

    def shards(codec: str) -> BatchLoader:
        return BatchLoader(*plans[codec], workers=1, pin_memory=False)

    def practice(augment: bool) -> DataLoader:
        data = plain.Files(files, list(WORDS), augment=augment)
        return DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=1, collate_fn=plain.collate, drop_last=True)

    def decoding() -> float:
        pin({cores[-1]})
        began = time.perf_counter()
        for payload in payloads:
            cv2.imdecode(payload, cv2.IMREAD_GRAYSCALE)
        return len(payloads) / (time.perf_counter() - began)

    sides = {
        "JPEG strips": lambda: reading(lambda: shards("jpeg"), cores),
        "raw": lambda: reading(lambda: shards("npy"), cores),
        "practice": lambda: reading(lambda: practice(True), cores),
        "practice, not augmented": lambda: reading(lambda: practice(False), cores),
        "decoding the strips alone": decoding,
    }
    turns = [{name: side() for name, side in sides.items()} for _ in range(rounds + 1)][1:]
    pin(set(cores))
    rows = []
    for name in sides:
        row = {"loader": name, "clips/s": round(statistics.median(t[name] for t in turns))}
        for other in ("practice", "practice, not augmented"):
            row[f"x {other}"] = round(statistics.median(t[name] / t[other] for t in turns), 2)
        rows.append(row)
    print_table(rows)
    return rows


def training(recipes: Iterable[str], rounds: int, steps: int) -> list[dict]:
    """Time the training of each recipe, in both precisions, against the plain loop over the same network."""
    shards, files = make_shards(BUILD / "jpeg", "jpeg"), make_files(BUILD / "npz")
    rows, parts_rows = [], []
    for recipe in recipes:
        sides: dict[str, Callable[[], tuple[float, float, dict]]] = {}
        for precision in ("auto", "fp32", "bf16"):
            config = load_recipe(recipe, [f"precision={precision}"])
            work = prepare(config, shards)
            if precision == "auto":
                chosen = work.config.resolved["precision"]
                clocked = work
            sides[precision] = ours(work, steps)
        sides["plain"] = theirs(load_recipe(recipe), files, steps)
        turns = [{name: side() for name, side in sides.items()} for _ in range(rounds + 1)][1:]
        row = {"recipe": recipe, "auto is": chosen}
        for name in sides:
            row[f"{name} clips/s"] = round(statistics.median(t[name][0] for t in turns), 1)
        for name in ("auto", "fp32", "bf16"):
            row[f"{name} / plain"] = round(statistics.median(t[name][0] / t["plain"][0] for t in turns), 2)
        row["waiting"] = f"{100 * statistics.median(t['auto'][1] for t in turns):.2f} %"
        rows.append(row)
        parts = timed_parts(clocked, steps)
        parts["sum"] = sum(parts.values())
        parts_rows.append({"recipe": recipe, **{f"{part}, ms": round(1e3 * s, 1) for part, s in parts.items()}})
        print_table(rows)
        print_table(parts_rows)
    return rows + parts_rows


def ours(work, steps: int) -> Callable[[], tuple[float, float]]:
    """Steps of the trainer as it trains, reader and all: clips a second, and the share of the time that it waits."""
    step = work.step()

    def run() -> tuple[float, float]:
        reader = {"workers": work.config.resolved["workers"], "pin_memory": work.device.type == "cuda"}
        untimed = until_running(reader["workers"])
        plan = [places[step.rows(0)] for places in work.plan(0)]
        plan = (plan * -(-(untimed + steps) // len(plan)))[: untimed + steps]
        loader = iter(BatchLoader(work.batches, plan, **reader))
        waiting = Waiting(work.device)
        for _ in range(untimed):
            step(next(loader), step=0, lr=1e-4)
        finish(work.device)
        began = time.perf_counter()
        for _ in range(steps):
            with waiting.for_batch():
                batch = next(loader)
            step(batch, step=0, lr=1e-4)
            waiting.step_done()
        finish(work.device)
        seconds = time.perf_counter() - began
        return steps * work.clips / seconds, waiting.take() / seconds

    return run


def theirs(config, files: list[Path], steps: int) -> Callable[[], tuple[float, float]]:
    """As many steps of the plain loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    network = networks.network(config.model, len(WORDS)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)
    workers = 0 if device.type == "cpu" else min(8, (os.cpu_count() or 2) - 1)
    options = config.augment
    like_ours = {"variable_length": options.variable_length, "subtract_mean_frame": options.subtract_mean_frame}
    data = plain.Files(files, list(WORDS), augment=True, **like_ours)

    def run() -> tuple[float, float]:
        # Its few clips are many epochs: to start the processes anew for each is not what is to be timed.
        reader = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": plain.collate}
        loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True, **reader)
        untimed = until_running(workers)
        batches = (batch for _ in range(untimed + steps) for batch in loader)
        for _ in range(untimed):
            plain.step(network, optimizer, next(batches), device, mixup=options.mixup)
        finish(device)
        began = time.perf_counter()
        for _ in range(steps):
            plain.step(network, optimizer, next(batches), device, mixup=options.mixup)
        finish(device)
        return steps * BATCH / (time.perf_counter() - began), 0.0

    return run


def until_running(workers: int) -> int:
    """How many steps go by until all processes that read have begun."""
    return 1 + 4 * workers


def timed_parts(work, steps: int) -> dict[str, float]:
    """Seconds of each part of a step."""
    step = work.step()
    reader = {"workers": work.config.resolved["workers"], "pin_memory": work.device.type == "cuda"}
    untimed = until_running(reader["workers"])
    plan = [work.plan(0)[0][step.rows(0)]] * (untimed + steps)
    loader = iter(BatchLoader(work.batches, plan, **reader))
    for _ in range(untimed):
        step(next(loader), step=0, lr=1e-4)
    step.clock = clock = Clock(work.device)
    for _ in range(steps):
        batch = next(loader)
        clock.mark("wait")
        step(batch, step=0, lr=1e-4)
    return {part: clock.seconds[part] / steps for part in PARTS}


def evaluation(recipes: Iterable[str], rounds: int) -> list[dict]:
    """Time how fast the network of each recipe reads, as lipprep builds and places it, against the plain one.

    Both in fp32 and with the same weights; recipes of one network share a row. Raises ClickException where the logits
    differ.
    """
    named: dict[str, list[str]] = {}
    for recipe in recipes:
        named.setdefault(json.dumps(load_recipe(recipe).model, sort_keys=True), []).append(recipe)
    device, rows = choose_device("auto"), []
    for model, names in named.items():
        sides = readers(json.loads(model), device)
        with torch.inference_mode(), reading_in(device, "fp32"):
            ours, theirs = (network() for network in sides)
            apart, wide = (ours - theirs).abs().max().item(), (theirs.max() - theirs.min()).item()
            if not apart <= 1e-3 * wide:
                raise click.ClickException(f"{names[0]}: the logits are up to {apart:g} apart, their range is {wide:g}")
            count = max(1, round(READ_SECONDS / timed(sides[0], 1, device)))
            turns = [[timed(network, count, device) for network in sides] for _ in range(rounds)]
        clips = count * READ_CLIPS
        rows.append(
            {
                "recipe": ", ".join(names),
                "clips/s": round(statistics.median(clips / turn[0] for turn in turns), 1),
                "plain clips/s": round(statistics.median(clips / turn[1] for turn in turns), 1),
                "ratio": round(statistics.median(turn[1] / turn[0] for turn in turns), 2),
            }
        )
        click.echo(" ".join(map(str, rows[-1].values())), err=True)
    print_table(rows)
    return rows


def readers(model: dict, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """The network of lipprep and the plain one, each with a batch to read."""
    torch.manual_seed(1)
    x_B1THW = torch.randn(READ_CLIPS, 1, FRAMES, plain.SIDE, plain.SIDE, device=device)
    boundary_BT1 = (torch.arange(FRAMES, device=device) // 10 == 1).float().expand(READ_CLIPS, FRAMES)[:, :, None]
    clips = x_B1THW, torch.full((READ_CLIPS,), FRAMES, device=device), boundary_BT1
    ours = place(new_model(model, num_classes=READ_WORDS), device, precision="fp32")
    # Norms with the statistics of what they normalise: else the numbers could grow, or fade to slow tiny ones.
    for module in ours.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        ours.train()(*clips)
    theirs = networks.network(model, READ_WORDS).to(device)
    theirs.load_state_dict(ours.state_dict())
    return [partial(network.eval(), *clips) for network in (ours, theirs)]


def timed(network: Callable[[], torch.Tensor], count: int, device: torch.device) -> float:
    """Seconds that a network takes to read its batch `count` times."""
    finish(device)
    began = time.perf_counter()
    for _ in range(count):
        network()
    finish(device)
    return time.perf_counter() - began


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_table(rows: list[dict]) -> None:
    """The rows as Markdown."""
    click.echo("| " + " | ".join(rows[0]) + " |")
    click.echo("|" + "---|" * len(rows[0]))
    for row in rows:
        click.echo("| " + " | ".join(map(str, row.values())) + " |")
    click.echo()


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often each side is timed.")
@click.option("--steps", type=int, help="Steps of training each time (default: 4, and 100 on a GPU).")
@click.option("--only", type=click.Choice(["loaders", "training", "evaluation"]), help="One part alone.")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help=f"What is trained and read (default: {', '.join(TRAINED)} are trained, and all are read).",
)
def main(rounds: int, steps: int | None, only: str | None, recipes: tuple[str, ...]) -> None:
    """Time loaders, training and evaluation against the common practice, and print tables."""
    cv2.setNumThreads(1)
    BUILD.mkdir(parents=True, exist_ok=True)
    if only in (None, "loaders"):
        loaders(rounds)
    if only in (None, "training"):
        training(recipes or TRAINED, rounds, steps or (100 if torch.cuda.is_available() else 4))
    if only in (None, "evaluation"):
        evaluation(recipes or known_recipes(), rounds)


if __name__ == "__main__":
    main()
