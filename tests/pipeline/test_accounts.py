"""planned = ok + failed by class: printed, kept, listed, and a reason to fail."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def spoilt(corpus, tmp_path) -> Path:
    """The corpus with two clips that cannot be read, one that is cut short, and twelve in all."""
    own = shutil.copytree(corpus, tmp_path / "own")
    (own / "ABOUT/train/ABOUT_00001.mp4").write_bytes(b"")
    (own / "BLACK/test/BLACK_00006.mp4").write_bytes(b"rubbish")
    video = own / "BLACK/train/BLACK_00002.mp4"
    video.write_bytes(video.read_bytes()[:-2000])
    return own


def test_the_report_has_every_stage_and_data_set(chain, lipprep, spoilt, corpus):
    figures = chain(spoilt)
    lipprep("manifest", "lrw", corpus, "-o", "manifests/other.jsonl", "--words", "BLACK")
    lipprep("landmarks", "-m", "manifests/other.jsonl", "-j", 1)
    report = json.loads(Path("work/report.json").read_text())
    assert set(report["datasets"]) == {"m", "other"} and set(report["datasets"]["m"]) == {"landmarks", "shards"}
    for stages in report["datasets"].values():
        for kept in stages.values():
            assert kept["planned"] == kept["ok"] + sum(kept["failed"].values())
    assert report["datasets"]["m"]["shards"]["failed"] == figures["failed"]
    assert figures["ok"] == 9 and figures["failed"]["unreadable"] >= 2
    Path("work/report.json").write_text('{"lipprep_report": 1, "data')  # it only repeats what the records say
    lipprep("landmarks", "-m", "manifests/other.jsonl", "-j", 1)
    assert set(json.loads(Path("work/report.json").read_text())["datasets"]) == {"other"}


def test_failures_are_listed_with_cause_and_file(chain, lipprep, spoilt):
    chain(spoilt)
    listed = json.loads(lipprep("failures", "--json").stdout)
    assert [f["video"] for f in sorted(listed, key=lambda f: f["key"])] == [
        "ABOUT/train/ABOUT_00001.mp4",
        "BLACK/test/BLACK_00006.mp4",
        "BLACK/train/BLACK_00002.mp4",
    ]
    assert {f["stage"] for f in listed} == {"landmarks"} and all(f["message"] for f in listed)
    unreadable = lipprep("failures", "--class", "unreadable")
    assert "ABOUT_00001.mp4 is empty" in unreadable.stdout and "no_face" not in unreadable.stdout
    assert "of 12 clips failed: unreadable" in unreadable.stderr
    assert "no class of failures 'blurred'" in lipprep("failures", "--class", "blurred", code=1).stderr


def test_nothing_failed_is_said_too(chain, lipprep):
    chain()
    assert lipprep("failures", "--json").stdout.strip() == "[]"
    assert "0 of 12 clips failed" in lipprep("failures").stderr


def test_too_many_failures_name_the_commonest_classes_with_examples(chain, lipprep, spoilt):
    lipprep("manifest", "lrw", spoilt, "-o", "manifests/m.jsonl")
    result = lipprep("landmarks", "-j", 1, "--max-failures", "2", code=1)
    assert "3 of 12 clips failed" in result.stderr and "`lipprep failures` lists them" in result.stderr
    assert "unreadable: " in result.stderr and "e.g. ABOUT/train/ABOUT_00001: " in result.stderr
    assert lipprep("landmarks", "-j", 1, "--max-failures", "25%").exit_code == 0
