import itertools
import json
import os
import re
import signal

import pytest
import torch

from lipprep.stages.store import AGAIN, RemoteError
from lipprep.train import device as devices
from lipprep.train import loop, report
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_config, load_recipe, overfitting
from lipprep.train.evaluate import evaluate
from lipprep.train.loader import ShardBatches
from lipprep.train.loop import train
from lipprep.train.models import LipReader
from lipprep.train.run import open_run


def lines(run) -> list[dict]:
    """The lines of a run's metrics, less the speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "wait")} for row in rows]


def test_training_learns(trained_run):
    rows = lines(trained_run)
    losses = [row["loss"] for row in rows if "split" not in row]
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 37))
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    best = load_checkpoint(trained_run / "best.pt")
    top1, last = max((row["top1"], row["step"]) for row in rows if row.get("split") == "val")
    assert (best.best, best.step) == (top1, last) and top1 > 0.6


def test_a_run_folder_holds_what_it_should(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "last.pt", "last.json", "best.pt", "best.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    about = json.loads((trained_run / "last.json").read_text())
    assert (about["step"], about["epoch"], about["batch"]) == (36, 6, 0)
    assert about["labels"] == ["down", "grow", "shrink", "up"]
    assert "model" not in about["parameters"] and about["parameters"]["profile"] == "lrw2021"


SIGNALS = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}


@pytest.mark.parametrize("how", ["crash", "ctrl-c", "sigterm", "network"])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(how, shards, tiny, tmp_path, monkeypatch):
    settings = [*tiny, "max_steps=15", "save_every=4", "augment.mixup=0.4", "augment.time_mask=3"]
    settings += ["augment.cutmix=0.5", "augment.erasing=0.2", "ema=0.9", "clip_norm=1"]
    config = load_recipe("compact", settings)
    train(config, shards=shards, run=tmp_path / "a", device="cpu")

    original, run = loop.Step.__call__, tmp_path / "b"

    def disturbed(*args, step, **kwargs):
        loss = original(*args, step=step, **kwargs)
        if step == 5 and how == "crash":
            raise RuntimeError("the machine went down")
        if step == 6 and how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[how])
        return loss

    read, count = ShardBatches.read, itertools.count()

    def cut_off(batches, places, **room):
        if how == "network" and batches.paths[0].name.startswith("train") and next(count) == 7:
            raise RemoteError(f"no answer{AGAIN}")
        return read(batches, places, **room)

    monkeypatch.setattr(loop.Step, "__call__", disturbed)
    monkeypatch.setattr(ShardBatches, "read", cut_off)
    message = r"^no answer\. The run is saved: go on with `--run .* --resume auto`$" if how == "network" else None
    with pytest.raises((RuntimeError, KeyboardInterrupt, RemoteError), match=message):
        train(config, shards=shards, run=run, device="cpu")
    monkeypatch.undo()
    with (run / "metrics.jsonl").open("a") as file:  # what a kill may leave behind
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')

    _, config, checkpoint = open_run(run, resume="auto")
    assert checkpoint.step == (4 if how == "crash" else 7)
    train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    assert lines(run) == lines(tmp_path / "a")
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / r / name) for r in "ab")
        assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
        assert (a.step, a.epoch, a.batch, a.best) == (b.step, b.epoch, b.batch, b.best)
        assert a.temperature is not None and (a.temperature, a.threshold) == (b.temperature, b.threshold)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_killed_while_it_validates_loses_nothing(shards, tiny, tmp_path, monkeypatch):
    config, run = load_recipe("compact", [*tiny, "epochs=2"]), tmp_path / "b"
    train(config, shards=shards, run=tmp_path / "a", device="cpu")
    original, calls = loop._validate, []

    def killed(*args, **kwargs):
        calls.append(None)
        if len(calls) in (1, 3):
            raise RuntimeError("the machine went down")
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "_validate", killed)
    checkpoint = None
    for step in (6, 12):
        with pytest.raises(RuntimeError):
            train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
        _, config, checkpoint = open_run(run, resume="auto")
        assert checkpoint.step == step
    train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    assert lines(run) == lines(tmp_path / "a")
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / r / name) for r in "ab")
        assert (a.best, a.temperature, a.threshold) == (b.best, b.temperature, b.threshold)


def test_a_line_holds_the_mean_loss_of_the_steps_since_the_last(shards, tiny, tmp_path):
    for name, every in (("a", 1), ("b", 4)):
        config = load_recipe("compact", [*tiny, "max_steps=10", f"log_every={every}"])
        train(config, shards=shards, run=tmp_path / name, device="cpu")
    losses = [row["loss"] for row in lines(tmp_path / "a") if "split" not in row]
    rows = [row for row in lines(tmp_path / "b") if "split" not in row]
    assert [row["loss"] for row in rows] == [losses[3], losses[7], losses[9]]
    means = [sum(part) / len(part) for part in (losses[:4], losses[4:8], losses[8:])]
    assert [row["mean_loss"] for row in rows] == pytest.approx(means)


def test_only_training_steps_run_in_the_precision_of_auto(shards, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda _: True)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu199")
    seen, original = set(), LipReader.read_features

    def spied(model, *args):
        seen.add((model.training, torch.is_autocast_enabled("cpu")))
        return original(model, *args)

    monkeypatch.setattr(LipReader, "read_features", spied)
    run = tmp_path / "r"
    train(load_recipe("compact", [*tiny, "max_steps=2"]), shards=shards, run=run, device="cpu")
    assert seen == {(True, True), (False, False)}
    evaluate(run, shards=shards, device="cpu")
    assert seen == {(True, True), (False, False)}
    resolved = {"device": "cpu", "precision": "bf16", "workers": 0, "processes": 1, "threads": 1}
    assert load_checkpoint(run / "last.pt").config["resolved"] == resolved
    assert load_config(run / "config.yaml").resolved == resolved

    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda _: False)
    _, config, checkpoint = open_run(run, overrides=["max_steps=3"], resume="auto")
    assert capsys.readouterr().err == ""
    train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    (told,) = re.findall("warning: .*", capsys.readouterr().err)  # none of torch, whose build is a part of its name
    assert "on precision bf16 and goes on with fp32" in told


def test_seeds_make_runs(shards, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        config = load_recipe("compact", [*tiny, "max_steps=2", f"seed={seed}"])
        train(config, shards=shards, run=tmp_path / name, device="cpu")
    assert lines(tmp_path / "a")[0]["loss"] != lines(tmp_path / "b")[0]["loss"]


def test_a_run_tells_of_itself(trained_run):
    summary = json.loads((trained_run / "summary.json").read_text())
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert (summary["ended"], summary["steps"], summary["epochs"], summary["words"]) == ("steps", 36, 6.0, 4)
    assert summary["best_val_top1"] == max(row["top1"] for row in rows if "split" in row)
    for name, which in (("best.pt", "best"), ("last.pt", "last")):  # each has the temperature of its own weights
        told, checkpoint = summary[f"{which}_validation"], load_checkpoint(trained_run / name)
        assert (checkpoint.step, checkpoint.temperature) == (told["step"], told["temperature"])
        assert checkpoint.threshold == told["threshold"] and 0 <= told["ece_calibrated"] <= 1
    assert summary["clips"] == {"train": 48, "val": 10} and summary["skipped"] == 0
    assert set(summary["versions"]) == {"lipprep", "torch", "python"}
    assert {"step", "epoch", "loss", "lr", "clips_per_s", "wait", "accuracy"} <= rows[0].keys()
    assert all(0 <= row["wait"] <= 1 for row in rows if "split" not in row)
    for name in ("curves.png", "first_batch.png"):
        assert (trained_run / name).read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(trained_run / "last.pt").versions == summary["versions"]


def test_the_average_is_what_is_validated_and_read_with(shards, tiny, tmp_path):
    run = tmp_path / "r"
    train(load_recipe("compact", [*tiny, "epochs=2", "ema=0.9"]), shards=shards, run=run, device="cpu")
    checkpoint = load_checkpoint(run / "last.pt")
    assert checkpoint.weights is checkpoint.ema
    assert any(not torch.equal(checkpoint.ema[k], v) for k, v in checkpoint.model.items())
    measured = evaluate(run / "last.pt", shards=shards, split="val", device="cpu")
    assert measured["top1"] == lines(run)[-1]["top1"]


def test_what_a_disk_made_of_the_metrics_ends_no_run(shards, tiny, tmp_path, monkeypatch, capsys):
    run, config = tmp_path / "r", load_recipe("compact", [*tiny, "max_steps=2"])
    run.mkdir()
    damaged = b'{"step": 0, "split": "val"}\n\x83\xff\n[3]\n{"step": "x"}\n'
    (run / "metrics.jsonl").write_bytes(damaged)
    train(config, shards=shards, run=run, device="cpu")
    assert [row["step"] for row in lines(run)] == [0, 1, 2, 2]
    monkeypatch.setattr(report, "read_metrics", lambda _: [{"split": "val"}])
    train(config, shards=shards, run=tmp_path / "s", device="cpu")
    assert "curves.png could not be drawn" in capsys.readouterr().err


def test_a_run_that_has_gone_on_is_not_overwritten(shards, tiny, tmp_path):
    run, config = tmp_path / "r", load_recipe("compact", [*tiny, "max_steps=3", "keep_every=2"])
    train(config, shards=shards, run=run, device="cpu")
    for checkpoint in (None, load_checkpoint(run / "step-2.pt")):
        with pytest.raises(ValueError, match=r"gone on to step 3, .*name another --run"):
            train(config, shards=shards, run=run, device="cpu", resume=checkpoint)


def test_an_average_may_begin_late_and_is_resumed_to_the_bit(shards, tiny, tmp_path):
    def go_on(name: str, *overrides: str, at) -> dict:
        run, config, checkpoint = open_run(tmp_path / name, overrides=overrides, resume=str(at))
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
        return load_checkpoint(run / "last.pt").ema

    settings = [*tiny, "max_steps=9", "keep_every=3"]
    train(load_recipe("compact", settings), shards=shards, run=tmp_path / "a", device="cpu")
    late = go_on("b", "ema=0.9", at=tmp_path / "a" / "step-3.pt")
    again = go_on("c", at=tmp_path / "b" / "step-6.pt")
    assert all(torch.equal(again[name], value) for name, value in late.items())


def test_what_a_kill_left_of_a_checkpoint_is_removed(shards, tiny, tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    for name in (".last.pt.d4b5.tmp", ".step-8.pt.d4b5.tmp"):
        (run / name).write_bytes(b"half")
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=shards, run=run, device="cpu")
    assert not list(run.glob(".*.tmp"))


def test_max_time_saves_and_the_run_goes_on_to_the_bit(shards, tiny, tmp_path):
    settings = [*tiny, "max_steps=8", "ema=0.9"]
    train(load_recipe("compact", settings), shards=shards, run=tmp_path / "a", device="cpu")
    run = tmp_path / "b"
    outcome = train(load_recipe("compact", [*settings, "max_time=1e-6"]), shards=shards, run=run, device="cpu")
    assert (outcome.ended, outcome.steps) == ("max_time", 0) and (run / "last.pt").is_file()
    for limit in ("max_time=1e-6", "max_time=null"):
        _, config, checkpoint = open_run(run, overrides=[limit], resume="auto")
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    a, b = (load_checkpoint(tmp_path / r / "last.pt") for r in "ab")
    assert all(torch.equal(getattr(a, kind)[k], v) for kind in ("model", "ema") for k, v in getattr(b, kind).items())


def test_validation_saves_and_kept_checkpoints_come_as_often_as_asked(shards, tiny, tmp_path):
    run, settings = tmp_path / "r", ["max_steps=10", "eval_every=4", "keep_every=3"]
    train(load_recipe("compact", [*tiny, *settings]), shards=shards, run=run, device="cpu")
    assert [row["step"] for row in lines(run) if "split" in row] == [4, 8, 10]
    assert sorted(path.name for path in run.glob("step-*.pt")) == ["step-3.pt", "step-6.pt", "step-9.pt"]
    assert load_checkpoint(run / "step-6.pt").step == 6


def test_what_is_learnt_by_heart_are_as_many_clips_as_asked(shards, tiny, tmp_path):
    config = load_recipe("compact", [*overfitting(10), *tiny, "max_steps=1", "model.head.dropout=0.5"])
    assert config.batch_size == 8
    outcome = train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert outcome.validated == 10 and outcome.ended == "steps"


def test_a_few_clips_are_learnt_by_heart(shards, tiny, tmp_path):
    config = load_recipe("compact", [*overfitting(8), *tiny, "max_steps=150", "eval_every=10", "lr=1e-2"])
    outcome = train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert (outcome.ended, outcome.best) == ("learned", 1.0)
    rows = [row for row in lines(tmp_path / "r") if "split" not in row]
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and outcome.steps < 150


def test_a_trace_shows_what_a_step_spends_its_time_on(shards, tiny, tmp_path):
    train(load_recipe("compact", [*tiny, "epochs=1"]), shards=shards, run=tmp_path / "r", device="cpu", trace=True)
    names = {event.get("name", "") for event in json.loads((tmp_path / "r" / "trace.json").read_text())["traceEvents"]}
    assert any("convolution" in name for name in names)
