import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import Shard, load_index
from lipprep.stages.store import RemoteError
from lipprep.train import cache as cache_module
from lipprep.train import epoch as epoch_module
from lipprep.train import loader as loader_module
from lipprep.train.cache import BlockCache, RemoteShard, open_cache, parse_size
from lipprep.train.config import load_recipe
from lipprep.train.epoch import training_plan
from lipprep.train.evaluate import evaluate
from lipprep.train.loader import BatchLoader, ShardBatches
from lipprep.train.loop import train

GENEROUS = 10**9


def put(folder, bucket) -> RemotePath:
    """The files of a local folder, in a bucket."""
    for path in folder.iterdir():
        (bucket / "shards" / path.name).upload(path)
    return bucket / "shards"


def remote_shard(folder: RemotePath) -> RemoteShard:
    index = load_index(folder)
    shard = index.split("train")[0]
    return RemoteShard(folder / shard.name, shard.sha256, index.offsets[shard.name])


def blocks(cache: BlockCache) -> list:
    """The files of the blocks that are kept, the one used last at the end."""
    return sorted(cache.folder.glob("??/*"), key=lambda path: path.stat().st_mtime_ns)


def expected(folder, position: int) -> bytes:
    index = load_index(folder)
    shard = index.split("train")[0]
    start, end = index.offsets[shard.name][position : position + 2]
    return (folder / shard.name).read_bytes()[start:end]


@pytest.fixture
def line(bucket, wire):
    return wire()


@pytest.fixture
def remote(line, shards, bucket) -> RemotePath:
    """The shards of `shards`, at the far end of `line`."""
    return put(shards, bucket)


def test_what_was_read_is_not_fetched_again(remote, line, shards, tmp_path):
    shard, cache = remote_shard(remote), BlockCache(tmp_path, size=GENEROUS)
    line.received = 0
    order = [20, 3, 15, 16, 29, 0]
    for position in order:
        assert cache.read(shard, position) == expected(shards, position)
    assert len(blocks(cache)) == 2
    once = line.received
    assert once > sum(len(expected(shards, p)) for p in range(30))
    for position in range(30):
        assert BlockCache(tmp_path, size=GENEROUS).read(shard, position) == expected(shards, position)
    cache.prefetch([(shard, position) for position in range(30)])
    assert line.received == once


@pytest.mark.parametrize("harm", ["flip", "checks", "cut", "longer", "empty"])
def test_damaged_blocks_are_fetched_again(remote, shards, tmp_path, harm):
    shard, cache = remote_shard(remote), BlockCache(tmp_path, size=GENEROUS)
    cache.read(shard, 3)
    (file,) = blocks(cache)
    content = bytearray(file.read_bytes())
    if harm in ("flip", "checks"):
        content[int(shard.offsets[3]) + 700 if harm == "flip" else -5] ^= 1
    file.write_bytes({"cut": content[:-1], "longer": content + b"0", "empty": b""}.get(harm, content))
    for position in range(16):
        assert cache.read(shard, position) == expected(shards, position)
    assert len(blocks(cache)) == 1 and len(file.read_bytes()) == shard.offsets[16] + 4 * 17


@pytest.mark.parametrize("always", [False, True])
def test_what_was_damaged_on_its_way_is_fetched_once_more(remote, shards, tmp_path, monkeypatch, always):
    original, fetched = cache_module.read_range, []

    def damaged(*place):
        content = bytearray(original(*place))
        if always or not fetched:
            content[:600] = bytes(600)
        fetched.append(place)
        return bytes(content)

    monkeypatch.setattr(cache_module, "read_range", damaged)
    batches = ShardBatches(remote, load_index(remote), "train", cache=BlockCache(tmp_path, size=GENEROUS))
    places = np.array([[0, 0], [0, 1]])
    if always:
        with pytest.raises(ValueError, match=r"train-0000\.tar is damaged"):
            batches.read(places)
    else:
        local = ShardBatches(shards, load_index(shards), "train")
        assert np.array_equal(batches.read(places)["video"], local.read(places)["video"])
    assert len(fetched) == 2


