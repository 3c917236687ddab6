"""A fault of lipprep's does not look like the user's: it is told as one, and its traceback is in a log."""

import json
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lipprep import cli
from lipprep.command import Command, log_to
from lipprep.io.errors import LOG, UserError
from lipprep.pipeline import make
from lipprep.pipeline import run as runs
from lipprep.pipeline.records import read_entries


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command that raises an error, in an empty folder; TMPDIR is another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("LIPPREP_DEBUG", raising=False)
    (tmp_path / "tmp").mkdir()

    def run(error: Exception, *arguments: str, logs: str | None = None):
        @click.command(cls=Command)
        def broken() -> None:
            if logs is not None:
                log_to(Path(logs))
            raise error

        return CliRunner().invoke(broken, arguments)

    return run


def zipped() -> ValueError:
    try:
        list(zip([1], [1, 2], strict=True))
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("error", [zipped(), KeyError("x"), RuntimeError("cu\x1bda"), AssertionError(), TypeError("t")])
def test_any_exception_but_the_user_s_is_an_internal_error_with_a_log(call, error):
    result = call(error)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "internal error, a fault in lipprep" in result.output and "\x1b" not in result.output
    (log,) = Path("tmp").iterdir()
    assert str(log.resolve()) in result.output
    assert "Traceback" in log.read_text() and type(error).__name__ in log.read_text()


def test_what_the_user_can_mend_is_no_internal_error(call):
    result = call(UserError("clips.csv, line 12: column 'word' is empty"))
    assert result.output == "Error: clips.csv, line 12: column 'word' is empty\n"
    result = call(FileNotFoundError(2, "No such file or directory", "clips.csv"))
    assert result.output == "Error: clips.csv: No such file or directory\n"
    assert not list(Path("tmp").iterdir())


def test_the_log_of_a_data_set_is_in_its_work_folder(call):
    for _ in range(2):
        assert f"logs/{LOG}" in call(KeyError("x"), logs="work/m/logs").output
    assert Path("work/m/logs", LOG).read_text().count("KeyError: 'x'") == 2
    assert not list(Path("tmp").iterdir())


def test_a_log_that_cannot_be_written_is_another(call):
    Path("work").write_text("a file")
    result = call(KeyError("x"), logs="work/m/logs")
    (log,) = Path("tmp").iterdir()
    assert str(log) in result.output and "KeyError" in log.read_text()


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_with_debug_the_traceback_is_on_the_terminal(call, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("LIPPREP_DEBUG", "1")
    else:
        monkeypatch.setenv("LIPPREP_DEBUG", "0")
    result = call(KeyError("x"), *(["--debug"] if how == "flag" else []))
    assert "Traceback" in result.output and "internal error" in result.output
    assert os.environ["LIPPREP_DEBUG"] == "1"


def test_every_command_takes_debug():
    for name in cli.COMMANDS:
        command = cli.main.get_command(click.Context(cli.main), name)
        for one in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert "--debug" in CliRunner().invoke(one, ["--help"]).output, one.name
    assert "--debug" in CliRunner().invoke(cli.main, ["--help"]).output


@pytest.fixture
def listed(tmp_path, monkeypatch, make_video, face_frames):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIPPREP_DEBUG", "0")
    for n in (1, 2, 3):
        make_video(tmp_path / f"videos/WORD/train/WORD_{n:05d}.mp4", face_frames[n : n + 6])
    arguments = ["manifest", "lrw", "videos", "-o", "manifests/m.jsonl"]
    assert CliRunner().invoke(cli.main, arguments).exit_code == 0


def landmarks(*flags: str):
    return CliRunner().invoke(cli.main, ["landmarks", "--engine", "serial", "--max-failures", "100%", *flags])


def test_a_clip_s_fault_is_logged_with_its_key_and_costs_no_other_clip(listed, monkeypatch):
    real, calls = make.track, []

    def track(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("no such point")
        return real(*arguments)

    monkeypatch.setattr(make, "track", track)
    result = landmarks("--json")
    figures = json.loads(result.stdout)
    assert (figures["ok"], figures["failed"]) == (2, {"error": 1})
    (failed,) = [e for tar in Path("work/m/landmarks").glob("*.tar") for e in read_entries(tar) if e["status"] != "ok"]
    assert "internal error" in failed["message"] and "no such point" in failed["message"] and LOG in failed["message"]
    log = Path("work/m/logs", LOG).read_text()
    assert failed["key"] in log and "Traceback" in log and "in track" in log
    assert "Traceback" not in result.output
    Path("work/m/landmarks").rename("elsewhere")
    calls.clear()
    assert "Traceback" in landmarks("--debug").output


def test_a_fault_in_a_stage_is_logged_in_the_work_folder(listed, monkeypatch):
    monkeypatch.setattr(runs, "close_accounts", lambda *_: {}["lost"])
    result = landmarks()
    assert result.exit_code == 1 and "internal error" in result.output and "Traceback" not in result.output
    assert "KeyError: 'lost'" in Path("work/m/logs", LOG).read_text()
