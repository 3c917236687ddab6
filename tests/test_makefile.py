"""The Makefile's targets, by dry runs in the clone, where folders named shards and train stand beside it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# target: what its recipe calls
TARGETS = {
    "setup": ".venv is ready",
    "test": "-m pytest",
    "test-browser": "-m browser",
    "test-cluster": '-m "cluster or dask"',
    "test-real": "-m real",
    "chaos": "tests/chaos.py",
    "lint": "ruff format --check",
    "format": "ruff format .",
    "demo": "lipprep predict",
    "landmarks": "lipprep landmarks",
    "crops": "lipprep crops",
    "shards": "lipprep shards",
    "bench": "benchmarks/bench.py",
    "bench-scale": "benchmarks/scale.py",
    "bench-train": "benchmarks/training.py",
    "bench-landmarks": "benchmarks/landmarks.py",
    "bench-predict": "benchmarks/predict.py",
    "bench-grid": "benchmarks/grid.py",
    "models-table": "benchmarks/models.py",
    "clean": "rm -rf build",
    "help": "awk",
}


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run make in the clone; the make that may run these tests must not hand its own options down."""
    kept = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS|LIPPREP", name)}
    return subprocess.run(["make", *arguments], cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_target_runs_its_recipe(target: str) -> None:
    # With the set-up taken for done, a folder of the target's name would stop a target that is not phony.
    done = make("-n", "-o", ".venv/.lipprep-setup", target)
    assert done.returncode == 0, done.stderr
    assert TARGETS[target] in done.stdout


def test_the_folder_that_a_target_is_named_like_stands_there() -> None:
    assert (ROOT / "shards").is_dir()  # or the dry run of `make shards` proves nothing


def test_setup_installs_torch_first_and_all_with_the_tested_versions() -> None:
    done = make("-n", "-W", "pyproject.toml", "setup", "TORCH_INDEX=file:///torch")
    installs = [line.partition("pip-version-check install ")[2] for line in done.stdout.splitlines()]
    assert [install for install in installs if install] == [
        "-c constraints.txt --extra-index-url file:///torch torch setuptools",
        '-c constraints.txt --no-build-isolation -e ".[dev]"',
    ]


def test_help_is_the_default_and_lists_every_target() -> None:
    done = make()
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "help", "setup", "test", "test-browser", "test-cluster", "test-real", "chaos", "lint", "format",
        "demo", "landmarks", "crops", "shards", "bench", "bench-scale", "bench-train", "bench-landmarks",
        "bench-predict", "bench-grid", "bench-faults", "bench-report", "models-table", "clean",
    ]  # fmt: skip


def test_landmarks_without_videos_says_where_it_looked(tmp_path: Path) -> None:
    videos, manifest = tmp_path / "nowhere", tmp_path / "none.jsonl"
    done = make("landmarks", f"VIDEOS={videos}", f"MANIFEST={manifest}")
    assert done.returncode != 0
    assert str(videos) in done.stderr and str(manifest) in done.stderr
    assert "make landmarks VIDEOS=/path/to/lipread_mp4" in done.stderr
    assert done.stdout == ""  # nothing was set up or run before the answer


def test_landmarks_makes_the_manifest_where_it_is_missing(tmp_path: Path) -> None:
    manifest = tmp_path / "new.jsonl"
    done = make("-n", "landmarks", f"VIDEOS={tmp_path}", f"MANIFEST={manifest}")
    listing = f'lipprep manifest lrw "{tmp_path}" -o "{manifest}"'
    assert listing in done.stdout
    assert done.stdout.index(listing) < done.stdout.index(f"lipprep landmarks -m {manifest}")


def test_landmarks_keeps_a_manifest_that_stands(tmp_path: Path) -> None:
    manifest = tmp_path / "old.jsonl"
    manifest.touch()
    done = make("-n", "landmarks", f"MANIFEST={manifest}", "ARGS=--detector fan")
    assert "lipprep manifest" not in done.stdout
    assert f"lipprep landmarks -m {manifest} --detector fan" in done.stdout


def test_real_videos_are_asked_for_before_anything_runs() -> None:
    done = make("test-real")
    assert done.returncode != 0
    assert "LIPPREP_GRID" in done.stderr
    assert done.stdout == ""
