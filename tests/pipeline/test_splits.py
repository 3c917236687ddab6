"""Splits that are drawn or given: speakers stay in one, or it is told that they do not."""

import csv
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipprep.pipeline.manifest import load_manifest
from lipprep.pipeline.sources import Row, make_manifest
from lipprep.pipeline.splits import draw_splits

WORDS = ("no", "yes")
SPLITS = {"train", "val", "test"}


def made(path: str = "m.jsonl"):
    return load_manifest(Path(path)).clips


def splits_of(speaker: str | None) -> set[str]:
    return {clip.split for clip in made() if clip.speaker == speaker}


def write(rows: list[dict], path: str = "t.csv") -> None:
    with Path(path).open("w", newline="") as file:
        table = csv.DictWriter(file, ["video", "word", "speaker", "split", "start", "num_frames"])
        table.writeheader()
        table.writerows(rows)


def clips(*speakers: str, each: int = 10, **fields: object) -> list[dict]:
    """`each` videos of every speaker, of two words by turns."""
    return [
        {"video": f"{speaker or 'x'}-{n}.mp4", "word": WORDS[n % 2], "speaker": speaker, **fields}
        for speaker in speakers
        for n in range(each)
    ]


@pytest.fixture
def listed(lipprep):
    """List rows as a table; give what is said on stderr."""

    def run(rows: list[dict], *arguments: object) -> str:
        write(rows)
        return lipprep("manifest", "csv", "t.csv", "-o", "m.jsonl", *arguments).stderr

    return run


def test_a_table_without_splits_is_drawn_by_speaker(listed):
    speakers = [f"s{n}" for n in range(20)]
    text = listed(clips(*speakers))
    assert "warning" not in text
    assert all(len(splits_of(speaker)) == 1 for speaker in speakers)
    assert Counter(clip.split for clip in made()) == {"train": 160, "val": 20, "test": 20}
    drawn = made()
    rows = clips(*speakers)
    random.Random(1).shuffle(rows)
    listed(rows, "--split-by", "speaker")
    assert made() == drawn
    listed(rows, "--seed", 1)
    assert {c.speaker for c in made() if c.split == "test"} != {c.speaker for c in drawn if c.split == "test"}
    text = listed(rows, "--split-by", "video")
    assert "warning" not in text and any(len(splits_of(speaker)) == 3 for speaker in speakers)


def test_three_speakers_fill_three_splits(listed):
    listed([*clips("ann", each=30), *clips("ben"), *clips("cem", each=5)])
    assert [splits_of(speaker) for speaker in ("ann", "ben", "cem")] == [{"train"}, {"val"}, {"test"}]


def test_two_speakers_are_drawn_by_video_with_a_warning(listed):
    for option in ((), ("--split-by", "speaker")):
        text = listed(clips("ann", "ben"), *option)
        assert "warning: splits are drawn by video: to draw them by speaker takes three speakers" in text
        assert "2 speakers are in more than one split (e.g. ann in test and train and val)" in text
        assert splits_of("ann") == {clip.split for clip in made()} == SPLITS
    assert "warning" not in listed(clips("ann", "ben"), "--split-by", "video")
    assert "--split-by speaker does nothing" in listed(clips(""), "--split-by", "speaker")
    assert "warning" not in listed(clips(""))


def test_speakers_who_share_a_video_stay_together(listed):
    duet = [
        {"video": "duet.mp4", "word": "no", "speaker": speaker, "start": 40 * n, "num_frames": 29}
        for n, speaker in enumerate(("s0", "s1", ""))
    ]
    for seed in range(8):
        assert "have no speaker" not in listed([*duet, *clips(*(f"s{n}" for n in range(5)))], "--seed", seed)
        assert splits_of("s0") == splits_of("s1") == splits_of(None) and len(splits_of("s0")) == 1
        assert all(len(splits_of(f"s{n}")) == 1 for n in range(5)) and {c.split for c in made()} == SPLITS
    text = listed([*duet, *clips("s0", "s1", "s2")])
    assert "takes three speakers who share no video" in text and {c.split for c in made()} == SPLITS


def test_a_video_without_a_speaker_counts_as_one_of_its_own(listed):
    text = listed([*clips("ann", "ben"), *clips("", each=20)])
    assert "warning: 20 videos have no speaker, and each counts as one of its own: x-0.mp4, x-1.mp4" in text
    assert len(splits_of("ann")) == len(splits_of("ben")) == 1 and {clip.split for clip in made()} == SPLITS


def test_words_that_a_split_lacks_are_counted(listed):
    rows = [{"video": f"s{n}.mp4", "word": f"w{n}", "speaker": f"s{n}"} for n in range(10)]
    text = listed([*rows, *clips(*(f"s{n}" for n in range(10)))])
    assert "warning: 2 of 12 words have no clip in train (" in text
    assert "warning: 9 of 12 words have no clip in val (" in text and " and 1 more)" in text


