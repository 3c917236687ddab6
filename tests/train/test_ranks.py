"""Several processes, as torchrun starts them: the same run as that of one."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from traps import PATIENCE, until

from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.evaluate import evaluate
from lipprep.train.ranks import join

EXACT = ["model.head.dropout=0", "precision=fp32", "max_steps=6", "batch_size=12", "augment.time_mask=3"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


TRAIN = "from lipprep.train.__main__ import run, train\nrun(train, prog_name='python -m lipprep.train')"


@pytest.fixture
def start(python):
    """Start the processes of one run; `code` is run by each before it trains."""

    def start(arguments: list[object], *, world: int, code: str = "", script: str = TRAIN) -> list:
        port = str(free_port())
        return [
            python(
                f"{code}\n{script}",
                arguments,
                env={
                    **os.environ,
                    **{"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                },
            )
            for n in range(world)
        ]

    return start


def end(processes: list) -> list[tuple[int, str, str]]:
    told = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]


def arguments(shards: Path, run: Path, *settings: str) -> list[object]:
    return ["--shards", shards, "--recipe", "compact", "--run", run, "--device", "cpu", *settings]


@pytest.fixture
def trained(start):
    """Train, and give the lines of metrics of the run."""

    def trained(shards: Path, run: Path, *settings: str, world: int = 1) -> list[dict]:
        done = end(start(arguments(shards, run, *settings), world=world))
        assert [code for code, _, _ in done] == [0] * world, done
        assert all(not out for _, out, _ in done[1:])
        assert not any("Warning" in err or "Error" in err for _, _, err in done)
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    return trained


@pytest.mark.parametrize(("world", "synced"), [(2, False), pytest.param(3, True, marks=pytest.mark.cluster)])
def test_several_processes_do_what_one_does_with_the_same_batch(world, synced, shards, tiny, trained, tmp_path):
    settings = [*tiny, *EXACT, "augment.mixup=0.4", "augment.cutmix=0.5", "augment.erasing=0.3", "clip_norm=5"]
    alone = trained(shards, tmp_path / "a", *settings, f"accumulate={1 if synced else world}")
    together = trained(shards, tmp_path / "b", *settings, f"sync_batchnorm={synced}", world=world)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    training = [[row["loss"] for row in rows if "split" not in row] for rows in (alone, together)]
    assert len(training[0]) == 6
    if synced:
        # Sums over ranks round otherwise, and Adam makes whole steps of gradients that are nothing but rounding.
        assert training[0][:2] == pytest.approx(training[1][:2], rel=5e-3)
        assert training[0] == pytest.approx(training[1], rel=0.15)
    else:
        assert training[0] == pytest.approx(training[1], rel=2e-4)


@pytest.mark.cluster
def test_several_processes_keep_what_is_frozen_and_learn_from_a_teacher(shards, tiny, trained, trained_run, tmp_path):
    settings = [*tiny, *EXACT, "max_steps=3", f"init_from={trained_run}", f"teacher={trained_run}"]
    settings += ["freeze=[frontend3D,trunk.layer2]", "augment.mixup=0.4", "eval_every=9"]
    alone = trained(shards, tmp_path / "a", *settings, "accumulate=2")
    together = trained(shards, tmp_path / "b", *settings, world=2)
    for name in ("loss", "distill"):
        assert [row[name] for row in alone[:3]] == pytest.approx([row[name] for row in together[:3]], rel=2e-4)
    before, after = load_checkpoint(trained_run / "best.pt").model, load_checkpoint(tmp_path / "b" / "last.pt").model
    frozen = [key for key in before if key.startswith(("frontend3D.", "trunk.layer2."))]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["trunk.layer1.0.conv1.weight"], after["trunk.layer1.0.conv1.weight"])


NORM = """
import json, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lipprep.train.ranks import join
from lipprep.train.sync_norm import synchronised

torch.manual_seed(0)
x = torch.randn(7, 3, 5, 5, dtype=torch.float64) * 3 + 20
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
with join("cpu") as ranks:
    module = net
    if ranks.world > 1:
        module = DistributedDataParallel(synchronised(net))
        x = x[:4] if ranks.main else x[4:]  # not of one size
    # Each rank's mean is weighed by its share, as ranks of one size are by themselves.
    loss = (module(x.float())[:, :, 0, 0] ** 3).sum() * ranks.world / 7
    loss.backward()
    if ranks.main:
        values = {**dict(net.named_buffers()), **{f"{k}.grad": p.grad for k, p in net.named_parameters()}}
        print(json.dumps({k: v.flatten().tolist() for k, v in values.items()}))
