"""The same bytes whoever makes them, in slices: the parts of a job array, and the index that is made of them."""

import json
import os
import socket
from pathlib import Path

import pytest
from traps import POSIX, everything, strays

from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.plan import Slice
from lipprep.stages import lock


def test_slices_give_the_same_bytes(whole, lipprep):
    for stage in ("landmarks", "crops", "shards"):
        for number in (2, 3, 1):
            out = lipprep(stage, "-j", 1, "--slice", f"{number}/3").stdout
            assert out.startswith(f"slice {number}/3 of {stage}: 4 clips planned = 4 ok")
            if stage == "shards" and number != 1:
                message = lipprep("index", code=1).stderr
                assert "shards are not there" in message and "missing" in message
    assert not Path("shards/index.json").exists()
    assert "12 clips planned = 12 ok" in lipprep("index").stdout
    assert everything() == whole and not strays() and not list(Path().rglob(f"{lock.LOCK}-*"))
    assert "0 chunks made" in lipprep("shards", "-j", 1).stdout


def test_slices_copy_what_a_new_manifest_deals_to_others(whole, lipprep, corpus):
    lipprep("landmarks", "-j", 1)
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--chunk-size", "3", "--seed", "5")
    computed = [
        json.loads(lipprep("landmarks", "-j", 1, "--json", "--slice", f"{n}/2").stdout)["clips_computed"]
        for n in (1, 2)
    ]
    assert computed == [0, 0]
    lipprep("landmarks", "-j", 1)
    assert not strays()


@POSIX
def test_slices_of_another_number_would_make_the_same_chunks(listed, lipprep, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0)
    folder = Path("work/m/landmarks")

    def parts() -> list[str]:
        return sorted(path.name for path in folder.glob(f"{lock.LOCK}-*"))

    with alone_in(folder, part=Slice(1, 4)):
        for flags in (["--slice", "1/8"], ["--slice", "1/4"], []):
            message = lipprep("landmarks", "-j", 1, *flags, code=1).stderr
            assert f"another run (slice 1/4, process {os.getpid()} on {socket.gethostname()}) is at work" in message
        lipprep("landmarks", "-j", 1, "--slice", "2/4")
    with alone_in(folder, shared=True):
        assert "(one that reads there" in lipprep("landmarks", "-j", 1, code=1).stderr
    lipprep("landmarks", "-j", 1, "--slice", "1/8")
    assert parts() == [f"{lock.LOCK}-{part}" for part in ("1-of-4", "1-of-8", "2-of-4")]
    lipprep("landmarks", "-j", 1)
    assert parts() == []


def test_an_index_is_made_of_the_shards_that_are_named(chain, lipprep, monkeypatch):
    chain()
    monkeypatch.setattr(lock, "_PATIENCE", 0)
    before = Path("shards/index.json").read_bytes()
    assert "there are no shards in" in lipprep("index", "-o", "elsewhere", code=1).stderr
    assert "nothing was made in" in lipprep("index", "-w", "elsewhere", code=1).stderr
    Path("manifests/m.jsonl").rename("manifests/other.jsonl")
    Path("work/m").rename("work/other")
    assert "holds shards of data set m, not of other" in lipprep("index", code=1).stderr
    Path("manifests/other.jsonl").rename("manifests/m.jsonl")
    Path("work/other").rename("work/m")
    if os.name == "posix":
        with alone_in(Path("work/m/landmarks"), part=Slice(1, 2)):
            assert "another run (slice 1/2" in lipprep("index", code=1).stderr
    assert not Path("elsewhere").exists() and Path("shards/index.json").read_bytes() == before
    lipprep("index")


@pytest.mark.parametrize("text", ["0/3", "4/3", "x", "1/0", "1"])
def test_no_slice(lipprep, text):
    assert "is no slice: 1/" in lipprep("landmarks", "--slice", text, code=2).stderr
