"""Optimizers and schedules: the formulas of the published trainers."""

import math

import pytest
import torch

from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.loop import train
from lipprep.train.optimize import learning_rate, make_optimizer
from lipprep.train.prepare import prepare
from lipprep.train.run import open_run


def rates(*settings: str, total: int, per_epoch: int) -> list[float]:
    config = load_recipe("lrw_resnet18_mstcn", ["lr=1", "schedule=cosine", *settings])
    return [learning_rate(step, total=total, per_epoch=per_epoch, config=config) for step in range(total)]


def test_the_rate_warms_up_and_falls_to_zero():
    found = rates("warmup=0.1", total=100, per_epoch=7)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(found) == 1
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[55] == pytest.approx(0.5)
    assert 0 < found[99] < 1e-3
    published = load_recipe("lrw_resnet18_mstcn", ["schedule=cosine"])
    assert learning_rate(0, total=80, per_epoch=1, config=published) == published.lr
    assert learning_rate(20, total=80, per_epoch=1, config=published) == pytest.approx(
        published.lr * (1 + math.sqrt(0.5)) / 2
    )
    assert rates("warmup=0.99", total=10, per_epoch=7)[-1] == 1  # all of it rises


def test_cosines_fall_to_their_least_rate():
    assert rates("lr_min=0.2", total=1000, per_epoch=10)[-1] == pytest.approx(0.2, abs=1e-4)
    assert rates("lr_min=0.2", total=1000, per_epoch=10)[500] == pytest.approx(0.6)


def test_a_cosine_by_epoch_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=5e-3)
    expected = []
    for _ in range(4):
        expected += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        scheduler.step()
    found = rates("schedule=cosine_by_epoch", "lr_min=5e-3", total=11, per_epoch=3)  # the last epoch is cut short
    assert found == pytest.approx(expected[:11])


def test_the_published_lrw_trainers_rate_stands_still_in_its_second_epoch():
    found = rates("schedule=mpc001", total=160, per_epoch=2)[::2]
    assert found[0] == found[1] == 1
    assert found[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (epoch - 1) / 80)) for epoch in range(2, 80)])
    assert found[79] == pytest.approx(0.5 * (1 + math.cos(math.pi * 78 / 80)))


def test_the_rate_is_halved_every_so_many_epochs():
    found = rates("schedule=halving", "halve_every=2", total=15, per_epoch=3)
    assert found == [1.0] * 6 + [0.5] * 6 + [0.25] * 3
    assert rates("schedule=halving", "warmup=0.2", total=15, per_epoch=3)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("adamw", 2 * (1 - 0.1 * 0.5) - 0.1),  # the first step of Adam is of the rate, whatever the gradient
        ("adam", 2 - 0.1),
        ("sgd", 2 - 0.1 * (3 + 0.5 * 2)),
    ],
)
def test_weights_decay_as_each_optimizer_has_it(name, after):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    config = load_recipe("compact", [f"optimizer={name}", "lr=0.1", "weight_decay=0.5"])
    optimizer = make_optimizer([weight], config)
    (3 * weight).backward()
    optimizer.step()
    assert weight.item() == pytest.approx(after, rel=1e-5)
    if name == "sgd":
        before = weight.item()
        optimizer.step()
        assert weight.item() == pytest.approx(before - 0.1 * (0.9 * 4 + 3 + 0.5 * before), rel=1e-5)


@pytest.mark.parametrize("settings", [["optimizer=sgd", "schedule=halving"], ["optimizer=adam", "schedule=mpc001"]])
def test_every_optimizer_and_schedule_is_resumed_to_the_bit(settings, shards, tiny, tmp_path):
    settings = [*tiny, *settings, "max_steps=8", "lr=1e-2"]  # an epoch has six
    train(load_recipe("compact", [*settings, "keep_every=5"]), shards=shards, run=tmp_path / "a", device="cpu")
    run, config, checkpoint = open_run(tmp_path / "b", resume=str(tmp_path / "a" / "step-5.pt"))
    train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    checkpoint.optimizer["state"][0] = {"exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match="optimizer state does not fit its model"):
        train(config, shards=shards, run=tmp_path / "c", device="cpu", resume=checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule=halving", "lr_min=1e-6"], "lr_min=1e-06 is for cosines"),
        (["halve_every=3"], "halve_every=3 is without effect"),
        (["distill_weight=2"], "distill_weight=2 is without effect"),
        ([], ""),
    ],
)
def test_what_is_set_in_vain_is_told(settings, message, shards, tiny, capsys):
    prepare(load_recipe("compact", [*tiny, *settings]), shards, device="cpu")
    said = capsys.readouterr().err
    assert message in said and bool(said) == bool(message)
