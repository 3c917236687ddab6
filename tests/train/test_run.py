import shutil

import pytest
from traps import POSIX

from lipprep.stages import lock
from lipprep.train.config import load_recipe
from lipprep.train.loop import train
from lipprep.train.run import alone_in, open_run


def test_a_new_run_has_a_dated_folder():
    run, config, checkpoint = open_run(None, recipe="compact", overrides=["epochs=2"])
    assert run.parent.name == "runs"
    assert run.name.endswith("-compact")
    assert (config.epochs, checkpoint) == (2, None)


def test_a_folder_with_something_in_it_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="--resume auto"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        open_run(tmp_path, resume="auto")


def test_auto_starts_a_run_that_saved_nothing_yet(tmp_path):
    assert open_run(tmp_path / "r", resume="auto")[2] is None
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert open_run(tmp_path, recipe="compact", resume="auto")[2] is None
    with pytest.raises(ValueError, match="--run"):
        open_run(None, resume="auto")


def test_auto_starts_anew_with_the_config_of_the_run(trained_run, tmp_path):
    shutil.copy(trained_run / "config.yaml", tmp_path)
    run, config, checkpoint = open_run(tmp_path, overrides=["epochs=9"], resume="auto")
    assert (run, checkpoint) == (tmp_path, None)
    assert (config.recipe, config.batch_size, config.epochs) == ("compact", 8, 9)
    assert open_run(tmp_path, recipe="lrw_snv05x_tcn1x", resume="auto")[1].recipe == "lrw_snv05x_tcn1x"
    (tmp_path / "config.yaml").write_text("lr: [")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        open_run(tmp_path, resume="auto")


def test_what_a_resumed_run_does_not_take_from_the_recipe_is_named(trained_run, tmp_path, capsys):
    recipe = tmp_path / "compact.yaml"
    recipe.write_text((trained_run / "config.yaml").read_text().replace("lr: 0.003", "lr: 0.001"))
    assert open_run(trained_run, recipe=str(recipe), resume="auto")[1].lr == 3e-3
    assert "lr=0.003, not 0.001" in capsys.readouterr().err
    assert open_run(trained_run, recipe=str(recipe), overrides=["lr=0.001"], resume="auto")[1].lr == 1e-3
    assert capsys.readouterr().err == ""


def test_a_resumed_run_keeps_its_config(trained_run):
    run, config, checkpoint = open_run(trained_run, overrides=["epochs=9"], resume="auto")
    assert (run, checkpoint.step) == (trained_run, 36)
    assert (config.recipe, config.epochs, config.batch_size) == ("compact", 9, 8)
    assert open_run(trained_run, recipe="compact", resume="auto")[1].batch_size == 8
    with pytest.raises(ValueError, match="recipe compact, not lrw_snv05x_tcn1x"):
        open_run(trained_run, recipe="lrw_snv05x_tcn1x", resume="auto")


def test_a_run_may_go_on_from_a_path(trained_run, tmp_path):
    assert open_run(None, resume=str(trained_run / "last.pt"))[0] == trained_run
    best = trained_run / "best.pt"
    assert open_run(tmp_path / "branch", resume=str(best))[0] == tmp_path / "branch"
    run, _, checkpoint = open_run(tmp_path / "fork", resume=str(trained_run))
    assert (run.name, checkpoint.step) == ("fork", 36)
    other = shutil.copytree(trained_run, tmp_path / "other")
    with pytest.raises(ValueError, match="not empty"):
        open_run(other, resume=str(trained_run))
    with pytest.raises(ValueError, match="does not exist"):
        open_run(None, resume=str(tmp_path / "nowhere"))


@POSIX
def test_two_processes_do_not_train_into_one_folder(shards, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0)
    config = load_recipe("compact", [*tiny, "max_steps=1"])
    with (
        alone_in(tmp_path / "r", after=0),
        pytest.raises(ValueError, match=r"another process trains .*\(process \d+ on "),
    ):
        train(config, shards=shards, run=tmp_path / "r", device="cpu")
    assert open_run(tmp_path / "r", recipe="compact")[2] is None  # a folder with a lock alone is as good as none
    assert train(config, shards=shards, run=tmp_path / "r", device="cpu").steps == 1