def test_of_earlier_runs_the_least_recently_used_block_goes_first(make_shards, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_AT_HAND", 1)
    folder = put(make_shards(tmp_path / "local", splits={"train": [80]}, frames=(4, 4)), bucket)
    shard = remote_shard(folder)
    block = int(shard.offsets[16]) + 4 * 17
    cache = BlockCache(tmp_path / "cache", size=3 * block + 100)
    for position in (0, 16, 32):
        cache.read(shard, position)
    for age, file in enumerate(reversed(blocks(cache))):
        os.utime(file, ns=(0, 10**9 * (10 - age)))
    first, second, third = blocks(cache)
    cache.read(shard, 1)
    cache.read(shard, 64)  # room is made for more than one
    kept = blocks(cache)
    assert first in kept and second not in kept
    for _ in range(2):
        for position in range(0, 80, 16):
            cache.read(shard, position)
            assert sum(file.stat().st_size for file in blocks(cache)) <= cache.size
    assert third.parent.exists()


def test_half_the_room_saves_almost_half_of_the_requests(tmp_path, monkeypatch):
    """Also where other processes, which the cache is sent to, read the second epoch."""
    monkeypatch.setattr(epoch_module, "WINDOW", 8)
    monkeypatch.setattr(cache_module, "_AT_HAND", 4 * 8)
    blocks, sample = 384, 8
    (tmp_path / "x.tar").write_bytes(bytes(blocks * 16 * sample))
    shard = RemoteShard(tmp_path / "x.tar", "", np.arange(blocks * 16 + 1) * sample)
    fetched, original = [], cache_module.read_range
    monkeypatch.setattr(cache_module, "read_range", lambda *where: fetched.append(where) or original(*where))
    cache = BlockCache(tmp_path / "cache", size=blocks // 2 * (16 * sample + 4 * 17))
    for epoch in range(2):
        fetched.clear()
        for batch in training_plan([blocks * 16], seed=0, epoch=epoch, batch_size=16):
            for position in batch[:, 1].tolist():
                cache.read(shard, position)
        cache = pickle.loads(pickle.dumps(cache))
        assert len(fetched) <= (1, 0.65)[epoch] * blocks


def test_without_room_for_a_window_nothing_is_fetched_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_module, "WINDOW", 8)
    monkeypatch.setattr(cache_module, "WINDOW", 8)
    blocks, sample = 64, 8
    (tmp_path / "x.tar").write_bytes(bytes(blocks * 16 * sample))
    shard = RemoteShard(tmp_path / "x.tar", "", np.arange(blocks * 16 + 1) * sample)
    fetched, original = [], cache_module.read_range
    monkeypatch.setattr(cache_module, "read_range", lambda *where: fetched.append(where) or original(*where))
    whole = blocks * 16 * sample
    cache = BlockCache(tmp_path / "cache", size=4 * (16 * sample + 4 * 17), needed=whole)
    for batch in training_plan([blocks * 16], seed=0, epoch=0, batch_size=16):
        for position in batch[:, 1].tolist():
            cache.read(shard, position)
    assert sum(end - start for _, start, end in fetched) == whole


@pytest.mark.parametrize("size", [None, 0, 100])
def test_samples_that_are_not_kept_are_fetched_several_at_once(remote, shards, tmp_path, monkeypatch, size):
    pairs = threading.Barrier(2)  # nobody goes on alone
    for module in (cache_module, loader_module):

        def together(*where, original=module.read_range):
            pairs.wait(60)
            return original(*where)

        monkeypatch.setattr(module, "read_range", together)
    cache = None if size is None else BlockCache(tmp_path, size=size)
    batches = ShardBatches(remote, load_index(remote), "train", cache=cache)
    places = np.array([[s, p] for p in (3, 0, 17) for s in (1, 0)])
    got = batches.read(places)
    wanted = ShardBatches(shards, load_index(shards), "train")
    monkeypatch.undo()
    wanted = wanted.read(places)
    assert got["keys"] == wanted["keys"] and np.array_equal(got["video"], wanted["video"])


def test_a_lost_ledger_is_counted_again(make_shards, bucket, tmp_path):
    folder = put(make_shards(tmp_path / "local", splits={"train": [64]}, frames=(4, 4)), bucket)
    shard = remote_shard(folder)
    block = int(shard.offsets[16]) + 4 * 17
    cache = BlockCache(tmp_path / "cache", size=2 * block)
    for position in (0, 16, 32, 48):
        (cache.folder / ".size.lock").unlink(missing_ok=True)
        cache.read(shard, position)
        assert sum(file.stat().st_size for file in blocks(cache)) <= cache.size


def test_a_block_is_fetched_once_for_all(remote, line, shards, tmp_path):
    shard = remote_shard(remote)
    line.received = 0
    got = {}

    def read(position: int) -> None:
        got[position] = BlockCache(tmp_path, size=GENEROUS).read(shard, position)

    threads = [threading.Thread(target=read, args=(position,)) for position in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {position: expected(shards, position) for position in range(16)}
    assert line.received < 1.5 * shard.offsets[16]


def test_shards_that_call_themselves_others_take_nobodys_place(remote, shards, tmp_path):
    shard, cache = remote_shard(remote), BlockCache(tmp_path, size=GENEROUS)
    cache.read(RemoteShard(shard.path.with_name("train-0001.tar"), shard.sha256, shard.offsets), 0)
    assert cache.read(shard, 0) == expected(shards, 0)
    cache.read(RemoteShard(shard.path, "../../../x", shard.offsets), 0)
    assert len(blocks(cache)) == 3


@pytest.mark.parametrize("fault", ["size", "disk"])
def test_what_cannot_be_kept_is_fetched_once(remote, line, shards, tmp_path, monkeypatch, capsys, fault):
    if fault == "disk" and not Path("/dev/full").exists():
        pytest.skip("there is no full disk")
    shard = remote_shard(remote)
    cache = BlockCache(tmp_path, size=GENEROUS if fault == "disk" else int(shard.offsets[16]))
    if fault == "disk":
        full = Path("/dev/full")
        monkeypatch.setattr(cache_module, "Output", lambda _: full.open("wb", buffering=0))
        cache.prefetch([(shard, 0), (shard, 16)])
    line.received = 0
    cache.prefetch([(shard, position) for position in range(16)])
    assert [cache.read(shard, position) for position in range(16)] == [expected(shards, p) for p in range(16)]
    assert line.received < 1.5 * shard.offsets[16] and list(tmp_path.glob("??/*")) == []
    assert capsys.readouterr().err.count("fetched by itself") == (fault == "disk")


def test_a_block_whose_time_cannot_be_set_is_kept(remote, line, shards, tmp_path, monkeypatch):
    shard, cache = remote_shard(remote), BlockCache(tmp_path, size=GENEROUS)
    cache.read(shard, 0)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    line.cut()
    assert cache.read(shard, 3) == expected(shards, 3)


def test_batches_are_those_of_local_shards(remote, line, shards, tmp_path, monkeypatch):
    local = ShardBatches(shards, load_index(shards), "train")
    far = ShardBatches(remote, load_index(remote), "train", cache=BlockCache(tmp_path, size=GENEROUS))
    plan = training_plan(local.counts, seed=3, epoch=1, batch_size=8)
    for ours, theirs in zip(
        BatchLoader(far, plan, workers=0, pin_memory=False),
        BatchLoader(local, plan, workers=0, pin_memory=False),
        strict=True,
    ):
        assert ours["keys"] == theirs["keys"] and torch.equal(ours["video"], theirs["video"])
    line.cut()
    assert len(list(BatchLoader(far, plan, workers=0, pin_memory=False))) == len(plan)
    monkeypatch.setattr("lipprep.stages.store._PAUSES", (0.01,))
    for file in blocks(far.cache):
        file.unlink()
    with pytest.raises(RemoteError, match=r"train-000[01]\.tar: no answer from the store"):
        list(BatchLoader(far, plan, workers=0, pin_memory=False))


def test_a_network_that_comes_back_costs_nothing(bucket, wire, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("lipprep.stages.store._PAUSES", (0.01,) * 5)
    folder = put(shards, bucket)
    line = wire(cuts=0, after=100)
    other = put(shards, bucket / "again")
    assert load_index(folder).fingerprint == load_index(other).fingerprint
    line.cuts = line.broken + 4
    shard = remote_shard(other)
    assert BlockCache(tmp_path, size=GENEROUS).read(shard, 0) == expected(shards, 0)


def losses(run) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.cluster
def test_training_from_a_store_is_training_from_a_disk(remote, shards, tiny, tmp_path):
    """By the command, with two processes that read and share a cache; then an evaluation."""
    settings = [setting for setting in tiny if not setting.startswith("workers")] + ["max_steps=4", "epochs=2"]
    train(load_recipe("compact", [*settings, "workers=0"]), shards=shards, run=tmp_path / "local", device="cpu")
    command = [sys.executable, "-m", "lipprep.train", "--shards", str(remote), "--recipe", "compact"]
    command += ["--run", "far", "--cache", "cache", "--cache-size", "1GB", "--device", "cpu", *settings, "workers=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Unclosed" not in done.stderr, done.stderr
    assert losses(tmp_path / "far") == pytest.approx(losses(tmp_path / "local"), abs=1e-12)
    kept = blocks(BlockCache(tmp_path / "cache", size=0))
    assert len(kept) == 2 + 2 + 1
    assert evaluate(tmp_path / "far", shards=remote, device="cpu", cache=tmp_path / "cache")["clips"] == 14
    assert set(kept) < set(blocks(BlockCache(tmp_path / "cache", size=0)))


def test_an_index_of_a_store_is_checked_as_a_local_one(remote, shards, bucket):
    index = load_index(str(remote))
    assert index.fingerprint == load_index(shards).fingerprint
    assert all(np.array_equal(index.offsets[n], o) for n, o in load_index(shards).offsets.items())
    (remote / "train-0001.tar").upload(shards / "index.json")
    with pytest.raises(ValueError, match=r"shard s3://.*/train-0001\.tar has .* bytes where the index has"):
        load_index(remote)
    (remote / "train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard s3://.*/train-0001\.tar is missing"):
        load_index(remote)
    (remote / "index.npz").upload(shards / "train-0001.tar")
    with pytest.raises(ValueError, match=r"has no index\.json"):
        load_index(bucket)


def test_a_network_at_fault_is_not_the_indexs(remote, line, monkeypatch):
    monkeypatch.setattr("lipprep.stages.store._PAUSES", (0.01,))
    line.cut()
    with pytest.raises(RemoteError, match="no answer from the store"):
        load_index(remote)


ONE = [Shard("train-00000.tar", "train", 1, 1, "")]


def test_a_cache_for_local_shards_is_none(shards, tmp_path, capsys):
    assert open_cache(shards, ONE) is None and capsys.readouterr().err == ""
    assert open_cache(shards, ONE, folder=tmp_path / "c") is None
    assert "a cache has no effect" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_cache_that_is_too_small_is_told(tmp_path, capsys):
    pytest.importorskip("s3fs")
    with pytest.raises(ValueError, match="at least 100MB"):
        open_cache("s3://bucket/x", ONE, folder=tmp_path, size=10**7)
    assert (
        open_cache(
            "s3://bucket/x", [Shard("train-00000.tar", "train", 10**6, 10**9, "")], folder=tmp_path, size=10**8
        ).size
        == 10**8
    )
    assert "1 GB are read and 0.1 GB kept" in capsys.readouterr().err
    large = [Shard("train-00000.tar", "train", 10**3, 3 * 10**8, "")]
    open_cache("s3://bucket/x", large, folder=tmp_path, size=10**8)
    assert "take 0.3 GB, and 0.1 GB are kept" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be a local folder"):
        open_cache("s3://bucket/x", ONE, folder="s3://bucket/cache")


def test_the_default_cache_is_the_persons(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    cache = open_cache("s3://bucket/x", ONE)
    assert cache.folder == tmp_path / "lipprep" and 0 < cache.size <= 50 * 10**9
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_a_disk_without_room_is_told(tmp_path, monkeypatch, capsys):
    pytest.importorskip("s3fs")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**12, free=10**8))
    assert open_cache("s3://bucket/x", ONE, folder=tmp_path) is None
    assert "every clip is fetched by itself" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"file.* cannot be written to .*--cache"):
            open_cache("s3://bucket/x", ONE, folder=tmp_path / folder)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    with pytest.raises(ValueError, match=r"no home folder .*--cache"):
        open_cache("s3://bucket/x", ONE)


@pytest.mark.parametrize(("text", "size"), [("20GB", 2 * 10**10), ("1.5 tb", 15 * 10**11), ("500MB", 5 * 10**8)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "20", "GB", "-1GB", "1e9", "20 gallons"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="is no size: write it as in 20GB"):
        parse_size(text)
