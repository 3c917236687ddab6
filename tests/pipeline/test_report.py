"""`lipprep report`: one page that is whole by itself, whatever is there to show and whatever it is called."""

import base64
import csv
import json
import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from lipprep.pipeline.report.facts import commands
from lipprep.pipeline.sources import Row, make_manifest
from lipprep.pipeline.wanted import Wanted

HOSTILE = ('<script>alert(1)</script>"', 'it\'s & "so"', "👩‍👧 שלום", "{{ 7 * 7 }}")


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and all text but that of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.styles = "", ""
        self._within = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "style":
            self.styles += data
        elif not self._within:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def cards(self, sheet: str) -> list[dict]:
        """The clips of a contact sheet, in its order."""
        places = {}
        for attributes in self.all("li"):
            for place in attributes.get("data-sheets", "").split():
                name, _, n = place.partition(":")
                if name == sheet:
                    places[int(n)] = attributes
        return [places[n] for n in sorted(places)]


def decoded(uri: str) -> np.ndarray:
    kind, _, payload = uri.partition(";base64,")
    assert kind.startswith("data:image/")
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(payload, validate=True), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return picture


def check(page: Page) -> None:
    """Raise AssertionError where a page asks for anything beyond itself, or a link, an id or a picture is amiss."""
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert {name for name, count in ids.items() if count > 1} == set()
    for _, attributes in page.elements:
        for name in ("src", "href"):
            value = attributes.get(name) or "data:"
            assert value.startswith(("data:", "#")), value
            assert not value.startswith("#") or value[1:] in ids, value
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name) is None or attributes[name] in ids
        assert not any(name.startswith("on") for name in attributes)
    for image in page.all("img"):
        assert image["alt"] and decoded(image["src"]).size
    for uri in re.findall(r"url\(([^)]*)\)", page.styles):
        assert decoded(uri).size
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not re.search(r"https?://|@import", page.html)


