"""A student learns from the labels and from its teacher."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.shard.index import load_index
from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.config import load_recipe, overfitting
from lipprep.train.distill import distillation, load_teacher
from lipprep.train.loop import train
from lipprep.train.models import LipReader
from lipprep.train.rehearse import rehearse
from lipprep.train.run import open_run

CPU = torch.device("cpu")


def rows(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("clips_per_s", "wait")} for line in lines]


def test_the_term_is_the_divergence_from_the_teacher_at_a_temperature():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (torch.softmax(x / 3, 1) for x in (student, teacher))
    expected = 9 * (q * (q / p).log()).sum(1).mean()
    assert distillation(student, teacher, temperature=3).item() == pytest.approx(expected.item())
    assert distillation(teacher + 4, teacher, temperature=3).item() == pytest.approx(0)


def test_a_student_is_of_the_next_generation_and_says_what_it_learns(shards, tiny, trained_run, tmp_path):
    settings = [*tiny, "max_steps=2", "model.head.channels=16", "augment.mixup=0.4"]  # not of its teacher's form
    train(load_recipe("compact", settings), shards=shards, run=tmp_path / "alone", device="cpu")
    teacher = trained_run
    for generation, weight in ((1, 1.0), (2, 0.5)):
        run, distil = tmp_path / str(generation), [f"teacher={teacher}", f"distill_weight={weight}"]
        config = load_recipe("compact", [*settings, *distil, "distill_temperature=2"])
        train(config, shards=shards, run=run, device="cpu")
        summary = json.loads((run / "summary.json").read_text())
        sha256 = hashlib.sha256((teacher / "best.pt").read_bytes()).hexdigest()
        assert (summary["generation"], summary["teacher_sha256"]) == (generation, sha256)
        resolved = load_checkpoint(run / "last.pt").config["resolved"]
        assert (resolved["generation"], resolved["teacher_sha256"]) == (generation, sha256)
        training = [row for row in rows(run) if "split" not in row]
        # What is not the teacher's is the cross entropy: in the first step that of the same run without one.
        assert training[0]["loss"] - training[0]["distill"] == pytest.approx(rows(tmp_path / "alone")[0]["loss"])
        assert all(row["distill"] > 0.01 for row in training)
        teacher = run
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["generation"] == 0
    assert "distill" not in rows(tmp_path / "alone")[0]


def test_the_teacher_is_in_evaluation_and_sees_what_its_student_sees(shards, tiny, trained_run, tmp_path, monkeypatch):
    seen, original = [], LipReader.forward

    def spied(model, x_B1THW, *args):
        logits = original(model, x_B1THW, *args)
        seen.append((model.training, torch.is_grad_enabled(), x_B1THW))
        return logits

    monkeypatch.setattr(LipReader, "forward", spied)
    settings = ["max_steps=1", "accumulate=2", "augment.mixup=0.4", "eval_every=9"]
    config = load_recipe("compact", [*tiny, *settings, f"teacher={trained_run}"])
    train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert [call[:2] for call in seen[:4]] == [(True, True), (False, False)] * 2
    assert all(student[2] is teacher[2] for student, teacher in zip(seen[:4:2], seen[1:4:2], strict=True))


def test_a_teacher_is_its_moving_average(shards, tiny, trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "best.pt")
    average = {name: value * 2 for name, value in checkpoint.model.items()}
    save_checkpoint(tmp_path / "t.pt", dataclasses.replace(checkpoint, ema=average))
    config = load_recipe("compact", [*tiny, f"teacher={tmp_path / 't.pt'}"])
    teacher = load_teacher(config, load_index(shards), CPU)
    assert all(torch.equal(value, average[name]) for name, value in teacher.model.state_dict().items())
    assert not any(weight.requires_grad for weight in teacher.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ("up", "down", "grow", "shrink")}, "the same words in another order"),
        ({"words": ("a", "down", "grow", "up")}, "'shrink' is only in the checkpoint's"),
        ({"profile": "lrw2022"}, "profile lrw2021"),
        ({"setting": "augment.crop_size=80"}, r"sees clips with augment\.crop_size=72, this run with 80: give"),
        ({"setting": "augment.std=0.2"}, r"give augment\.std=0\.165"),
        ({"setting": "augment.subtract_mean_frame=false"}, r"give augment\.subtract_mean_frame=True"),
        ({"setting": "augment.mean_frame_gain=1"}, r"give augment\.mean_frame_gain=3"),
        ({"teacher": "nowhere"}, "teacher=nowhere: nowhere does not exist"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change, message, shards, make_shards, tiny, trained_run, tmp_path):
    words, profile = change.get("words"), change.get("profile", "lrw2021")
    if words or profile != "lrw2021":
        more = {"words": words} if words else {}
        shards = make_shards(tmp_path / "s", splits={"train": [8]}, profile=profile, **more)
    settings = [f"teacher={change.get('teacher', trained_run)}", change.get("setting", "max_steps=1")]
    with pytest.raises(ValueError, match=message) as error:
        train(load_recipe("compact", [*tiny, *settings]), shards=shards, run=tmp_path / "r", device="cpu")
    assert str(error.value).startswith("teacher=") and not (tmp_path / "r").exists()


def test_the_recipe_says_that_it_needs_a_teacher(shards, tmp_path):
    distilled = ["train", "--recipe", "lrw_resnet18_mstcn_distilled"]
    shown = CliRunner().invoke(main, [*distilled, "--show-config"])
    assert "teacher: ''" in shown.stdout
    done = CliRunner().invoke(main, [*distilled, "--shards", str(shards), "--run", str(tmp_path / "r")])
    assert done.exit_code == 1 and "--recipe lrw_resnet18_mstcn_distilled teacher=RUN`" in done.output
    assert not (tmp_path / "r").exists()


@pytest.mark.cluster
def test_a_frozen_student_is_resumed_to_the_bit_and_another_teacher_is_told(
    shards, tiny, trained_run, tmp_path, capsys
):
    teacher = shutil.copytree(trained_run, tmp_path / "teacher")
    settings = [*tiny, "max_steps=9", "keep_every=4", "ema=0.9", "accumulate=2", "augment.mixup=0.4"]
    settings += [f"teacher={teacher}", f"init_from={trained_run}", "freeze=[frontend3D,trunk.layer1]"]
    train(load_recipe("compact", settings), shards=shards, run=tmp_path / "a", device="cpu")

    def go_on(name: str, *overrides: str) -> dict:
        capsys.readouterr()
        run, config, checkpoint = open_run(tmp_path / name, overrides=overrides, resume=str(tmp_path / "a/step-4.pt"))
        train(config, shards=shards, run=run, device="cpu", resume=checkpoint)
        return load_checkpoint(run / "last.pt")

    a, b = load_checkpoint(tmp_path / "a" / "last.pt"), go_on("b")
    assert not capsys.readouterr().err
    for kind in ("model", "ema"):
        assert all(torch.equal(getattr(a, kind)[key], value) for key, value in getattr(b, kind).items())
    assert rows(tmp_path / "b") == rows(tmp_path / "a")[4:]

    (teacher / "best.pt").write_bytes((tmp_path / "a" / "last.pt").read_bytes())
    go_on("c")
    assert f"teacher={teacher} is not the file that the run has learnt from" in capsys.readouterr().err
    go_on("d", "teacher=null")
    assert "has learnt from a teacher, and that changes now" in capsys.readouterr().err


def test_a_student_is_rehearsed_and_learns_clips_by_heart(shards, tiny, trained_run, tmp_path):
    config = load_recipe("compact", [*tiny, f"teacher={trained_run}"])
    assert rehearse(config, shards=shards, device="cpu").parts["forward"] > 0
    config = load_recipe("compact", [*overfitting(8), *tiny, "max_steps=2", f"teacher={trained_run}"])
    assert train(config, shards=shards, run=tmp_path / "r", device="cpu").validated == 8


def test_a_run_does_not_learn_from_itself(shards, tiny, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    for teacher in (run, run / "best.pt"):
        with pytest.raises(ValueError, match="is of the run itself"):
            train(load_recipe("compact", [*tiny, f"teacher={teacher}"]), shards=shards, run=run, device="cpu")
