"""`make bench-grid`: the whole chain on real videos, through the command line, and the accuracy it reaches.

The videos are those of grid-subset.tsv (speaker, code, sha256), a part of the GRID corpus (Cooke et al. 2006),
in the folder LIPPREP_GRID. Three seeds on one split of sentences, then each of three speakers kept unseen.

`make bench-grid ARGS=augment` says what each augmentation contributes, and `ARGS=plateau` how many steps the published
networks need before they begin to learn, and `ARGS=models` what small networks reach in equal time; all keep what they
have, and go on with the rest when they are called again.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from lipprep.pipeline.records import read_entries
from lipprep.stages.shard.index import load_index

HERE = Path(__file__).parent
BUILD = Path("build/grid")
GROUPS = HERE / "grid-groups.txt"
SEEDS = (1, 2, 3)
UNSEEN = ("s2", "s3", "s5")


def lipprep(*arguments: object, threads: int | None = None) -> str:
    """Run one command; its output."""
    command = [sys.executable, "-m", "lipprep", *map(str, arguments)]
    click.echo("lipprep " + " ".join(command[3:]), err=True)
    env = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def check_videos(root: Path) -> None:
    """Refuse another set of videos: the figures would not compare."""
    listed = [line.split("\t") for line in (HERE / "grid-subset.tsv").read_text().splitlines()[1:]]
    for speaker, code, sha256 in listed:
        video = root / "video" / speaker / f"{code}.mpg"
        if not video.is_file() or hashlib.sha256(video.read_bytes()).hexdigest() != sha256:
            raise click.ClickException(f"{video} is missing or not the one of benchmarks/grid-subset.tsv")
    there = len(list((root / "video").rglob("*.mpg")))
    if there != len(listed):
        raise click.ClickException(f"{root} holds {there} videos where the subset has {len(listed)}")


def prepare(root: Path, name: str, *flags: object) -> tuple[Path, dict[str, dict]]:
    """Videos to shards; the shards and each stage's figures."""
    manifest, shards = BUILD / f"{name}.jsonl", BUILD / f"{name}-shards"
    lipprep("manifest", "grid", root, "-o", manifest, "--words", GROUPS, *flags)
    common = ("-m", manifest, "-w", BUILD / "work", "--json")
    figures = {
        "landmarks": json.loads(lipprep("landmarks", *common)),
        "crops": json.loads(lipprep("crops", *common)),
        "shards": json.loads(lipprep("shards", *common, "-o", shards)),
    }
    entries = [e for tar in (BUILD / "work" / name / "landmarks").glob("*.tar") for e in read_entries(tar)]
    frames = sum(e["figures"]["num_frames"] for e in entries)
    found = sum(round(e["figures"]["num_frames"] * e["figures"]["face_share"]) for e in entries)
    figures["landmarks"] |= {"frames": frames, "frames_without_face": frames - found}
    return shards, figures


def train_and_evaluate(shards: Path, name: str, seed: int, split: str) -> dict:
    """One training of `compact` with its defaults, and what it reaches on a split."""
    run = BUILD / f"run-{name.replace(' ', '-')}-{seed}"
    began = time.monotonic()
    lipprep("train", "--shards", shards, "--recipe", "compact", "--run", run, f"seed={seed}")
    minutes = (time.monotonic() - began) / 60
    results = json.loads(lipprep("evaluate", run, "--shards", shards, "--split", split, "--groups", GROUPS, "--json"))
    click.echo(f"{name} seed {seed}: top-1 {100 * results['top1']:.1f} % in {minutes:.1f} min", err=True)
    return {"name": name, "seed": seed, "minutes": round(minutes, 2), **results}


def percent(part: float, interval: list[float]) -> str:
    return f"{100 * part:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


