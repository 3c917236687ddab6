import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipprep.stages.align import mean_face
from lipprep.stages.quality import (
    face_build,
    face_quality,
    face_vector,
    look_vector,
    motion_bits,
    mouth_quality,
)
from lipprep.stages.shard.codec import decode_mouth, encode_mouth


def speaking(seed: int, T: int = 29, S: int = 96) -> np.ndarray:
    """Crops of a mouth that opens and closes in a way of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:S, :S] / S - 0.5
    frames = []
    for opening in np.convolve(rng.uniform(0, 1, T + 4), np.ones(5) / 5, "valid"):
        lips = (x / 0.3) ** 2 + (y / (0.05 + 0.3 * opening)) ** 2
        frames.append(150 - 90 * np.exp(-(lips**2)) + 30 * x)
    return np.clip(np.stack(frames) + rng.normal(0, 2, (T, S, S)), 0, 255).astype(np.uint8)


def face(T: int = 10, *, size: float = 0.5, roll: float = 0.0, at: tuple[float, float] = (100, 120)) -> np.ndarray:
    """The mean face, scaled, turned (degrees clockwise) and with its mouth's centre at `at`."""
    points = (mean_face() - mean_face()[48:68].mean(0)) * size
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    return np.tile((points @ np.array([[c, s], [-s, c]]) + at).astype(np.float32), (T, 1, 1))


def differing(a: str, b: str) -> int:
    return int(np.bitwise_count(motion_bits(a) ^ motion_bits(b)).sum())


def test_of_a_face():
    figures = face_quality(face(size=0.5, roll=7, at=(100, 120)))
    eyes = mean_face()[[36, 45]]
    assert figures["face_size"] == pytest.approx(0.5 * np.linalg.norm(eyes[1] - eyes[0]), abs=0.01)
    level = np.degrees(np.arctan2(*(eyes[1] - eyes[0])[::-1]))
    assert figures["rotation"] == pytest.approx(level + 7, abs=0.01)
    assert (figures["centre_x"], figures["centre_y"]) == pytest.approx((100, 120), abs=0.01)
    assert figures["jitter"] == pytest.approx(0, abs=1e-3)
    assert np.abs(face_vector(figures["face"])).max() < 0.2
    assert face_quality(face(T=2))["jitter"] is None


def test_a_head_that_moves_evenly_does_not_jitter_where_its_face_is_lost_for_a_while():
    points = face(T=12) + np.arange(12, dtype=np.float32)[:, None, None] * 3
    points[[3, 7, 8]] = np.nan
    figures = face_quality(points)
    assert figures["jitter"] == pytest.approx(0, abs=1e-3)
    assert figures["centre_x"] == pytest.approx(100 + 3 * np.delete(np.arange(12), [3, 7, 8]).mean(), abs=0.01)
    points[::3] = np.nan
    assert face_quality(points)["jitter"] is None


def test_the_build_of_a_face_is_its_own_wherever_it_is():
    wide = mean_face() * [1.1, 1]
    narrow = mean_face() * [0.9, 1]
    build = {name: face_vector(face_build(p[None])) for name, p in (("wide", wide), ("narrow", narrow))}
    turned = face_vector(face_build((wide @ np.array([[0.3, 0.1], [-0.1, 0.3]]) + 50)[None]))
    assert np.abs(turned - build["wide"]).max() <= 0.25
    assert np.abs(build["narrow"] - build["wide"]).max() > 3
    assert face_build(np.zeros((3, 68, 2))) is None


def test_of_a_mouth():
    mouth = speaking(0)
    figures = mouth_quality(mouth)
    assert figures["brightness"] == pytest.approx(mouth.mean(), abs=0.01)
    assert figures["black"] == figures["frozen"] == 0
    assert figures["movement"] > 0.5 and figures["jump"] < 5 and figures["sharpness"] > 1


def test_frames_that_show_nothing_are_black():
    mouth = speaking(0)
    mouth[:7] = 0
    mouth[7:9] = 128
    figures = mouth_quality(mouth)
    assert figures["black"] == pytest.approx(9 / 29, abs=1e-4)
    assert figures["jump"] > 10
    # What is seen in the others is as it was.
    assert np.abs(look_vector(figures["look"]) - look_vector(mouth_quality(speaking(0))["look"])).max() < 0.5
    black = mouth_quality(np.zeros((5, 96, 96), np.uint8))
    assert (black["black"], black["look"], black["motion"]) == (1, None, None)


def test_frames_that_repeat_the_one_before_are_frozen():
    mouth = speaking(0)
    mouth[10:] = mouth[10]
    assert mouth_quality(mouth)["frozen"] == pytest.approx(18 / 28, abs=1e-4)
    still = mouth_quality(mouth[10:])
    assert still["frozen"] == 1 and still["movement"] == 0 and still["motion"] is None


def test_a_cut_to_another_picture_is_a_jump():
    usual = mouth_quality(speaking(0))["jump"]
    cut = mouth_quality(np.concatenate([speaking(0)[:14], 255 - speaking(1)[14:]]))["jump"]
    assert cut > 5 * usual


def test_one_recording_moves_alike_in_another_encoding_and_no_other_does():
    clips = [mouth_quality(speaking(seed)) for seed in range(6)]
    extension, payload = encode_mouth(speaking(0), codec="jpeg", quality=60)
    again = mouth_quality(decode_mouth(extension, payload))
    assert differing(clips[0]["motion"], again["motion"]) <= 8
    assert np.abs(look_vector(clips[0]["look"]) - look_vector(again["look"])).max() < 0.1
    for a in range(6):
        for b in range(a):
            assert differing(clips[a]["motion"], clips[b]["motion"]) > 16


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(8, 120), st.integers(0, 3))
def test_any_clip_has_figures_that_json_can_hold(T, S, kind):
    rng = np.random.default_rng(T * S + kind)
    mouth = [
        np.zeros((T, S, S)),
        np.full((T, S, S), 255),
        rng.integers(0, 256, (T, S, S)),
        rng.integers(0, 2, (T, S, S)),
    ]
    for name, value in mouth_quality(mouth[kind].astype(np.uint8)).items():
        assert value is None or isinstance(value, str) or np.isfinite(value), name


@pytest.mark.parametrize(
    "read, text", [(face_vector, "AAAA"), (look_vector, "no base64!"), (motion_bits, "00ff"), (motion_bits, "zz")]
)
def test_texts_of_another_form_are_refused(read, text):
    with pytest.raises(ValueError):
        read(text)
