"""The examples read shards without lipprep: where importing it fails, they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lipprep.stages.shard.codec import encode_mouth
from lipprep.stages.shard.writer import TarWriter

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = """
import json, runpy, sys
sys.modules["lipprep"] = None  # importing it fails from here on
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")
"""
WORDS = ("down", "up")


def bar(word: str, frames: int, random: np.random.Generator) -> np.ndarray:
    """(T, 80, 80) uint8: a bright bar that moves down or up."""
    rows = np.linspace(24, 66, frames) + random.uniform(-6, 6)
    y = np.arange(80)[None, :, None] - (rows if word == "down" else rows[::-1])[:, None, None]
    return np.clip(80 + 120 * (np.abs(y) < 8) + random.normal(0, 4, (frames, 80, 80)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two shards to train on, one of each codec, and one to test; clips of 6 to 8 frames."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, codec, count in (("train-00000", "jpeg", 20), ("train-00001", "npy", 12), ("test-00000", "jpeg", 10)):
        with TarWriter(folder / f"{name}.tar") as tar:
            for number in range(count):
                word = WORDS[number % 2]
                extension, payload = encode_mouth(bar(word, 6 + number % 3, random), codec=codec)
                sample = {"word": word, "label": WORDS.index(word), "num_frames": 6 + number % 3}
                tar.add(f"{word}/{name}-{number}.{extension}", payload)
                tar.add(f"{word}/{name}-{number}.json", json.dumps(sample).encode())
            tar.close()
            tar.publish()
    (folder / "index.json").write_text(json.dumps({"labels": WORDS}))
    return folder


def test_examples_need_no_lipprep(shards, tmp_path):
    calls = [("train_plain.py", shards, 6), ("contact_sheet.py", shards, tmp_path / "sheet.png")]
    told = json.dumps([[str(EXAMPLES / name), *map(str, rest)] for name, *rest in calls])
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, told], capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert "10 test clips of 2 words: 100.0 % right" in done.stdout and "down/test-00000-0 down" in done.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
