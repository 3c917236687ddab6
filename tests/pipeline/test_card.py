"""The data set card beside the shards: true, kept true, and silent about the machine."""

import csv
import gc
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from traps import tars

from lipprep.pipeline.card import Tally, card_text
from lipprep.pipeline.manifest import Clip, Manifest, load_manifest
from lipprep.pipeline.wanted import read_wanted
from lipprep.stages.shard.index import Index, Shard, load_index

CARD = Path("shards/README.md")
PLAN = Path("work/m/plan.yaml")


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_a_card_says_what_the_shards_hold(chain, corpus, monkeypatch):
    chain()
    text, index = CARD.read_text(), load_index(Path("shards"))
    files = {f["split"]: f["path"] for f in front(text)["configs"][0]["data_files"]}
    assert {split: len(list(Path("shards").glob(path))) for split, path in files.items()} == {
        split: sum(s.split == split for s in index.shards) for split in ("train", "val", "test")
    }
    assert front(text)["size_categories"] == ["n<1K"] and front(text)["pretty_name"] == "m"
    told = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line}
    assert told["train"][:3] == ["8", "0", "8"] and told["train"][5] == "4 / 4 / 4"
    assert told["frames"][0] == "12" and "0.235" in told["the word's duration, seconds"]
    assert "ABOUT, BLACK" in text and index.fingerprint in text and "12 .mp4 files on a disk" in text
    for secret in (*corpus.parts[1:], str(Path.cwd()), Path.home().name, socket.gethostname()):
        assert secret not in text
    monkeypatch.chdir("shards")
    load, check = snippets(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last shard open
        exec(load, read := {})
        assert read["mouth"].shape == (14, 96, 96) and read["label"] == index.labels.index(read["word"])
        gc.collect()
    exec(check, {})
    Path("val-00000.tar").write_bytes(b"")
    with pytest.raises(AssertionError, match="val-00000"):
        exec(check, {})


def test_a_card_is_kept_true_and_costs_no_shard(chain, lipprep):
    chain()
    text, before, index = CARD.read_text(), tars("shards"), Path("shards/index.json").read_bytes()
    CARD.unlink()
    lipprep("shards", "-j", 1)
    assert CARD.read_text() == text
    lipprep("shards", "-j", 1, "--licence", "CC BY 4.0")
    lipprep("shards", "-j", 1)  # it need not be said twice
    stated = CARD.read_text()
    assert front(stated)["license"] == "cc-by-4.0" and "\nCC BY 4.0. " in stated
    assert read_wanted(PLAN).licence == "CC BY 4.0"
    assert tars("shards") == before and Path("shards/index.json").read_bytes() == index
    lipprep("verify", "--deep", "-j", 1)
    lipprep("shards", "-j", 1, "--quality", 80, "--replace")
    assert "| `quality` | 80 |" in CARD.read_text() and load_index(Path("shards")).fingerprint in CARD.read_text()


def test_a_text_of_ones_own_stays(chain, lipprep):
    chain()
    kept = [line for line in CARD.read_text().splitlines() if not line.startswith("<!-- lipprep card")]
    CARD.write_text("\n".join(kept))
    lipprep("shards", "-j", 1, "--quality", 80, "--replace")
    assert CARD.read_text() == "\n".join(kept)
    CARD.unlink()
    CARD.mkdir()
    lipprep("shards", "-j", 1, "--quality", 95, "--replace")
    assert CARD.is_dir() and lipprep("verify").exit_code == 0


def test_a_card_of_an_earlier_version_is_written_anew(chain, lipprep):
    chain()
    text = CARD.read_text()
    CARD.write_text(
        re.sub("(?m)^dataset_info:\n(?: .*\n)+", "", re.sub("lipprep card [0-9a-f]+", "lipprep card 0", text))
    )
    assert "dataset_info" not in CARD.read_text()
    lipprep("shards", "-j", 1)
    assert CARD.read_text() == text and "dataset_info" in front(text)


# In a process of its own: `datasets` reads its settings when it is imported.
LOAD = """
import json, sys
import datasets, numpy as np

datasets.disable_progress_bars()
told = {}
for folder, mouth in (("jpeg", "mouth.jpg"), ("npy", "mouth.npy")):
    for streaming in (False, True):
        splits = datasets.load_dataset(folder, streaming=streaming)
        told[f"{folder} {streaming}"] = {
            split: [{**clip, mouth: np.asarray(clip[mouth]).tolist()} for clip in clips]
            for split, clips in splits.items()
        }
json.dump(told, sys.stdout)
"""


def packed(folder: Path, mouth: str) -> dict[str, list[dict]]:
    """The clips of each split as `datasets` names their parts, in the order of the shards; jpeg's pixels left out."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for json_member in tar.getmembers()[1::2]:
                key = json_member.name.removesuffix(".json")
                clip = {"json": json.load(tar.extractfile(json_member)), "__key__": key, "__url__": str(path.resolve())}
                if mouth == "mouth.npy":
                    clip[mouth] = np.load(io.BytesIO(tar.extractfile(f"{key}.{mouth}").read())).tolist()
                found.setdefault(path.stem.partition("-")[0], []).append(clip)
    return found


def test_datasets_loads_shards_whose_first_clips_have_no_times(lipprep, corpus, tmp_path):
    pytest.importorskip("datasets")
    videos = [v.relative_to(corpus).as_posix() for v in sorted(corpus.rglob("*.mp4"))[:6]]

    def listing(known: set[str]) -> list[str]:
        with Path("m.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["video", "word", "split", "duration", "word_start", "word_end", "speaker"])
            for n, video in enumerate(videos):
                row = [video, "yes", "train" if n else "test"]
                table.writerow([*row, 0.25, 0.5, 0.75, "ann"] if video in known else row)
        lipprep("manifest", "csv", "m.csv", "--root", corpus, "-o", "manifests/m.jsonl")
        return [clip.video for clip in load_manifest(Path("manifests/m.jsonl")).clips if clip.split == "train"]

    listing(set(listing(set())[-2:]))
    lipprep("landmarks", "--engine", "serial")
    for codec in ("jpeg", "npy"):
        lipprep("shards", "--engine", "serial", "--codec", codec, "-o", codec)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "USE_TORCH": "0"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for way, splits in json.loads(done.stdout).items():
        codec, mouth = ("jpeg", "mouth.jpg") if way.startswith("jpeg") else ("npy", "mouth.npy")
        wanted = packed(tmp_path / codec, mouth)
        times = [clip["json"]["word_start"] for clip in wanted["train"]]
        assert times == [None] * 3 + [0.5] * 2 and wanted["train"][-1]["json"]["speaker"] == "ann"
        if codec == "jpeg":
            shapes = {np.shape(clip.pop(mouth)) for clips in splits.values() for clip in clips}
            assert shapes == {(14 * 96, 96)}
        assert splits == wanted, way


@pytest.mark.parametrize("licence", ["two\nlines", "x" * 201, "${HOME}", "\x1b[2J"])
def test_what_is_no_licence_is_refused(licence, lipprep, listed):
    result = lipprep("shards", "--licence", licence, code=1)
    assert "no licence's name" in result.stderr and "\x1b" not in result.stderr


def made_card(labels: tuple[str, ...], *, name: str = "mine", licence: str | None = None, speakers: str = "") -> str:
    """The card of two clips, of the first label: one in a shard, one not."""
    clips = [Clip(f"v{n}", f"v{n}.mp4", "train", labels[0], 0, 0, speaker=s) for n, s in enumerate(speakers or "ab")]
    shard = Shard("train-00000.tar", "train", 1, 4096, "0" * 64)
    parameters = {"profile": "fixed", "crop_size": 96, "box": [80, 116, 96, 96], "codec": "npy"}
    index = Index(name, "f" * 64, labels, 25.0, parameters, {"train": {"no_face": 1}}, (shard,), {})
    tally = Tally()
    tally.add(clips, [{"status": "ok", "figures": {"num_frames": 29, "brightness": None}}, {"status": "failed"}])
    root = Path("/home/somebody/secret")
    return card_text(
        index, Manifest(Path(f"{name}.jsonl"), root, 25.0, 0, 512, labels, tuple(clips)), tally, licence=licence
    )


def test_words_mark_nothing_up():
    words = ("<script>", "a|b`c", "![x](http://x.org)", "www.x.org", "*so* _so_", "line\u2028two", "don't")
    text = made_card(words, licence="mine | <b>")
    assert r"\<script\>, a\|b\`c, \!\[x\]\(http\://x.org\), www\.x.org, \*so\* \_so\_, line\\u2028two, don't." in text
    assert " <script" not in text and r"mine \| \<b\>." in text
    assert front(text)["license"] == "other" and front(text)["license_name"] == "mine-b"
    assert front(made_card(("a",), name="no: [yaml"))["pretty_name"] == "no: [yaml"


def test_failures_and_speakers_are_told():
    text = made_card(("yes", "no"))
    assert "| `no_face` | 1 |" in text and "1 of them have no clip." in text
    assert "Speakers: 1, and in more than one split 0." in text
    assert "secret" not in text and "somebody" not in text and "Not stated: that of the videos." in text
    assert "secret" not in text and "BBC" not in text and "brightness" not in text


def test_what_looks_like_lrw_is_the_bbcs():
    for text in (made_card(("ABOUT", "PEOPLE")), made_card(("yes",), name="my_LRW")):
        assert "belongs to the BBC" in text and "neither its videos nor crops of them may be passed on" in text
        assert front(text)["license"] == "other" and front(text)["license_name"] == "lrw"
    text = made_card(("ABOUT", "PEOPLE"), licence="MIT")
    assert "no other licence holds" in text and front(text)["license"] == "mit"


def test_git_ignores_the_card():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no clone")
    command = ["git", "-C", root, "check-ignore", "-q", "shards/README.md"]
    assert subprocess.run(command).returncode == 0
