"""`make chaos`: break the pipeline on purpose, go on as its messages say, and compare the bytes.

A corpus is brought to shards once, undisturbed. A round takes its artefacts back to some moment before a stage,
runs the stage's command with one fault, runs it again, then the stages after it, and compares every tar of every
stage and the index with the undisturbed ones. What a round does is drawn from its seed alone; when exactly a fault
strikes is the system's to decide.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from chaos_kinds import KINDS
from chaos_scene import STAGES, Case, Corpus, Result, Scene, artefacts, digests
from tqdm import tqdm

CHUNK_SIZE = 6
SAMPLE_CLIPS = 48
GRID_SPEAKERS, GRID_VIDEOS = 2, 4  # six windows each: 48 clips


def lipprep(folder: Path, *arguments: object) -> str:
    """Run a command undisturbed; its output."""
    command = [sys.executable, "-m", "lipprep", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"lipprep {' '.join(command[3:])} failed undisturbed:\n{done.stderr}")
    return done.stdout


def copy_grid(grid: Path, videos: Path) -> None:
    """Copy a few videos of the GRID corpus, with their alignments."""
    speakers = 0
    for speaker in sorted((grid / "video").glob("*")):
        codes = [v.stem for v in sorted(speaker.glob("*.mpg")) if (grid / "align" / speaker.name).is_dir()]
        if len(codes) < GRID_VIDEOS or speakers == GRID_SPEAKERS:
            continue
        speakers += 1
        for kind, ending in (("video", "mpg"), ("align", "align")):
            (videos / kind / speaker.name).mkdir(parents=True)
            for code in codes[:GRID_VIDEOS]:
                name = f"{code}.{ending}"
                shutil.copy2(grid / kind / speaker.name / name, videos / kind / speaker.name / name)
    if speakers < GRID_SPEAKERS:
        raise click.ClickException(
            f"LIPPREP_GRID={grid} has no {GRID_SPEAKERS} speakers with {GRID_VIDEOS} videos each, as "
            "video/SPEAKER/CODE.mpg with align/SPEAKER/CODE.align"
        )


def make_videos(name: str, home: Path, *, grid: str | None, videos: Path | None) -> None:
    """Make or copy the videos of a corpus."""
    home.mkdir(parents=True)
    if name == "grid":
        copy_grid(Path(grid), home / "videos")
    elif videos is not None:
        shutil.copytree(videos, home / "videos")
    else:
        lipprep(home, "sample", "videos", "-n", SAMPLE_CLIPS)


def build_corpus(name: str, home: Path) -> None:
    """Bring the videos below `home` to shards, undisturbed."""
    kind = "grid" if name == "grid" else "lrw"
    lipprep(home, "manifest", kind, "videos", "-o", f"{name}.jsonl", "--chunk-size", CHUNK_SIZE)
    pace = {}
    for stage in STAGES:
        out = ("-o", "shards") if stage == "shards" else ()
        report = json.loads(lipprep(home, stage, "-m", f"{name}.jsonl", "-w", "work", "--json", *out))
        if report["ok"] != report["planned"]:
            raise click.ClickException(f"{stage} of corpus {name} failed undisturbed: {report['example']}")
        pace[stage] = report["seconds"] / report["chunks_made"]
    (home / "pace.json").write_text(json.dumps(pace))


def read_corpus(name: str, home: Path) -> Corpus:
    """A corpus that was built."""
    rows = [json.loads(line) for line in (home / f"{name}.jsonl").read_text().splitlines()[1:]]
    videos: dict[str, list[str]] = {}
    for row in rows:
        videos.setdefault(f"{row['split']}-{row['chunk']:05d}", []).append(row["video"])
    pace = json.loads((home / "pace.json").read_text())
    reference = {stage: digests(artefacts(home, name, stage)) for stage in STAGES}
    return Corpus(name, home, len(rows), videos, pace, reference, partial(lipprep, home))


def make_plan(seed: int, rounds: int, corpora: list[str], kinds: list[str], stages: list[str]) -> list[Case]:
    """The rounds: kinds of faults in turn, each with every stage, and every corpus, equally often."""
    rng = random.Random(seed)
    kinds, stages = rng.sample(kinds, len(kinds)), rng.sample(stages, len(stages))
    cases = []
    for n in range(rounds):
        turn, kind = divmod(n, len(kinds))
        stage = stages[(kind + turn) % len(stages)]
        cases.append(Case(n + 1, corpora[n % len(corpora)], kinds[kind], stage, rng.randrange(10**9)))
    return cases


def table(results: list[Result], kinds: list[str]) -> str:
    """What the rounds did and what came of them."""
    cases = [r.case for r in results]
    lines = [f"{'fault':12} {'rounds':>7} {'struck':>7} " + " ".join(f"{s:>10}" for s in STAGES)]
    for kind in kinds:
        mine = [r for r in results if r.case.kind == kind]
        by_stage = Counter(r.case.stage for r in mine)
        struck = sum(r.struck for r in mine)
        lines.append(f"{kind:12} {len(mine):7} {struck:7} " + " ".join(f"{by_stage[s]:10}" for s in STAGES))
    by_stage = Counter(c.stage for c in cases)
    struck = sum(r.struck for r in results)
    lines.append(f"{'all':12} {len(cases):7} {struck:7} " + " ".join(f"{by_stage[s]:10}" for s in STAGES))
    failed = sum((Counter(r.failed) for r in results), Counter())
    on_the_way = sum((Counter(r.failed_on_the_way) for r in results), Counter())
    stops = [r.stop_seconds for r in results if r.stop_seconds is not None]
    figures = {
        "corpora": ", ".join(f"{name} {count}" for name, count in sorted(Counter(c.corpus for c in cases).items())),
        "clips planned": sum(r.planned for r in results),
        "clips ok": sum(r.ok for r in results),
        "clips failed": ", ".join(f"{kind} {count}" for kind, count in sorted(failed.items())) or 0,
        "failed before the re-run": ", ".join(f"{k} {count}" for k, count in sorted(on_the_way.items())) or 0,
        "re-runs": f"{sum(r.reruns for r in results)}, at most {max(r.reruns for r in results)} a round",
        "slowest stop": f"{max(stops):.1f} s after the signal" if stops else "none",
        "differences": sum(len(r.differences) for r in results),
        "tracebacks": sum(r.tracebacks for r in results),
        "orphans": sum(r.orphans for r in results),
        "other problems": sum(len(r.problems) for r in results),
    }
    return "\n".join(["", *lines, "", *(f"{name:26}{value}" for name, value in figures.items())])


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=100, show_default=True, help="How many faults.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed plans other rounds.")
@click.option("--videos", type=click.Path(path_type=Path), help="A corpus in LRW's layout in place of the sample.")
@click.option("--only", type=click.Choice(list(KINDS)), help="Faults of this kind alone.")
@click.option("--stage", type=click.Choice(STAGES), help="Faults in this stage alone.")
@click.option("--corpus", "only_corpus", type=click.Choice(["sample", "grid"]), help="This corpus alone.")
@click.option("--round-seed", type=int, help="Of the one round that is to be repeated, as its failure names it.")
@click.option("--build", type=click.Path(path_type=Path), default=Path("build/chaos"), show_default=True)
@click.option("--stop-seconds", type=float, default=5.0, show_default=True, help="A signal must end a command in this.")
def main(
    rounds: int,
    seed: int,
    videos: Path | None,
    only: str | None,
    stage: str | None,
    only_corpus: str | None,
    round_seed: int | None,
    build: Path,
    stop_seconds: float,
) -> None:
    """Break the pipeline on purpose, many times, and compare its bytes with those of an undisturbed run.

    With LIPPREP_GRID (a folder with video/SPEAKER/CODE.mpg and align/SPEAKER/CODE.align) every other round is
    over real videos.
    """
    if round_seed is not None and not (rounds == 1 and only and stage):
        raise click.UsageError("--round-seed repeats one round: give --rounds 1, --only and --stage with it")
    grid = os.environ.get("LIPPREP_GRID")
    corpora = [only_corpus] if only_corpus else ["sample", "grid"] if grid else ["sample"]
    if "grid" in corpora and not (grid and Path(grid, "video").is_dir()):
        raise click.UsageError("there are no GRID videos: LIPPREP_GRID must name a folder with video/SPEAKER/CODE.mpg")
    kinds = [only] if only else list(KINDS)
    cases = make_plan(seed, rounds, corpora, kinds, [stage] if stage else list(STAGES))
    if round_seed is not None:
        cases = [Case(1, cases[0].corpus, only, stage, round_seed)]
    click.echo(f"seed {seed}, {len(cases)} rounds, corpora: {', '.join(corpora)}")
    build = build.resolve()
    shutil.rmtree(build, ignore_errors=True)
    began = time.monotonic()
    built = {}
    for name in dict.fromkeys(c.corpus for c in cases):
        make_videos(name, build / name, grid=grid, videos=videos)
        build_corpus(name, build / name)
        built[name] = read_corpus(name, build / name)
    results = []
    for case in (bar := tqdm(cases, desc="chaos", unit="round")):
        bar.set_postfix_str(f"{case.kind} in {case.stage} of {case.corpus}")
        with Scene(case, built[case.corpus], build / f"round-{case.number:03d}", stop_seconds=stop_seconds) as scene:
            result = scene.play(KINDS[case.kind])
        results.append(result)
        with (build / "rounds.jsonl").open("a") as log:
            log.write(json.dumps(asdict(result)) + "\n")
        for trouble in result.troubles:
            bar.write(f"round {case.number}: {trouble}")
        if result.troubles:
            bar.write(
                f"  look into {scene.folder}, or repeat it: python tests/chaos.py --rounds 1 --only {case.kind} "
                f"--stage {case.stage} --corpus {case.corpus} --round-seed {case.seed}"
            )
        else:
            shutil.rmtree(scene.folder)
    click.echo(table(results, kinds))
    bad = sum(bool(r.troubles) for r in results)
    click.echo(
        f"\n{len(results) - bad} of {len(results)} rounds in order, seed {seed}, {time.monotonic() - began:.0f} s"
    )
    # A fault that never strikes proves nothing; one that comes too late now and then is the nature of faults.
    planned = Counter(c.kind for c in cases)
    idle = [k for k in kinds if planned[k] > 3 and not any(r.struck for r in results if r.case.kind == k)]
    if idle:
        click.echo(f"never struck: {', '.join(idle)}")
    sys.exit(1 if bad or idle else 0)


if __name__ == "__main__":
    main()
