"""A manifest made anew deals clips to other chunks: what was made of them is copied, not computed."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from traps import strays

from lipprep.pipeline.records import read_entries, read_header


def make(lipprep, corpus: Path, *flags: object) -> dict:
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--chunk-size", 2, *flags)
    return json.loads(lipprep("landmarks", "-j", 1, "--json").stdout)


def tars(folder: str = "work/m/landmarks") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.tar"))}


def test_another_seed_computes_nothing(lipprep, corpus):
    make(lipprep, corpus, "--seed", 5)
    wanted = tars()
    shutil.rmtree("work")
    assert make(lipprep, corpus)["clips_computed"] == 12
    lipprep("shards", "-j", 1)
    figures = make(lipprep, corpus, "--seed", 5)
    assert figures["clips_computed"] == 0 < figures["chunks_made"]
    assert tars() == wanted and not strays()
    assert json.loads(lipprep("shards", "-j", 1, "--json").stdout)["clips_computed"] == 0
    assert not strays()


def test_another_word_computes_that_word(lipprep, corpus):
    assert make(lipprep, corpus, "--words", "BLACK")["clips_computed"] == 6
    figures = make(lipprep, corpus)
    assert (figures["planned"], figures["clips_computed"]) == (12, 6)
    assert make(lipprep, corpus, "--words", "ABOUT")["clips_computed"] == 0
    keys = {e["key"] for tar in Path("work/m/landmarks").glob("*.tar") for e in read_entries(tar)}
    assert len(keys) == 6 and all(key.startswith("ABOUT/") for key in keys)


def test_what_was_set_aside_outlives_a_run_that_was_stopped(lipprep, corpus, monkeypatch):
    from lipprep.pipeline import run

    make(lipprep, corpus)

    def stop(jobs, *, workers, done):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(run, "supervise", stop)
        for seed in (5, 6):
            lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--chunk-size", 2, "--seed", seed)
            lipprep("landmarks", "-j", 1, code=130)
    assert list(Path("work/m/scratch/landmarks/earlier").glob("*.tar"))
    assert make(lipprep, corpus, "--seed", 7)["clips_computed"] == 0
    assert not strays()
    assert sum(read_header(tar)["planned"] for tar in Path("work/m/landmarks").glob("*.tar")) == 12


def test_another_corpus_of_the_same_name_is_not_overwritten(lipprep, corpus, tmp_path):
    make(lipprep, corpus)
    before = tars()
    other = tmp_path / "other"
    for video in corpus.rglob("*.mp4"):
        target = other / "OTHER" / video.parent.name / f"OTHER_{video.stem}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)
    lipprep("manifest", "lrw", other, "-o", "manifests/m.jsonl")
    message = lipprep("landmarks", "-j", 1, code=1).stderr
    assert "made of other clips" in message and "another -w" in message and tars() == before
    lipprep("landmarks", "-j", 1, "-w", "elsewhere")


@pytest.mark.parametrize("stage", ["crops", "shards"])
def test_every_stage_copies_what_moved(lipprep, corpus, stage):
    make(lipprep, corpus)
    lipprep(stage, "-j", 1)
    make(lipprep, corpus, "--seed", 3)
    assert json.loads(lipprep(stage, "-j", 1, "--json").stdout)["clips_computed"] == 0


def test_a_chunk_may_be_dealt_from_many_old_ones(lipprep, corpus):
    make(lipprep, corpus)
    manifest = Path("manifests/m.jsonl")
    header, *lines = manifest.read_text().splitlines()
    clips = [json.loads(line) | {"split": "train", "chunk": 0} for line in lines]
    manifest.write_text("\n".join([header, *map(json.dumps, clips)]))
    figures = json.loads(lipprep("landmarks", "-j", 1, "--json").stdout)
    assert (figures["chunks_made"], figures["clips_computed"]) == (1, 0)
