"""Records and indexes whose digests fit and whose values are of any type: each is named, and none ends a command."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from record_lines import write

from lipprep.cli import main
from lipprep.pipeline.journal import read_attempt
from lipprep.pipeline.records import read_entries
from lipprep.pipeline.verify import verify
from lipprep.stages.shard.index import plain_digest, read_index

ODD = [None, True, -1, 10**30, 1.5, 1e308, "", "\x1b[2J\x07", [], {}, [[]], {"a": 1}]


def run(*arguments: object) -> int:
    """Call a command and return its exit code; it ends in figures or one message, whatever it reads."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert "internal error" not in result.output and "Traceback" not in result.output, (arguments, result.output)
    assert "\x07" not in result.output
    return result.exit_code


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where all values of plain containers stand, those in containers after these."""
    if path:
        yield path
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, name))


def at(plain: object, path: tuple) -> object:
    for name in path:
        plain = plain[name]
    return plain


def changed(plain: object, path: tuple, value: object) -> object:
    plain = copy.deepcopy(plain)
    at(plain, path[:-1])[path[-1]] = value
    return plain


def without(plain: object, path: tuple) -> object:
    plain = copy.deepcopy(plain)
    del at(plain, path[:-1])[path[-1]]
    return plain


def another_type(value: object) -> object:
    """A value of a type that no field has which holds `value`."""
    return {str: 7, int: "7", float: "0.5", bool: 3, list: "ab", dict: [1], type(None): True}[type(value)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_video, face_frames) -> Iterator[Path]:
    """A clip that is sound and one that is no video, run through to shards; the working folder."""
    folder = tmp_path_factory.mktemp("types")
    with contextlib.chdir(folder):
        for word in ("ABOUT", "BLACK"):
            make_video(Path(f"videos/{word}/train/{word}_1.mp4"), face_frames[:8])
        Path("videos/BLACK/train/BLACK_1.mp4").write_text("no video")
        assert run("manifest", "lrw", "videos", "-o", "manifests/m.jsonl") == 0
        for stage in ("landmarks", "crops", "shards"):
            assert run(stage, "-j", 1, "--engine", "serial", "--max-failures", "100%") == 0
        yield folder


@pytest.fixture
def spoilt(data, tmp_path, monkeypatch) -> Path:
    """A copy of it."""
    monkeypatch.chdir(shutil.copytree(data, tmp_path / "data"))
    return Path()


def records(folder: str) -> Iterator[tuple[Path, dict, dict]]:
    """The record of the sound clip and that of the other one: path, header, line."""
    for path in sorted(Path(folder).glob("*.jsonl")):
        header, line = map(json.loads, path.read_bytes().splitlines())
        yield path, header, line


FOLDERS = ["work/m/landmarks", "shards"]  # of which crops have nothing more


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_record_with_a_value_of_another_type_is_damaged(folder, spoilt):
    """Field by field of header and line, with digests that fit: verify names it, and nothing stumbles over it."""
    count = 0
    for path, header, line in records(folder):
        whole = path.read_bytes()
        # What a stage was told may be of any type there: that it differs is what is said of it.
        told = [p for p in places(header) if p[0] not in ("check", "parameters", "lipprep_record")]
        spoils = [(changed(header, p, another_type(at(header, p))), line) for p in told if p[0] != "entries"]
        spoils += [(header, changed(line, p, another_type(at(line, p)))) for p in places(line)]
        for about, entry in spoils:
            write(path, about, [entry])
            assert "bad_record" in {f.kind for f in verify(Path(folder)).findings}, (about, entry)
            count += 1
        path.write_bytes(whole)
    assert count > 100


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_value_of_a_record_ends_a_command(folder, spoilt):
    """Odd values in turn, one a field, and fields that are missing, in every reader of records."""
    for path, header, line in records(folder):
        whole = path.read_bytes()
        spoils = [(changed(header, p, ODD[n % len(ODD)]), line) for n, p in enumerate(places(header))]
        spoils += [(without(header, p), line) for p in places(header)]
        spoils += [(header, changed(line, p, ODD[(n + 5) % len(ODD)])) for n, p in enumerate(places(line))]
        spoils += [(header, without(line, p)) for p in places(line)]
        commands = [("status", "--timing"), ("report", "--json"), ("failures",), ("verify", folder, "-j", 1)]
        for n, (about, entry) in enumerate(spoils):
            write(path, about, [entry])
            run(*commands[n % 4])
        path.write_bytes(whole)


def test_a_damaged_record_is_told_and_made_again(spoilt):
    (path, header, line), *_ = records("shards")
    write(path, changed(header, ("parts",), []), [line])
    status = CliRunner().invoke(main, ["status"]).stdout
    assert "missing: tar or record cut, damaged" in status
    assert run("shards", "-j", 1, "--engine", "serial", "--max-failures", "100%") == 0
    again = json.loads(path.read_bytes().splitlines()[0])
    assert again["counts"] == header["counts"] and run("verify", "shards") == 0


def test_a_line_of_another_clip_makes_its_stage_go_again(spoilt):
    (path, header, line), *_ = records("work/m/landmarks")
    write(path, header, [changed(line, ("key",), "another")])
    shutil.rmtree("shards"), shutil.rmtree("work/m/crops")
    result = CliRunner().invoke(main, ["shards", "-j", "1", "--engine", "serial", "--max-failures", "100%"])
    assert result.exit_code == 1 and "was damaged since it was made: run `lipprep landmarks`" in result.output
    assert not path.exists()


def test_no_value_of_an_index_ends_a_command(spoilt):
    path = Path("shards/index.json")
    plain = json.loads(path.read_text())
    for n, place in enumerate(places(plain)):
        new = changed(plain, place, ODD[n % len(ODD)])
        body = {k: v for k, v in new.items() if k != "sha256"}
        path.write_text(json.dumps({**body, "sha256": plain_digest(body)}))
        run("verify", "shards", "-j", 1), run("index")
    for place in places(plain):
        if place[0] in ("labels", "fps", "parameters", "shards", "failures"):
            new = changed(plain, place, another_type(at(plain, place)))
            body = {k: v for k, v in new.items() if k != "sha256"}
            path.write_text(json.dumps({**body, "sha256": plain_digest(body)}))
            assert run("verify", "shards", "-j", 1) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_size", 10**30), ("crop_size", 10**5), ("crop_size", 0), ("name", "n" * 300), ("fps", 1e300)],
)
def test_an_index_has_sizes_that_can_be(field, value, spoilt):
    path = Path("shards/index.json")
    plain = json.loads(path.read_text())
    part = {"crop_size": plain["parameters"], "name": plain["shards"][0], "fps": plain}[field]
    part[field] = value
    del plain["sha256"]
    path.write_text(json.dumps({**plain, "sha256": plain_digest(plain)}))
    with pytest.raises(ValueError, match=r"index\.json is no usable index") as caught:
        read_index(Path("shards"))
    assert len(str(caught.value)) < 400


def test_a_journal_is_read_up_to_what_is_none(spoilt):
    tar = Path("work/m/landmarks/train-00000.tar")
    (line,) = read_entries(tar)
    journal = tar.with_name(".train-00000.journal.1.tmp")
    start = json.dumps({"working": [line["key"], "b"]}) + "\n"
    for place in places(line):
        bad = changed(line, place, another_type(at(line, place)))
        journal.write_text(start + json.dumps(line) + "\n" + json.dumps(bad) + "\n")
        assert read_attempt(tar, "1", tar.parent).entries == [line]
    for value in ODD:
        journal.write_text(start + json.dumps({"working": value}) + "\n")
        assert read_attempt(tar, "1", tar.parent).working == [line["key"], "b"]


@pytest.mark.parametrize("line", [0, 1])
def test_no_value_of_a_manifest_ends_a_command(line, spoilt):
    path = Path("manifests/m.jsonl")
    lines = path.read_text().splitlines()
    plain = json.loads(lines[line])
    for place in places(plain):
        for value in ODD:
            path.write_text("\n".join([*lines[:line], json.dumps(changed(plain, place, value)), *lines[line + 1 :]]))
            run("status")
            if place == ("seed",):
                run("report", "--json")


def test_no_value_of_the_accounts_ends_a_stage(spoilt):
    path = Path("work/report.json")
    plain = json.loads(path.read_text())
    for place in [p for p in places(plain) if len(p) < 4]:
        path.write_text(json.dumps(changed(plain, place, ODD[len(place)])))
        assert run("landmarks", "-j", 1, "--engine", "serial", "--max-failures", "100%") == 0
        assert json.loads(path.read_text())["datasets"]["m"]["landmarks"]["planned"] == 2
