import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.shard.index import load_index
from lipprep.train import evaluate as evaluating
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.confusion import draw_confusion, word_table
from lipprep.train.draws import AugmentOptions
from lipprep.train.epoch import evaluation_plan, places
from lipprep.train.evaluate import (
    classify,
    evaluate,
    read_groups,
    top_k,
    wilson,
    within_groups,
)
from lipprep.train.loader import BatchLoader, ShardBatches
from lipprep.train.loop import train
from lipprep.train.models import build


def test_top_k_counts_the_best_and_no_more():
    logits = np.array([[3.0, 2, 1], [3, 2, 1], [0, 0, 0]])
    labels = np.array([0, 2, 2])
    assert [top_k(logits, labels, k) for k in (1, 2, 3, 5)] == pytest.approx([1 / 3, 1 / 3, 1, 1])


@pytest.mark.parametrize(
    ("correct", "clips", "interval"),
    # Wilson's interval, as statsmodels' proportion_confint(method="wilson") gives it
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (880, 1000, (0.8584, 0.8987))],
)
def test_wilson_intervals(correct, clips, interval):
    assert wilson(correct, clips) == pytest.approx(interval, abs=1e-4)


def test_groups_are_read_with_spaces_or_commas(tmp_path):
    (tmp_path / "g").write_text("blue, red\n\nat by\tin\n")
    assert read_groups(tmp_path / "g", ["at", "blue", "by", "in", "red"]) == [["blue", "red"], ["at", "by", "in"]]
    (tmp_path / "g").write_text("good day, bye\n")
    assert read_groups(tmp_path / "g", ["bye", "good day"]) == [["good day", "bye"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blue rad\n", "did you mean 'red'"),
        ("blue red\nblue at\n", "twice"),
        ("blue\n", "two words"),
        ("\n", "no groups"),
    ],
)
def test_bad_groups_are_named(text, message, tmp_path):
    (tmp_path / "g").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_groups(tmp_path / "g", ["at", "blue", "red"])


def test_within_a_group_only_its_words_are_answers():
    labels = ["a", "b", "c", "d", "e"]
    logits = np.array([[1, 0, 9, 0, 0], [2, 1, 9, 0, 0], [0, 0, 1, 2, 0], [0, 0, 0, 0, 1]], np.float32)
    result = within_groups(logits, np.array([0, 1, 3, 4]), labels=labels, groups=[["b", "a"], ["c", "d", "e"]])
    assert [row["accuracy"] for row in result["groups"]] == [0.5, 1.0]
    assert [row["chance"] for row in result["groups"]] == pytest.approx([1 / 2, 1 / 3])
    assert (result["all_groups"]["clips"], result["all_groups"]["correct"]) == (4, 3)
    assert result["all_groups"]["chance"] == pytest.approx((2 / 2 + 2 / 3) / 4)
    assert within_groups(logits[:2], np.array([0, 1]), labels=labels, groups=[["c", "d"]])["all_groups"] is None


class Brightness(torch.nn.Module):
    """Answers with the word whose number is nearest to the clip's mean brightness, in tens; told a word's frames, with
    their number."""

    def __init__(self, ignores_padding, boundary=None):
        super().__init__()
        self.ignores_padding, self.boundary = ignores_padding, boundary

    def extract_features(self, x_B1THW, lengths_B):
        return x_B1THW.sum((1, 3, 4))[:, :, None] / x_B1THW.shape[3] ** 2

    def read_features(self, feat_BTC, lengths_B, boundary_BT1):
        gray_B = (feat_BTC.sum((1, 2)) / lengths_B * 0.165 + 0.421) * 255
        if boundary_BT1 is not None:
            gray_B = 10 * boundary_BT1.sum((1, 2))
        return -(gray_B[:, None] / 10 - torch.arange(5)).abs()


@pytest.mark.parametrize("ignores_padding", [False, True])
def test_every_clip_is_classified_once_whatever_it_is_padded_with(ignores_padding):
    levels, lengths = [0, 40, 20, 10, 30], [2, 5, 1, 3, 3]
    video = torch.zeros(5, 5, 96, 96, dtype=torch.uint8)
    for row, level, length in zip(video, levels, lengths, strict=True):
        row[:length] = level
    batch = {"video": video, "lengths": torch.tensor(lengths), "labels": torch.tensor([0, 4, 2, 1, 1])}
    batch |= {"durations": torch.full((5,), torch.nan), "times": torch.full((5, 2), torch.nan)}
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 3), slice(3, 5))]
    halves[0]["keys"], halves[1]["keys"] = ["a", "b", "c"], ["d", "e"]
    how = {"options": AugmentOptions(), "fps": 25, "device": torch.device("cpu"), "precision": "fp32"}
    answers = classify(Brightness(ignores_padding), halves, **how)
    assert answers.logits.argmax(1).tolist() == [0, 4, 2, 1, 3]
    assert answers.keys == list("abcde")
    assert top_k(answers.logits, answers.labels, 1) == 0.8
    assert answers.untold is None and not answers.told.any()
    # Of the same clips, what is said with the words' frames and without them.
    times = torch.tensor([[0.0, 0.04], [0.0, 0.16], [0.0, torch.nan], [0.04, 0.12], [0.04, 0.12]])
    for part, half in zip((slice(0, 3), slice(3, 5)), halves, strict=True):
        half["times"] = times[part]
    told = classify(Brightness(ignores_padding, "times"), halves, **how)
    assert told.told.tolist() == [True, True, False, True, True]
    assert told.logits.argmax(1).tolist() == [1, 4, 0, 2, 2]
    np.testing.assert_array_equal(told.untold, answers.logits)


