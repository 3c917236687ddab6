"""What is stale, why, and what it costs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lipprep.pipeline import plan
from lipprep.pipeline.records import read_header


@pytest.fixture
def own(corpus, tmp_path) -> Path:
    return shutil.copytree(corpus, tmp_path / "own")


def rows(lipprep, *flags: str) -> dict[str, dict]:
    return {row["stage"]: row for row in json.loads(lipprep("status", "--json", *flags).stdout)}


def run(lipprep, *arguments: object) -> dict:
    return json.loads(lipprep(*arguments, "-j", 1, "--json").stdout)


def tars(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.tar"))}


def put(video: Path, content: bytes) -> None:
    """Another content, of the same size and time."""
    times = video.stat()
    assert len(content) == times.st_size
    video.write_bytes(content)
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_touched_video_costs_a_look_and_nothing_else(chain, lipprep, own):
    chain(own)
    landmarks, shards = tars("work/m/landmarks"), tars("shards")
    for video in own.rglob("*.mp4"):
        os.utime(video)
    assert rows(lipprep)["landmarks"]["reasons"] == {"videos were replaced or touched": 12}
    figures = run(lipprep, "landmarks")
    assert (figures["chunks_made"], figures["clips_computed"]) == (12, 0)
    assert rows(lipprep)["landmarks"]["fresh"] == rows(lipprep)["shards"]["fresh"] == 12
    assert tars("work/m/landmarks") == landmarks and tars("shards") == shards


def test_another_content_of_the_same_size_and_time_is_found_in_depth(chain, lipprep, own):
    chain(own)
    video = own / "ABOUT/train/ABOUT_00002.mp4"
    content = video.read_bytes()
    put(video, content[:-1] + bytes([content[-1] ^ 1]))
    assert rows(lipprep)["landmarks"]["stale"] == 0
    (reason,) = rows(lipprep, "--deep")["landmarks"]["reasons"]
    assert reason == "1 of its sources have other content, of the same size and time"
    assert run(lipprep, "landmarks")["chunks_made"] == 0
    figures = run(lipprep, "landmarks", "--deep")
    assert (figures["chunks_made"], figures["clips_computed"]) == (1, 1)
    assert rows(lipprep, "--deep")["landmarks"]["stale"] == 0
    assert rows(lipprep)["shards"]["stale"] == 1  # made from another video


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    from lipprep.pipeline import inputs

    monkeypatch.setattr(inputs, "_WHOLE", 64 * 16)
    monkeypatch.setattr(inputs, "_BLOCK", 16)
    file = tmp_path / "long.mp4"
    found = set()
    for size, place in ((4000, None), (4001, None), (4000, 0), (4000, 3999)):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        found.add(inputs.content_digest(file))
    assert len(found) == 4 and all(digest.startswith("sampled-") for digest in found)
    assert inputs.content_digest(tmp_path) is None


@pytest.fixture
def of_four(lipprep, corpus):
    """The corpus in three chunks of four clips, made; and its manifest's clips, to be changed and written."""
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    manifest = Path("manifests/m.jsonl")
    header, *lines = manifest.read_text().splitlines()
    clips = [json.loads(line) | {"split": "train", "chunk": n // 4} for n, line in enumerate(lines)]

    def write(clips: list[dict]) -> None:
        manifest.write_text("\n".join([header, *map(json.dumps, clips)]))

    write(clips)
    for stage in ("landmarks", "shards"):
        assert run(lipprep, stage)["chunks_made"] == 3
    return clips, write


def test_reasons_are_in_the_users_terms(of_four, lipprep):
    clips, write = of_four
    clips[0]["duration"] = 0.33
    clips[5]["word_start"] = clips[6]["word_end"] = 0.1
    write(clips)
    assert rows(lipprep)["landmarks"]["stale"] == 0
    assert rows(lipprep)["shards"]["reasons"] == {
        "the manifest's duration changed": 1,
        "the manifest's word_start, word_end changed": 1,
    }
    figures = run(lipprep, "shards")
    assert (figures["chunks_made"], figures["clips_computed"]) == (2, 0)  # no crop is cut again
    changed = tars("shards")
    shutil.rmtree("shards")
    assert run(lipprep, "shards")["clips_computed"] == 12
    assert tars("shards") == changed
    write(clips[1:])
    assert rows(lipprep)["landmarks"]["reasons"] == {"clips came into the chunk or left it": 1}
    assert "clips came into the chunk or left it" in lipprep("status").stdout


def test_a_clip_less_in_every_chunk_computes_nothing(of_four, lipprep):
    clips, write = of_four
    write([clip for n, clip in enumerate(clips) if n % 4])
    for stage in ("landmarks", "shards"):
        figures = run(lipprep, stage)
        assert (figures["planned"], figures["chunks_made"], figures["clips_computed"]) == (9, 3, 0)


def test_a_clip_that_is_retried_is_computed_alone(of_four, lipprep, own):
    clips, _ = of_four
    lipprep("landmarks", "-j", 1, "--root", own)
    video = own / clips[2]["video"]
    content = video.read_bytes()
    put(video, bytes(len(content)))
    flags = ("--root", own, "--max-failures", "100%")
    assert run(lipprep, "landmarks", "--deep", *flags)["failed"] == {"unreadable": 1}
    put(video, content)
    figures = run(lipprep, "landmarks", "--retry-failed", "--deep", *flags)
    assert (figures["failed"], figures["chunks_made"], figures["clips_computed"]) == ({}, 1, 1)


def test_what_another_version_made_is_made_again(chain, lipprep, monkeypatch):
    chain()
    monkeypatch.setitem(plan.STAGE_VERSIONS, "landmarks", 9)
    (reason,) = rows(lipprep)["landmarks"]["reasons"]
    assert reason == "made by version 2 of the stage, this is 9"
    assert "run `lipprep landmarks` first" in lipprep("shards", "-j", 1, code=1).stderr
    assert run(lipprep, "landmarks")["clips_computed"] == 12
    header = read_header(next(Path("work/m/landmarks").glob("*.tar")))
    assert header["version"] == 9


def test_damage_that_makes_an_artefact_none_is_told(chain, lipprep):
    chain()
    record = min(Path("work/m/landmarks").glob("*.jsonl"))
    record.write_bytes(record.read_bytes().replace(b'"parts"', b'"Parts"', 1))
    assert rows(lipprep)["landmarks"]["damaged"] == 1
    assert "cut, damaged, or of another version" in lipprep("status").stdout


def test_timing(chain, lipprep):
    assert "manifest" in lipprep("status", "--timing", code=1).stderr
    chain()
    timing = rows(lipprep, "--timing")["landmarks"]["timing"]
    assert timing["clips"] == 12 and timing["worker_seconds"] > 0 and timing["slowest_chunk"]
    assert {"decode", "detect", "mesh", "write"} <= set(timing["parts"])
    assert sum(timing["parts"].values()) == pytest.approx(timing["worker_seconds"], abs=0.01)
    assert "clips/s a worker" in lipprep("status", "--timing").stdout
    assert "nothing was made yet" in lipprep("status", "--timing").stdout  # crops
