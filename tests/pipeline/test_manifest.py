import dataclasses
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lipprep.pipeline.deal import deal
from lipprep.pipeline.manifest import clip_key, find_manifest, groups, load_manifest, save_manifest
from lipprep.pipeline.sources import Row, make_manifest


def rows(videos: int, windows: int = 1) -> list[Row]:
    """`windows` clips of each of `videos` videos, one split each."""
    return [
        Row(f"{v}.mp4", f"w{(v + n) % 3}", ("train", "val", "test")[v % 3], start=9 * n, num_frames=29)
        for v in range(videos)
        for n in range(windows)
    ]


@given(videos=st.integers(1, 120), windows=st.integers(1, 6), size=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_dealing_keeps_videos_together_and_loses_nothing(videos, windows, size, seed):
    made = make_manifest(Path("m.jsonl"), rows(videos, windows), root=Path(), seed=seed, chunk_size=size)
    assert len(made.clips) == len({c.key for c in made.clips}) == videos * windows
    places: dict[str, set] = {}
    for clip in made.clips:
        places.setdefault(clip.video, set()).add((clip.split, clip.chunk))
    assert all(len(p) == 1 for p in places.values())
    for split in ("train", "val", "test"):
        sizes = Counter(c.chunk for c in made.clips if c.split == split)
        assert sorted(sizes) == list(range(len(sizes)))  # numbered without gaps
        assert all(n <= size + windows for n in sizes.values())  # a video is never cut
        if sum(sizes.values()) >= 8 * windows and windows == 1:
            assert len(sizes) >= 8
    assert [c for chunk in made.chunks().values() for c in chunk] == list(made.clips)


def test_the_order_is_seeded_and_shuffled():
    one, same, other = (
        [c.key for c in make_manifest(Path("m"), rows(60), root=Path(), seed=s).clips] for s in (1, 1, 2)
    )
    assert one == same != other
    assert sorted(one) == sorted(other) and one != sorted(one)


def test_a_long_video_is_cut_into_stretches():
    clips = make_manifest(
        Path("m"), [Row("long.mp4", "w", "train", start=n * 25, num_frames=29) for n in range(100)], root=Path()
    ).clips
    chunks: dict[int, set] = {}
    for clip in clips:
        chunks.setdefault(clip.start // 750, set()).add(clip.chunk)
    assert all(len(c) == 1 for c in chunks.values()) and len({*map(min, chunks.values())}) > 1


@pytest.mark.parametrize(
    ("video", "start", "key"),
    [
        ("ABOUT/test/ABOUT_00001.mp4", None, "ABOUT/test/ABOUT_00001"),
        ("video/s1/bbaf2n.mpg", -4, "video/s1/bbaf2n@-4"),
        ("a.b/c d.mp4", None, "a%2Eb/c%20d"),
        ("é.mp4", None, "%C3%A9"),
        ("__x/__y.mp4", None, "%5F_x/%5F_y"),
    ],
)
def test_keys(video, start, key):
    assert clip_key(video, start) == key


def test_a_manifest_comes_back(tmp_path):
    (tmp_path / "videos").mkdir()
    made = make_manifest(tmp_path / "m/a.jsonl", rows(20, 2), root=tmp_path / "videos", seed=3, chunk_size=7)
    save_manifest(made)
    assert json.loads((tmp_path / "m/a.jsonl").read_text().splitlines()[0])["root"] == "../videos"
    assert load_manifest(tmp_path / "m/a.jsonl") == made
    assert load_manifest(tmp_path / "m/a.jsonl", root=tmp_path).root == tmp_path.resolve()


HEADER = {"lipprep_manifest": 1, "root": ".", "fps": 25, "seed": 0, "chunk_size": 2, "labels": ["A", "B"]}
CLIP = {"key": "a", "video": "a.mp4", "split": "train", "word": "A", "label": 0, "chunk": 0}


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ({}, [CLIP, {**CLIP, "video": "b.mp4"}], "line 3: key 'a' stands already in line 2"),
        ({}, [{**CLIP, "split": "dev"}], "line 2: unknown split 'dev'"),
        ({}, [{**CLIP, "video": "../a.mp4"}], "no path below the root"),
        ({}, [{**CLIP, "video": "/etc/passwd"}], "no path below the root"),
        ({}, [{**CLIP, "video": "C:/a.mp4"}], "no path below the root"),
        ({}, [{**CLIP, "video": "a\\..\\..\\b.mp4"}], "no path below the root"),
        ({}, [{**CLIP, "label": 2}], "do not agree"),
        ({}, [{**CLIP, "label": 1}], "do not agree"),
        ({}, [{**CLIP, "label": "0"}], "expected a number"),
        ({}, [{**CLIP, "extra": 1}], "unknown field 'extra'"),
        ({}, [{k: v for k, v in CLIP.items() if k != "word"}], "word"),
        ({}, [{**CLIP, "start": 3}], "both start and num_frames"),
        ({}, [{**CLIP, "key": "a.b"}], "not of the form"),
        ({}, [{**CLIP, "key": "/a"}], "not of the form"),
        ({}, [{**CLIP, "chunk": -1}], "not of the form"),
        ({}, [CLIP, {**CLIP, "key": "b", "split": "test"}], "splits share no video"),
        ({}, [[1]], "not a JSON object"),
        ({}, [{**CLIP, "video": "."}], "no path below the root"),
        ({}, [{**CLIP, "start": 0, "num_frames": 10**9}], "longer than"),
        ({}, [{**CLIP, "duration": -1.0}], "expected seconds"),
        ({}, [{**CLIP, "word_start": float("nan")}], "expected seconds"),
        ({"fps": 0}, [CLIP], "frames a second"),
        ({"fps": float("nan")}, [CLIP], "frames a second"),
        ({"labels": "AB"}, [CLIP], "distinct words"),
        ({"labels": ["A", "A"]}, [CLIP], "distinct words"),
        ({}, [], "lists no clips"),
        ({"lipprep_manifest": 2}, [CLIP], "no manifest of version 1"),
        ({"labels": None}, [CLIP], "header"),
    ],
)
def test_a_bad_manifest_is_refused_by_line(tmp_path, header, lines, message):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({**HEADER, **header}, *lines)))
    with pytest.raises(ValueError, match=message):
        load_manifest(path)


