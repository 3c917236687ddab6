import numpy as np
import pytest

from lipprep.stages.align import PROFILES
from lipprep.stages.crop import Crop, CropParameters, Window, crop_clips, crop_stretches
from lipprep.stages.failures import ClipFailure
from lipprep.stages.video import read_frames

CLIPS = ["ABOUT/test/ABOUT_00001", "ABOUT/test/ABOUT_00002"] + [f"ABSOLUTELY/test/ABSOLUTELY_0000{n}" for n in (1, 2)]


@pytest.mark.parametrize(
    ("profile", "archive", "reference"),
    [("lrw2021", "landmarks_npz", "legacy_gray"), ("lrw2022", "landmarks_pkl", "new_gray")],
)
@pytest.mark.parametrize(("exact", "most"), [(False, 0.7), (True, 0.2)])
@pytest.mark.parametrize("name", CLIPS)
def test_crops_are_those_of_the_reference(golden, profile, archive, reference, exact, most, name):
    folder = golden / "crops"
    from lipprep.stages.landmarks.archive import read_archive, read_persons

    person = read_persons(folder / "detected_face.csv")[name]
    points = read_archive(folder / archive, name, person=person).points
    frames = read_frames(folder / "videos" / f"{name}.mp4", color=exact)
    (crop,) = crop_clips(frames, [Window(None, None, points)], CropParameters(profile=profile, exact=exact))
    with np.load(folder / reference / f"{name}.npz") as arrays:
        difference = np.abs(crop.mouth.astype(int) - arrays["data"])
    assert difference.mean() <= most
    assert (difference > 4).mean() <= 0.001


def moving_points(T: int) -> np.ndarray:
    from lipprep.stages.align import mean_face

    return (mean_face()[None] + np.arange(T)[:, None, None] * [0.4, 0.2]).astype(np.float32)


@pytest.fixture(scope="module")
def frames(portrait):
    import cv2

    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    return [np.roll(gray, t, axis=1) for t in range(40)]


@pytest.mark.parametrize("profile", [n for n, p in PROFILES.items() if p.align])
def test_windows_cut_together_equal_windows_cut_alone(frames, profile):
    points = moving_points(40)
    windows = [Window(s, 20, points[np.clip(np.arange(s, s + 20), 0, 39)]) for s in (-5, 0, 7, 30)]
    parameters = CropParameters(profile=profile, crop_size=64)
    together = crop_clips(frames, windows, parameters)
    for window, crop in zip(windows, together, strict=True):
        chosen = [frames[i] for i in np.clip(np.arange(window.start, window.start + 20), 0, 39)]
        (alone,) = crop_clips(chosen, [Window(None, None, window.points)], parameters)
        assert crop.mouth.shape == (20, 64, 64)
        assert np.array_equal(crop.mouth, alone.mouth)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("length", [1, 12, 40, 99])
def test_stretches_one_after_another_are_the_whole_clip(frames, profile, length):
    points = moving_points(40)
    points[17:20] = np.nan
    window = Window(None, 40, None if profile == "fixed" else points)
    parameters = CropParameters(profile=profile, crop_size=64, box=(30, 40, 64, 64))
    (whole,) = crop_clips(frames, [window], parameters)
    stretches = list(crop_stretches(frames, window, parameters, length=length))
    assert [len(mouth) for mouth in stretches[:-1]] == [length] * (len(stretches) - 1)
    assert np.array_equal(np.concatenate(stretches), whole.mouth)
    for other in (frames[:-1], [*frames, frames[0]]):
        with pytest.raises(ClipFailure, match="landmarks for 40 frames"):
            list(crop_stretches(other, window, parameters, length=length))


def test_a_smaller_crop_is_the_middle_of_a_larger_one(frames):
    window = [Window(None, None, moving_points(40))]
    (large,) = crop_clips(frames, window, CropParameters(crop_size=128))
    (small,) = crop_clips(frames, window, CropParameters(crop_size=88))
    assert np.abs(large.mouth[:, 20:108, 20:108].astype(int) - small.mouth).max() <= 1


def test_the_fixed_box_is_a_slice_of_the_frame(frames):
    parameters = CropParameters(profile="fixed", box=(80, 116, 96, 96))
    (crop,) = crop_clips(frames, [Window(None, 40)], parameters)
    assert np.array_equal(crop.mouth, np.stack(frames)[:, 116:212, 80:176])


def test_unaligned_is_a_slice_round_the_mouth(frames):
    points = moving_points(40)
    (crop,) = crop_clips(frames, [Window(None, None, points)], CropParameters(profile="unaligned"))
    x, y = np.rint(points[3, 48:68].mean(0)).astype(int) - 48
    assert np.array_equal(crop.mouth[3], frames[3][y : y + 96, x : x + 96])


def test_a_face_at_the_border_is_black_beyond_it(frames):
    (crop,) = crop_clips(frames, [Window(None, None, moving_points(40) - [110, 0])], CropParameters())
    assert crop.outside == 1.0
    assert (crop.mouth[:, :, 0] == 0).all() and crop.mouth[:, 40, -1].min() > 0


def kind(outcome: Crop | ClipFailure) -> str:
    assert isinstance(outcome, ClipFailure)
    return outcome.kind


def test_what_cannot_be_cut_is_said_and_harms_no_neighbour(frames):
    points = moving_points(40)
    nowhere = np.full((40, 68, 2), np.nan)
    outcomes = crop_clips(
        frames,
        [
            Window(None, None, points),
            Window(None, None, points[:30]),
            Window(None, None, nowhere),
            Window(40, 5, points[:5]),
        ],
        CropParameters(),
    )
    assert isinstance(outcomes[0], Crop)
    assert [kind(o) for o in outcomes[1:]] == ["landmarks_mismatch", "no_face", "too_short"]
    assert "30" in str(outcomes[1]) and "40" in str(outcomes[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": 300}, "crop size 300"),
        ({"profile": "fixed", "box": (0, 0, 96, 90)}, "square"),
        ({"profile": "fixed", "box": (0, 0, 112, 112)}, "must equal"),
        ({"profile": "lrw"}, "unknown profile"),
    ],
)
def test_parameters_that_cut_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CropParameters(**fields)
