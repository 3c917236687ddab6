import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from traps import PATIENCE

from lipprep.stages.shard.index import load_index
from lipprep.stages.shard.reader import read_samples
from lipprep.train import loader
from lipprep.train.epoch import evaluation_plan, places, training_plan
from lipprep.train.loader import BatchLoader, ShardBatches

FORKS = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a server that forks"
)


def batches_of(folder, split="train") -> ShardBatches:
    return ShardBatches(folder, load_index(folder), split)


def test_a_batch_holds_the_samples_of_its_places(shards):
    batches = batches_of(shards)
    places = np.array([[1, 3], [0, 29], [0, 0]])
    batch = batches.read(places)
    index = load_index(shards)
    samples = [
        read_samples(shards / f"train-000{s}.tar", index.offsets[f"train-000{s}.tar"], range(p, p + 1))[0]
        for s, p in places.tolist()
    ]
    assert batch["keys"] == [s["key"] for s in samples]
    assert batch["labels"].tolist() == [index.labels.index(s["word"]) for s in samples]
    assert batch["lengths"].tolist() == [len(s["mouth"]) for s in samples]
    assert batch["video"].shape == (3, max(batch["lengths"]), 96, 96)
    for video, sample in zip(batch["video"], samples, strict=True):
        length = len(sample["mouth"])
        assert np.array_equal(video[:length], sample["mouth"])
        assert not video[length:].any()


def test_unknown_durations_are_nan(shards):
    durations = batches_of(shards).read(np.array([[0, 0], [0, 1]]))["durations"]
    assert durations[0] == pytest.approx(0.24)
    assert np.isnan(durations[1])


def test_workers_change_nothing(shards):
    batches = batches_of(shards)
    plan = training_plan(batches.counts, seed=0, epoch=0, batch_size=8)
    loaders = [BatchLoader(batches, plan, workers=workers, pin_memory=False) for workers in (0, 2)]
    for places_, alone, shared in zip(plan, *loaders, strict=True):
        wanted = batches.read(places_)
        for batch in (alone, shared):
            assert batch["keys"] == wanted["keys"]
            assert all(np.array_equal(batch[name], wanted[name]) for name in ("video", "lengths", "labels"))
            assert all(isinstance(batch[name], torch.Tensor) for name in ("video", "lengths", "labels", "durations"))


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_used_again_but_not_while_a_batch_may_be_looked_at(shards, workers):
    batches = batches_of(shards)
    plan = training_plan(batches.counts, seed=0, epoch=0, batch_size=4)
    before = None
    for number, batch in enumerate(BatchLoader(batches, plan, workers=workers, pin_memory=False)):
        assert np.array_equal(batch["video"], batches.read(plan[number])["video"])
        if before is not None:  # all is read that can be, by now
            assert np.array_equal(before["video"], batches.read(plan[number - 1])["video"])
        before = batch
    assert number > 8


def test_a_loader_may_be_read_again(shards):
    batches = batches_of(shards, "val")
    loader = BatchLoader(batches, evaluation_plan(places(batches.counts), batch_size=4), workers=0, pin_memory=False)
    first, second = ([key for batch in loader for key in batch["keys"]] for _ in range(2))
    assert first == second
    assert len(set(first)) == 10


def test_a_missing_split_names_those_there(shards):
    with pytest.raises(ValueError, match=r"unseen.*test, train, val"):
        batches_of(shards, "unseen")


def test_without_workers_a_thread_reads_one_batch_ahead(shards):
    class Watched(ShardBatches):
        begun = threading.Event()

        def read(self, places, **room):
            if places[0, 1] == 1:
                self.begun.set()
            return super().read(places, **room)

    before = set(threading.enumerate())
    plan = [np.array([[0, n]]) for n in range(9)]
    batches = iter(BatchLoader(Watched(shards, load_index(shards), "train"), plan, workers=0, pin_memory=False))
    assert next(batches)["keys"][0].endswith("_00000")
    assert Watched.begun.wait(60)
    assert next(batches)["keys"][0].endswith("_00001")
    batches.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("duration", ["1", True, -1, [], float("nan"), 10**400])
def test_durations_that_are_none_are_refused(duration, make_shards, tmp_path, monkeypatch):
    folder = make_shards(tmp_path, splits={"train": [1]})
    sample = {"key": "up/1", "mouth": np.zeros((3, 96, 96), np.uint8), "label": 0, "duration": duration}
    monkeypatch.setattr(loader, "decode_sample", lambda _: sample)
    monkeypatch.setattr(loader, "read_samples", lambda *_, **__: [sample])
    with pytest.raises(ValueError, match=r"train-0000\.tar: clip up/1 has duration"):
        batches_of(folder).read(np.array([[0, 0]]))


