import cv2
import numpy as np
import pytest

from lipprep.stages.failures import ClipFailure
from lipprep.stages.video import probe, read_frames


def numbered(count: int, size: int = 64) -> list[np.ndarray]:
    """Frames that tell their number by their brightness."""
    return [np.full((size, size), 20 + 5 * n, np.uint8) for n in range(count)]


def numbers(frames) -> list[int]:
    return [round((float(np.asarray(f).mean()) - 20) / 5) for f in frames]


def test_color_frames_are_those_of_opencv(golden):
    path = next((golden / "crops/videos").rglob("*.mp4"))
    capture, expected = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        expected.append(read[1])
    assert np.array_equal(list(read_frames(path, color=True)), expected)


def test_luma_is_close_to_opencvs_gray(golden):
    for path in (golden / "crops/videos").rglob("*.mp4"):
        exact = np.stack([cv2.cvtColor(f, cv2.COLOR_BGR2GRAY) for f in read_frames(path, color=True)])
        luma = np.stack(list(read_frames(path)))
        assert luma.shape == exact.shape == (29, 256, 256)
        assert np.abs(luma.astype(int) - exact)[:, 60:200, 60:200].mean() < 0.7


def test_a_window_is_a_part_of_the_whole(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", numbered(30))
    assert numbers(read_frames(path)) == list(range(30))
    assert numbers(read_frames(path, first=7, last=12)) == [7, 8, 9, 10, 11]
    assert numbers(read_frames(path, first=25, last=99)) == [25, 26, 27, 28, 29]
    assert numbers(read_frames(path, first=40, last=50)) == []


def test_a_window_deep_in_a_long_video_is_sought(make_video, tmp_path):
    frames = [np.full((32, 32), 20 + 10 * (n // 25 % 20), np.uint8) for n in range(20 * 25)]
    path = make_video(tmp_path / "long.mp4", frames)
    whole = list(read_frames(path))
    part = list(read_frames(path, first=370, last=405))
    assert len(part) == 35
    assert np.array_equal(np.stack(part), np.stack(whole[370:405]))


@pytest.mark.parametrize("fps", [10, 24, 30, 50, 60])
def test_other_frame_rates_are_resampled_by_time(make_video, tmp_path, fps):
    path = make_video(tmp_path / "v.mp4", numbered(40), fps=fps)
    shown = numbers(read_frames(path, fps=25))
    assert abs(len(shown) - 40 * 25 / fps) <= 1
    # Frame k is the one on screen at k / 25 s, to half a frame of either rate.
    late = [k / 25 - n / fps for k, n in enumerate(shown)]  # seconds since frame n came on screen
    assert min(late) >= -0.5 / 25 - 1e-6 and max(late) <= 1 / fps + 0.5 / 25 + 1e-6


def test_padded_planes_and_odd_sizes(make_video, tmp_path):
    frames = [np.full((50, 70), 90, np.uint8)] * 3
    assert [f.shape for f in read_frames(make_video(tmp_path / "v.mp4", frames))] == [(50, 70)] * 3


def test_a_part_of_a_gray_frame_is_that_part_of_the_whole(golden):
    frame = next(read_frames(next((golden / "crops/videos").rglob("*.mp4"))))
    assert np.array_equal(frame[30:90, 200:], np.asarray(frame)[30:90, 200:])


def test_probe(make_video, tmp_path):
    info = probe(make_video(tmp_path / "v.mp4", numbered(10, 48), fps=30))
    assert (info.width, info.height, info.num_frames, round(info.fps)) == (48, 48, 10, 30)


def failure(path) -> str:
    with pytest.raises(ClipFailure) as error:
        list(read_frames(path))
    assert path.name in str(error.value)
    return error.value.kind


def test_rubbish_is_named(make_video, tmp_path):
    whole = make_video(tmp_path / "whole.mp4", [np.random.default_rng(0).integers(0, 255, (128, 128), np.uint8)] * 25)
    assert failure(tmp_path / "absent.mp4") == "unreadable"
    (tmp_path / "empty.mp4").touch()
    assert failure(tmp_path / "empty.mp4") == "unreadable"
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(20000))
    assert failure(tmp_path / "noise.mp4") == "unreadable"
    (tmp_path / "text.mp4").write_text("no video at all")
    assert failure(tmp_path / "text.mp4") == "unreadable"
    (tmp_path / "headless.mp4").write_bytes(whole.read_bytes()[:2000])
    assert failure(tmp_path / "headless.mp4") == "unreadable"


def test_a_cut_file_whose_header_survived_is_truncated(make_video, tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (128, 128), np.uint8) for _ in range(25)]
    moved = make_video(tmp_path / "faststart.mp4", frames, options={"movflags": "faststart"})
    data = moved.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    assert len(list(read_frames(moved))) == 25
    assert failure(tmp_path / "cut.mp4") == "truncated"


def test_sound_alone_is_no_video(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(32000))
    assert failure(tmp_path / "a.wav") == "no_video"


def test_a_playlist_opens_nothing_else(make_video, tmp_path):
    make_video(tmp_path / "v.mp4", numbered(5))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'v.mp4'}'\n")
    assert failure(tmp_path / "list.mp4") == "unreadable"
