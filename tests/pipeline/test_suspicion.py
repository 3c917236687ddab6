"""The order of suspicion, of tables whose faults are known."""

import base64
from pathlib import Path

import numpy as np
import pytest

from lipprep.pipeline.figures import NUMBERS, TEXTS, ClipTable
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.pipeline.suspicion import FAILED, MOST, rank, scores

USUAL = {
    "num_frames": (29, 0), "face_share": (1, 0), "max_faces": (1, 0), "face_size": (60, 3), "jitter": (0.2, 0.03),
    "rotation": (0, 3), "centre_x": (128, 4), "centre_y": (170, 4), "scale": (1.2, 0.05), "outside": (0, 0),
    "brightness": (120, 8), "black": (0, 0), "frozen": (0, 0), "sharpness": (8, 0.8), "movement": (2, 0.3),
    "jump": (2, 0.3), "off_centre": (0.02, 0.005),
}  # fmt: skip


def described(vector: np.ndarray) -> str:
    return base64.b64encode(np.rint(vector).clip(-127, 127).astype(np.int8).tobytes()).decode()


@pytest.fixture
def table() -> ClipTable:
    """300 good clips of two speakers, who differ in all that a face can differ in."""
    rng = np.random.default_rng(0)
    speakers = ["s1"] * 150 + ["s2"] * 150
    clips = tuple(
        Clip(key=f"c{n}", video=f"c{n}.mp4", split="train", word="W", label=0, chunk=0, speaker=who)
        for n, who in enumerate(speakers)
    )
    manifest = Manifest(Path("m.jsonl"), Path("videos"), 25.0, 0, 512, ("W",), clips)
    own = {who: (rng.normal(0, 12, 66), rng.normal(0, 20, 64)) for who in ("s1", "s2")}
    N = len(clips)
    columns = {name: rng.normal(mean, spread or 1e-9, N) for name, (mean, spread) in USUAL.items()}
    columns["centre_x"][150:] += 60
    texts = {
        "face": [described(own[who][0] + rng.normal(0, 2, 66)) for who in speakers],
        "look": [described(own[who][1] + rng.normal(0, 4, 64)) for who in speakers],
        "motion": [rng.bytes(16).hex() for _ in range(N)],
    }
    assert set(columns) == set(NUMBERS) and set(texts) == set(TEXTS)
    return ClipTable(manifest, ["ok"] * N, [""] * N, [""] * N, columns, texts, [None] * N, [None] * N)


def first(table: ClipTable, count: int) -> dict[int, str]:
    return {suspect.index: " ".join(suspect.reasons) for suspect in rank(table)[:count]}


def test_each_clip_once_and_good_ones_are_hardly_suspicious(table):
    suspects = rank(table)
    assert sorted(s.index for s in suspects) == list(range(300))
    assert [s.score for s in suspects] == sorted((s.score for s in suspects), reverse=True)
    assert suspects[0].score < 9
    assert scores(table)[suspects[0].index] == suspects[0].score
    assert rank(table) == suspects


@pytest.mark.parametrize(
    "figure, value, said",
    [
        ("black", 0.2, "20% of the frames show nothing"),
        ("frozen", 0.6, "60% of the steps"),
        ("face_share", 0.5, "50% of the frames"),
        ("jitter", 2.0, "jitter by 2.00 pixels"),
        ("jump", 30.0, "30 times"),
        ("centre_x", 210.0, "x = 210"),  # within what all clips have, but not within what its speaker has
        ("sharpness", 2.0, "sharpness 2.0"),
        ("outside", 1.0, "leaves the picture"),
    ],
)
def test_a_figure_beyond_those_of_the_clips_speaker_comes_first(table, figure, value, said):
    table.columns[figure][7] = value
    assert said in first(table, 1)[7]


def test_a_face_or_a_mouth_of_somebody_else_comes_first(table):
    table.texts["face"][7] = table.texts["face"][200]
    table.texts["look"][9] = table.texts["look"][201]
    found = first(table, 2)
    assert "another face" in found[7] and "another mouth" in found[9]


def test_both_of_two_copies_come_first_unless_they_are_windows_that_overlap(table):
    bits = int(table.texts["motion"][7], 16) ^ 0b10110  # three bits differ
    table.texts["motion"][280], table.texts["look"][280] = f"{bits:032x}", table.texts["look"][7]
    found = first(table, 2)
    assert set(found) == {7, 280} and "shows what c280 shows (3 of 128" in found[7]
    clips = list(table.clips)
    for starts in ((0, 10), (0, None), (None, 0)):
        for row, start in zip((7, 280), starts, strict=True):
            clips[row] = Clip(key=f"a@{start}", video="a.mp4", split="train", word="W", label=0, chunk=0, start=start,
                              num_frames=None if start is None else 29, speaker="s1")  # fmt: skip
        object.__setattr__(table.manifest, "clips", tuple(clips))
        assert not any("shows what" in reason for suspect in rank(table) for reason in suspect.reasons)


def test_copies_are_found_among_very_many(table, monkeypatch):
    monkeypatch.setattr("lipprep.pipeline.likeness._ALL_PAIRS", 10)
    table.texts["motion"][280] = f"{int(table.texts['motion'][7], 16) ^ 0b10110:032x}"
    table.texts["look"][280] = table.texts["look"][7]
    # More bits differ, but face, mouth and place are the same, as in another encoding.
    table.texts["motion"][99] = f"{int(table.texts['motion'][8], 16) ^ (2**24 - 1) << 40:032x}"
    for texts in (table.texts["face"], table.texts["look"]):
        texts[99] = texts[8]
    for name in ("centre_x", "centre_y", "face_size"):
        table.columns[name][99] = table.columns[name][8] + 0.4
    assert set(first(table, 4)) == {7, 280, 8, 99}


def test_failures_come_before_all_else_and_nothing_is_known_against_what_waits(table):
    table.kinds[5], table.stages[5], table.messages[5] = "no_face", "landmarks", "no face was found"
    table.kinds[6] = "pending"
    table.columns["jitter"][8] = 50
    suspects = rank(table)
    assert (suspects[0].index, suspects[0].score) == (5, FAILED)
    assert suspects[0].reasons == ("no_face in landmarks: no face was found",)
    assert suspects[1].index == 8 and 4 < suspects[1].score <= MOST
    assert scores(table)[6] == 0


def test_tables_that_know_little_are_ranked_too(table):
    N = len(table)
    for column in table.columns.values():
        column[:] = np.nan
    for name in TEXTS:
        table.texts[name][:] = [None] * N
    assert {suspect.score for suspect in rank(table)} == {0}
