"""A corpus of real, tiny videos in LRW's layout, and the commands run on it."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from traps import everything

from lipprep.cli import main

WORDS = ("ABOUT", "BLACK")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, make_video, face_frames) -> Path:
    """Two words, six clips each: four for training, one each for validation and test."""
    root = tmp_path_factory.mktemp("corpus")
    for word in WORDS:
        for n, split in enumerate(("train",) * 4 + ("val", "test"), 1):
            start = n if word == "ABOUT" else n + 6
            path = make_video(root / word / split / f"{word}_{n:05d}.mp4", face_frames[start : start + 14])
            path.with_suffix(".txt").write_text(f"Channel: none \nDuration: 0.{20 + n} seconds ")
    return root


def run_command(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def lipprep(tmp_path, monkeypatch):
    """Run one command in an empty folder and give its result; `code` is the exit code to expect."""
    monkeypatch.chdir(tmp_path)
    return run_command


def run_chain(root: Path, flags: Sequence[object], stages: Sequence[str]) -> dict:
    run_command("manifest", "lrw", root, "-o", "manifests/m.jsonl", "--chunk-size", "2")
    for stage in stages:
        mine = flags if stage == stages[-1] else ()
        result = run_command(stage, "-j", 1, "--json", "--max-failures", "100%", *mine)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def made(tmp_path_factory, corpus) -> Callable[[Sequence[str]], tuple[Path, dict]]:
    """The corpus run through some stages, once for all tests: the folder, and the last command's figures."""

    @functools.cache
    def make(stages: tuple[str, ...]) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("made")
        with contextlib.chdir(folder):
            return folder, run_chain(corpus, (), stages)

    return make


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def chain(lipprep, corpus, made):
    """Run a corpus through to shards, in one process; give the last command's figures.

    The corpus itself is not run again, and of a copy of it nothing is computed that was for the corpus.
    """

    def run(root: Path = corpus, *flags: object, stages=("landmarks", "shards")) -> dict:
        if (
            not flags
            and stages
            and not list(Path().iterdir())
            and (root is corpus or contents(root) == contents(corpus))
        ):
            folder, figures = made(tuple(stages))
            shutil.copytree(folder, ".", dirs_exist_ok=True)
            if root is corpus:
                return figures
        return run_chain(root, flags, stages)

    return run


@pytest.fixture
def whole(chain) -> dict[str, dict[str, bytes]]:
    """What one process makes; the folder is empty again but for the manifest."""
    chain(stages=("landmarks", "crops", "shards"))
    found = everything()
    shutil.rmtree("work")
    shutil.rmtree("shards")
    return found


@pytest.fixture
def listed(lipprep, corpus) -> None:
    """A manifest, of which nothing is made yet."""
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--chunk-size", "2")
