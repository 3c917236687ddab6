"""Full disks: foreseen, told with what is needed, and gone on from."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lipprep.pipeline import run, space
from lipprep.pipeline.manifest import load_manifest
from lipprep.pipeline.plan import Layout, survey
from lipprep.pipeline.wanted import read_wanted

STAGES = ("landmarks", "crops", "shards")


@pytest.mark.parametrize("flags", [(), ("--codec", "npy")])
def test_what_a_stage_writes_is_foreseen(chain, corpus, flags):
    chain(corpus, *flags, stages=STAGES)
    manifest, layout = load_manifest(Path("manifests/m.jsonl")), Layout(Path("work/m"), Path("shards"))
    wanted = read_wanted(layout.plan)
    there = survey(manifest, layout, wanted)
    empty = survey(manifest, Layout(Path("none"), Path("none/shards")), wanted)
    for stage in STAGES:
        written = sum(p.stat().st_size for p in layout.folder(stage).glob("*-*"))
        missing = [c for c in empty if c.stage == stage]
        foreseen = space.needed_bytes(stage, manifest, wanted, missing, missing, workers=2)
        padding = len(missing) * 10240  # a tar's last block, which only chunks of one clip notice
        assert 0.5 * written - padding <= foreseen <= 2 * written
        mine = [c for c in there if c.stage == stage]
        assert space.needed_bytes(stage, manifest, wanted, mine, [], workers=2) == 0
        again = space.needed_bytes(stage, manifest, wanted, mine, mine, workers=2)
        assert 0 < again < written  # old tars go as new ones come


def test_a_disk_that_will_be_full_is_warned_of(chain, lipprep, corpus, monkeypatch):
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    monkeypatch.setattr(run, "free_bytes", lambda _: 100)
    assert "will be written to" in lipprep("landmarks", "-j", 1).stderr
    assert "will be written to" not in lipprep("landmarks", "-j", 1).stderr  # nothing to do


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "make room"), (errno.EIO, "see to the disk"), (errno.EFBIG, "ulimit -f")]
)
def test_trouble_is_told_with_what_is_still_needed(chain, lipprep, monkeypatch, code, remedy):
    chain(stages=("landmarks",))

    def fail(jobs, *, workers, done):
        raise OSError(code, os.strerror(code), "x.tmp")

    with monkeypatch.context() as patched:
        patched.setattr(run, "supervise", fail)
        message = lipprep("shards", "-j", 1, code=1).stderr
    assert os.strerror(code) in message and remedy in message
    assert "12 chunks are still to be made, which takes about" in message and "are free" in message
    lipprep("shards", "-j", 1)


@pytest.mark.skipif(os.name != "posix", reason="limits on files are POSIX's")
def test_a_limit_on_the_size_of_files_ends_in_one_message(chain, lipprep):
    chain(stages=("landmarks",))
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, resource.RLIM_INFINITY));"
        "from lipprep.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "crops", "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("Error: ") == 1 and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and "ulimit -f" in done.stderr
    assert not list(Path("work/m/crops").glob("*.tar"))
    lipprep("crops", "-j", 1)
    assert not list(Path("work").rglob(".*.tmp"))


def test_sizes_are_legible():
    assert [space.size(n) for n in (0, 1500, 34e6, 1.26e10, 2e12)] == ["0 kB", "1.5 kB", "34 MB", "12.6 GB", "2 TB"]
