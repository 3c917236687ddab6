"""Words and names from anybody in tables, cards, subtitles and messages: shown as they are."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.pipeline.manifest import load_manifest
from lipprep.stages.untrusted import MAX_ECHO, cell, markdown, parse_settings, printable
from lipprep.train.confusion import write_confusion
from lipprep.train.subtitles import write_subtitles
from lipprep.train.utterances import Utterance

FORMULAS = ["=HYPERLINK(A1)", "+cmd|' /C calc'!A0", "@SUM(1)", "-2+3"]
HEADER = {"lipprep_manifest": 1, "root": ".", "fps": 25, "seed": 0, "chunk_size": 1, "labels": ["a"]}
ROW = {"key": "a@0", "video": "a.mp4", "split": "train", "word": "a", "label": 0, "chunk": 0, "start": 0}


@pytest.mark.parametrize("text", FORMULAS)
def test_no_word_is_a_formula(text, tmp_path):
    labels = [text, "PLAIN"]
    write_confusion(np.array([[1, 2], [0, 3]]), labels, tmp_path, title="t")
    for name in ("words.csv", "confusion.csv"):
        cells = [c for row in csv.reader((tmp_path / name).read_text(encoding="utf-8").splitlines()) for c in row]
        assert f"'{text}" in cells and "PLAIN" in cells and not any(c.startswith(tuple("=+-@\t\r")) for c in cells)
    assert [cell(v) for v in (-2, "a-b", "\tx", "\rx")] == [-2, "a-b", "'\tx", "'\rx"]


def test_no_word_is_markup_in_subtitles(tmp_path):
    said = [_said("<b>a</b>&{\\an8}-->")]
    write_subtitles(said, tmp_path / "a.vtt")
    write_subtitles(said, tmp_path / "a.srt")
    web, rip = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a.vtt", "a.srt"))
    assert "&lt;b&gt;a&lt;/b&gt;&amp;" in web and web.count("-->") == 1
    assert "<b>" not in rip and "{" not in rip and rip.count("-->") == 1


def _said(word: str) -> Utterance:
    return Utterance(word, 0.0, 1.0, ((word, 0.9),))


def test_markdown_marks_nothing_up():
    assert markdown("_a_ b_c a__b__") == r"\_a\_ b_c a\_\_b\_\_"
    assert markdown("`<img src=x>` [a](http://b) |") == r"\`\<img src=x\>\` \[a\]\(http\://b\) \|"


def message(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    assert "internal error" not in result.output
    return result.stderr


LONG = "x" * 200_000


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        (
            "t.csv",
            "video,word," + ",".join(f"column{n}" for n in range(20_000)),
            ("manifest", "csv", "t.csv", "-o", "m.jsonl"),
        ),
        ("t.csv", f"video,word,start\na,b,{LONG[:100_000]}\n", ("manifest", "csv", "t.csv", "-o", "m.jsonl")),
        ("t.csv", f"video,word,split\na.mp4,b,{LONG[:100_000]}\n", ("manifest", "csv", "t.csv", "-o", "m.jsonl")),
        ("m.jsonl", json.dumps({**HEADER, "fps": LONG}), ("status", "-m", "m.jsonl")),
        ("m.jsonl", json.dumps(HEADER) + "\n" + json.dumps({**ROW, LONG: 1}), ("status", "-m", "m.jsonl")),
        ("m.jsonl", json.dumps(HEADER) + "\n" + json.dumps({**ROW, "split": LONG}), ("status", "-m", "m.jsonl")),
        ("m.jsonl", json.dumps(HEADER) + "\n" + json.dumps({**ROW, "video": LONG}), ("status", "-m", "m.jsonl")),
        ("r.yaml", f"{LONG}: 1\n", ("train", "--recipe", "r.yaml", "--show-config")),
        ("r.yaml", f"recipe: compact\nprofile: p\nmodel: {{}}\nlr: {LONG}\n", ("train", "--recipe", "r.yaml")),
        ("r.yaml", f"lr: *{LONG}\n", ("train", "--recipe", "r.yaml", "--show-config")),
        ("r.yaml", f"lr: !{LONG} 1\n", ("train", "--recipe", "r.yaml", "--show-config")),
        ("p.csv", f"a/b,{LONG[:100_000]}\n", ("landmarks", "-m", "s.jsonl", "--archive", ".", "--persons", "p.csv")),
        ("s/index.json", json.dumps({"lipprep_index": LONG}), ("train", "--shards", "s", "--run", "r")),
    ],
)  # fmt: skip
def test_no_message_quotes_more_than_sense(name, text, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    listed = [json.dumps(HEADER), json.dumps({**ROW, "num_frames": 1})]
    (tmp_path / "s.jsonl").write_text("\n".join(listed))
    assert len(message(*arguments)) < 4500


def test_what_is_left_out_of_a_message_is_its_middle():
    short = printable("\x1b" + "a" * 5000 + "remedy", MAX_ECHO)
    assert short.startswith("\\x1baaa") and short.endswith("remedy") and "characters left out" in short
    assert len(short) < MAX_ECHO + 50 and printable("a" * MAX_ECHO, MAX_ECHO) == "a" * MAX_ECHO
    with pytest.raises(ValueError, match="characters left out"):
        parse_settings("a: !" + LONG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 100_000}, r"m\.jsonl, line 2: a window of 100000 frames .*cut it into several"),
        ({"num_frames": 29_128}, "line 2: a window of 29128 frames"),
        ({"num_frames": 10**30}, "line 2: a window"),
        ({"num_frames": 1, "start": 10**12}, "line 2: the window"),
        ({"num_frames": 1, "tracked_from": 0, "tracked_to": 10**9}, "line 2: tracked_from"),
        ({"num_frames": 1, "tracked_from": 10**15, "tracked_to": 10**15 + 5}, "line 2: tracked_from"),
    ],
)
def test_a_line_of_a_manifest_takes_no_more_memory_than_a_clip_has(fields, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps({**ROW, "key": f"a@{fields.get('start', 0)}", **fields}))
    with pytest.raises(ValueError, match=message):
        load_manifest(path)
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps({**ROW, "num_frames": 29_127}))
    assert load_manifest(path).clips[0].num_frames == 29_127


@pytest.mark.parametrize("profile", ["lrw2021", "fixed"])
def test_a_window_repeats_its_edge_frames_within_reason(profile, tmp_path, monkeypatch, make_video, face_frames):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "a.mp4", face_frames[:4])
    rows = [
        {**ROW, "key": f"a@{start}", "start": start, "num_frames": n} for start, n in ((0, 1004), (1, 1004), (-2, 8))
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [{**HEADER, "chunk_size": 3}, *rows])))
    run = ["-m", "m.jsonl", "-j", "1", "--engine", "serial", "--max-failures", "100%"]
    if profile != "fixed":
        assert CliRunner().invoke(main, ["landmarks", *run]).exit_code == 0
    box = ["--box", "80,116,96,96"] if profile == "fixed" else []
    done = CliRunner().invoke(main, ["crops", *run, "--profile", profile, *box])
    assert done.exit_code == 0, done.output
    told = [json.loads(line) for line in Path("work/m/crops/train-00000.jsonl").read_text().splitlines()[1:]]
    assert [t["status"] for t in told] == ["ok", "failed", "ok"]
    assert "1001 frames beyond the 4 of" in told[1]["message"] and "list a shorter window" in told[1]["message"]


def test_crops_are_not_cut_where_no_codec_takes_them(tmp_path, monkeypatch, make_video, face_frames):
    """JPEG strips of 256 pixels hold 255 frames: told before memory is taken, with the remedy."""
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "a.mp4", face_frames[:4])
    rows = [{**ROW, "num_frames": 256}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [HEADER, *rows])))
    run = ["-m", "m.jsonl", "-j", "1", "--engine", "serial", "--max-failures", "100%"]
    assert CliRunner().invoke(main, ["landmarks", *run]).exit_code == 0
    assert CliRunner().invoke(main, ["shards", *run, "--crop-size", "256"]).exit_code == 0
    (told,) = [json.loads(line) for line in Path("shards/train-00000.jsonl").read_text().splitlines()[1:]]
    assert told["class"] == "too_long" and "256 frames are too many for one JPEG strip (255 at most)" in told["message"]


def test_no_word_is_markup_in_a_model_card(tmp_path):
    """A label with a backtick would end the code that it stood in, and begin HTML."""
    from lipprep.train.card import model_card
    from lipprep.train.checkpoint import Checkpoint, save_checkpoint
    from lipprep.train.config import as_plain, load_recipe
    from lipprep.train.device import new_model

    evil = "`<img src=x onerror=alert(1)>"
    config = as_plain(load_recipe("compact"))
    config["resolved"] = {"imported": f"{evil}.pt", "family": evil}
    weights = new_model(config["model"], num_classes=2).state_dict()
    parameters = {"profile": evil, "crop_size": 96, "detector": evil}
    state = {"optimizer": {}, "step": 0, "epoch": 0, "batch": 0, "best": None}
    checkpoint = Checkpoint(
        model=weights, config=config, labels=[evil, "b"], parameters=parameters, fps=25.0, dataset=evil, **state
    )
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    card = model_card(checkpoint, path=tmp_path / "best.pt", format="onnx", file=tmp_path / "r.onnx")
    assert "<img" not in card.replace("\\<img", "") and card.count("onerror") >= 4
