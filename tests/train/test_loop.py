import itertools
import json
import math
import os
import shutil
import signal

import pytest
import torch

from lipprep.stages.store import AGAIN, RemoteError
from lipprep.train import device as devices
from lipprep.train import loop
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_config, load_recipe
from lipprep.train.evaluate import evaluate
from lipprep.train.loader import ShardBatches
from lipprep.train.loop import learning_rate, train
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
    assert best.best == max(row["top1"] for row in rows if row.get("split") == "val") > 0.6


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

    def cut_off(batches, places):
        if how == "network" and batches.paths[0].name.startswith("train") and next(count) == 7:
            raise RemoteError(f"no answer{AGAIN}")
        return read(batches, places)

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
        assert load_checkpoint(run / name).best == load_checkpoint(tmp_path / "a" / name).best


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
    seen, original = set(), LipReader.forward

    def spied(model, *args):
        seen.add((model.training, torch.is_autocast_enabled("cpu")))
        return original(model, *args)

    monkeypatch.setattr(LipReader, "forward", spied)
    run = tmp_path / "r"
    train(load_recipe("compact", [*tiny, "max_steps=2"]), shards=shards, run=run, device="cpu")
    assert seen == {(True, True), (False, False)}
    evaluate(run, shards=shards, device="cpu")
    assert seen == {(True, True), (False, False)}
    resolved = {"device": "cpu", "precision": "bf16", "workers": 0, "processes": 1}
    assert load_checkpoint(run / "last.pt").config["resolved"] == resolved
    assert load_config(run / "config.yaml").resolved == resolved

    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda _: False)
    _, config, checkpoint = open_run(run, overrides=["max_steps=3"], resume="auto")
    assert capsys.readouterr().err == ""
    train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    assert "on precision bf16 and goes on with fp32" in capsys.readouterr().err


def test_nothing_that_is_no_number_is_saved(shards, tiny, tmp_path, monkeypatch):
    original = loop.Step.__call__

    def broken(update, *args, **kwargs):
        loss = original(update, *args, **kwargs)
        next(update.model.parameters()).data[0] = math.nan
        return loss

    monkeypatch.setattr(loop.Step, "__call__", broken)
    config = load_recipe("compact", [*tiny, "max_steps=1"])
    with pytest.raises(ValueError, match="weights after step 1 are no finite numbers"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    monkeypatch.undo()
    assert not list((tmp_path / "r").glob("*.pt"))

    monkeypatch.setattr(loop, "_validate", lambda *_, **__: {"loss": math.nan, "top1": 1.0, "top5": 1.0})
    with pytest.raises(ValueError, match="validation loss after step 1 is nan"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r" / "best.pt").exists()


def test_a_crop_larger_than_the_shards_is_refused_at_once(shards, tiny, tmp_path):
    config = load_recipe("compact", [*tiny, "augment.crop_size=112"])
    with pytest.raises(ValueError, match=r"96 pixels wide.*crop_size=112"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_seeds_make_runs(shards, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        config = load_recipe("compact", [*tiny, "max_steps=2", f"seed={seed}"])
        train(config, shards=shards, run=tmp_path / name, device="cpu")
    assert lines(tmp_path / "a")[0]["loss"] != lines(tmp_path / "b")[0]["loss"]


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_step(shards, tiny, tmp_path):
    config = load_recipe("compact", [*tiny, "lr=1e30", "warmup=0", "log_every=3"])
    with pytest.raises(ValueError, match=r"loss of step [23] is (nan|inf)"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")


def test_another_profile_than_the_recipes_is_warned_of(make_shards, tiny, tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", splits={"train": [8]}, profile="lrw2022")
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=shards, run=tmp_path / "r", device="cpu")
    said = capsys.readouterr()
    assert "meant for crops of profile lrw2021" in said.err
    assert "no split val" in said.out
    assert not (tmp_path / "r" / "best.pt").exists()


def test_fewer_clips_than_a_batch_still_train(make_shards, tiny, tmp_path):
    shards = make_shards(tmp_path / "shards", splits={"train": [2, 1], "val": [1]})
    outcome = train(load_recipe("compact", [*tiny, "epochs=2"]), shards=shards, run=tmp_path / "r", device="cpu")
    assert outcome.steps == 2
    assert outcome.best in (0.0, 1.0)
    assert (tmp_path / "r" / "best.pt").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=9", "seed=1, not 9"),
        ("batch_size=4", "batch_size"),
        ("model.head.channels=64", "model="),
        ("lr=1", "36 steps"),
    ],
)
def test_what_cannot_change_on_the_way_is_refused(override, message, trained_run, shards, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    _, config, checkpoint = open_run(run, overrides=[override], resume="auto")
    with pytest.raises(ValueError, match=message):
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)


@pytest.mark.parametrize("wrong", ["shape", "more", "fewer", "kind", "names", "form"])
def test_moments_that_do_not_fit_their_weights_are_refused(wrong, trained_run, shards, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    _, config, checkpoint = open_run(run, overrides=["epochs=7"], resume="auto")
    state = checkpoint.optimizer["state"]
    match wrong:
        case "shape":
            state[0]["exp_avg_sq"] = torch.zeros(1)
        case "more":
            state[len(state)] = state[0]
        case "fewer":
            del state[0]
        case "kind":
            state[0]["exp_avg"] = 1.0
        case "names":
            state[0]["max_exp_avg_sq"] = state[0]["exp_avg_sq"]
        case "form":
            checkpoint.optimizer["state"] = [state]
    with pytest.raises(ValueError, match="optimizer state does not fit its model"):
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)


def test_a_checkpoint_changes_no_setting_of_the_optimizer(trained_run, shards, tmp_path):
    weights = []
    for name in "ab":
        run = shutil.copytree(trained_run, tmp_path / name)
        _, config, checkpoint = open_run(run, overrides=["epochs=7"], resume="auto")
        if name == "b":
            checkpoint.optimizer["param_groups"] = [{"betas": (0.0, 0.0), "eps": 1e9, "amsgrad": True}]
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
        weights.append(load_checkpoint(run / "last.pt").model)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_other_shards_are_refused_on_resuming(make_shards, trained_run, tmp_path):
    shards = make_shards(tmp_path / "shards", splits={"train": [48]}, seed=5)
    _, config, checkpoint = open_run(tmp_path / "r", overrides=["epochs=9"], resume=str(trained_run))
    with pytest.raises(ValueError, match="made anew"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu", resume=checkpoint)


def test_shards_without_an_index_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"lipprep shards"):
        train(load_recipe("compact", tiny), shards=tmp_path, run=tmp_path / "r", device="cpu")


def test_an_unknown_device_is_refused(shards, tiny, tmp_path):
    for device in ("tpu", "cuda:99"):
        with pytest.raises(ValueError, match="device"):
            train(load_recipe("compact", tiny), shards=shards, run=tmp_path / "r", device=device)


def test_the_rate_warms_up_and_falls_to_zero():
    config = load_recipe("compact", ["lr=1", "warmup=0.1"])
    rates = [learning_rate(step, total=100, config=config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    published = load_recipe("lrw_resnet18_mstcn")
    assert learning_rate(0, total=80, config=published) == published.lr
    assert learning_rate(20, total=80, config=published) == pytest.approx(published.lr * (1 + math.sqrt(0.5)) / 2)
