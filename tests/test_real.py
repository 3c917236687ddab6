"""The chain on real videos of the GRID corpus, in the folder that LIPPREP_GRID names."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.pipeline.records import read_entries
from lipprep.stages.shard.index import load_index
from lipprep.stages.shard.reader import read_samples

GRID = os.environ.get("LIPPREP_GRID")
pytestmark = [pytest.mark.real, pytest.mark.skipif(not GRID, reason="LIPPREP_GRID names no folder of GRID videos")]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Four videos of each of three speakers, from manifest to shards; the folder with both."""
    folder = tmp_path_factory.mktemp("grid")
    for speaker in ("s2", "s4", "s22"):
        for video in sorted((Path(GRID) / "video" / speaker).glob("*.mpg"))[:4]:
            align = Path(GRID) / "align" / speaker / f"{video.stem}.align"
            for source, kind in ((video, "video"), (align, "align")):
                (folder / "g" / kind / speaker).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / "g" / kind / speaker)
    manifest, common = folder / "m.jsonl", ["-m", folder / "m.jsonl", "-w", folder / "work", "--json"]
    for arguments in (
        ["manifest", "grid", folder / "g", "-o", manifest],
        ["landmarks", *common],
        ["shards", *common, "-o", folder / "shards"],
    ):
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder


def test_no_clip_is_lost_and_no_face_missed(chain):
    entries = [e for tar in (chain / "work/m/landmarks").glob("*.tar") for e in read_entries(tar)]
    assert len(entries) >= 60 and {e["status"] for e in entries} == {"ok"}
    assert np.mean([e["figures"]["face_share"] for e in entries]) >= 0.99
    assert np.median([e["figures"]["jitter"] for e in entries]) < 1.0


def test_the_crops_show_mouths(chain):
    index = load_index(chain / "shards")
    assert index.parameters["detector"] == "mesh"
    samples = [
        s
        for shard in index.shards
        for s in read_samples(chain / "shards" / shard.name, index.offsets[shard.name], range(shard.samples))
    ]
    assert {s["mouth"].shape for s in samples} == {(29, 96, 96)}
    for sample in samples:
        mouth = sample["mouth"].astype(float)
        assert 40 < mouth.mean() < 220 and mouth.std() > 10
        # What moves is in the lower middle of the crop, where lips are.
        moving = mouth.std(0)
        assert moving[30:80, 20:76].mean() > moving[:20].mean()


def test_words_are_where_the_alignment_has_them(chain):
    rows = [json.loads(line) for line in (chain / "m.jsonl").read_text().splitlines()[1:]]
    middles = [(r["word_start"] + r["word_end"]) / 2 for r in rows]
    assert np.abs(np.array(middles) - 29 / 25 / 2).max() <= 0.5 / 25 + 1e-6
