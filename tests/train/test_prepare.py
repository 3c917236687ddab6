"""What is refused, told or taken over before the first step."""

import math
import re
import shutil

import pytest
import torch

from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.loop import train
from lipprep.train.prepare import prepare
from lipprep.train.run import open_run


def test_a_crop_larger_than_the_shards_is_refused_at_once(shards, tiny, tmp_path):
    config = load_recipe("compact", [*tiny, "augment.crop_size=112"])
    with pytest.raises(ValueError, match=r"96 pixels wide.*crop_size=112"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_another_profile_than_the_recipes_is_warned_of(make_shards, tiny, tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", splits={"train": [8]}, profile="lrw2022")
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=shards, run=tmp_path / "r", device="cpu")
    said = capsys.readouterr()
    assert "meant for crops of profile lrw2021" in said.err
    assert "no split val" in said.out
    assert not (tmp_path / "r" / "best.pt").exists()


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (None, "the shards do not say which box their crops were cut with, and recipe .* of the box "),
        ([0, 0, 96, 96], "of the box .*79, 115, 96, 96.*, these shards are of .*0, 0, 96, 96"),
        ([79, 115, 96, 96], None),
    ],
)
def test_another_box_than_the_recipes_is_warned_of(box, said, make_shards, change_index, tiny, tmp_path, capsys):
    folder = make_shards(tmp_path / "shards", splits={"train": [2]}, profile="fixed")
    parameters = {"profile": "fixed", "crop_size": 96, "codec": "npy", "crops_from": "files"}
    change_index(folder, parameters=parameters | ({"box": box} if box else {}))
    config = load_recipe("compact", [*tiny, "profile=fixed", "box=[79,115,96,96]"])
    prepare(config, folder, device="cpu")
    err = capsys.readouterr().err
    assert re.search(said, err) if said else "box" not in err


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
        ("freeze=[trunk]", r"freeze=\[\], not \['trunk'\].*init_from=PATH begins it"),
        ("optimizer=sgd", "optimizer=adamw, not sgd"),
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


def test_a_run_begins_with_the_weights_of_another_and_tells_which(shards, tiny, trained_run, tmp_path, capsys):
    config = load_recipe("compact", [*tiny, "max_steps=1", f"init_from={trained_run}", "lr=1e-9"])
    train(config, shards=shards, run=tmp_path / "a", device="cpu")
    theirs, ours = load_checkpoint(trained_run / "best.pt").model, load_checkpoint(tmp_path / "a" / "last.pt").model
    weights = [key for key in ours if "running" not in key and "num_batches" not in key]
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in weights)
    assert f"init_from: {len(theirs)} of {len(ours)} weights are those of" in capsys.readouterr().out

    config = load_recipe("compact", [*tiny, "max_steps=1", f"init_from={trained_run}", "model.head.num_layers=3"])
    train(config, shards=shards, run=tmp_path / "b", device="cpu")
    assert "tcn.convs.2.weight is not there: it begins anew" in capsys.readouterr().out
    config = load_recipe("compact", [*tiny, "max_steps=1", f"init_from={trained_run}", "model.head.channels=16"])
    train(config, shards=shards, run=tmp_path / "c", device="cpu")
    assert "tcn.convs.0.weight is (16, 16, 3) here and (32, 32, 3) there" in capsys.readouterr().out


def test_the_classifier_of_other_words_begins_anew(make_shards, tiny, trained_run, tmp_path, capsys):
    shards = make_shards(tmp_path / "s", splits={"train": [16]}, words=("up", "down", "shrink", "grow"))
    config = load_recipe("compact", [*tiny, "max_steps=1", f"init_from={trained_run}"])
    train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert "tcn.output.weight is for other words there: it begins anew" in capsys.readouterr().out


