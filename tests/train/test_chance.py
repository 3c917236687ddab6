"""What every recipe's network does in training: follow its moving average, and nothing by chance where it overfits."""

import dataclasses
import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.shard.index import load_index, save_index
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe, recipes
from lipprep.train.loop import train
from lipprep.train.models import build, switch_off_dropout
from lipprep.train.step import MovingAverage


def networks() -> dict[str, dict]:
    """The networks of all recipes, each once, by the first recipe that has it."""
    found: dict[str, tuple[str, dict]] = {}
    for name in recipes():
        model = load_recipe(name).model
        found.setdefault(json.dumps(model, sort_keys=True, default=str), (name, model))
    return dict(found.values())


NETWORKS = networks()


def answers(model: torch.nn.Module, seed: int) -> torch.Tensor:
    lengths_B = torch.tensor([4, 3])
    boundary_BT = None if model.boundary is None else torch.ones(2, 4, 1)
    x_B1THW = torch.randn(2, 1, 4, 88, 88, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(x_B1THW, lengths_B, boundary_BT)


@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_network_that_overfits_does_nothing_by_chance(recipe):
    model = build(NETWORKS[recipe], 5).train()
    switch_off_dropout(model)
    assert torch.equal(answers(model, 1), answers(model, 2))


@pytest.mark.parametrize("recipe", ["lrw_snv05x_tcn1x", "lrw_resnet18_bigru", "lrw_efficientnet_mstcn"])
def test_a_network_that_trains_does(recipe):
    model = build(NETWORKS[recipe], 5).train()
    assert not torch.equal(answers(model, 1), answers(model, 2))


@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_moving_average_moves_every_tensor_by_its_decay_once(recipe):
    model = build(NETWORKS[recipe], 5)
    average = MovingAverage(model, 0.9)
    average.updates = 1000  # the decay has come to its value
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        average.update(model)
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 1
    average.update(model)
    after = average.module.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        step = 1 if not value.is_floating_point() else 1 - 0.9
        torch.testing.assert_close(value, before[name] + step, rtol=1e-6, atol=1e-6, msg=name)


def test_overfit_switches_off_what_a_recipe_drops(shards, tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lipprep.train.prepare.switch_off_dropout", lambda model: seen.append(model))
    for overrides in (["overfit=4"], []):
        config = load_recipe("compact", [*tiny, *overrides, "max_steps=1"])
        train(config, shards=shards, run=tmp_path / f"r{len(seen)}{len(overrides)}", device="cpu")
    assert len(seen) == 1


def test_a_video_is_read_in_windows_as_long_as_the_training_clips(shards, tiny, tmp_path, make_video, face_frames):
    """The shards' index tells how long they usually are, and the checkpoint keeps it."""
    shutil.copytree(shards, tmp_path / "s")
    parameters = {"profile": "fixed", "box": [80, 116, 96, 96], "crop_size": 96}
    save_index(tmp_path / "s", dataclasses.replace(load_index(shards), num_frames=9, parameters=parameters))
    run = tmp_path / "r"
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=tmp_path / "s", run=run, device="cpu")
    assert load_checkpoint(run / "last.pt").num_frames == 9
    video = make_video(tmp_path / "v.mp4", face_frames[:20])
    result = CliRunner().invoke(main, ["predict", str(video), "--checkpoint", str(run), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    windows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {round(25 * (w["to"] - w["from"])) for w in windows} == {9}


def test_older_checkpoints_read_windows_of_lrw(trained_run):
    checkpoint = dataclasses.replace(load_checkpoint(trained_run / "best.pt"), num_frames=None)
    assert checkpoint.window == 29


def test_the_index_tells_the_usual_length_and_an_older_index_is_read(tmp_path, monkeypatch, make_video, face_frames):
    from lipprep.stages.shard.index import plain_digest

    monkeypatch.chdir(tmp_path)
    for n in range(4):
        make_video(tmp_path / f"videos/WORD/train/WORD_{n:05d}.mp4", face_frames[: 15 if n else 20])
    for command in (
        ["manifest", "lrw", "videos", "-o", "manifests/m.jsonl"],
        ["shards", "--profile", "fixed", "--engine", "serial"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    assert load_index(tmp_path / "shards").num_frames == 15
    path = tmp_path / "shards/index.json"
    plain = json.loads(path.read_text())
    del plain["num_frames"], plain["sha256"]
    plain["lipprep_index"] = 2
    path.write_text(json.dumps({**plain, "sha256": plain_digest(plain)}))
    assert load_index(tmp_path / "shards").num_frames is None
    assert CliRunner().invoke(main, ["verify", "shards"]).exit_code == 0
    result = CliRunner().invoke(main, ["shards", "--engine", "serial"])
    assert "0 chunks made" in result.output and load_index(tmp_path / "shards").num_frames == 15
