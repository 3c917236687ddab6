from collections import Counter
from pathlib import Path

import pytest

from lipprep.pipeline.manifest import load_manifest
from lipprep.pipeline.sources import lrw_duration, make_manifest, read_csv


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def made(path: str = "m.jsonl"):
    return load_manifest(Path(path))


REAL = (
    "Disk reference: 6221443953311207281 \nChannel: BBC One HD \nClip start: 1428.12 seconds \nDuration: 0.45 seconds"
)


@pytest.mark.parametrize("text", [REAL, REAL + " ", REAL.replace(" \n", "\n"), "duration : 0.45"])
def test_durations_are_found_by_name(text):
    assert lrw_duration(text) == 0.45


@pytest.mark.parametrize("text", ["", "Duration:", "Duration: long seconds", "0.45"])
def test_no_duration_is_none(text):
    assert lrw_duration(text) is None


def test_lrw(lipprep, tmp_path):
    for word in ("ZEBRA", "ABOUT"):
        for split in ("train", "val", "test"):
            touch(tmp_path / f"v/{word}/{split}/{word}_00001.mp4", tmp_path / f"v/{word}/{split}/notes.md")
    (tmp_path / "v/ABOUT/train/ABOUT_00001.txt").write_text(REAL)
    result = lipprep("manifest", "lrw", "v", "-o", "m.jsonl")
    assert "6 clips of 2 words" in result.stdout and "5 clips have no word duration" in result.stderr
    assert made().labels == ("ABOUT", "ZEBRA")
    timed = [c for c in made().clips if c.duration]
    assert [(c.key, c.duration, c.word_start, c.word_end) for c in timed] == [
        ("ABOUT/train/ABOUT_00001", 0.45, 0.355, 0.805)
    ]
    lipprep("manifest", "lrw", "v", "-o", "m.jsonl", "--words", "ZEBRA")
    assert {c.word for c in made().clips} == {"ZEBRA"}


def test_folders_with_and_without_splits(lipprep, tmp_path):
    touch(*(tmp_path / f"a/{w}/{n}.mov" for w in ("yes", "no") for n in range(20)))
    lipprep("manifest", "folders", "a", "-o", "m.jsonl")
    assert Counter((c.word, c.split) for c in made().clips) == {
        (w, s): n for w in ("yes", "no") for s, n in (("train", 16), ("val", 2), ("test", 2))
    }
    drawn = made().clips
    lipprep("manifest", "folders", "a", "-o", "m.jsonl", "--seed", 1)
    assert {c.key for c in made().clips if c.split == "test"} != {c.key for c in drawn if c.split == "test"}
    touch(*(tmp_path / f"b/{w}/{s}/1.mp4" for w in ("yes", "no") for s in ("train", "test")))
    lipprep("manifest", "folders", "b", "-o", "m.jsonl")
    assert Counter(c.split for c in made().clips) == {"train": 2, "test": 2}


def test_grid(lipprep, tmp_path):
    for speaker in ("s1", "s2"):
        for n in range(10):
            touch(tmp_path / f"g/video/{speaker}/c{n}.mpg", tmp_path / f"g/align/{speaker}/c{n}.align")
            text = "0 6000 sil\n6000 12000 bin\n12000 13000 sp\n13000 20000 red\n60000 75000 now\n"
            (tmp_path / f"g/align/{speaker}/c{n}.align").write_text(text)
    lipprep("manifest", "grid", "g", "-o", "m.jsonl", "--unseen-speakers", "s2")
    clips = made().clips
    assert made().labels == ("bin", "now", "red") and len(clips) == 60
    assert {c.split for c in clips if c.speaker == "s2"} == {"unseen"}
    assert Counter(c.split for c in clips if c.speaker == "s1") == {"train": 24, "val": 3, "test": 3}
    first = next(c for c in clips if c.key == "video/s1/c0@-6")
    # The word's middle, frame 9.0, lies half a frame from that of the 29-frame window [-6, 23).
    assert (first.word, first.start, first.num_frames) == ("bin", -6, 29)
    assert (first.word_start, first.word_end, first.duration) == (0.48, 0.72, 0.24)
    lipprep("manifest", "grid", "g", "-o", "m.jsonl", "--words", "red,now")
    assert made().labels == ("now", "red")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lrw", "absent"], "there is no folder absent"),
        (["lrw", "empty"], "no clips found"),
        (["grid", "empty"], "no folders video/ and align/"),
        (["grid", "g", "--unseen-speakers", "s9"], "no speaker s9"),
        (["grid", "g"], "is not `start end word`"),
        (["folders", "f", "--words", "maybe"], "no clip of the words maybe"),
        (["folders", "f", "--labels", "labels.txt"], "'yes' .* is not in the label file"),
        (["csv", "absent.csv"], "there is no table"),
    ],
)
def test_what_cannot_be_listed_is_said(lipprep, tmp_path, arguments, message):
    import re

    (tmp_path / "empty").mkdir()
    touch(tmp_path / "f/yes/1.mp4", tmp_path / "g/video/s1/a.mpg", tmp_path / "g/align/s1/a.align")
    (tmp_path / "g/align/s1/a.align").write_text("0 x sil\n")
    (tmp_path / "labels.txt").write_text("no\n")
    result = lipprep("manifest", *arguments, "-o", "m.jsonl", code=1)
    assert re.search(message, result.stderr) and not (tmp_path / "m.jsonl").exists()