@pytest.mark.parametrize(("trunk", "head"), [("compact", "tcn"), ("shufflenetv2", "tcn"), ("compact", "compact")])
def test_answers_do_not_depend_on_the_batch(trunk, head, shards):
    torch.manual_seed(0)
    head = {"name": head, "channels": 16, "num_layers": 2}
    model = build({"trunk": trunk, "activation": "relu", "head": head}, 4)
    for parameter in model.parameters():  # away from where a fresh network starts: biases of zero
        torch.nn.init.normal_(parameter, std=0.2)
    batches = ShardBatches(shards, load_index(shards), "test")
    assert len(set(batches.read(np.array([[0, i] for i in range(9)]))["lengths"].tolist())) > 1

    def logits(batch_size: int) -> np.ndarray:
        plan = evaluation_plan(places(batches.counts), batch_size=batch_size)
        loader = BatchLoader(batches, plan, workers=0, pin_memory=False)
        how = {"fps": 25, "device": torch.device("cpu"), "precision": "fp32"}
        return classify(model, loader, options=AugmentOptions(crop_size=48), **how).logits

    alone = logits(1)
    assert alone.std() > 0.1
    for batch_size in (4, 14):
        assert logits(batch_size) == pytest.approx(alone, abs=1e-4 * float(np.abs(alone).max()))


def test_clips_that_no_shard_holds_are_counted(trained_run, shards, tmp_path, change_index):
    folder = shutil.copytree(shards, tmp_path / "shards")
    change_index(folder, failures={"test": {"no_face": 2, "unreadable": 1}, "val": {"truncated": 4}})
    results = evaluate(trained_run, shards=folder, out=tmp_path / "out", device="cpu")
    assert results["not_in_shards"] == {"no_face": 2, "unreadable": 1}
    args = ["evaluate", str(trained_run), "--shards", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert "3 clips of the split are in no shard" in CliRunner().invoke(main, args).output


def test_the_word_table_names_what_a_word_is_taken_for():
    table = word_table(np.array([[3, 1, 2], [0, 0, 0], [0, 0, 4]]), ["a", "b", "c"])
    assert table[1:] == [["a", 6, 3, "0.5000", "c", 2], ["b", 0, 0, "", "", 0], ["c", 4, 4, "1.0000", "", 0]]


def test_a_run_is_measured_and_the_tables_agree(trained_run, shards, tmp_path):
    (tmp_path / "groups").write_text("up down\ngrow shrink\n")
    results = evaluate(trained_run, shards=shards, groups=tmp_path / "groups", out=tmp_path / "out", device="cpu")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["clips"] == 14
    assert results["top1"] > 0.5
    assert results["top5"] == 1
    low, high = results["top1_interval95"]
    assert 0 <= low < results["top1"] <= high <= 1
    assert results["all_groups"]["accuracy"] >= results["top1"]
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").read_text().splitlines()))
    matrix = np.array([row[1:] for row in rows[1:]], int)
    assert rows[0][1:] == [row[0] for row in rows[1:]] == ["down", "grow", "shrink", "up"]
    assert matrix.sum() == 14
    assert matrix.trace() / 14 == results["top1"]
    words = (tmp_path / "out" / "words.csv").read_text().splitlines()
    assert sum(int(line.split(",")[2]) for line in words[1:]) == matrix.trace()
    assert cv2.imread(str(tmp_path / "out" / "confusion.png")) is not None


def test_the_figures_do_not_depend_on_the_batch_size(trained_run, shards, tmp_path):
    one, many = (evaluate(trained_run, shards=shards, out=tmp_path, device="cpu", batch_size=b) for b in (1, 14))
    assert one["top1"] == many["top1"]


def test_validation_of_training_and_evaluation_agree(trained_run, shards):
    results = evaluate(trained_run, shards=shards, split="val", device="cpu")
    assert results["top1"] == load_checkpoint(trained_run / "best.pt").best
    assert (trained_run / "evaluate-val" / "results.json").is_file()


@pytest.fixture(scope="module")
def another_run(shards, tiny, tmp_path_factory):
    """A run that has learnt less, and sees less of the clips."""
    run = tmp_path_factory.mktemp("another") / "run"
    config = load_recipe("compact", [*tiny, "epochs=2", "seed=5", "augment.crop_size=64", "model.head.channels=16"])
    train(config, shards=shards, run=run, device="cpu")
    return run


def test_an_ensemble_answers_with_the_mean_probability_of_its_members(
    trained_run, another_run, shards, tmp_path, monkeypatch
):
    seen, original = [], evaluating.classify

    def spied(*args, **how):
        answers = original(*args, **how)
        seen.append((answers.logits, how["options"].crop_size))
        if len(seen) == 2:
            answers.labels[3] = -1  # as where one of them could not read a clip
        return answers

    monkeypatch.setattr(evaluating, "classify", spied)
    results = evaluate(trained_run, another_run, shards=shards, out=tmp_path / "out", device="cpu")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [crop for _, crop in seen] == [72, 64] and results["clips"] == 13
    kept = np.arange(14) != 3
    single, labels = [member[kept] for member, _ in seen], (np.arange(14) + 58)[kept] % 4
    scaled = [load_checkpoint(run / "best.pt").temperature for run in (trained_run, another_run)]
    softmax = [torch.from_numpy(own / t).softmax(1).numpy() for own, t in zip(single, scaled, strict=True)]
    assert results["top1"] == top_k((softmax[0] + softmax[1]) / 2, labels, 1)
    for run, own, member in zip((trained_run, another_run), single, results["members"], strict=True):
        assert (member["checkpoint"], member["top1"]) == (str(run / "best.pt"), top_k(own, labels, 1))
    words = (tmp_path / "out" / "words.csv").read_text().splitlines()
    assert sum(int(line.split(",")[2]) for line in words[1:]) == round(13 * results["top1"])


def test_an_ensemble_tells_of_each_member(trained_run, another_run, shards):
    args = [
        "evaluate",
        str(trained_run),
        str(another_run),
        "--shards",
        str(shards),
        "--device",
        "cpu",
        "--split",
        "val",
    ]
    out = CliRunner().invoke(main, args).output
    assert f"{another_run / 'best.pt'}, step 12: top-1" in out and "ensemble of 2; split val, 4 words" in out
    assert str(trained_run / "evaluate-val-ensemble" / "words.csv") in out


def test_a_member_that_is_named_twice_or_has_other_words_is_refused(trained_run, make_shards, tiny, shards, tmp_path):
    with pytest.raises(ValueError, match=r"best\.pt is named twice"):
        evaluate(trained_run, trained_run / "best.pt", shards=shards, device="cpu")
    other = make_shards(tmp_path / "s", splits={"train": [8]}, words=("a", "b"))
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=other, run=tmp_path / "r", device="cpu")
    with pytest.raises(ValueError, match=r"r/last\.pt: the checkpoint knows 2 words and the shards have 4"):
        evaluate(trained_run, tmp_path / "r", shards=shards, device="cpu")


