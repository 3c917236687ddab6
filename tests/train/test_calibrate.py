import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lipprep.cli import main
from lipprep.stages.lock import LOCK, hold
from lipprep.train.calibrate import (
    LEAST,
    MOST,
    Calibration,
    abstain_threshold,
    confidence_figures,
    expected_calibration_error,
    fit_calibration,
    fit_temperature,
    mean_probabilities,
)
from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.evaluate import evaluate


def drawn(seed: int, *, clips: int = 4000, words: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are drawn from their softmax: a reader that is as sure as it is right."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (clips, words))
    labels = (np.cumsum(mean_probabilities([logits], [1.0]), axis=1) < random.random((clips, 1))).sum(axis=1)
    return logits, labels


@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 20))
def test_logits_that_are_scaled_have_the_scale_for_their_temperature(seed, factor):
    logits, labels = drawn(seed, clips=300)
    once = fit_temperature(logits, labels)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * once, rel=1e-6)
    assert fit_temperature(logits + 5, labels) == pytest.approx(once, rel=1e-6)


def test_a_reader_that_is_as_sure_as_it_is_right_has_the_temperature_one():
    logits, labels = drawn(0)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    calibration = fit_calibration((3 * logits).astype(np.float32), labels)
    assert calibration.temperature == pytest.approx(3, abs=0.15)
    figures = confidence_figures([3 * logits], [calibration], labels)
    assert figures["ece_calibrated"] < 0.03 < 0.15 < figures["ece"]
    assert figures["kept_top1"] > (logits.argmax(axis=1) == labels).mean()


@pytest.mark.parametrize("clips", [1, 12, 500])
def test_clips_that_are_all_read_do_not_make_a_reader_certain(clips):
    logits, labels = 9 * np.eye(5)[np.arange(clips) % 5], np.arange(clips) % 5
    confidence = mean_probabilities([logits], [fit_temperature(logits, labels)]).max(axis=1)
    assert confidence == pytest.approx((clips + 1) / (clips + 2), abs=1e-6)


def test_temperatures_have_bounds_and_need_numbers():
    logits, labels = drawn(1, clips=50)
    assert fit_temperature(-logits, labels) == MOST  # it takes the likeliest word for the least likely one
    assert fit_temperature(1e-5 * logits, labels) == LEAST
    assert fit_temperature(np.zeros((3, 1)), np.zeros(3, int)) == 1  # one word alone
    with pytest.raises(ValueError, match="no clips"):
        fit_temperature(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="no number"):
        fit_temperature(np.full((2, 2), np.nan), np.zeros(2, int))


def test_the_calibration_error_of_known_sets():
    confidences, correct = np.repeat([0.7, 1.0], [10, 5]), np.repeat([True, False, True], [7, 3, 5])
    assert expected_calibration_error(confidences, correct) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(confidences, ~correct) == pytest.approx((10 * 0.4 + 5 * 1.0) / 15)
    assert expected_calibration_error(np.ones(4), np.zeros(4, bool)) == 1


def test_below_the_threshold_are_one_in_twenty_right_answers_and_all_that_are_likelier_wrong():
    confidences = np.linspace(0.6, 0.98, 100)[np.random.default_rng(0).permutation(100)]
    threshold = abstain_threshold(confidences, np.ones(100, bool))
    assert np.mean(confidences >= threshold) == 0.95 and threshold == round(threshold, 4)
    assert abstain_threshold(confidences - 0.5, np.ones(100, bool)) == 0.5
    assert abstain_threshold(confidences, np.zeros(100, bool)) == 0.5
    assert abstain_threshold(confidences, np.ones(100, bool), keep=1) <= confidences.min() < threshold


def test_an_ensemble_has_the_error_of_its_mean_probability():
    (logits, labels), (others, _) = drawn(2), drawn(3)
    fitted, none = Calibration(2.0, 0.5), None
    figures = confidence_figures([logits, others], [fitted, none], labels)
    mean = (mean_probabilities([logits], [2.0]) + mean_probabilities([others], [1.0])) / 2
    expected = expected_calibration_error(mean.max(axis=1), mean.argmax(axis=1) == labels)
    assert figures["ece_calibrated"] == pytest.approx(expected) and "kept" not in figures
    assert set(confidence_figures([logits, others], [none, none], labels)) == {"ece"}


@pytest.fixture
def plain_run(trained_run, tmp_path):
    """A run whose checkpoint is not calibrated."""
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = dataclasses.replace(load_checkpoint(trained_run / "best.pt"), temperature=None, threshold=None)
    save_checkpoint(run / "best.pt", checkpoint)
    return run


def test_a_checkpoint_is_calibrated_afterwards_as_its_run_would_have(trained_run, plain_run, shards):
    before = evaluate(plain_run, shards=shards, device="cpu")
    assert before["temperature"] is None and "ece" in before and "ece_calibrated" not in before
    args = ["evaluate", str(plain_run), "--shards", str(shards), "--device", "cpu", "--split", "val", "--calibrate"]
    output = CliRunner().invoke(main, args).output
    assert f"calibrated on split val, and stored in {plain_run / 'best.pt'}" in output
    ours, theirs = load_checkpoint(plain_run / "best.pt"), load_checkpoint(trained_run / "best.pt")
    assert ours.temperature == pytest.approx(theirs.temperature) and ours.threshold == pytest.approx(theirs.threshold)
    assert all(torch.equal(value, theirs.model[name]) for name, value in ours.model.items())
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    after = evaluate(plain_run, shards=shards, device="cpu")
    assert (
        after["temperature"] == ours.temperature and after["top1"] == before["top1"] and after["ece"] == before["ece"]
    )
    assert 0 <= after["kept"] <= 1 and 0 <= after["ece_calibrated"] <= 1


def test_what_cannot_be_calibrated_is_refused(trained_run, plain_run, shards, monkeypatch):
    with pytest.raises(ValueError, match="one after another"):
        evaluate(trained_run, plain_run, shards=shards, split="val", calibrate=True, device="cpu")
    with pytest.raises(ValueError, match="--split val"):
        evaluate(plain_run, shards=shards, split="train", calibrate=True, device="cpu")
    monkeypatch.setattr("lipprep.stages.lock._PATIENCE", 0)
    with hold(plain_run / LOCK, str), pytest.raises(ValueError, match="a training is at work"):
        evaluate(plain_run, shards=shards, split="val", calibrate=True, device="cpu")
    assert load_checkpoint(plain_run / "best.pt").temperature is None


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_older_versions_are_not_calibrated(version, trained_run, tmp_path):
    state = torch.load(trained_run / "best.pt", weights_only=True)
    new = {1: ("ema", "scaler", "versions", "temperature", "threshold"), 2: ("temperature", "threshold")}[version]
    old = {name: value for name, value in state.items() if name not in new} | {"lipprep_checkpoint": version}
    torch.save(old, tmp_path / "c.pt")
    checkpoint = load_checkpoint(tmp_path / "c.pt")
    assert checkpoint.calibration is None and checkpoint.step == state["step"]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"threshold": 1.5},
        {"threshold": None},
    ],
)
def test_a_calibration_that_is_none_is_damage(change, trained_run, tmp_path):
    torch.save(torch.load(trained_run / "best.pt", weights_only=True) | change, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=next(iter(change))):
        load_checkpoint(tmp_path / "c.pt")