@pytest.fixture
def plain(lipprep, make_video, face_frames, tmp_path):
    """Shards of a fixed box, of clips of the given words; `spoil` changes the frames of some."""

    def make(words, spoil=None, speakers=("s1", "s2")) -> Path:
        with Path("clips.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["video", "word", "split", "speaker"])
            for n, word in enumerate(words):
                frames = face_frames[n : n + 5]
                path = make_video(tmp_path / f"videos/clip{n}.mp4", spoil(n, frames) if spoil else frames)
                out.writerow([path.name, word, "train", speakers[n % len(speakers)]])
        lipprep("manifest", "csv", "clips.csv", "--root", "videos", "-o", "manifests/m.jsonl", "--seed", 3)
        return tmp_path / "videos"

    return make


BOX = ("-j", 1, "--engine", "serial", "--profile", "fixed", "--box", "80,116,96,96", "--max-failures", "100%")


def test_the_page_is_whole_and_the_same_again(chain, lipprep):
    chain()
    said = lipprep("report", "-o", "r.html")
    assert "r.html" in said.stdout and "12 clips shown" in said.stdout and "records of shards" in said.stderr
    page = Page(Path("r.html"))
    check(page)
    assert {"stages", "failures", "clips", "figures", "averages", "landmarks", "time", "settings", "again"} <= {
        attributes.get("id") for attributes in page.all("section")
    }
    assert sum("Landmarks on the first frame" in image["alt"] for image in page.all("img")) == 12
    assert len(page.cards("random")) == 12 and len(page.cards("words")) == 12
    for card in page.cards("suspicious"):
        assert "Clip length\t14 frames" in card["data-figures"] and "Mouth centre" in card["data-figures"]
    lowest = [float(re.search(r"Jitter\t([\d.]+)", card["data-figures"])[1]) for card in page.cards("jitter-low")]
    assert lowest == sorted(lowest) and lowest
    for command in ("manifest lrw", "landmarks -m manifests/m.jsonl", "shards -m manifests/m.jsonl"):
        assert f"lipprep {command}" in page.text
    before = Path("r.html").read_bytes()
    lipprep("report")
    assert Path("report.html").read_bytes() == before and len(before) < 10e6


def test_json_has_the_order_of_suspicion_and_writes_no_page(plain, lipprep):
    videos = plain(["A"] * 6, lambda n, frames: [f * 0 for f in frames] if n == 4 else frames)
    (videos / "clip1.mp4").write_bytes(b"")
    lipprep("shards", *BOX)
    told = json.loads(lipprep("report", "--json").stdout)
    assert told["planned"] == 6 and told["counts"] == {"ok": 5, "unreadable": 1}
    reasons = {suspect["key"]: " ".join(suspect["reasons"]) for suspect in told["suspicion"]}
    assert len(reasons) == 6 and next(iter(reasons)) == "clip1"
    assert "empty" in reasons["clip1"] and "show nothing" in reasons["clip4"] and told["figures"]["black"]["max"] == 1
    assert not Path("report.html").exists()
    lipprep("report", "--json", "-o", "both.html")
    page = Page(Path("both.html"))
    check(page)
    assert page.cards("black-high")[0]["data-key"] == "clip4" and page.cards("failed")[0]["data-key"] == "clip1"
    assert "clip1.mp4 is empty" in page.text and "--profile fixed --box 80,116,96,96" in page.text


def test_whatever_words_and_speakers_are_called_is_escaped(plain, lipprep):
    videos = plain(HOSTILE, speakers=('"><img src=x onerror=alert(1)>', "ذكر"))
    (videos / "clip2.mp4").write_bytes(b"none")
    lipprep("shards", *BOX)
    lipprep("report", "-o", "r.html")
    page = Page(Path("r.html"))
    check(page)
    cards = page.cards("words")
    assert {card["data-word"] for card in cards} == set(HOSTILE) - {HOSTILE[2]}
    assert {card["data-speaker"] for card in cards} == {'"><img src=x onerror=alert(1)>', "ذكر"}
    assert page.cards("failed")[0]["data-word"] == HOSTILE[2]
    assert all(word in page.text for word in HOSTILE)
    assert {option.get("value") for option in page.all("option")} >= set(HOSTILE)


def test_what_is_not_there_yet_is_said(plain, lipprep):
    videos = plain(["A", "B"])
    assert "manifests is a folder: name the page" in lipprep("report", "-o", "manifests", code=1).stderr
    for command, said in (
        (None, "2 clips were planned: 0 are done, 2 are still to be made"),
        (("crops", *BOX), "2 are done as far as crops, none failed"),
    ):
        if command:
            lipprep(*command)
        lipprep("report")
        page = Page(Path("report.html"))
        check(page)
        assert said in (text := " ".join(page.text.split())) and "stale: why" not in text
    os.utime(videos / "clip0.mp4", (1, 1))
    tar = next(Path("work/m/crops").glob("*.tar"))
    tar.write_bytes(bytes(tar.stat().st_size))  # as long as its record says
    lipprep("report")
    page = Page(Path("report.html"))
    check(page)
    assert "crops of 1 clips could not be read" in page.text
    assert "none failed. Of these 1 is stale: why" in " ".join(page.text.split())


def test_crops_of_files_are_shown(lipprep):
    for n, word in enumerate(("ONE", "ONE", "TWO")):
        path = Path(f"crops/{word}/train/{word}_{n:05d}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(n).integers(0, 255, (4, 88, 88), np.uint8))
    lipprep("shards", "--from-crops", "crops", "--profile", "lrw2021", "-j", 1, "--engine", "serial")
    lipprep("report")
    page = Page(Path("report.html"))
    check(page)
    assert len(page.cards("random")) == 3 and "strip s0" in page.html
    command = f"lipprep shards --from-crops {Path('crops').resolve()} -m manifests/crops.jsonl --profile lrw2021"
    assert command in page.text


@pytest.mark.parametrize(
    "ending, flag, command", [("mp4", {}, "manifest lrw"), ("npy", {"from_crops": True}, "shards")]
)
def test_a_filtered_manifest_is_not_listed_again(ending, flag, command):
    rows = [Row(f"A/train/A_{n:05d}.{ending}", "A", "train") for n in range(40)]
    whole = make_manifest(Path("m.jsonl"), rows, root=Path("videos"))
    less = replace(whole, clips=whole.clips[:30], filtered="jitter < 2")
    (first, *_), (instead, *_) = (commands(m, Wanted(**flag), (), {}) for m in (whole, less))
    assert first.startswith(f"lipprep {command}") and "videos" in first
    assert instead.startswith("# m.jsonl as it is") and "manifest filter 'jitter < 2'" in instead


@pytest.mark.cluster
def test_videos_work_shards_and_the_page_itself_may_be_in_a_store(lipprep, plain, bucket):
    videos = plain(["A", "B", "C"])
    (videos / "clip1.mp4").write_bytes(b"none")
    for video in videos.iterdir():
        (bucket / "videos" / video.name).upload(video)
    root, work, shards = ("--root", bucket / "videos"), ("-w", bucket / "work"), bucket / "shards"
    lipprep("shards", *root, *work, "-o", shards, *BOX)
    lipprep("report", *root, *work, "--shards", shards, "-o", bucket / "report.html")
    Path("r.html").write_bytes((bucket / "report.html").read_bytes())
    page = Page(Path("r.html"))
    check(page)
    assert len(page.cards("random")) == 2 and len(page.cards("failed")) == 1 and "strip s0" in page.html