def test_accuracy_with_and_without_word_boundaries_is_told_apart(shards, tiny, trained_run, tmp_path):
    run = tmp_path / "run"
    train(load_recipe("compact", [*tiny, "max_steps=2", "model.boundary=vipl"]), shards=shards, run=run, device="cpu")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["top1_without_boundary"] <= 1 for row in rows if "split" in row)
    args = ["evaluate", str(run), "--shards", str(shards), "--device", "cpu"]
    output = CliRunner().invoke(main, args).output
    results = json.loads((run / "evaluate-test" / "results.json").read_text())
    assert "known for 4 of 14 clips; without, as in the wild" in output  # of every third clip the duration is known
    accuracies = {"top1", "top1_interval95", "top5", "ece"}
    # The temperature is for answers without them, as in the wild.
    assert results["boundaries_known"] == 4 and accuracies < set(results["without_boundary"])
    assert "ece_calibrated" in results["without_boundary"] and "ece_calibrated" not in results
    both = evaluate(run, trained_run, shards=shards, out=tmp_path / "both", device="cpu")
    assert "without_boundary" in both and ["without_boundary" in member for member in both["members"]] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"words": ("a", "down", "grow", "up")}, "'shrink' is only in"), ({"profile": "lrw2022"}, "profile lrw2021")],
)
def test_other_shards_are_refused(change, message, make_shards, trained_run, tmp_path):
    words = change.get("words", ("down", "grow", "shrink", "up"))
    shards = make_shards(tmp_path, splits={"test": [4]}, words=words, profile=change.get("profile", "lrw2021"))
    with pytest.raises(ValueError, match=message):
        evaluate(trained_run, shards=shards, device="cpu")


@pytest.mark.parametrize("count", [3, 61])
def test_confusion_matrices_are_drawn_for_few_words_and_many(count, tmp_path):
    matrix = np.random.default_rng(0).multinomial(20, np.full(count, 1 / count), size=count)
    draw_confusion(matrix, [rf"$\x{i}$" for i in range(count)], tmp_path / "c.png", title=r"$\b$")
    picture = cv2.imread(str(tmp_path / "c.png"))
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 5
