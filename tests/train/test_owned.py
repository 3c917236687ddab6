"""Files that lipprep did not make stay in every folder that it writes to."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.train.config import load_recipe
from lipprep.train.embed import embed_shards
from lipprep.train.evaluate import evaluate
from lipprep.train.loop import train


@pytest.mark.parametrize("name", ["embedding.json", "failures.jsonl"])
@pytest.mark.parametrize("flags", [(), ("--replace",)], ids=["plainly", "with --replace"])
def test_features_replace_no_files_of_others(shards, trained_run, tmp_path, name, flags):
    (tmp_path / name).write_text('{"mine": 1}')
    command = ["embed", shards, "--checkpoint", trained_run, "-o", tmp_path, "--split", "test", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, command), *flags])
    assert result.exit_code == 1 and "name another f" in result.output
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lipprep.lock"] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_features_leave_foreign_files_beside_them(shards, trained_run, tmp_path):
    mine = [tmp_path / ".mine.npz.1.tmp", tmp_path / "notes.txt", tmp_path / "a/b.json"]
    mine[2].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    for _ in range(2):
        embed_shards(trained_run, shards, out=tmp_path, splits=["test"], device="cpu", replace=True)
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("flags", [(), ("--replace",)], ids=["plainly", "with --replace"])
def test_a_table_replaces_no_file_of_others(shards, trained_run, tmp_path, flags):
    table = tmp_path / "t.parquet"
    table.write_text("mine")
    command = ["embed", shards, "--checkpoint", trained_run, "-o", table, "--split", "test", "--device", "cpu"]
    assert CliRunner().invoke(main, [*map(str, command), *flags]).exit_code == 1
    assert table.read_text() == "mine"


@pytest.mark.parametrize("name", ["results.json", "words.csv", "confusion.png"])
def test_an_evaluation_replaces_no_files_of_others(shards, trained_run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not lipprep's"):
        evaluate(trained_run, shards=shards, split="test", out=tmp_path, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_an_evaluation_replaces_its_own(shards, trained_run, tmp_path):
    for _ in range(2):
        evaluate(trained_run, shards=shards, split="test", out=tmp_path, device="cpu")


def test_a_run_leaves_foreign_files_in_its_folder(shards, tiny, tmp_path):
    run = tmp_path / "r"
    train(load_recipe("compact", [*tiny, "max_steps=1"]), shards=shards, run=run, device="cpu")
    mine = run / ".notes.pt.mine.tmp"
    mine.write_text("mine")
    command = ["train", "--shards", shards, "--run", run, "--resume", "auto", "--device", "cpu", "max_steps=2"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert mine.read_text() == "mine" and Path(run / "last.pt").is_file()
