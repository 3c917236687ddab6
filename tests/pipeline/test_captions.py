import itertools
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipprep.pipeline.captions.choose import DROPPED, Account, Choice, Spoken, choose, choose_words
from lipprep.pipeline.captions.faces import Span, choose_faces, look
from lipprep.pipeline.captions.match import files_below, match, speakers_of
from lipprep.pipeline.captions.timing import Timing
from lipprep.pipeline.manifest import load_manifest
from lipprep.stages.failures import ClipFailure


def write(path: Path, *words: tuple[str, float, float]) -> None:
    """A CTM of one video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"x 1 {start:.3f} {end - start:.3f} {word}\n" for word, start, end in words))


@pytest.fixture(scope="module")
def talk(make_video, tmp_path_factory) -> Path:
    """A video of four seconds in which nothing is seen."""
    frames = [np.full((16, 16), 90, np.uint8)] * 100
    return make_video(tmp_path_factory.mktemp("talk") / "talk.mp4", frames)


@pytest.fixture
def talks(talk, tmp_path):
    """Lay out videos below v/, each of other content: name=(word, start, end), ..."""

    def lay(**videos: tuple) -> None:
        for name, words in videos.items():
            path = tmp_path / "v" / f"{name.replace('__', '/')}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(talk.read_bytes() + bytes(4) + b"free" + name.encode())
            if words:
                write(path.with_suffix(".ctm"), *words)

    return lay


def made(path: str = "m.jsonl") -> dict:
    return {c.key: c for c in load_manifest(Path(path)).clips}


def listed(lipprep, *flags: object) -> dict:
    """The figures of the command; every word is accounted for."""
    found = json.loads(lipprep("manifest", "captions", "v", "-o", "m.jsonl", "--json", *flags).stdout)
    assert found["words"] == found["clips"] + sum(found["dropped"].values()) and set(found["dropped"]) <= set(DROPPED)
    return found


def test_windows_and_the_account_of_every_word(lipprep, talks):
    good = [("well", 1.0, 1.4), ("Then,", 1.4, 1.8)]
    talks(
        a=[*good, ("sil", 1.8, 2.0), ("a", 2.0, 2.05), ("long", 2.1, 3.5)],
        b=[*good, ("well", 1.4, 1.9), ("well", 1.0, 1.4), ("late", 3.9, 4.6)],
        c=[("rare", 0.0, 0.3), *good],
        d=[("well", 0.5, 0.9)] * 2 + [(f"w{n}", 4.0 + n, 4.5 + n) for n in range(4)],
        e=[],
    )
    Path("v/e.info.json").write_text("{}")
    Path("v/lost.srt").touch()
    found = listed(lipprep, "--min-clips", 2)
    # Of b, Then and another well are said at once.
    assert found["dropped"] == {
        "silence": 1, "short": 1, "long": 1, "overlapping": 2, "doubled": 2, "beyond": 1, "few": 1, "foreign": 5
    }  # fmt: skip
    assert found["videos_without_timings"] == ["e.mp4"] and found["timings_without_video"] == ["lost.srt"]
    assert [n["file"] for n in found["notes"]] == ["d.ctm"] and "probably another video's" in str(found["notes"])
    clips = made()
    assert sorted(clips) == ["a@16", "a@26", "b@16", "c@16", "c@26"]
    first = clips["a@16"]  # of a middle at frame 30: half a frame from that of [16, 45)
    assert (first.word, first.num_frames, first.word_start, first.word_end) == ("WELL", 29, 0.36, 0.76)
    assert (first.duration, first.speaker) == (0.4, None)
    text = lipprep("manifest", "captions", "v", "-o", "m.jsonl", "--min-clips", 2)
    assert "19 words: 1 silence or noise, 2 listed twice, 5 in files that are probably" in text.stdout
    assert "5 clips of 2 words in m.jsonl" in text.stdout
    assert "1 videos have no timings: e.mp4" in text.stderr and "1 timing files have no video: lost.srt" in text.stderr


def test_words_labels_and_spelling(lipprep, talks):
    talks(a=[("Well", 1.0, 1.4), ("then", 1.5, 1.9), ("NO", 2.0, 2.4)], b=[("then", 1.5, 1.9)])
    assert listed(lipprep, "--words", "WELL,then")["dropped"] == {"unwanted": 1}
    assert {c.word for c in made().values()} == {"WELL", "THEN"}
    listed(lipprep, "--max-words", 1, "--case", "lower")
    assert {c.word for c in made().values()} == {"then"}
    Path("labels.txt").write_text("then\nno\nmaybe\n")
    listed(lipprep, "--labels", "labels.txt", "--case", "lower")
    assert {c.word: c.label for c in made().values()} == {"then": 0, "no": 1}
    text = lipprep("manifest", "captions", "v", "-o", "m.jsonl", "--labels", "labels.txt", "--case", "lower")
    assert "1 words that are asked for have no clip: maybe" in text.stderr
    refused = lipprep("manifest", "captions", "v", "-o", "x.jsonl", "--labels", "labels.txt", code=1)
    assert "the label 'then' is not spelt as words are with --case upper" in refused.stderr


def test_languages_and_other_folders(lipprep, talks):
    talks(a=[], b__c=[])
    vtt = "WEBVTT\n\n00:01.000 --> 00:02.000\n{0}<00:01.500><c> {0}s</c>\n"
    for name, word in (("a.en.vtt", "dog"), ("a.en-orig.vtt", "hound"), ("a.de.vtt", "Hund"), ("c.en.vtt", "cat")):
        (Path("t") / name).parent.mkdir(exist_ok=True)
        (Path("t") / name).write_text(vtt.format(word))
    refused = lipprep("manifest", "captions", "v", "--timings", "t", "-o", "m.jsonl", code=1)
    assert "a.mp4 has timings in several languages (de, en): choose with --lang" in refused.stderr
    assert listed(lipprep, "--timings", "t", "--lang", "en")["timings_not_taken"] == ["a.de.vtt"]
    assert {c.word for c in made().values()} == {"HOUND", "HOUNDS", "CAT", "CATS"}
    found = listed(lipprep, "--timings", "t", "--lang", "de")
    assert found["videos_without_timings"] == ["b/c.mp4"] and found["timings_not_taken"] == [
        "a.en-orig.vtt", "a.en.vtt", "c.en.vtt"
    ]  # fmt: skip
    message = lipprep("manifest", "captions", "v", "--timings", "t", "--lang", "fr", "-o", "m.jsonl", code=1).stderr
    assert "none of 2 videos below v has timings in the language fr below t" in message


def test_one_ctm_of_many_videos(lipprep, talks):
    talks(a=[], b__c=[], d=[("own", 1, 1.5)])
    Path("v/all.ctm").write_text("a 1 1 0.5 dog\nb/c 1 1 0.5 cat\nz 1 1 0.5 cow\n")
    assert listed(lipprep)["timings_without_video"] == ["all.ctm (z)"]
    assert {(c.video, c.word) for c in made().values()} == {("a.mp4", "DOG"), ("b/c.mp4", "CAT"), ("d.mp4", "OWN")}


def test_files_that_cannot_be_read_cost_only_themselves(lipprep, talks, tmp_path):
    talks(a=[("well", 1.0, 1.4)], b=[], c=[("so", 1.0, 1.4)], d=[], e=[], **{"f\\g": [("so", 1.0, 1.4)]})
    shutil.copy("v/a.mp4", "v/a.webm")
    v = Path("v")
    (v / "b.json").write_text('{"title": "no timings"}')
    (v / "b.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\ngo\n")  # the next best
    (v / "c.mp4").write_text("no video")
    (v / "d.vtt").write_text("WEBVTT\n\n00:00:01.000 -> 00:00:02.000\nx\n00:01 --> 5\ny\n")
    (v / "e.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncafé\n".encode("cp1252"))
    found = listed(lipprep, "--rough")
    assert {c.word: c.rough for c in made().values()} == {"WELL": None, "GO": True, "CAFÉ": True}
    assert {c.word for c in made().values()} == {"WELL", "GO", "CAFÉ"} and found["videos"] == 3
    notes = {n["file"]: n["message"] for n in found["notes"]}
    assert set(notes) == {"a.webm", "b.json", "c.mp4", "d.vtt", "e.srt", "f\\g.mp4"} and "line 5" in notes["d.vtt"]
    assert "read as cp1252" in notes["e.srt"]
    assert listed(lipprep)["dropped"] == {"rough": 2}
    for name in ("a.ctm", "b.srt", "e.srt"):
        (v / name).write_text("")
    refused = lipprep("manifest", "captions", "v", "-o", "x.jsonl", code=1)
    assert "a.ctm: it is empty" in refused.stderr and "no word is left" in refused.stderr
    assert not Path("x.jsonl").exists()


def test_files_in_another_language_are_told(lipprep, talks):
    said = [(f"w{n}x", n / 2, n / 2 + 0.3) for n in range(6)]
    talks(a=said, b=said, c=[("да" + "нет" * n, start, end) for n, (_, start, end) in enumerate(said)])
    notes = listed(lipprep)["notes"]
    assert [n["file"] for n in notes] == ["c.ctm"] and "Cyrillic, most files' Latin" in notes[0]["message"]
    notes = listed(lipprep, "--words", ",".join(word for word, _, _ in said))["notes"]
    assert {n["file"] for n in notes} == {"c.ctm"} and "none of its 6 words is asked for" in notes[0]["message"]
    assert listed(lipprep, "--words", "w1x")["notes"] == notes[1:]  # one word may be missing anywhere


def test_times_count_from_the_sound_and_frames_from_the_first(lipprep, tmp_path):
    (tmp_path / "v").mkdir()
    with av.open("v/a.mp4", "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.width = picture.height = 16
        voice = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 80_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(voice.encode(silence))
        for n in range(75):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), 90, np.uint8), format="gray")
            frame.pts, frame.time_base = n + 25, Fraction(1, 25)
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        container.mux(voice.encode())
    write(Path("v/a.ctm"), ("early", 0.2, 0.5), *((f"w{n}", 1 + n / 4, 1.2 + n / 4) for n in range(10)))
    assert listed(lipprep)["dropped"] == {"beyond": 1}
    assert sorted(c.start for c in made().values())[:2] == [-12, -6]  # of middles at 1.1 s and 1.35 s


def test_speakers_and_copies_stay_in_one_split(lipprep, talks):
    talks(**{f"s{n % 5}__{n}": [("well", 1.0, 1.4), ("so", 1.5, 1.9)] for n in range(15)})
    shutil.copy("v/s0/0.mp4", "v/s1/copy.mp4")
    shutil.copy("v/s0/0.ctm", "v/s1/copy.ctm")
    found = listed(lipprep, "--speaker-from", "folder")
    assert found["groups"] == 4 and found["same_files"] == [["s0/0.mp4", "s1/copy.mp4"]]
    split = {(c.speaker, c.split) for c in made().values()}
    assert len(split) == 5 and dict(split)["s0"] == dict(split)["s1"] and {s for _, s in split} == {
        "train", "val", "test"
    }  # fmt: skip
    drawn = made()
    listed(lipprep, "--speaker-from", r"^(s\d)/")
    assert made() == drawn
    Path("speakers.csv").write_text("video,speaker\ns0/0.mp4,ann\ns3/3.mp4,ann\n")
    text = lipprep("manifest", "captions", "v", "-o", "m.jsonl", "--speaker-from", "speakers.csv", "--seed", 3)
    assert "14 videos have no speaker after --speaker-from" in text.stderr
    ann = [c for c in made().values() if c.speaker == "ann"]
    assert len(ann) == 4 and len({c.split for c in ann}) == 1
    found = listed(lipprep, "--speaker-from", "folder", "--split-by", "video")
    assert found["split_by"] == "video" and found["groups"] == 15 and found["speakers_in_several_splits"]
    copies = {c.split for c in made().values() if c.video in ("s0/0.mp4", "s1/copy.mp4")}
    assert len(copies) == 1


def test_long_videos_of_two_speakers_are_drawn_by_video(lipprep, talks):
    talks(**{f"s{n % 2}__{n}": [("well", 1.0, 1.4)] for n in range(6)})
    text = lipprep("manifest", "captions", "v", "-o", "m.jsonl", "--speaker-from", "folder").stderr
    assert "drawn by video: to draw them by speaker takes three speakers" in text and "in more than one split" in text
    assert {c.split for c in made().values()} == {"train", "val", "test"}
    found = listed(lipprep, "--speaker-from", "folder")
    assert found["split_by"] == "video" and found["speakers_in_several_splits"]


timings = st.builds(
    lambda word, start, length, rough, sure: Timing(word, start, start + length, rough, sure),
    st.sampled_from(["so", "SO!", "well", "sil", "нет"]),
    st.integers(0, 400).map(lambda n: n / 40),
    st.integers(0, 60).map(lambda n: n / 40),
    st.booleans(),
    st.none() | st.floats(0, 1),
) | st.just(Timing("so", None, None))


@given(st.lists(timings, max_size=40), st.sampled_from([0.0, 5.0, 9.0, 20.0]), st.booleans(), st.integers(1, 4))
def test_words_are_chosen_or_counted(said, duration, rough, min_clips):
    account = Account()
    choice = Choice(rough=rough, min_confidence=0.3, wanted={"SO", "WELL"}, min_clips=min_clips, max_words=1)
    chosen = choose(said, video="v", file="f", duration=duration, choice=choice, account=account)
    for one, other in itertools.combinations(chosen, 2):
        shared = min(one.end, other.end) - max(one.start, other.start)
        assert shared <= 0.5 * min(one.end - one.start, other.end - other.start) + 1e-5
    assert chosen == sorted(chosen, key=lambda o: o.start) and all(o.end <= (duration or 99) + 0.11 for o in chosen)
    kept = choose_words(chosen, choice, account)
    assert (len({o.word for o in kept}) <= 1 and len(kept) >= min_clips) or not kept
    assert account.words == len(said) == len(kept) + account.dropped.total() and set(account.dropped) <= set(DROPPED)


def test_a_crowd_of_words_is_no_transcript():
    account = Account()
    crowd = [Timing(f"w{n}", 1.0, 2.0) for n in range(3000)]
    assert not choose(crowd, video="v", file="f", duration=9.0, choice=Choice(), account=account)
    assert account.dropped.total() == 3000 and "at 1 s" in account.notes[0][1]


def test_files_are_matched_by_path_then_by_name():
    found = match(
        ["a/x.mp4", "b/x.mkv", "b/y.v2.mp4", "b/x.info.json", "z.mp4"],
        ["a/x.en.vtt", "deep/y.v2.TextGrid", "x.srt", "b/x.info.json", "b/x.vtt", "notes.txt", "b/x.json"],
    )
    assert found.timings == {
        "a/x.mp4": ["a/x.en.vtt"], "b/x.mkv": ["b/x.json", "b/x.vtt"], "b/y.v2.mp4": ["deep/y.v2.TextGrid"]
    }  # fmt: skip
    assert (found.untimed, found.orphans, found.others) == (["z.mp4"], ["x.srt"], [])


def test_links_that_lead_back_are_walked_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/v.mp4").touch()
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    assert files_below(tmp_path / "a") == ["b/v.mp4"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("(", "no regular expression"),
        ("name", "no group"),
        ("absent.csv", "there is no table of speakers"),
        ("bad.csv", "needs the columns"),
        ("two.csv", "line 3: './a.mp4' has two speakers"),
    ],
)
def test_sources_of_speakers_that_are_none(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("a,b\n")
    Path("two.csv").write_text("video,speaker\na.mp4,ann\n./a.mp4,bob\n")
    with pytest.raises(ValueError, match=message):
        speakers_of(["a.mp4"], source)


def test_faces_are_counted_during_each_word(make_video, portrait, tmp_path):
    small = np.full((256, 512, 3), 120, np.uint8)
    one, two, none = small.copy(), small.copy(), small
    one[:, :256] = two[:, :256] = portrait
    two[:, 256:] = portrait
    make_video(tmp_path / "v.mp4", [one] * 8 + [two] * 8 + [none] * 8)
    words = ((0, 6), (9, 14), (18, 23))
    seen = look(tmp_path, Span("v.mp4", 0, 24, words))
    assert [s.faces for s in seen] == [1, 2, 0] and 55 < seen[0].size < 80 and seen[0].share == 1
    spoken = [Spoken("v.mp4", str(n), begin / 25, end / 25) for n, (begin, end) in enumerate(words)]
    for one_face, min_face, kept in ((True, 0.0, "0"), (False, 0.0, "01"), (False, 100.0, "")):
        account = Account()
        pairs = list(zip(spoken, seen, strict=True))
        chosen = choose_faces(pairs, one_face=one_face, min_face=min_face, account=account)
        assert "".join(o.word for o in chosen) == kept and len(chosen) + account.dropped.total() == 3
    with pytest.raises(ClipFailure):
        look(tmp_path, msgspec.structs.replace(Span("v.mp4", 0, 24, words), video="absent.mp4"))


@pytest.mark.cluster
def test_from_a_long_video_with_subtitles_to_shards(lipprep, make_video, tmp_path, monkeypatch):
    """Sample clips one after another are a video of a few words, whose faces are looked at, once."""
    from lipprep.pipeline import pool
    from lipprep.pipeline.sample import WORDS, write_clip
    from lipprep.stages.video import read_frames

    for n in range(4):
        frames, cues = [], "WEBVTT\n"
        for word in list(WORDS)[2 * n : 2 * n + 2]:
            write_clip(tmp_path, 0, word, "train", n)
            clip = tmp_path / word / "train" / f"{word}_{n:05d}.mp4"
            start = len(frames) / 25
            frames += read_frames(clip, color=True)
            half = float(clip.with_suffix(".txt").read_text().split("Duration: ")[1].split()[0]) / 2
            begin, end = (f"00:{start + 0.58 + side * half:06.3f}" for side in (-1, 1))
            # A word by itself in a file with times inside is as exact as those are.
            cues += f"\n{begin} --> {end}\n{word.lower()}<{end}>\n"
        make_video(tmp_path / f"talks/t{n}.mp4", frames)
        Path(f"talks/t{n}.en.vtt").write_text(cues)
    flags = ("talks", "-o", "manifests/m.jsonl", "--one-face", "--min-face", 30, "-j", 2, "--json")
    figures = json.loads(lipprep("manifest", "captions", *flags).stdout)
    assert figures["clips"] == figures["words"] == 8 and figures["splits"] == {"train": 4, "val": 2, "test": 2}
    clips = made("manifests/m.jsonl")
    kept = Path("manifests/.m.faces")
    kept.write_bytes(kept.read_bytes()[:-20])  # as a kill leaves it
    looked = []
    run_all = pool.run_all

    def counted(executor, function, tasks, **how):
        looked.extend(tasks := list(tasks))
        return run_all(executor, function, tasks, **how)

    monkeypatch.setattr(pool, "run_all", counted)
    lipprep("manifest", "captions", *flags)
    assert made("manifests/m.jsonl") == clips and len(looked) == 1
    # The clips of the sample again, frame by frame: their words lie in their middle.
    assert {(c.start, c.num_frames) for c in clips.values()} == {(0, 29), (29, 29)}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    lipprep("landmarks", "-j", 2)
    report = json.loads(lipprep("shards", "-j", 2, "--json").stdout.splitlines()[-1])
    assert report["ok"] == 8