_PLAIN = ["augment.erasing=0"]
_AFFINE = ("scale", "aspect", "rotation", "shift")
_TWICE = ["augment.scale=0.2", "augment.aspect=0.15", "augment.rotation=0.25", "augment.shift=0.12"]
AUGMENTATIONS = {
    "the recipe": [],
    "erasing 0.5": ["augment.erasing=0.5"],
    "erasing 0.5, and twice the scale, aspect, rotation and shift": ["augment.erasing=0.5", *_TWICE],
    "without erasing, as all below": _PLAIN,
    "without the mean frame subtracted": [*_PLAIN, "augment.subtract_mean_frame=false"],
    "without scale, aspect, rotation and shift": [*_PLAIN, *(f"augment.{n}=0" for n in _AFFINE)],
    "twice the scale, aspect, rotation and shift": [*_PLAIN, *_TWICE],
    "without flip and change of light": [*_PLAIN, "augment.flip=0", "augment.gain=0"],
    "with cutmix 1.0": [*_PLAIN, "augment.cutmix=1.0"],
    "with mixup 0.4": [*_PLAIN, "augment.mixup=0.4"],
    "with time mask 15": [*_PLAIN, "augment.time_mask=15"],
}
_RAW, _MEAN = ["augment.subtract_mean_frame=false"], ["augment.subtract_mean_frame=true"]
_FAST, _LATE, _TORCH = ["lr=2e-3", "warmup=0.05"], ["augment_after=400"], ["model.init=torch"]
PLATEAU = {
    "as published": _RAW,
    "lr 2e-3 with warm-up": [*_RAW, *_FAST],
    "weights as torch draws them": [*_RAW, *_TORCH],
    "nothing mixed or shortened yet": [*_RAW, *_LATE],
    "nothing mixed or shortened yet, lr 2e-3 with warm-up": [*_RAW, *_LATE, *_FAST],
    "mean frame": _MEAN,
    "mean frame, lr 2e-3 with warm-up": [*_MEAN, *_FAST],
    "mean frame, weights as torch draws them": [*_MEAN, *_TORCH],
    "mean frame, nothing mixed or shortened yet": [*_MEAN, *_LATE],
    "mean frame, nothing mixed or shortened yet, weights as torch draws them": [*_MEAN, *_LATE, *_TORCH],
}
_SMALL = ["model.head.channels=64", "model.head.num_layers=2"]
_DENSE = ["model.head.block_layers=[2,2]", "model.head.growth_rates=[48,48]", "model.head.reduced_channels=64"]
# With the recipe `compact` and its augmentation.
MODELS = {
    "compact trunk, compact head": [],
    "compact trunk, BiGRU": ["model.head.name=bigru", "model.head.hidden=128", "model.head.num_layers=1"],
    "compact trunk, transformer": ["model.head.name=transformer", *_SMALL, "model.head.num_heads=4"],
    "compact trunk, multi-scale TCN": ["model.head.name=mstcn", *_SMALL],
    "compact trunk, dense TCN": ["model.head.name=dctcn", *_DENSE],
}
_TOLD = ["model.boundary=mpc001", "augment.variable_length=false"]
WORDS = 26


def the_videos() -> Path:
    """The folder of the videos."""
    root = Path(os.environ["LIPPREP_GRID"])
    check_videos(root)
    BUILD.mkdir(parents=True, exist_ok=True)
    return root


