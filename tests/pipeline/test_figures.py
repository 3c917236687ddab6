"""The table of a corpus's figures, of records that anybody may have made."""

import math
from pathlib import Path

import pytest
from record_lines import header, sound

from lipprep.pipeline.figures import read_table
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.pipeline.options import layout_of
from lipprep.pipeline.records import commit
from lipprep.pipeline.suspicion import rank
from lipprep.stages.shard.writer import TarWriter

FIGURES = {"num_frames": 29, "jitter": 0.5, "look": None}


def table_of(figures: dict, tmp_path: Path):
    entries = [sound("c0", figures=FIGURES), sound("c1", figures=FIGURES | figures)]
    clips = tuple(Clip(f"c{n}", f"c{n}.mp4", "train", "W", 0, 0) for n in range(2))
    layout = layout_of("m", tmp_path / "work", tmp_path / "shards")
    with TarWriter(layout.tar("shards", "train", 0)) as tar:
        tar.close()
        commit(tar, header(), entries)
    return read_table(Manifest(Path("m.jsonl"), tmp_path, 25.0, 0, 512, ("W",), clips), layout)


@pytest.mark.parametrize(
    "spoilt", [{"jitter": 10**400}, {"look": "AAAA"}, {"face": "\u2603"}, {"motion": "zz"}, {"jitter": None}]
)
def test_figures_that_are_none_say_nothing(spoilt, tmp_path):
    table = table_of(spoilt, tmp_path)
    assert table.kinds == ["ok", "ok"] and table.columns["jitter"][0] == 0.5
    assert math.isnan(table.columns["jitter"][1]) == ("jitter" in spoilt)
    assert [table.texts[name][1] for name in ("look", "face", "motion")] == [None] * 3
    assert len(rank(table)) == 2
