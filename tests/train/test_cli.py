import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.train import loop


def call(*args, code: int = 0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "embed"])
def test_help_has_an_example(command):
    assert f"lipprep {command} " in call(command, "--help").output.split("Example")[1]


def test_help_imports_nothing_slow():
    code = (
        "import sys, lipprep.train.cli, lipprep.train.cli_embed, lipprep.train.cli_predict\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'cv2', 'av', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "command", ["train --shards", "evaluate run --shards", "predict --checkpoint run", "embed --checkpoint run -o f"]
)
def test_a_store_at_fault_is_told_before_anything_slow_is_imported(s3_server, command):
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom lipprep.cli import main\n"
        "print(CliRunner().invoke(main, sys.argv[1:]).output, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    words = [*command.split(), "s3://lipprep-there-is-none/x"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Error: there is no bucket s3://lipprep-there-is-none")
    assert done.stdout.endswith("False False\n")


def test_train_evaluate_and_what_they_print(shards, tiny, tmp_path):
    run = tmp_path / "run"
    args = ["train", "--shards", shards, "--recipe", "compact", "--run", run, "--device", "cpu", *tiny]
    out = call(*args, "max_steps=3").output
    assert "to step 3" in out
    assert "best validation accuracy" in out
    assert str(run / "best.pt") in out
    assert "not empty" in call(*args, "max_steps=3", code=1).output
    outcome = call(*args[:-1], "--resume", "auto", "max_steps=4", "--json").stdout.splitlines()[-1]
    assert json.loads(outcome)["steps"] == 4

    out = call("evaluate", run, "--shards", shards, "--device", "cpu").output
    assert "top-1" in out
    assert "95 % interval" in out
    assert str(run / "evaluate-test" / "confusion.png") in out
    figures = json.loads(call("evaluate", run, "--shards", shards, "--device", "cpu", "--json").output)
    assert figures["clips"] == 14
    assert "(they hold: test, train, val)" in call("evaluate", run, "--shards", shards, "--split", "x", code=1).output


def test_bad_input_ends_in_one_line(shards, trained_run, tmp_path):
    for args, message in [
        (["train", "--shards", tmp_path], "has no index.json"),
        (["train", "--shards", shards, "--recipe", "compat"], "did you mean compact"),
        (["train", "--shards", shards, "--recipe", "compact", "epoch=1"], "did you mean epochs"),
        (["train", "--shards", shards, "--resume", "auto"], "name it with --run"),
        (["evaluate", tmp_path, "--shards", shards], "neither best.pt nor last.pt"),
        (["predict", tmp_path / "v.mp4", "--checkpoint", shards / "train-0000.tar"], "damaged"),
        (["predict", tmp_path, "--checkpoint", trained_run], "no videos"),
    ]:
        result = call(*args, code=1)
        assert message in result.output
        assert result.output.startswith("Error: ")
        assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_says_how_to_go_on(shards, tiny, tmp_path, monkeypatch):
    original = loop.Step.__call__

    def pressed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop.Step, "__call__", pressed)
    args = ["train", "--shards", shards, "--recipe", "compact", "--run", tmp_path / "r", "--device", "cpu", *tiny]
    assert f"--run {tmp_path / 'r'} --resume auto" in call(*args, code=130).output
    assert json.loads((tmp_path / "r" / "last.json").read_text())["step"] == 1


def test_a_bad_video_is_named_and_the_others_go_on(trained_run, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("not a video")
    result = call("predict", tmp_path, "--checkpoint", trained_run, "--device", "cpu", "--json", code=1)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["video"] for answer in answers] == [str(tmp_path / n) for n in ("a.mp4", "b.mp4")]
    assert all("not a video" in answer["error"] for answer in answers)


def test_the_trainer_is_a_module_too(shards, tiny, tmp_path):
    args = ["--shards", shards, "--recipe", "compact", "--run", tmp_path / "r", "--device", "cpu", *tiny]
    command = [sys.executable, "-m", "lipprep.train", *map(str, args), "max_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "to step 1" in done.stdout


def test_recipes_and_settings_are_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = call("recipes").stdout
    assert "compact\n  lipprep's own small network" in listed and "lrw_resnet18_mstcn_prelu (default)" in listed
    assert json.loads(call("recipes", "--json").stdout)["compact"]["model"]["trunk"] == "compact"
    Path("mine.yaml").write_text(call("train", "--recipe", "compact", "lr=0.5", "--show-config").stdout)
    again = call("train", "--recipe", "mine.yaml", "--show-config").stdout
    assert "lr: 0.5" in again and [p.name for p in Path().iterdir()] == ["mine.yaml"]
    assert "Missing option '--shards'" in call("train", code=2).output
    # What a recipe does not spell out can be set all the same, if the network has it.
    assert "stem_bias: true" in call("train", "--show-config", "model.stem_bias=true").stdout
    assert "did you mean trunk?" in call("train", "--show-config", "model.trnk=compact", code=1).stderr


def test_a_dry_run_tells_what_a_run_will_take_and_keeps_nothing(shards, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = call("train", "--shards", shards, "--recipe", "compact", "--device", "cpu", "--dry-run", *tiny).stdout
    for part in ("network", "memory", "wait", "forward", "backward", "optimizer", "checkpoint", "epoch", "run"):
        assert f"\n{part} " in words
    told = json.loads(call("train", "--shards", shards, "--recipe", "compact", "--dry-run", "--json", *tiny).stdout)
    assert told["steps"] == 180 and told["batch"][0] == 8
    assert not list(tmp_path.iterdir())


def test_clips_are_learnt_by_heart_with_settings_that_are_shown(shards, tiny, tmp_path):
    shown = call("train", "--recipe", "compact", "--overfit", 8, "--show-config", "lr=0.01").stdout
    assert "overfit: 8" in shown and "random_crop: false" in shown and "lr: 0.01" in shown
    few = [*tiny, "max_steps=2", "eval_every=1"]
    words = call(
        "train", "--shards", shards, "--recipe", "compact", "--run", tmp_path / "r", "--overfit", 8, *few
    ).stdout
    assert "8 clips by heart: they are not learnt" in words


def test_a_run_that_max_time_ended_says_how_to_go_on(shards, tiny, tmp_path):
    run = tmp_path / "r"
    words = call("train", "--shards", shards, "--recipe", "compact", "--run", run, *tiny, "max_time=1e-9").stdout
    assert f"max_time is over; to go on: lipprep train --shards {shards} --run {run} --resume auto" in words
