"""The table of a corpus's figures, of records that anybody may have made."""

import math
from pathlib import Path

import pytest

from lipprep.pipeline.figures import read_table
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.pipeline.options import layout_of
from lipprep.pipeline.records import commit
from lipprep.pipeline.suspicion import rank
from lipprep.stages.shard.writer import TarWriter


def line(key: str, **changed: object) -> dict:
    figures = {"num_frames": 29, "jitter": 0.5, "look": None, **changed.pop("figures", {})}
    entry = {"key": key, "status": "ok", "figures": figures, "offset": 0, "members": ["mouth.jpg", "json"]}
    return {**entry, "parts": {}, "maker": "m", **changed}


def table_of(entries: list[dict], tmp_path: Path):
    clips = tuple(Clip(f"c{n}", f"c{n}.mp4", "train", "W", 0, 0) for n in range(2))
    layout = layout_of("m", tmp_path / "work", tmp_path / "shards")
    with TarWriter(layout.tar("shards", "train", 0)) as tar:
        tar.close()
        commit(tar, {"dataset": "m", "parts": {}}, entries)
    return read_table(Manifest(Path("m.jsonl"), tmp_path, 25.0, 0, 512, ("W",), clips), layout)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"key": ["c1"]},
        {"figures": {"jitter": 10**400, "num_frames": "29"}},
        {"figures": {"look": "AAAA", "face": "\u2603", "motion": "zz"}},
        {"offset": "0"},
        {"offset": -1},
        {"members": "mouth.jpg"},
        {"status": "failed", "class": "<b>", "message": "x"},
        {"status": "failed", "class": "upstream", "message": "x", "upstream": {"class": "no_face", "stage": []}},
    ],
)
def test_lines_and_figures_that_are_none_say_nothing(spoilt, tmp_path):
    table = table_of([line("c0"), {**line("c1"), **spoilt}], tmp_path)
    assert table.kinds[0] == "ok" and table.columns["jitter"][0] == 0.5
    if "figures" in spoilt:
        assert table.kinds[1] == "ok" and math.isnan(table.columns["num_frames"][1] * table.columns["jitter"][1])
        assert table.texts["look"][1] is table.texts["motion"][1] is None
    else:
        assert table.kinds[1] == "pending"
    assert len(rank(table)) == 2