def shards_of(root: Path, name: str, *flags: object) -> Path:
    """The shards of a name, made where they are not there."""
    there = BUILD / f"{name}-shards"
    return there if (there / "index.json").is_file() else prepare(root, name, *flags)[0]


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Run the chain on the GRID subset and print the figures as Markdown."""
    if context.invoked_subcommand is None:
        chain()


@main.command()
@click.option("--epochs", default=20, show_default=True)
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Trainings at a time, one thread each.")
def augment(epochs: int, jobs: int) -> None:
    """What each augmentation contributes to speakers who were never seen, with the recipe `compact`.

    All three speakers are kept unseen at once, so that one training is tried on all of their clips.
    """
    shards = shards_of(the_videos(), "without-" + "-".join(UNSEEN), "--unseen-speakers", ",".join(UNSEEN))

    def trial(name: str, seed: int) -> tuple[float, float]:
        run = BUILD / "augment" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        if not (run / "summary.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
            settings = [f"epochs={epochs}", f"seed={seed}", *AUGMENTATIONS[name]]
            lipprep("train", "--shards", shards, "--recipe", "compact", "--run", run, *settings, threads=1)
        unseen, seen = (
            json.loads(lipprep("evaluate", run / "last.pt", "--shards", shards, "--split", split, "--json", threads=1))
            for split in ("unseen", "test")
        )
        return 100 * unseen["top1"], 100 * seen["top1"]

    click.echo(f"| {epochs} epochs | unseen speakers | seen speakers, held-out sentences |\n|---|---|---|")
    with ThreadPoolExecutor(jobs) as pool:
        found = {name: [pool.submit(trial, name, seed) for seed in SEEDS[:2]] for name in AUGMENTATIONS}
        for name, trials in found.items():
            splits = zip(*(each.result() for each in trials), strict=True)
            parts = [f"{statistics.mean(s):.1f} % ({' / '.join(f'{each:.1f}' for each in s)})" for s in splits]
            click.echo(f"| {name} | {' | '.join(parts)} |")


@main.command()
@click.option("--recipe", "recipes", multiple=True, default=("lrw_snv05x_tcn1x", "lrw_resnet18_mstcn_prelu"))
@click.option("--steps", default=800, show_default=True, help="How many are tried before it is given up.")
@click.option("--every", default=25, show_default=True, help="Steps between two looks at the validation clips.")
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Trainings at a time, one thread each.")
def plateau(recipes: tuple[str, ...], steps: int, every: int, jobs: int) -> None:
    """How many steps a published network, trained from scratch, needs to three times chance on held-out sentences.

    It has come there at the first of two looks in a row.
    """
    shards = shards_of(the_videos(), "grid")

    def trial(recipe: str, name: str, seed: int) -> str:
        run = BUILD / "plateau" / f"{recipe}-{name.replace(' ', '-').replace(',', '')}-{seed}"
        settings = [*PLATEAU[name], f"seed={seed}", f"eval_every={every}", "epochs=100", "workers=0"]
        reached = train_until(shards, recipe, run, settings, top1=3 / WORDS, steps=steps)
        return str(reached or f"over {steps}")

    click.echo("| network | training | steps to 3 times chance, by seed |\n|---|---|---|")
    with ThreadPoolExecutor(jobs) as pool:
        rows = [(r, n, [pool.submit(trial, r, n, seed) for seed in SEEDS]) for r in recipes for n in PLATEAU]
        for recipe, name, trials in rows:
            click.echo(f"| `{recipe}` | {name} | {', '.join(each.result() for each in trials)} |")


@main.command()
@click.option("--minutes", default=6.0, show_default=True, help="Of training, of each network, on one core.")
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Trainings at a time, one thread each.")
def models(minutes: float, jobs: int) -> None:
    """What small networks reach in equal time, with and without word boundaries, and a student beside its teacher.

    How many epochs a network has follows from its speed, which is measured first, alone; the trainings may then share
    the machine with others, and come to the same.
    """
    shards = shards_of(the_videos(), "grid")
    folder = BUILD / f"models-{minutes:g}"
    speeds = folder / "speeds.json"
    settings = {(name, told): [*MODELS[name], *(_TOLD if told else [])] for name in MODELS for told in (False, True)}

    def speed(name: str) -> float:
        """Clips a second in training, the middle of three rehearsals."""
        args = ("train", "--shards", shards, "--recipe", "compact", "--dry-run", "--json", "workers=0", *MODELS[name])
        return statistics.median(json.loads(lipprep(*args, threads=1))["clips_per_s"] for _ in range(3))

    if not speeds.is_file():
        speeds.parent.mkdir(parents=True, exist_ok=True)
        speeds.write_text(json.dumps({name: speed(name) for name in MODELS}, indent=1))
    measured = json.loads(speeds.read_text())
    clips = sum(shard.samples for shard in load_index(shards).split("train"))

    def trial(name: str, told: bool, *more: str) -> dict:
        epochs = max(1, round(60 * minutes * measured[name] / clips))
        words = "-".join([*name.replace(",", "").split(), *(["told"] if told else []), *(["student"] if more else [])])
        run = folder / words
        if not (run / "summary.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
            how = [f"epochs={epochs}", "seed=1", "workers=0", *settings[name, told], *more]
            lipprep("train", "--shards", shards, "--recipe", "compact", "--run", run, *how, threads=1)
        results = json.loads(lipprep("evaluate", run, "--shards", shards, "--json", threads=1))
        parameters = json.loads((run / "summary.json").read_text())["parameters"]
        return results | {"epochs": epochs, "run": run, "parameters": parameters}

    columns = (
        "network | parameters | clips/s | epochs | without boundaries | told them | told in training, not in the test"
    )
    click.echo(f"| {columns} |")
    click.echo("|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(jobs) as pool:
        trials = {key: pool.submit(trial, *key) for key in settings}
        for name in MODELS:
            plain, told = (trials[name, each].result() for each in (False, True))
            untold = told["without_boundary"]
            figures = [percent(row["top1"], row["top1_interval95"]) for row in (plain, told, untold)]
            row = [name, f"{plain['parameters']:,}", f"{measured[name]:.0f}", plain["epochs"], *figures]
            click.echo(f"| {' | '.join(map(str, row))} |")
        teacher_name = max(MODELS, key=lambda name: trials[name, False].result()["top1"])
    teacher = trials[teacher_name, False].result()
    student = trial(next(iter(MODELS)), False, f"teacher={teacher['run']}")
    both = json.loads(lipprep("evaluate", teacher["run"], student["run"], "--shards", shards, "--json"))
    click.echo("\n| teacher, student | top-1 |\n|---|---|")
    for name, row in (
        (f"teacher: {teacher_name}", teacher),
        ("student: compact", student),
        ("both, an ensemble", both),
    ):
        click.echo(f"| {name} | {percent(row['top1'], row['top1_interval95'])} |")


def train_until(shards: Path, recipe: str, run: Path, settings: list[str], *, top1: float, steps: int) -> int | None:
    """Train until a validation accuracy is reached and kept; the step, None where it is not within `steps`."""
    metrics = run / "metrics.jsonl"

    def seen() -> list[dict]:
        text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [row for row in rows if row.get("split") == "val"]

    def verdict() -> tuple[bool, int | None]:
        rows = seen()
        hits = [
            a["step"] for a, b in itertools.pairwise(rows) if min(a["top1"], b["top1"]) >= top1 and a["step"] <= steps
        ]
        return bool(hits or (rows and rows[-1]["step"] >= steps)), hits[0] if hits else None

    over, step = verdict()
    if over:
        return step
    command = [sys.executable, "-m", "lipprep", "train", "--shards", shards, "--recipe", recipe, "--run", run]
    command += [*settings, "--resume", "auto"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=env)
    while training.poll() is None and not over:
        time.sleep(2)
        over, step = verdict()
    if training.poll() is None:
        training.send_signal(signal.SIGINT)
    if training.wait() not in (0, 130):
        raise click.ClickException(f"training {run} failed")
    return verdict()[1]


def chain() -> None:
    """Three seeds on held-out sentences, then three speakers unseen."""
    root = the_videos()
    shards, figures = prepare(root, "grid")
    runs = [train_and_evaluate(shards, "held-out sentences", seed, "test") for seed in SEEDS]
    for speaker in UNSEEN:
        without, _ = prepare(root, f"without-{speaker}", "--unseen-speakers", speaker)
        runs.append(train_and_evaluate(without, f"speaker {speaker} unseen", 1, "unseen"))
    (BUILD / "results.json").write_text(json.dumps({"stages": figures, "runs": runs}, indent=1))

    for stage, row in figures.items():
        click.echo(f"* {stage}: {row['ok']} of {row['planned']} clips, {row['clips_per_second']:.0f} clips/s")
    row = figures["landmarks"]
    click.echo(f"* frames without a face: {row['frames_without_face']} of {row['frames']}\n")
    click.echo("| test | seed | minutes | clips | top-1 (95 % interval) | within the word's group |")
    click.echo("|---|---|---|---|---|---|")
    for run in runs:
        group = run["all_groups"]
        click.echo(
            f"| {run['name']} | {run['seed']} | {run['minutes']:.1f} | {run['clips']} | "
            f"{percent(run['top1'], run['top1_interval95'])} | {percent(group['accuracy'], group['interval95'])} |"
        )
    seen = [r["top1"] for r in runs if r["name"].startswith("held")]
    unseen = [r["top1"] for r in runs if not r["name"].startswith("held")]
    click.echo(f"\nmean of the seeds: {100 * statistics.mean(seen):.1f} %")
    click.echo(f"mean of the unseen speakers: {100 * statistics.mean(unseen):.1f} %")


if __name__ == "__main__":
    main()
