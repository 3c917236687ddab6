import dataclasses
import os
import pickle

import pytest
import torch

from lipprep.stages.shard.index import load_index
from lipprep.train.checkpoint import check_fits, find_checkpoint, load_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_as_it_was(trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "last.pt")
    save_checkpoint(tmp_path / "c.pt", checkpoint)
    again = load_checkpoint(tmp_path / "c.pt")
    assert all(torch.equal(again.model[key], value) for key, value in checkpoint.model.items())
    for name in ("step", "epoch", "batch", "best", "config", "labels", "parameters", "fps", "dataset"):
        assert getattr(again, name) == getattr(checkpoint, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.pt"]


@pytest.fixture
def make_index(shards):
    """The index of `shards` with other parameters, or another fps."""
    index = load_index(shards)

    def made(fps=index.fps, **parameters):
        return dataclasses.replace(index, fps=fps, parameters=index.parameters | parameters)

    return made


class Touch:
    """What a hostile pickle looks like: opened carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_is_refused_and_not_executed(form, tmp_path):
    trap, path = Touch(tmp_path / "executed"), tmp_path / "c.pt"
    state = {"lipprep_checkpoint": 1, "model": trap}
    torch.save(state, path) if form == "torch" else path.write_bytes(pickle.dumps(state))
    with pytest.raises(ValueError, match="never executed"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_checkpoint_cut_short_is_refused(cut, trained_run, tmp_path):
    (tmp_path / "c.pt").write_bytes((trained_run / "last.pt").read_bytes()[:cut])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lipprep_checkpoint": 99}, "version 99"),
        ({"labels": "abc"}, "labels"),
        ({"labels": [1]}, "labels"),
        ({"labels": ["down", "grow", "shrink", "\x1b[2J"]}, "cannot be printed"),
        ({"step": "1"}, "step"),
        ({"step": 2**53}, "step"),
        ({"epoch": -1}, "epoch"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"profile": "lrw2021", "crop_size": "96"}}, "crop_size is '96'"),
        ({"parameters": {"profile": "fixed", "crop_size": 96, "box": [1, 2]}}, "box"),
        ({"parameters": {"profile": "lrw2021", "crop_size": 96, "mean_face": [[1.0, 2.0]]}}, "mean_face"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 0.0}, r"fps is 0\.0"),
        ({"extra": 1}, "extra"),
    ],
)
def test_damaged_fields_are_named(change, message, trained_run, tmp_path):
    state = torch.load(trained_run / "last.pt", weights_only=True)
    torch.save(state | change, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": 9_000}, "a network of"),
        ({"num_layers": 400}, "a network of"),
        ({"num_layers": 10**6}, "the number 1000000"),
        ({"channels": float("nan")}, "the number nan"),
        ({"name": 3}, "unknown head 3"),
    ],
)
def test_a_network_larger_than_its_weights_is_not_built(setting, message, trained_run, tmp_path):
    state = torch.load(trained_run / "last.pt", weights_only=True)
    state["config"]["model"]["head"] |= setting
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt")


def test_weights_that_are_not_there_are_refused(trained_run, tmp_path):
    state = torch.load(trained_run / "last.pt", weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name] = torch.zeros(1).expand(10**12)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="more numbers than bytes"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("foreign", [{"model_state_dict": {}}, torch.zeros(3), [1]])
def test_a_foreign_file_is_no_checkpoint_of_lipprep(foreign, tmp_path):
    torch.save(foreign, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no checkpoint of lipprep"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_published_checkpoint_is_said_to_be_one(tmp_path):
    torch.save({"model_state_dict": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="lipprep import-checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_run_means_its_best_and_else_its_last(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(tmp_path / "r")
    (tmp_path / "r").mkdir()
    with pytest.raises(ValueError, match=r"neither best\.pt nor last\.pt"):
        find_checkpoint(tmp_path / "r")
    for name in ("last.pt", "best.pt"):
        (tmp_path / "r" / name).touch()
        assert find_checkpoint(tmp_path / "r").name == name
    assert find_checkpoint(tmp_path / "r", "last.pt").name == "last.pt"
    assert find_checkpoint(tmp_path / "r" / "last.pt").name == "last.pt"


def test_other_labels_or_another_profile_do_not_fit(trained_run, shards):
    checkpoint, index = load_checkpoint(trained_run / "last.pt"), load_index(shards)
    check_fits(checkpoint, index)
    with pytest.raises(ValueError, match=r"'up' is only in the checkpoint's, 'zig' only in the shards'"):
        check_fits(checkpoint, dataclasses.replace(index, labels=("down", "grow", "shrink", "zig")))
    with pytest.raises(ValueError, match="another order"):
        check_fits(checkpoint, dataclasses.replace(index, labels=index.labels[::-1]))
    with pytest.raises(ValueError, match=r"lrw2021.*lrw2022"):
        check_fits(checkpoint, dataclasses.replace(index, parameters={"profile": "lrw2022"}))


FACE = [[1.0, 2.0]] * 68


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        ({}, {"mean_face": FACE}, "mean_face"),
        ({"mean_face": FACE}, {"mean_face": [[1.0, 2.5]] * 68}, "mean_face"),
        ({"box": [0, 0, 96, 96]}, {"box": [0, 8, 96, 96]}, "box"),
        ({"fps": 25.0}, {"fps": 30.0}, "fps"),
    ],
)
def test_other_crops_do_not_fit(trained, given, message, trained_run, make_index):
    checkpoint = load_checkpoint(trained_run / "last.pt")
    checkpoint = dataclasses.replace(checkpoint, parameters=checkpoint.parameters | trained)
    with pytest.raises(ValueError, match=message):
        check_fits(checkpoint, make_index(**given))


def test_crops_made_by_other_means_are_warned_of(trained_run, make_index, capsys):
    checkpoint = load_checkpoint(trained_run / "last.pt")
    check_fits(checkpoint, make_index(exact=False))
    assert capsys.readouterr().err == ""
    check_fits(checkpoint, make_index(exact=True, detector="fan", identity="fan-12345678"))
    err = capsys.readouterr().err
    assert "exact False" in err and "fan-12345678" in err
    check_fits(checkpoint, make_index(crops_from="files", exact=True, detector="fan"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mute", ["checkpoint does", "shards do"])
def test_a_box_that_is_not_known_is_warned_of(mute, trained_run, make_index, capsys):
    checkpoint = load_checkpoint(trained_run / "last.pt")
    box = {"box": [79, 115, 96, 96]}
    known = dataclasses.replace(checkpoint, parameters=checkpoint.parameters | box)
    check_fits(known, make_index(**box))
    assert capsys.readouterr().err == ""
    check_fits(*((known, make_index()) if mute == "shards do" else (checkpoint, make_index(**box))))
    assert f"the {mute} not say which box their crops were cut with" in capsys.readouterr().err
