"""The data set card beside the shards: true, kept true, and silent about the machine."""

import gc
import re
import shutil
import socket
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml
from traps import tars

from lipprep.pipeline.card import Tally, card_text
from lipprep.pipeline.manifest import Clip, Manifest
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