"""


def test_synchronised_normalisation_has_the_statistics_and_gradients_of_the_whole_batch(start):
    def values(world: int) -> dict[str, list[float]]:
        done = end(start([], world=world, script=NORM))
        assert [code for code, _, _ in done] == [0] * world, done
        return json.loads(done[0][1])

    alone, together = values(1), values(2)
    assert alone.keys() == together.keys()
    for name in alone:
        assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-3), name


@pytest.mark.cluster
def test_one_that_fails_ends_all_with_its_message_and_the_run_goes_on_to_the_bit(shards, tiny, start, tmp_path):
    settings = [*tiny, *EXACT, "model.head.dropout=0.2", "save_every=2"]
    code = """
import os
from lipprep.train.loader import ShardBatches
read, calls = ShardBatches.read, []
def fails(batches, places, **room):
    calls.append(None)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        raise ValueError("shard x is damaged")
    return read(batches, places, **room)
ShardBatches.read = fails
"""
    whole, broken = arguments(shards, tmp_path / "a", *settings), arguments(shards, tmp_path / "b", *settings)
    done = end(start(broken, world=2, code=code))
    assert [status for status, _, _ in done] == [1, 1], done
    assert "shard x is damaged" in done[1][2] and "lost one of them" in done[0][2]
    assert not any("Traceback" in err for _, _, err in done)
    assert 0 < load_checkpoint(tmp_path / "b" / "last.pt").step < 6
    for command in (whole, [*broken, "--resume", "auto"]):
        done = end(start(command, world=2))
        assert [status for status, _, _ in done] == [0, 0], done
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert a.step == b.step == 6 and all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    measured = evaluate(tmp_path / "a", shards=shards, split="val", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert measured["clips"] == 10 and measured["top1"] == pytest.approx(a.best)
    assert max(row["top1"] for row in rows if "split" in row) == a.best


def test_a_store_that_is_lost_to_one_ends_all(shards, tiny, start, tmp_path):
    code = """
import os
from lipprep.stages.store import AGAIN, RemoteError
from lipprep.train.loader import ShardBatches
read, calls = ShardBatches.read, []
def fails(batches, places, **room):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "0":
        raise RemoteError(f"no answer{AGAIN}")
    return read(batches, places, **room)
ShardBatches.read = fails
"""
    done = end(start(arguments(shards, tmp_path / "a", *tiny, *EXACT), world=2, code=code))
    assert [status for status, _, _ in done] == [1, 1], done
    assert "no answer. The run is saved" in done[0][2] and "lost one of them" in done[1][2]
    assert load_checkpoint(tmp_path / "a" / "last.pt").step == 2


def test_what_is_wrong_for_all_is_told_once(shards, tiny, start, tmp_path):
    done = end(start(arguments(shards, tmp_path / "a", *tiny, *EXACT, "batch_size=9"), world=2))
    assert [status for status, _, _ in done] == [1, 1]
    assert "make it a multiple of 2" in done[0][2] and not done[1][2]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [("nowhere", "has no index.json"), pytest.param("others", "of rank 1 are others than", marks=pytest.mark.cluster)],
)
def test_one_that_has_other_shards_ends_all(where, message, shards, make_shards, tiny, start, tmp_path):
    if where == "others":
        make_shards(tmp_path / where, splits={"train": [24], "val": [10]}, seed=9)
    code = f"""
import os, sys
if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("--shards") + 1] = {str(tmp_path / where)!r}
"""
    done = end(start(arguments(shards, tmp_path / "a", *tiny, *EXACT), world=2, code=code))
    assert [status for status, _, _ in done] == [1, 1], done
    assert message in done[0][2] + done[1][2]
    assert not any("Traceback" in err for _, _, err in done) and not (tmp_path / "a").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.cluster
def test_a_signal_to_one_saves_and_ends_all(shards, tiny, start, tmp_path):
    processes = start(arguments(shards, tmp_path / "a", *tiny, *EXACT, "max_steps=5000", "epochs=5000"), world=2)
    metrics = tmp_path / "a" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    processes[1].send_signal(signal.SIGTERM)
    done = end(processes)
    assert [status for status, _, _ in done] == [130, 130], done
    assert "--resume auto" in done[0][2]
    assert load_checkpoint(tmp_path / "a" / "last.pt").step >= 3


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is not, or is no number: start it with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
    ],
)
def test_an_environment_that_names_no_run_is_refused(variables, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables["WORLD_SIZE"] == "abc":
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=message), join("cpu"):
        pass
