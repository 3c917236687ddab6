"""Filtering a manifest: what stays is what fits, and none of it is computed again."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.pipeline.expression import parse_condition
from lipprep.pipeline.figures import ClipTable, read_table
from lipprep.pipeline.filter import filter_manifest
from lipprep.pipeline.manifest import Clip, Manifest, load_manifest
from lipprep.pipeline.options import layout_of
from lipprep.pipeline.records import read_entries


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_video, face_frames) -> Path:
    """Windows of two long videos, one of them with a window that shows black frames; all stages made of them."""
    folder = tmp_path_factory.mktemp("filmed")
    frames = list(face_frames[:24])
    with contextlib.chdir(folder):
        make_video(Path("videos/a.mp4"), frames)
        make_video(Path("videos/b.mp4"), frames[:14] + [f * 0 for f in frames[14:18]] + frames[18:])
        rows = ["video,word,split,start,num_frames"]
        rows += [f"{name}.mp4,W{n % 2},train,{start},8" for name in "ab" for n, start in enumerate((2, 6, 14))]
        Path("clips.csv").write_text("\n".join(rows))
        for command in (
            "manifest csv clips.csv --root videos -o manifests/all.jsonl --chunk-size 3",
            *(f"{stage} -m manifests/all.jsonl --engine serial" for stage in ("landmarks", "crops", "shards")),
        ):
            result = CliRunner().invoke(main, command.split(), catch_exceptions=False)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def filmed(made, tmp_path, lipprep):
    """The same, in a folder of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return lipprep


def figures(lipprep, *command: object) -> dict:
    return json.loads(lipprep(*command, "--json").stdout.splitlines()[-1])


def test_what_stays_is_copied_and_is_what_it_would_be_made_anew(filmed):
    told = figures(filmed, "manifest", "filter", "black < 0.1 and num_frames == 8", "-m", "manifests/all.jsonl",
                   "-o", "manifests/clean.jsonl")  # fmt: skip
    assert told["clips"] == 6 and told["kept"] + told["left_out"]["against the condition"] == 6
    before, after = (load_manifest(Path(f"manifests/{name}.jsonl")) for name in ("all", "clean"))
    chunk_of = {clip.key: (clip.split, clip.chunk, clip.label) for clip in before.clips}
    assert 0 < len(after.clips) < 6
    assert all(chunk_of[clip.key] == (clip.split, clip.chunk, clip.label) for clip in after.clips)
    assert before.labels == after.labels and before.root == after.root
    assert (before.filtered, after.filtered) == (None, "black < 0.1 and num_frames == 8")
    dark = {e["key"] for e in read_entries(Path("work/all/crops/train-00000.tar")) if e["figures"]["black"] >= 0.1}
    assert not dark & {clip.key for clip in after.clips}

    for stage, out in (("landmarks", ()), ("crops", ()), ("shards", ("-o", "clean-shards"))):
        made = figures(filmed, stage, "-m", "manifests/clean.jsonl", "--engine", "serial", *out)
        assert (made["planned"], made["ok"], made["clips_computed"]) == (told["kept"], told["kept"], 0)
    assert not list(Path("work/clean").rglob(".old/*"))  # what was lent has gone
    for stage, out in (("landmarks", ()), ("crops", ()), ("shards", ("-o", "anew-shards"))):
        how = ("-m", "manifests/clean.jsonl", "-w", "anew", "--engine", "serial", *out)
        assert figures(filmed, stage, *how)["clips_computed"] == told["kept"]
    for ours, anew in (("work/clean", "anew/clean"), ("clean-shards", "anew-shards")):
        tars = sorted(p.relative_to(ours) for p in Path(ours).rglob("*.tar"))
        assert tars and all((Path(ours) / t).read_bytes() == (Path(anew) / t).read_bytes() for t in tars)


def test_a_stretch_is_tracked_from_where_it_was(filmed):
    filmed("manifest", "filter", "num_frames > 0", "-m", "manifests/all.jsonl", "-o", "manifests/same.jsonl")
    everything_stays = load_manifest(Path("manifests/same.jsonl"))
    assert all(clip.tracked_from is clip.tracked_to is None for clip in everything_stays.clips)
    table = read_table(load_manifest(Path("manifests/all.jsonl")), layout_of("all", Path("work"), Path("shards")))
    first = table.columns["centre_x"][0]
    told = figures(filmed, "manifest", "filter", f"centre_x != {first}", "-m", "manifests/all.jsonl",
                   "-o", "manifests/late.jsonl")  # fmt: skip
    assert told["kept"] < 6
    (begins, *_) = load_manifest(Path("manifests/late.jsonl")).clips
    assert (begins.tracked_from, begins.tracked_to) == (2, 22)


def test_windows_of_a_video_that_was_a_clip_itself_make_a_manifest_that_can_be_read():
    clips = [
        Clip(key=key, video="a.mp4", split="train", word="W", label=0, chunk=0, start=start, num_frames=frames)
        for key, start, frames in (("a", None, None), ("a@2", 2, 8), ("a@6", 6, 8))
    ]
    columns = {"jitter": np.array([9.0, 1.0, 1.0])}
    none = [None] * 3
    table = ClipTable(Manifest(Path("m.jsonl"), Path("videos"), 25.0, 0, 512, ("W",), tuple(clips)), ["ok"] * 3,
                      [""] * 3, [""] * 3, columns, {}, none, none)  # fmt: skip
    kept = filter_manifest(table, parse_condition("jitter < 2", columns), columns, Path("kept.jsonl")).manifest
    assert kept.clips == tuple(clips[1:])


def test_what_failed_or_is_not_known_does_not_stay_and_is_counted(filmed):
    told = figures(filmed, "manifest", "filter", "suspicion < 1000", "-m", "manifests/all.jsonl", "-o", "m.jsonl")
    assert told["kept"] == 6
    # Landmarks alone know nothing of crops.
    result = filmed("manifest", "filter", "black < 1", "-m", "manifests/all.jsonl", "-w", "nowhere", "--shards",
                    "none", "-o", "m.jsonl", code=1)  # fmt: skip
    assert "no clip" in result.output and "pending: 6" in result.output
    assert "no nowhere/all/plan.yaml: does -w" in result.output.replace(f"{Path.cwd()}/", "")
    result = filmed("manifest", "filter", "blak < 1", "-m", "manifests/all.jsonl", "-o", "m.jsonl", code=1)
    assert "did you mean black" in result.output


def test_filters_of_filters_and_lists_that_would_undo_them(filmed):
    common = ("-m", "manifests/all.jsonl", "-o", "manifests/once.jsonl")
    filmed("manifest", "filter", "black < 0.9", *common)
    Path("work/once").mkdir(exist_ok=True)
    Path("work/once/plan.yaml").write_text("quality: 80\n")
    warned = filmed("manifest", "filter", "black < 0.9", *common).stderr
    assert "wants other settings" in warned and Path("work/once/plan.yaml").read_text() == "quality: 80\n"
    filmed("manifest", "filter", "jitter < 9", "-m", "manifests/once.jsonl", "-w", "work", "-o", "twice.jsonl", code=1)
    filmed("landmarks", "-m", "manifests/once.jsonl", "--engine", "serial")
    filmed("manifest", "filter", "jitter < 9", "-m", "manifests/once.jsonl", "-o", "twice.jsonl")
    assert load_manifest(Path("twice.jsonl")).filtered == "(black < 0.9) and (jitter < 9)"
    refused = filmed("shards", "--from-crops", "videos", "--profile", "lrw2021", "-m", "twice.jsonl", code=1).output
    assert "was filtered" in refused and "leave out --from-crops" in refused
