"""A corpus of real, tiny videos in LRW's layout, and the commands run on it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

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


@pytest.fixture
def lipprep(tmp_path, monkeypatch):
    """Run one command in an empty folder and give its result; `code` is the exit code to expect."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0):
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def chain(lipprep, corpus):
    """Run a corpus through to shards, in one process; give the last command's figures."""

    def run(root: Path = corpus, *flags: object, stages=("landmarks", "shards")) -> dict:
        lipprep("manifest", "lrw", root, "-o", "manifests/m.jsonl", "--chunk-size", "2")
        for stage in stages:
            result = lipprep(
                stage, "-j", 1, "--json", "--max-failures", "100%", *(flags if stage == stages[-1] else ())
            )
        return json.loads(result.stdout.splitlines()[-1])

    return run
