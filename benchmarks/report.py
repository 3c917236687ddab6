"""`make bench-report`: how long a report takes to write, and its page to open in Chromium.

The corpus is a few clips of the sample many times over, each with figures of its own: what is timed reads records and
single clips, whatever made them. Nothing else should be running.
"""

import itertools
import os
import shutil
import statistics
import time
from pathlib import Path

import click
import numpy as np
from scale import measured

from lipprep.pipeline.manifest import Clip, load_manifest, save_manifest
from lipprep.pipeline.plan import Layout, survey
from lipprep.pipeline.records import commit, read_entries
from lipprep.pipeline.run import make_jobs
from lipprep.pipeline.sources import Row, make_manifest
from lipprep.pipeline.wanted import read_wanted, write_wanted
from lipprep.stages.shard.reader import read_members
from lipprep.stages.shard.writer import TarWriter

BUILD = Path("build/bench-report")
STAGES = ("landmarks", "shards")
VARIED = ("face_size", "jitter", "rotation", "centre_x", "centre_y", "scale", "brightness", "sharpness", "movement")


def base(count: int) -> tuple[list[Clip], dict]:
    """Clips of the sample with their entries and members by stage, made as users make them."""
    videos, manifest, work, shards = (BUILD / name for name in ("base", "base.jsonl", "work", "base-shards"))
    if not (shards / "index.json").exists():
        measured("sample", videos, "-n", count)
        measured("manifest", "lrw", videos, "-o", manifest)
        measured("landmarks", "-m", manifest, "-w", work)
        measured("shards", "-m", manifest, "-w", work, "-o", shards)
    listed, layout = load_manifest(manifest), Layout((work / "base").absolute(), shards.absolute())
    made: dict = {}
    for stage in STAGES:
        for split, number in listed.chunks():
            tar = layout.tar(stage, split, number)
            for entry in read_entries(tar):
                names = [f"{entry['key']}.{extension}" for extension in entry["members"]]
                made[stage, entry["key"]] = entry, read_members(tar, entry["offset"], names)
    return list(listed.clips), made


def enlarge(count: int, words: int, sample: int) -> Path:
    """A manifest of `count` clips of so many words, with landmarks and shards that are fresh."""
    name = f"clips-{count}"
    path, work, shards = BUILD / f"{name}.jsonl", BUILD / "work" / name, BUILD / f"shards-{count}"
    if (shards / "done").exists():
        return path
    for folder in (work, shards, BUILD / name):
        shutil.rmtree(folder, ignore_errors=True)
    clips, made = base(sample)
    rows, of = [], {}
    for n, clip in zip(range(count), itertools.cycle(clips)):
        word = f"W{n % words:03d}"
        video = f"{word}/train/{word}_{n:06d}.mp4"
        link = BUILD / name / video
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(BUILD / "base" / clip.video, link)
        of[video] = clip.key
        rows.append(Row(video=video, word=word, split="train", speaker=f"s{n % 40}"))
    listed = make_manifest(path, rows, root=BUILD / name)
    save_manifest(listed)
    layout, rng = Layout(work.absolute(), shards.absolute()), np.random.default_rng(0)
    wanted = read_wanted(BUILD / "work/base/plan.yaml")
    write_wanted(layout.plan, wanted)
    for stage in STAGES:
        chunks = survey(listed, layout, wanted, (stage,))
        for chunk, job in zip(chunks, make_jobs(stage, listed, layout, wanted, chunks), strict=True):
            with TarWriter(chunk.tar, "bench") as tar:
                entries = []
                for clip in chunk.clips:
                    entry, payloads = made[stage, of[clip.video]]
                    figures = dict(entry["figures"])
                    for figure in VARIED:
                        if isinstance(figures.get(figure), float):
                            figures[figure] = round(figures[figure] * float(rng.normal(1, 0.03)), 3)
                    if "motion" in figures:  # else all would be copies of each other
                        figures["motion"] = rng.bytes(16).hex()
                    entries.append({**entry, "key": clip.key, "offset": tar.offset, "figures": figures})
                    for extension, payload in zip(entry["members"], payloads, strict=True):
                        tar.add(f"{clip.key}.{extension}", payload)
                end = tar.offset
                tar.close()
                header = {**job.header, "attempt": "bench", "computed": 0, "end": end, "parts": {"write": 1.0}}
                if stage == "landmarks":
                    header |= {"content": "", "absent": [], "failed": ""}
                commit(tar, header, entries)
    (shards / "done").touch()
    return path


def opened(page: Path, rounds: int) -> list[float] | None:
    """Seconds until a page is loaded, each time in a new profile; None where no browser can be driven."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    chromium = os.environ.get("PLAYWRIGHT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        took = []
        for _ in range(rounds):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            tab = context.new_page()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            # After two frames what is seen first has been painted.
            took.append(
                tab.evaluate(
                    "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done("
                    "performance.timeOrigin + performance.now() - performance.timing.navigationStart))))"
                )
                / 1e3
            )
            context.close()
        browser.close()
    return took


@click.command()
@click.option("-n", "count", default=10_000, show_default=True, help="Clips.")
@click.option("--words", default=500, show_default=True)
@click.option("--sample", default=60, show_default=True, help="Clips of the sample that are repeated.")
@click.option("--rounds", default=3, show_default=True)
def main(count: int, words: int, sample: int, rounds: int) -> None:
    """Time `lipprep report`; asked are 60 s for 10,000 clips on two cores, and 2 s to open its page."""
    BUILD.mkdir(parents=True, exist_ok=True)
    manifest, page = enlarge(count, words, sample), BUILD / f"report-{count}.html"
    where = ("-m", manifest, "-w", BUILD / "work", "--shards", BUILD / f"shards-{count}")
    runs = [measured("report", *where, "-o", page) for _ in range(rounds)]
    seconds, peak = statistics.median(s for s, _ in runs), max(p for _, p in runs)
    click.echo(f"report of {count} clips of {words} words: {seconds:.1f} s, {peak:.0f} MB of memory, asked 60 s")
    click.echo(f"the page: {page.stat().st_size / 1e6:.1f} MB, asked 10 MB")
    began = time.perf_counter()
    took = opened(page, rounds)
    if took is None:
        click.echo("playwright is not installed, so no browser was timed: `make test-browser` installs it")
    else:
        click.echo(
            f"Chromium opens it in {statistics.median(took):.2f} s, asked 2 s ({time.perf_counter() - began:.0f} s)"
        )


if __name__ == "__main__":
    main()
