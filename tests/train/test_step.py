"""One update: what is done to gradients and averages, and how a slice is dealt with."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lipprep.stages.shard.index import load_index
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.device import new_model, place, training_precision
from lipprep.train.errors import explained, less_memory
from lipprep.train.loader import ShardBatches
from lipprep.train.loop import train
from lipprep.train.models import LipReader
from lipprep.train.step import MovingAverage, Step
from lipprep.train.timing import PARTS, Clock, Waiting

CPU = torch.device("cpu")


def made(tiny, *settings, precision="fp32", **more):
    """A model and the step that updates it."""
    config = load_recipe("compact", [*tiny, "model.head.dropout=0", *settings])
    config = dataclasses.replace(config, resolved={"precision": precision})
    torch.manual_seed(0)
    model = place(new_model(config.model, num_classes=4), CPU, precision="fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    average = MovingAverage(model, config.ema) if config.ema else None
    more |= {"clips": 8, "size": 96, "fps": 25.0, "device": CPU, "average": average}
    return model, Step(model, optimizer, config, **more)


def batch(seed=0, *, frames=5) -> dict:
    random = np.random.default_rng(seed)
    return {
        "video": torch.from_numpy(random.integers(0, 256, (8, frames, 96, 96), dtype=np.uint8)),
        "lengths": torch.full((8,), frames),
        "labels": torch.arange(8) % 4,
        "durations": torch.full((8,), float("nan")),
        "times": torch.full((8, 2), float("nan")),
        "keys": [str(n) for n in range(8)],
    }


def test_the_average_follows_weights_and_statistics(tiny):
    model, step = made(tiny, "ema=0.5")
    expected = None
    for number in range(4):
        step(batch(number), step=number, lr=1e-2)
        now = {k: v.double().clone() for k, v in model.state_dict().items() if v.is_floating_point()}
        # The decay of the first updates is (1 + n) / (10 + n); the first one begins with the weights.
        decay = min(0.5, (1 + number) / (10 + number))
        expected = now if expected is None else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    found = step._average.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-6)
    assert not any(torch.equal(found[k].double(), v) for k, v in now.items() if "weight" in k)


def test_gradients_are_shortened_to_the_norm(tiny):
    model, step = made(tiny, "clip_norm=0.01")
    step(batch(), step=0, lr=1e-3)
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_half_precision_with_scaled_gradients_does_what_full_precision_does(tiny):
    weights = []
    for precision in ("fp32", "fp16"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "fp16")
        model, step = made(tiny, precision=precision, scaler=scaler)
        loss = step(batch(frames=3), step=0, lr=1e-3)[0].item()
        weights.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (full, full_gradient), (half, half_gradient) = weights
    assert half == pytest.approx(full, rel=0.01)
    # What step() leaves behind is still scaled.
    half_gradient = half_gradient / half_gradient.norm() * full_gradient.norm()
    assert torch.cosine_similarity(full_gradient, half_gradient, dim=0) > 0.98


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_the_scale_lowered(tiny):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    model, step = made(tiny, precision="fp16", scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    step(batch(frames=1), step=0, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**59


def test_the_first_batch_is_shown_once_and_each_part_is_timed(tiny):
    _, step = made(tiny, "accumulate=2")
    seen = []
    step.show = lambda augmented, labels: seen.append((augmented.x_B1THW.shape, labels.tolist()))
    step.clock = Clock(CPU)
    for number in range(2):
        step(batch(), step=number, lr=1e-3)
    assert seen == [((4, 1, 5, 72, 72), [0, 1, 2, 3])]
    assert set(step.clock.seconds) == set(PARTS) - {"wait"}
    assert all(seconds > 0 for seconds in step.clock.seconds.values())


def test_waiting_is_what_the_loop_waits_for_batches():
    waiting = Waiting(CPU)
    with waiting.for_batch():
        sum(range(100_000))
    waiting.step_done()
    assert waiting.take() > 0
    assert waiting.take() == 0


@pytest.mark.parametrize(
    ("recipe", "bf16", "expected"),
    [
        ("compact", True, "bf16"),
        ("lrw_resnet18_mstcn", True, "bf16"),
        ("lrw_snv05x_tcn1x", True, "fp32"),
        ("lrw_resnet18_mstcn", False, "fp32"),
    ],
)
def test_the_precision_of_auto_is_the_one_that_was_measured_to_be_fastest(recipe, bf16, expected, monkeypatch):
    monkeypatch.setattr("lipprep.train.device._cpu_has_bf16", lambda _: bf16)
    model = new_model(load_recipe(recipe).model, num_classes=3)
    assert training_precision(CPU, "auto", model) == expected
    assert training_precision(CPU, "fp16", model) == "fp16"
    assert training_precision(torch.device("cuda"), "auto", model) == "bf16"


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that gives memory back")
def test_memory_that_a_step_frees_is_kept():
    script = """
import resource, torch
from lipprep.train.device import keep_memory
keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(**more: str) -> int:
        done = subprocess.run([sys.executable, "-c", script], env={**kept, **more}, capture_output=True, check=True)
        return int(done.stdout)

    assert faults() < 10 < faults(MALLOC_ARENA_MAX="2")  # which leaves it to whoever set it