def test_other_shards_are_gone_on_with_where_asked(make_shards, trained_run, tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", splits={"train": [48]}, seed=5, profile="lrw2022")
    _, config, checkpoint = open_run(tmp_path / "r", overrides=["epochs=7"], resume=str(trained_run))
    with pytest.raises(ValueError, match="Add --other-shards"):
        train(config, shards=shards, run=tmp_path / "r", device="cpu", resume=checkpoint)
    outcome = train(config, shards=shards, run=tmp_path / "r", device="cpu", resume=checkpoint, other_shards=True)
    assert outcome.steps == 42 and "Going on all the same" in capsys.readouterr().err
    fewer = make_shards(tmp_path / "fewer", splits={"train": [48]}, words=("up", "down"))
    with pytest.raises(ValueError, match="init_from=PATH"):
        train(config, shards=fewer, run=tmp_path / "q", device="cpu", resume=checkpoint, other_shards=True)


@pytest.mark.parametrize("value", [math.nan, 1j])
def test_weights_that_are_no_numbers_begin_no_run(value, shards, tiny, trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "last.pt")
    name = "tcn.output.weight"
    checkpoint.model[name] = torch.full_like(checkpoint.model[name], value, dtype=torch.tensor(value).dtype)
    save_checkpoint(tmp_path / "bad.pt", checkpoint)
    config = load_recipe("compact", [*tiny, f"init_from={tmp_path / 'bad.pt'}"])
    with pytest.raises(ValueError, match=f"its weight {name} "):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augment.crop_size=4"], "too small for the trunk compact: 32"),
        (["model.head.channels=-1"], "channels of the compact head is -1: it must be a whole number from 1 on"),
        (["compile=true"], "not for the trunk compact"),
        (["freeze=[frontend]"], r"no part 'frontend': did you mean frontend3D\? It has trunk, trunk\.layer1.*tcn"),
        (["freeze=[trunk,frontend3D,tcn]"], "leaves nothing to train"),
    ],
)
def test_settings_that_no_network_takes_are_refused(settings, message, shards, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(load_recipe("compact", [*tiny, *settings]), shards=shards, run=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_what_is_frozen_at_random_is_told(shards, tiny, trained_run, tmp_path, capsys):
    def said(name, *settings) -> str:
        config = load_recipe("compact", [*tiny, "max_steps=1", *settings])
        train(config, shards=shards, run=tmp_path / name, device="cpu")
        said = capsys.readouterr()
        assert "parameters stay as they are" in said.out
        return said.err

    assert "freeze: frontend3D, drawn at random, will stay so" in said("a", "freeze=[frontend3D]")
    assert not said("b", "freeze=[frontend3D,trunk.layer1]", f"init_from={trained_run}")
    wider = [f"init_from={trained_run}", "model.head.channels=16", "freeze=[frontend3D,tcn.convs.1]"]
    told = said("c", *wider)
    assert "freeze: tcn.convs.1, drawn at random" in told and "frontend3D" not in told


def test_a_boundary_that_no_clip_has_is_told_of(shards, tiny, tmp_path, capsys):
    for formula, said in (("times", True), ("mpc001", False)):  # of every third clip the duration is known
        config = load_recipe("compact", [*tiny, "max_steps=1", f"model.boundary={formula}"])
        train(config, shards=shards, run=tmp_path / formula, device="cpu")
        assert ("none of the first 8 clips has a word_start and word_end" in capsys.readouterr().err) == said


@pytest.mark.parametrize("name", ["init_from", "teacher"])
def test_what_learns_from_weights_of_lrw_says_so(name, shards, tiny, trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "best.pt")
    for resolved, bound in (({"of_lrw": True}, True), ({}, None)):
        checkpoint.config["resolved"] = resolved
        save_checkpoint(tmp_path / "first.pt", checkpoint)
        config = load_recipe("compact", [*tiny, f"{name}={tmp_path / 'first.pt'}"])
        work = prepare(config, shards, device="cpu")
        assert work.checkpoint().config["resolved"].get("of_lrw") is bound