def test_files_that_are_no_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    with pytest.raises(ValueError, match="no manifest"):
        load_manifest(path)
    for content in (b"", b"\x00\xff\xfe", b"key,video\n", json.dumps(HEADER).encode() + b"\n{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.jsonl"):
            load_manifest(path)


def test_the_only_manifest_is_found(tmp_path):
    with pytest.raises(ValueError, match="lipprep manifest lrw"):
        find_manifest(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert find_manifest(tmp_path) == tmp_path / "a.jsonl"
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match=r"choose one with -m: .*a\.jsonl, .*b\.jsonl"):
        find_manifest(tmp_path)


def test_stretches_of_one_video_are_worked_on_apart():
    rows = [Row("long.mp4", "w", "train", start=n * 700, num_frames=29) for n in range(40)]
    clips = make_manifest(Path("m"), rows, root=Path(), chunk_size=1000).clips
    for chunk in {c.chunk for c in clips}:
        for _, members in groups([c for c in clips if c.chunk == chunk], 25.0):
            assert max(c.start for c in members) - min(c.start for c in members) < 750


def test_file_names_that_are_no_utf8(tmp_path):
    import os

    name = os.fsdecode(b"caf\xe9.mp4")
    made = make_manifest(tmp_path / "m.jsonl", [Row(name, "w", "train")], root=tmp_path)
    save_manifest(made)
    assert load_manifest(tmp_path / "m.jsonl").clips == made.clips and made.clips[0].key == "caf%E9"


def test_dealing_again_changes_nothing():
    clips = make_manifest(Path("m"), rows(50, 3), root=Path(), chunk_size=10).clips
    again = deal([msgspec.structs.replace(c, chunk=0) for c in reversed(clips)], seed=0, chunk_size=10, fps=25.0)
    assert again == list(clips)


# Any name that a file system allows, but for those that a manifest refuses: whole parts of dots, and what would be a
# drive or a folder elsewhere.
PARTS = st.binary(min_size=1, max_size=40).filter(
    lambda part: not set(part) & set(b"\0/\\:") and part not in (b".", b"..") and part.strip(b".")
)


WORD = st.text(min_size=1).filter(str.isprintable)


@given(names=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=6), word=WORD)
@settings(max_examples=80, deadline=None)
def test_any_file_name_survives(names, word, tmp_path_factory):
    import os

    folder = tmp_path_factory.getbasetemp()
    videos = sorted({os.fsdecode(b"/".join(parts) + b".mp4") for parts in names})
    assume(len({clip_key(v) for v in videos}) == len(videos))
    made = make_manifest(folder / "names.jsonl", [Row(v, word, "train") for v in videos], root=folder)
    save_manifest(made)
    again = load_manifest(folder / "names.jsonl")
    assert again == made
    assert {c.video for c in again.clips} == set(videos)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 0, 1, 25])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["train", "../x", "/x", "a\0", "\ud800", "a//b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_manifest_loads_or_says_why_not(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [dict(HEADER), dict(CLIP), {**CLIP, "key": "b", "video": "b.mp4", "start": -2, "num_frames": 29}]
    for _ in range(data.draw(st.integers(1, 3))):
        line = data.draw(st.sampled_from(lines))
        name = data.draw(st.sampled_from([*HEADER, *CLIP, "start", "num_frames", "word_start", "duration", "colour"]))
        if data.draw(st.booleans()):
            line[name] = data.draw(JSON)
        else:
            line.pop(name, None)
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + data.draw(st.integers(0, 9)) :]
    path.write_bytes(content)
    try:
        loaded = load_manifest(path)
    except ValueError as error:
        assert "any.jsonl" in str(error) and str(error).isprintable()
    else:
        save_manifest(dataclasses.replace(loaded, path=path.with_name("again.jsonl")))
        assert load_manifest(path.with_name("again.jsonl")).clips == loaded.clips