@pytest.mark.cluster  # for its time
# What the compiler itself warns of is not ours.
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_does_the_same_and_a_compiler_that_fails_is_told_of(tiny, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(original, backend="eager"))
    small = ["model.trunk=shufflenetv2", "model.head.name=tcn"]
    teacher = made([*tiny, *small])[0].eval().requires_grad_(False)
    plain, compiled = (made([*tiny, *small, setting], teacher=teacher)[1] for setting in ("seed=1", "compile=true"))
    for lengths in ([5] * 8, [5, 2] * 4, [3] * 8):
        given = {**batch(), "lengths": torch.tensor(lengths)}
        given["video"] = given["video"][:, : max(lengths)]
        losses = [step(given, step=0, lr=1e-6)[0].item() for step in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    def fails(*_):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(original, backend=fails))
    config = load_recipe("compact", tiny)
    with (
        pytest.raises(ValueError, match=r"leave out compile=true .*there is no compiler"),
        explained(less_memory(config)),
    ):
        made(tiny, "compile=true")[1](batch(), step=0, lr=1e-3)


def test_clips_are_whole_until_augmentation_begins(tiny):
    settings = ["augment.mixup=0.4", "augment.cutmix=0.4", "augment.erasing=1", "augment.time_mask=4"]
    _, late = made(tiny, *settings, "augment_after=1")
    _, never = made(tiny, "augment.erasing=0")
    _, always = made(tiny, *settings)
    assert np.array_equal(late.rows(0), never.rows(0))
    losses = [[step(batch(n), step=n, lr=1e-3)[0].item() for n in range(2)] for step in (late, never, always)]
    assert losses[0][0] == losses[1][0] != losses[2][0]
    assert losses[0][1] != losses[1][1]


def test_a_gpu_waits_from_the_end_of_a_step_to_the_start_of_the_next(monkeypatch):
    clock = itertools.count()

    class Event:
        def __init__(self, **_):
            self.at = next(clock)

        def record(self):
            pass

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for steps in (3, 1):  # looks after several steps, and after one
        for _ in range(steps):
            with waiting.for_batch():
                pass
            waiting.step_done()
        assert waiting.take() == (2 if steps == 3 else 1)  # what was before the first step of all is not known


def test_no_bit_of_a_frozen_part_changes_and_all_else_does(shards, tiny, trained_run, tmp_path, monkeypatch):
    seen, original = [], LipReader.extract_features

    def spied(model, *args):
        features = original(model, *args)
        if model.tcn.training:
            seen.append((features.requires_grad, model.trunk.training, model.frontend3D.norm.training))
        return features

    monkeypatch.setattr(LipReader, "extract_features", spied)
    freeze = "freeze=[frontend3D,trunk,tcn.project]"
    settings = [*tiny, "max_steps=4", "weight_decay=0.5", "lr=1e-2", "ema=0.9", "accumulate=2", "clip_norm=1"]
    config = load_recipe("compact", [*settings, f"init_from={trained_run}", freeze])
    train(config, shards=shards, run=tmp_path / "r", device="cpu")
    before, after = load_checkpoint(trained_run / "best.pt").model, load_checkpoint(tmp_path / "r" / "last.pt")
    frozen = {key for key in before if key.startswith(("frontend3D.", "trunk.", "tcn.project."))}
    assert any("running_var" in key for key in frozen) and len(frozen) < len(before)
    for weights in (after.model, after.ema):
        assert {key for key in before if torch.equal(before[key], weights[key])} == frozen
    # Nothing is kept for gradients that nobody needs, and no moments.
    assert seen == [(False, False, False)] * 8
    trained = [key for key in set(before) - frozen if "running" not in key and "num_batches" not in key]
    assert len(after.optimizer["state"]) == len(trained)


def test_gradients_go_through_a_frozen_part_to_what_is_before_it(shards, tiny, trained_run, tmp_path):
    config = load_recipe("compact", [*tiny, "max_steps=2", f"init_from={trained_run}", "freeze=[trunk.layer2]"])
    train(config, shards=shards, run=tmp_path / "r", device="cpu")
    before, after = (
        load_checkpoint(run / name).model for run, name in [(trained_run, "best.pt"), (tmp_path / "r", "last.pt")]
    )
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if key.startswith("trunk.layer2.")}


def test_what_is_normalised_already_is_trained_and_validated_on_as_it_is(shards, tiny, tmp_path, monkeypatch):
    seen, original = [], LipReader.read_features

    def spied(*args):
        seen.append(original(*args).log_softmax(1) / 2)  # no sum of them is 1
        return seen[-1]

    monkeypatch.setattr(LipReader, "read_features", spied)
    monkeypatch.setattr(LipReader, "normalised", True)
    nll = torch.nn.functional.nll_loss
    _, step = made(tiny, "label_smoothing=0")
    assert step(batch(), step=0, lr=1e-3)[0].item() == pytest.approx(nll(seen[0], batch()["labels"]).item())
    config = load_recipe("compact", [*tiny, "max_steps=1", "batch_size=24"])
    train(config, shards=shards, run=tmp_path / "r", device="cpu")
    row = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    val = ShardBatches(shards, load_index(shards), "val").read(np.array([[0, n] for n in range(10)]))
    assert row["loss"] == pytest.approx(nll(seen[-1], torch.from_numpy(val["labels"])).item())