def test_a_batch_beyond_the_memory_is_refused(make_shards, tmp_path, monkeypatch):
    folder = make_shards(tmp_path, splits={"train": [3]})
    monkeypatch.setattr(loader, "_MAX_BATCH", 3 * 9 * 96 * 96 - 1)
    with pytest.raises(ValueError, match=r"train-0000\.tar: clip .* has 9 frames.*lower batch_size"):
        batches_of(folder).read(np.array([[0, 0], [0, 1], [0, 2]]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_names_its_shard(shards, tmp_path, workers):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "train-0001.tar"
    start = load_index(folder).offsets[path.name][5]
    with path.open("rb+") as file:
        file.seek(int(start) + 512)
        file.write(bytes(200))
    batches = batches_of(folder)
    loader = BatchLoader(batches, [np.array([[1, 4], [1, 5]])], workers=workers, pin_memory=False)
    with pytest.raises(ValueError, match=r"train-0001\.tar"):
        list(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"labels": ["down", "grow"]}, "has label"), ({"parameters": {"profile": "lrw2021", "crop_size": 88}}, "side 88")],
)
def test_samples_that_do_not_fit_the_index_are_refused(make_shards, tmp_path, change_index, change, message):
    folder = make_shards(tmp_path, splits={"train": [4]})
    change_index(folder, **change)
    with pytest.raises(ValueError, match=message):
        batches_of(folder).read(np.array([[0, i] for i in range(4)]))


def test_what_stands_in_for_a_damaged_clip_is_the_same_whoever_reads_it(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    index = load_index(folder)
    path = folder / "train-0000.tar"
    with path.open("rb+") as file:
        for position in (5, 6, 29):
            file.seek(int(index.offsets[path.name][position]))
            file.write(bytes(600))
    batches = ShardBatches(folder, index, "train", skip_damaged=True)
    clean = ShardBatches(shards, load_index(shards), "train")
    first, second = (batches.read(np.array(p)) for p in ([[1, 2], [0, 5], [0, 29]], [[0, 29], [0, 6], [0, 5]]))
    wanted = clean.read(np.array([[1, 2], [0, 7], [0, 0]]))
    assert first["keys"] == wanted["keys"] and np.array_equal(first["video"], wanted["video"])
    assert second["keys"] == [wanted["keys"][2], wanted["keys"][1], wanted["keys"][1]]
    assert {row: place for row, (place, _) in first["damaged"].items()} == {1: (0, 5), 2: (0, 29)}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_to_all_leaves_readers_to_the_main_process(python):
    script = "import os, signal; from lipprep.train.loader import _begin; _begin(0)\n"
    signals = "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True)\n"
    again = "os.kill(os.getpid(), signal.SIGTERM); print('still')"
    process = python(script + signals + again, [], env=os.environ)
    assert process.communicate(timeout=PATIENCE)[0] == "alive\n" and process.returncode == -signal.SIGTERM


READS = """
import sys, time
from pathlib import Path
import numpy as np
from lipprep.stages.shard.index import load_index
from lipprep.train.loader import BatchLoader, ShardBatches

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    batches = ShardBatches(folder, load_index(folder), "train")
    plan = [np.array([[0, 0]])] * 99
    reader = iter(BatchLoader(batches, plan, workers=2, pin_memory=False))
    print(next(reader)["keys"], flush=True)
    time.sleep(600)
"""


@FORKS
def test_readers_take_lipprep_from_where_the_run_does_and_end_with_it(shards, tmp_path):
    for package in ("lipprep", "torch"):  # folders of these names, as in a clone, are none of Python's business
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    script = tmp_path / "scripts" / "reads.py"
    script.parent.mkdir()
    script.write_text(READS)
    command = [sys.executable, script, shards]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        try:
            assert run.stdout.readline().count("_00000") == 1
            started = psutil.Process(run.pid).children(recursive=True)
            assert len(started) >= 3  # the server and its workers
        finally:
            run.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]


@FORKS
def test_what_others_have_the_server_fork_can_be_ended(shards):
    batches = batches_of(shards)
    reader = iter(BatchLoader(batches, [np.array([[0, 0]])], workers=1, pin_memory=False))
    assert len(next(reader)["keys"]) == 1
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM


@FORKS
def test_a_folder_whose_name_is_too_long_to_meet_in_is_named(shards, monkeypatch):
    def fail():
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", fail)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with pytest.raises(ValueError, match=r"AF_UNIX path too long.*set TMPDIR to .* or workers=0"):
        BatchLoader(batches_of(shards), [np.array([[0, 0]])], workers=1, pin_memory=False)
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_run_that_fails_does_not_wait_for_its_readers(shards, python, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    start = load_index(folder).offsets["train-0001.tar"][4]
    with (folder / "train-0001.tar").open("rb+") as file:
        file.seek(int(start) + 512)
        file.write(bytes(200))
    command = ["train", "--recipe", "compact", "--device", "cpu", "--shards", folder]
    settings = ["--run", tmp_path / "r", "workers=2", "epochs=1", "batch_size=8"]
    process = python("from lipprep.cli import program\nprogram()", [*command, *settings], env=os.environ)
    _, err = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 1 and "train-0001.tar is damaged" in err