def test_two_videos_with_one_key(lipprep, tmp_path):
    touch(tmp_path / "f/yes/1.mp4", tmp_path / "f/yes/1.mov")
    assert "two clips have the key 'yes/1'" in lipprep("manifest", "folders", "f", "-o", "m.jsonl", code=1).stderr


def test_a_label_file_gives_the_order(lipprep, tmp_path):
    touch(tmp_path / "f/yes/1.mp4", tmp_path / "f/no/1.mp4")
    (tmp_path / "labels.txt").write_text("yes\nno\nmaybe\n")
    lipprep("manifest", "folders", "f", "-o", "m.jsonl", "--labels", "labels.txt")
    assert made().labels == ("yes", "no", "maybe") and {c.word: c.label for c in made().clips} == {"yes": 0, "no": 1}


def test_paths_may_start_above_the_corpus(lipprep, tmp_path):
    touch(tmp_path / "data/f/yes/1.mp4")
    lipprep("manifest", "folders", "data/f", "-o", "m.jsonl", "--root", "data")
    assert [c.video for c in made().clips] == ["f/yes/1.mp4"] and made().root == (tmp_path / "data").resolve()
    assert "neither" in lipprep("manifest", "folders", "data/f", "-o", "m.jsonl", "--root", "data/f/yes", code=1).stderr


def test_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "video,word,split,start,num_frames,duration,speaker\n"
        "a.mp4,yes,train,5,29,0.3,s1\na.mp4,no,train,40,29,,s1\nb/c.mp4,yes,unseen,,,,\n"
    )
    clips = make_manifest(tmp_path / "m", read_csv(path), root=tmp_path).clips
    assert {c.key: (c.label, c.split, c.duration) for c in clips} == {
        "a@5": (1, "train", 0.3), "a@40": (0, "train", None), "b/c": (1, "unseen", None)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,word\na,b\n", "needs the columns video and word"),
        ("video,word,colour\na,b,c\n", "unknown columns colour"),
        ("video,word,start\na.mp4,b,soon\n", "line 2"),
        ("video,word\n,b\n", "line 2: video or word is empty"),
        ("video,word\n../a.mp4,b\n", "no path below the root"),
        ("video,word,split\na.mp4,b,dev\n", "unknown split 'dev'"),
        ("video,word,start\na.mp4,b,3\n", "both start and num_frames"),
        ("video,word\n.,b\n", "no path below the root"),
        ("video,word,key\na.mp4,b,my clip.1\n", "not of the form"),
        ("video,word,start,num_frames\na.mp4,b,0,0\n", "at least one frame"),
        ("video,word,duration\na.mp4,b,nan\n", "expected seconds"),
        ("video,word,split,start,num_frames\na.mp4,b,train,0,9\na.mp4,b,test,9,9\n", "splits share no video"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_manifest(tmp_path / "m", read_csv(tmp_path / "t.csv"), root=tmp_path)


def test_a_corpus_in_a_store_is_listed_as_one_on_a_disk(lipprep, corpus, bucket):
    for path in sorted(p for p in corpus.rglob("*") if p.is_file()):
        (bucket / "lrw" / path.relative_to(corpus).as_posix()).upload(path)
    for layout in ("lrw", "folders"):
        lipprep("manifest", layout, corpus, "-o", "here.jsonl")
        lipprep("manifest", layout, f"{bucket}/lrw", "-o", "there.jsonl")
        here, there = load_manifest(Path("here.jsonl")), load_manifest(Path("there.jsonl"))
        assert there.clips == here.clips and there.root == bucket / "lrw"
    lipprep("manifest", "lrw", f"{bucket}/lrw", "--root", bucket, "-o", "above.jsonl")
    assert load_manifest(Path("above.jsonl")).clips[0].video.startswith("lrw/")
    message = lipprep("manifest", "lrw", f"{bucket}/lrw", "--root", corpus, "-o", "x.jsonl", code=1).stderr
    assert "nor a folder above it" in message
    assert "there is no folder" in lipprep("manifest", "lrw", f"{bucket}/nothing", "-o", "x.jsonl", code=1).stderr
