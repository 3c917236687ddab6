"""A few rounds of `make chaos`, and whether it would notice."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from traps import PATIENCE

HERE = Path(__file__).parent
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def harness():
    """The modules of the harness, which is a script beside its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield importlib.import_module


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video, face_frames) -> Path:
    """Twelve tiny clips of two words."""
    root = tmp_path_factory.mktemp("videos")
    for word in ("ABOUT", "BLACK"):
        for n, split in enumerate(("train",) * 4 + ("val", "test"), 1):
            start = n if word == "ABOUT" else n + 6
            path = make_video(root / word / split / f"{word}_{n:05d}.mp4", face_frames[start : start + 8])
            path.with_suffix(".txt").write_text("Duration: 0.25 seconds")
    return root


@pytest.fixture(scope="module")
def played(videos, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Five rounds over the tiny clips, and the folder that they were played in."""
    build = tmp_path_factory.mktemp("played") / "chaos"
    environment = {name: value for name, value in os.environ.items() if name != "LIPPREP_GRID"}
    command = [sys.executable, HERE / "chaos.py", "--rounds", "5", "--videos", videos, "--build", build]
    # How soon a signal ends a command is asked of a machine that does nothing else.
    done = subprocess.run([*command, "--stop-seconds", "60"], env=environment, capture_output=True, text=True)
    return done, build


def test_five_rounds_end_with_the_undisturbed_bytes(played):
    done, build = played
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in (build / "rounds.jsonl").read_text().splitlines()]
    assert [r["planned"] for r in rounds] == [r["ok"] for r in rounds] == [12] * 5
    assert len({r["case"]["kind"] for r in rounds}) == 5
    assert {r["case"]["stage"] for r in rounds} == {"landmarks", "crops", "shards"}
    assert "5 of 5 rounds in order" in done.stdout


def test_a_plan_is_its_seeds_and_spreads_faults_evenly(harness):
    chaos = harness("chaos")
    stages = list(chaos.STAGES)
    plan = chaos.make_plan(3, 108, ["sample", "grid"], list(chaos.KINDS), stages)
    assert plan == chaos.make_plan(3, 108, ["sample", "grid"], list(chaos.KINDS), stages)
    assert plan != chaos.make_plan(4, 108, ["sample", "grid"], list(chaos.KINDS), stages)
    cells = [(c.kind, c.stage, c.corpus) for c in plan]
    assert len(set(cells)) == len(chaos.KINDS) * 3 * 2
    assert {cells.count(cell) for cell in cells} == {2}


def test_a_changed_a_lost_and_a_left_file_are_differences(harness, tmp_path):
    scene = harness("chaos_scene")
    for name in ("a.tar", "b.tar", "a.jsonl"):
        (tmp_path / name).write_bytes(name.encode())
    wanted = scene.digests(tmp_path)
    assert scene.differences(scene.digests(tmp_path), wanted) == []
    (tmp_path / "a.jsonl").write_bytes(b"another time")  # records hold times
    assert scene.differences(scene.digests(tmp_path), wanted) == []
    (tmp_path / "a.tar").write_bytes(b"b.tar")
    (tmp_path / "b.tar").unlink()
    (tmp_path / ".c.tar.1.tmp").touch()
    assert scene.differences(scene.digests(tmp_path), wanted) == [".c.tar.1.tmp", "a.tar", "b.tar"]


@pytest.fixture
def scene(harness, played, tmp_path):
    """One more round over the tiny clips."""
    chaos = harness("chaos")
    corpus = chaos.read_corpus("sample", played[1] / "sample")
    case = chaos.Case(6, "sample", "test", "shards", 0)
    with chaos.Scene(case, corpus, tmp_path / "round", stop_seconds=60) as scene:
        yield scene


def test_other_bytes_in_the_end_are_trouble(scene):
    def relabel(scene) -> None:
        scene.set("nothing", later=False)
        manifest = scene.folder / "sample.jsonl"
        manifest.write_text(manifest.read_text().replace('"duration":0.25', '"duration":0.75', 1))

    result = scene.play(relabel)
    assert result.differences == ["shards/index.json", "shards/train-00000.tar"]
    assert result.planned == result.ok == 12 and len(result.troubles) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_worker_that_outlives_its_driver_is_an_orphan_and_is_ended(scene):
    scene.set("nothing", later=False)
    command = scene.start("shards")
    assert command.wait_for(command.workers)
    workers = command.workers()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that it cannot end by itself
    command.send(signal.SIGKILL)
    ended = command.end(orphan_seconds=0.1)
    assert ended.code == -signal.SIGKILL
    assert len(ended.orphans) >= len(workers) > 0
    left = [psutil.Process(worker) for worker in workers if psutil.pid_exists(worker)]
    assert not psutil.wait_procs([p for p in left if p.status() != "zombie"], timeout=PATIENCE)[1]
