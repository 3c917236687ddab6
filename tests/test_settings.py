"""YAML from anybody: tags and values that nothing can be made of end in one message, wherever YAML is read."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.untrusted import parse_settings

TAGGED = ["!!bool maybe", "!!int ''", "!!timestamp foo", "!!python/name:os.system", "!local x", "! x", "!!set {a}"]
UNMAKEABLE = ["0x_", "-0b_", "9" * 5000, "=", "1:" + "59:" * 3000 + "5.5", "{a: 1, a: 2}", "{[a]: 1}", "{<<: 3}"]


def refused(*arguments: object) -> str:
    """What a command that ends in a message says, in one line at most a terminal's page long."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "internal error" not in result.output and "Traceback" not in result.output
    assert result.stderr.startswith("Error: ") and len(result.stderr) < 1500
    return result.stderr


@pytest.fixture
def listed(tmp_path, monkeypatch) -> Path:
    """A folder with a manifest; its plan's path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v/WORD/train").mkdir(parents=True)
    (tmp_path / "v/WORD/train/1.mp4").touch()
    result = CliRunner().invoke(main, ["manifest", "folders", "v", "-o", "manifests/m.jsonl"])
    assert result.exit_code == 0, result.output
    plan = tmp_path / "work/m/plan.yaml"
    plan.parent.mkdir(parents=True)
    return plan


@pytest.mark.parametrize("value", TAGGED + UNMAKEABLE)
def test_values_that_nothing_can_be_made_of_are_refused(value, listed):
    listed.write_text(f"detector: {value}\n")
    for command in (["status"], ["report"], ["landmarks", "-j", 1]):
        assert "plan.yaml is no plan of lipprep's" in refused(*command)
    Path("mine.yaml").write_text(f"lr: {value}\n")
    assert "mine.yaml: " in refused("train", "--recipe", "mine.yaml", "--show-config")
    assert "lr=" in refused("train", "--recipe", "compact", f"lr={value}", "--show-config")
    assert "model.trunk=" in refused("train", "--recipe", "compact", f"model.trunk={value}", "--show-config")
    Path("run").mkdir()
    Path("run/config.yaml").write_text(f"lr: {value}\n")
    assert "config.yaml" in refused("import-checkpoint", "x.pt", "-o", "out", "--config", "run/config.yaml")


def test_a_tag_is_named(listed):
    listed.write_text("exact: !!bool maybe\n")
    assert "the tag !!bool is not read: write the value without it" in refused("status")
    assert "the tag !!bool" in refused("train", "--recipe", "compact", "sync_batchnorm=!!bool maybe", "--show-config")


def test_plain_values_are_read_as_before():
    text = "a: 2001-13-45\nb: 1_000\nc: 1:30\nd: .inf\ne: 'no tag: !!bool'\nf: [1, 2.5, null]\n"
    values = {"a": "2001-13-45", "b": 1000, "c": 90, "d": float("inf"), "e": "no tag: !!bool", "f": [1, 2.5, None]}
    assert parse_settings(text) == values


@pytest.mark.parametrize("text", ["5", "- a", "a: ???", "a: 1\n---\nb: 2", "\0", "%YAML 9.9\n---\na: 1"])
def test_what_is_no_mapping_of_values_is_refused(text, listed):
    listed.write_text(text)
    refused("status")