def test_given_splits_that_share_speakers_are_told_and_kept(listed, lipprep, tmp_path):
    rows = [*clips("ann", "ben", "cem"), *clips("dan", split="train")]
    for n, row in enumerate(rows[:25]):
        row["split"] = ("train", "test")[n % 2]
    rows[25:30] = []
    text = listed(rows)
    assert "warning: 3 speakers are in more than one split (e.g. ann in test and train): a network is" in text
    assert "Give each speaker one split, or none" in text
    assert {clip.video: clip.split for clip in made()} == {row["video"]: row["split"] for row in rows}
    text = listed(rows, "--split-by", "speaker")
    assert "--split-by does nothing: every clip has a split already" in text
    for word in WORDS:
        for n, split in enumerate(("train", "val", "test", "train")):
            path = tmp_path / "f" / word / split / f"p{n % 3}_{word}_{n}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    text = lipprep("manifest", "folders", "f", "-o", "m.jsonl", "--speaker-from", r"/(p\d)_").stderr
    assert "warning" not in text.replace("no word duration", "")
    (tmp_path / "f/no/test/p0_no_9.mp4").touch()
    text = lipprep("manifest", "folders", "f", "-o", "m.jsonl", "--speaker-from", r"/(p\d)_").stderr
    assert "1 speaker is in more than one split (e.g. p0 in test and train)" in text


def test_clips_without_a_split_follow_their_speaker(listed):
    given_ones = [*clips("ann", split="train", each=3), *clips("ben", split="unseen", each=3)]
    free = [*clips("ann", "ben", each=9)[3:], *clips("cem", "dan", "eve")]
    free = [row for row in free if row["video"] not in {given["video"] for given in given_ones}]
    assert "in more than one split" not in listed([*given_ones, *free])
    assert splits_of("ann") == {"train"} and splits_of("ben") == {"unseen"}
    assert splits_of("cem") | splits_of("dan") | splits_of("eve") == SPLITS
    # Windows of one video, too.
    window = {"video": "a.mp4", "word": "no", "num_frames": 29}
    for seed in range(5):
        listed([{**window, "start": 0, "split": "test"}, {**window, "start": 40}, *clips("", each=9)], "--seed", seed)
        assert {clip.split for clip in made() if clip.video == "a.mp4"} == {"test"}


def test_folders_are_drawn_by_the_speakers_in_names(lipprep, tmp_path):
    for n in range(40):
        path = tmp_path / "f" / WORDS[n % 2] / f"s{n // 5}_{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = ("manifest", "folders", "f", "-o", "m.jsonl")
    lipprep(*command, "--speaker-from", r"/(s\d)_")
    assert all(len(splits_of(f"s{n}")) == 1 for n in range(8)) and {clip.split for clip in made()} == SPLITS
    Path("who.csv").write_text("video,speaker\nno/s0_0.mp4,ann\nyes/s0_1.mp4,ann\n")
    text = lipprep(*command, "--speaker-from", "who.csv").stderr
    assert "38 videos have no speaker after --speaker-from" in text and len(splits_of("ann")) == 1
    lipprep(*command, "--speaker-from", r"/(s\d)_", "--split-by", "video")
    assert any(len(splits_of(f"s{n}")) > 1 for n in range(8))
    text = lipprep(*command, "--speaker-from", "folder", code=1).stderr
    assert "the first folder below ROOT, which is the word here" in text


def test_a_grid_is_drawn_by_sentence(lipprep, tmp_path):
    for n in range(40):
        video, align = (
            tmp_path / f"g/{kind}/s{n % 4}/c{n}.{end}" for kind, end in (("video", "mpg"), ("align", "align"))
        )
        for path in (video, align):
            path.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
        align.write_text("0 6000 sil\n6000 12000 bin\n13000 20000 red\n")
    text = lipprep("manifest", "grid", "g", "-o", "m.jsonl").stderr
    assert "warning" not in text and all(splits_of(f"s{n}") == SPLITS for n in range(4))


ROWS = st.lists(
    st.builds(
        lambda n, speaker, start: Row(f"{n}.mp4", "no", start=start * 40, num_frames=29, speaker=speaker or None),
        st.integers(0, 30),
        st.sampled_from(["", *"abcdefg"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=60,
    unique_by=lambda row: (row.video, row.start),
)


@given(ROWS, st.lists(st.lists(st.integers(0, 30).map("{}.mp4".format), min_size=2, max_size=3), max_size=3))
def test_no_speaker_and_no_copy_is_in_two_splits(rows, same):
    drawn = draw_splits(rows, seed=3, same=same)
    split = {row.video: row.split for row in drawn.rows}
    assert {(row.video, row.split) for row in draw_splits(rows[::-1], seed=3, same=same).rows} == set(split.items())
    assert all(len({split[video] for video in named if video in split}) < 2 for named in same)
    if drawn.by == "speaker":
        assert len({(row.speaker, row.split) for row in drawn.rows if row.speaker}) == len(
            {row.speaker for row in rows} - {None}
        )
    assert set(split.values()) == (SPLITS if drawn.groups >= 3 else {"train"})
    plain = make_manifest(Path("m.jsonl"), rows, root=Path()).clips
    assert {clip.key for clip in plain} and len({(c.video, c.split) for c in plain}) == len({c.video for c in plain})
