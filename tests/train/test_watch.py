"""What stops a run, and what it tells then."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.shard.index import load_index
from lipprep.train import loop, watch
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.evaluate import evaluate
from lipprep.train.loop import train


def lines(run) -> list[dict]:
    """The lines of a run's metrics, less the speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "wait")} for row in rows]


def test_nothing_that_is_no_number_is_saved(shards, tiny, tmp_path, monkeypatch):
    original = loop.Step.__call__

    def broken(update, *args, **kwargs):
        loss = original(update, *args, **kwargs)
        next(update.model.parameters()).data[0] = math.nan
        return loss

    monkeypatch.setattr(loop.Step, "__call__", broken)
    config = load_recipe("compact", [*tiny, "max_steps=1"])
    with pytest.raises(ValueError, match="a weight after step 1 is nan"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    monkeypatch.undo()
    assert not list((tmp_path / "r").glob("*.pt"))
    assert json.loads((tmp_path / "r" / "failure.json").read_text())["step"] == 1

    monkeypatch.setattr(loop, "_validate", lambda *_, **__: {"loss": math.nan, "top1": 1.0, "top5": 1.0})
    with pytest.raises(ValueError, match="validation loss after step 1 is nan"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r" / "best.pt").exists()


@pytest.fixture
def fails():
    """Run a command that stops at something that is no number: what its failure.json says."""

    def fails(command: list[object]) -> tuple[dict, str]:
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 1 and result.output.count("Error: ") == 1
        told = json.loads((Path(command[command.index("--run") + 1]) / "failure.json").read_text())
        assert f"{told['what']} is {told['value']} (step {told['step']} is batch" in result.output
        return {name: told[name] for name in ("what", "step", "batch", "clips", "keys_here")}, told["to_see_it_again"]

    return fails


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_step(shards, tiny, tmp_path, fails):
    settings = [*tiny, "lr=1e10", "warmup=0", "log_every=3"]
    for more in ([], ["save_every=1"]):
        run = tmp_path / f"r{len(more)}"
        first, again = fails(["train", "--shards", shards, "--recipe", "compact", "--run", run, *settings, *more])
        assert first["batch"] == first["step"] > 1 and len(first["clips"]) == 8
        assert (run / "failure.pt").exists() == bool(more)
        assert fails(again.split()[1:])[0] == first


def test_a_run_that_fails_after_its_settings_were_changed_can_be_seen_again(trained_run, shards, tmp_path, fails):
    command = ["train", "--shards", shards, "--device", "cpu", "epochs=9", "lr=1e30", "save_every=100"]
    copy = shutil.copytree(trained_run, tmp_path / "copy")
    for more in (["--run", copy, "--resume", "auto"], ["--run", tmp_path / "new", "--resume", trained_run]):
        first, again = fails([*command, *more])
        assert first["step"] > 36
        assert fails(again.split()[1:])[0] == first


@pytest.mark.cluster
def test_gradients_that_are_scaled_to_nothing_stop_a_run(shards, tiny, tmp_path):
    config = load_recipe("compact", [*tiny, "precision=fp16", "max_steps=4", "keep_every=2"])
    train(config, shards=shards, run=tmp_path / "a", device="cpu")
    assert all("scale" in row for row in lines(tmp_path / "a") if "split" not in row)
    kept = load_checkpoint(tmp_path / "a" / "step-2.pt")
    wrong = [{"scale": math.nan}, {"scale": "x"}, {"scale": torch.ones(3)}, {"_growth_tracker": -1}, {"scale": None}]
    small = "the scale of fp16's gradients after step 3 is 9.99"
    for change, message in [({"scale": 1e-4}, small), *((w, "state of the gradient scaler is none") for w in wrong)]:
        checkpoint = replace(kept, scaler={**kept.scaler, **change})
        with pytest.raises(ValueError, match=message):
            train(config, shards=shards, run=tmp_path / "b", device="cpu", resume=checkpoint)


def damage(shard, index) -> None:
    """Overwrite the middle of the first sample of a shard."""
    data = bytearray(shard.read_bytes())
    start = int(index.offsets[shard.name][0])
    data[start : start + 600] = bytes(600)
    stat = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_clip_stops_a_run_or_is_left_out_and_counted(make_shards, tiny, tmp_path, monkeypatch, capsys):
    shards = make_shards(tmp_path / "shards", splits={"train": [24], "val": [9]})
    for name in ("train-0000.tar", "val-0000.tar"):
        damage(shards / name, load_index(shards))
    config = load_recipe("compact", [*tiny, "epochs=2"])
    with pytest.raises(ValueError, match=r"train-0000\.tar is damaged .*add --skip-corrupt.*The run is saved"):
        train(config, shards=shards, run=tmp_path / "a", device="cpu")
    assert load_checkpoint(tmp_path / "a" / "last.pt").step < 3
    one = tmp_path / "one"
    shutil.copytree(make_shards(tmp_path / "whole", splits={"train": [24], "val": [9]}), one)
    damage(one / "val-0000.tar", load_index(one))
    with pytest.raises(
        ValueError, match=r"val-0000\.tar is damaged \(sample 0, .*add --skip-corrupt.*The run is saved"
    ):
        train(config, shards=one, run=tmp_path / "d", device="cpu")
    train(
        config,
        shards=one,
        run=tmp_path / "d",
        device="cpu",
        resume=load_checkpoint(tmp_path / "d" / "last.pt"),
        skip_corrupt=True,
    )
    measured = evaluate(tmp_path / "d" / "last.pt", shards=one, split="val", device="cpu", skip_corrupt=True)
    assert (measured["clips"], measured["damaged"]) == (8, 1)
    assert measured["top1"] == lines(tmp_path / "d")[-1]["top1"]
    with pytest.raises(ValueError, match=r"clips are damaged, more than 0\.1 % of 33"):
        train(config, shards=shards, run=tmp_path / "b", device="cpu", skip_corrupt=True)
    capsys.readouterr()
    monkeypatch.setattr(watch, "MOST_SKIPPED", 0.1)
    train(config, shards=shards, run=tmp_path / "c", device="cpu", skip_corrupt=True)
    assert json.loads((tmp_path / "c" / "summary.json").read_text())["skipped"] == 2
    assert capsys.readouterr().err.count("left out: shard") == 2
    top1 = [row["top1"] for row in lines(tmp_path / "c") if "split" in row]
    assert all((8 * part) == round(8 * part) for part in top1)  # of the eight that are whole


@pytest.mark.parametrize("how", ["others", "gone", "touched"])
def test_shards_that_change_during_a_run_are_noticed_before_it_is_saved(how, make_shards, tiny, tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "shards", splits={"train": [24]})
    others = make_shards(tmp_path / "others", splits={"train": [24]}, seed=9) / "train-0000.tar"
    path = shards / "train-0000.tar"
    original = loop.Step.__call__

    def changes(*args, step, **kwargs):
        if step == 4:
            match how:
                case "others":
                    shutil.copy(others, path)
                case "gone":
                    path.unlink()
                case "touched":
                    os.utime(path)
        return original(*args, step=step, **kwargs)

    monkeypatch.setattr(loop.Step, "__call__", changes)
    config = load_recipe("compact", [*tiny, "epochs=2"])
    if how == "touched":
        assert train(config, shards=shards, run=tmp_path / "r", device="cpu").steps == 6
        return
    with pytest.raises(ValueError, match="not the one it was when the run began" if how == "others" else "is gone"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert load_checkpoint(tmp_path / "r" / "last.pt").step == 3


def test_too_little_memory_is_told_with_what_to_lower(shards, tiny, tmp_path, monkeypatch):
    def greedy(*_, **__):
        torch.empty(1 << 60)

    monkeypatch.setattr(loop.Step, "__call__", greedy)
    with pytest.raises(ValueError, match=r"out of memory: lower batch_size \(it is 8\).* accumulate=2"):
        train(load_recipe("compact", tiny), shards=shards, run=tmp_path / "r", device="cpu")
