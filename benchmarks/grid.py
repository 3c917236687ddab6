"""`make bench-grid`: the whole chain on real videos, through the command line, and the accuracy it reaches.

The videos are those of grid-subset.tsv (speaker, code, sha256), a part of the GRID corpus (Cooke et al. 2006),
in the folder LIPPREP_GRID. Three seeds on one split of sentences, then each of three speakers kept unseen.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from lipprep.pipeline.records import read_entries

HERE = Path(__file__).parent
BUILD = Path("build/grid")
GROUPS = HERE / "grid-groups.txt"
SEEDS = (1, 2, 3)
UNSEEN = ("s2", "s3", "s5")


def lipprep(*arguments: object) -> str:
    """Run one command; its output."""
    command = [sys.executable, "-m", "lipprep", *map(str, arguments)]
    click.echo("lipprep " + " ".join(command[3:]), err=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


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


@click.command()
def main() -> None:
    """Run the chain on the GRID subset and print the figures as Markdown."""
    root = Path(os.environ["LIPPREP_GRID"])
    check_videos(root)
    BUILD.mkdir(parents=True, exist_ok=True)
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
