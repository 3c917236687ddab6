import numpy as np
import pytest

from lipprep.pipeline.likeness import copies, groups_of, off_centre, strangeness
from lipprep.pipeline.manifest import Clip
from lipprep.stages.quality import look_vector, mouth_quality


def mouths(count: int, shifts: dict[int, tuple[int, int]]) -> np.ndarray:
    """The looks (count, 64) of still mouths, some of them moved by (x, y) of 96 pixels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:192, :192] / 96 - 1
    mouth, nose = ((x / 0.3) ** 4) + (y / 0.12) ** 2, ((x / 0.2) ** 2) + ((y + 0.5) / 0.2) ** 2
    face = 150 - 80 * np.exp(-mouth) + 40 * np.exp(-nose)
    looks = []
    for n in range(count):
        dx, dy = shifts.get(n, (0, 0))
        crop = face[48 - dy : 144 - dy, 48 - dx : 144 - dx] + rng.normal(0, 4, (3, 96, 96))
        looks.append(look_vector(mouth_quality(np.clip(crop, 0, 255).astype(np.uint8))["look"]))
    return np.stack(looks)


def clips(speakers: list[str | None]) -> list[Clip]:
    return [
        Clip(key=str(n), video=f"{n}.mp4", split="train", word="W", label=0, chunk=0, speaker=speaker)
        for n, speaker in enumerate(speakers)
    ]


def test_clips_are_compared_with_those_of_their_speaker_where_there_are_enough():
    groups = groups_of(clips(["a"] * 12 + ["b"] * 3 + [None] * 4 + ["c"] * 10))
    assert [rows.tolist() for rows in groups] == [[*range(12)], [*range(19, 29)], [*range(12, 19)]]


def test_a_mouth_off_the_middle_is_told_in_parts_of_the_crop():
    shifts = {3: (20, 0), 5: (0, -20), 7: (15, 15)}
    off = off_centre(mouths(30, shifts), [np.arange(30)])
    for row, (dx, dy) in shifts.items():
        assert off[row] == pytest.approx(np.hypot(dx, dy) / 96, abs=0.04)
    assert np.delete(off, list(shifts)).max() < 0.04


def test_too_few_are_not_compared():
    looks = mouths(5, {})
    assert np.isnan(off_centre(looks, [np.arange(5)])).all()
    assert np.isnan(strangeness(looks, [np.arange(5)])).all()
    looks[0] = np.nan
    assert np.isnan(strangeness(np.tile(looks, (4, 1)), [np.arange(20)])[0])


def test_strange_is_what_lies_far_off_in_its_own_group():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (2, 66))
    vectors = np.repeat(centres, 40, axis=0) + rng.normal(0, 0.5, (80, 66))
    vectors[7] = vectors[60]
    far = strangeness(vectors, [np.arange(40), np.arange(40, 80)])
    assert far.argmax() == 7 and far[7] > 3 * np.delete(far, 7).max()
    assert strangeness(vectors, [np.arange(80)])[7] < 3 * np.median(far)


def test_what_differs_from_many_that_are_the_same_is_strange():
    vectors = np.zeros((20, 66), np.float32)
    assert (strangeness(vectors, [np.arange(20)]) == 0).all()
    vectors[7] = 1
    far = strangeness(vectors, [np.arange(20)])
    assert far[7] > 3 and (np.delete(far, 7) == 0).all()


@pytest.mark.parametrize("all_pairs", [10**6, 10])
def test_copies_are_all_found_and_no_others(monkeypatch, all_pairs):
    monkeypatch.setattr("lipprep.pipeline.likeness._ALL_PAIRS", all_pairs)
    rng = np.random.default_rng(0)
    N = 1000
    motion = rng.integers(0, 2**64, (N, 2), dtype=np.uint64)
    places = rng.uniform(0, 60, (N, 3))
    face, look = rng.normal(0, 3, (N, 66)), rng.normal(0, 1, (N, 64))
    motion[1], look[1] = motion[0] ^ np.uint64(0b111), look[0]  # few bits differ: a copy, wherever the face is
    motion[3] = motion[2] ^ np.uint64(0xFFF)  # 24 bits differ, and all else is the same: another encoding
    places[3], face[3], look[3] = places[2] + 0.4, face[2] + 0.1, look[2]
    motion[5] = motion[4] ^ np.uint64(0xFFF)  # 24 bits differ, and it is another face
    places[5] = places[4]
    motion[9] = motion[8] ^ np.uint64(0b111)  # one word said alike by two people
    places[7], face[7], look[7] = places[6], face[6], look[6]  # one face, which moves in another way
    found = {(a, b) for a, b, _ in copies(motion, places, face, look).tolist()}
    assert found == {(0, 1), (2, 3)}
    places[:] = np.nan
    assert copies(motion, places, face, look)[:, :2].tolist() == [[0, 1]]


def test_very_many_clips_alike_take_no_time_without_end(monkeypatch):
    monkeypatch.setattr("lipprep.pipeline.likeness._ALL_PAIRS", 10)
    N = 2000
    pairs = copies(np.zeros((N, 2), np.uint64), np.zeros((N, 3)), np.zeros((N, 66)), np.zeros((N, 64)))
    assert len(pairs) <= 8 * N and set(pairs[:, :2].ravel()) == set(range(N))
