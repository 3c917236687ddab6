import dataclasses
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from skimage import data

from lipprep.stages.align import mean_face
from lipprep.stages.crop import CropParameters, Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks import load_detector, track
from lipprep.stages.video import read_frames
from lipprep.train import predict
from lipprep.train.augment import eval_batch
from lipprep.train.checkpoint import LRW_FRAMES as WINDOW
from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.predict import load_reader
from lipprep.train.subtitles import write_video as write_video_read
from lipprep.train.videos import find_videos


def write_video(path: Path, frames: list[np.ndarray], *, fps: int = 25) -> Path:
    """Frames (H, W, 3) uint8 as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[0:256, 96:352])


@pytest.fixture(scope="module")
def reader(trained_run):
    return load_reader(trained_run, device="cpu")


@pytest.fixture
def cut(monkeypatch):
    """The mouth crops that readers cut from here on."""
    made = []

    def kept(*args, **kwargs):
        made.extend(crop_clips(*args, **kwargs))
        return made[-1:]

    monkeypatch.setattr(predict, "crop_clips", kept)
    return made


def moving(face: np.ndarray, count: int, size: tuple[int, int] = (288, 288)) -> list[np.ndarray]:
    """A face that drifts through frames of a size (height, width)."""
    frames = [np.full((*size, 3), 90, np.uint8) for _ in range(count)]
    for t, frame in enumerate(frames):
        x = 4 + t * (size[1] - 264) // max(count, 20)
        frame[4:260, x : x + 256] = face
    return frames


@pytest.mark.parametrize("count", [WINDOW, 3])
def test_a_face_gets_words_and_probabilities(count, reader, face, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * count)
    (reading,) = reader.read_video(video, count=9)
    (window,) = reading.windows
    assert (reading.face, reading.start, window.start, window.stop) == (0, 0, 0, count)
    assert reading.points_TKD.shape == (count, 68, 2) and reading.mouth_TSS.shape == (count, 96, 96)
    assert sorted(word for word, _ in window.words) == ["down", "grow", "shrink", "up"]
    probabilities = [p for _, p in window.words]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert probabilities == sorted(probabilities, reverse=True)
    (again,) = reader.read_video(video, count=2, mouth_every=0)
    assert again.windows[0].words == window.words[:2] and again.mouth_TSS.shape == (0, 96, 96)


def test_a_window_is_read_as_a_clip_of_its_frames(reader, face, tmp_path):
    video = write_video(tmp_path / "v.mp4", moving(face, 41))
    (reading,) = reader.read_video(video, mouth_every=4)
    assert [(w.start, w.stop) for w in reading.windows] == [(0, 29), (5, 34), (10, 39), (12, 41)]
    frames = list(read_frames(video))
    for window in reading.windows:
        points = reading.points_TKD[window.start : window.stop]
        (crop,) = crop_clips(frames[window.start : window.stop], [Window(None, WINDOW, points)], reader.crop)
        alone = dict(reader.words_of([crop.mouth], count=5)[0])
        assert dict(window.words) == pytest.approx(alone, abs=1e-5)
    # Crops are those of the window whose middle is nearest.
    (crop,) = crop_clips(frames[5:34], [Window(None, WINDOW, reading.points_TKD[5:34])], reader.crop)
    assert reading.mouth_TSS.shape == (11, 96, 96)
    np.testing.assert_array_equal(reading.mouth_TSS[5], crop.mouth[20 - 5])


@pytest.mark.parametrize(("fps", "length"), [(50, 84), (12, 20)])
def test_time_is_kept_at_any_frame_rate(fps, length, reader, face, tmp_path):
    (reading,) = reader.read_video(write_video(tmp_path / "v.mp4", moving(face, length), fps=fps))
    assert len(reading.points_TKD) == pytest.approx(25 * length / fps, abs=1)
    assert reading.windows[-1].stop == len(reading.points_TKD)
    x = reading.points_TKD[:, 30, 0]
    assert x[-1] - x[0] == pytest.approx(24 * (length - 1) / length, abs=2)


def test_short_videos_are_padded_for_networks_that_know_one_length(load_with, face, cut, monkeypatch, tmp_path):
    video = write_video(tmp_path / "v.mp4", moving(face, 6))
    reader = load_with()
    seen = []
    monkeypatch.setattr(predict, "eval_batch", lambda *args: seen.append(args[0]) or eval_batch(*args))
    for variable in (False, True):
        options = dataclasses.replace(reader.options, variable_length=variable)
        dataclasses.replace(reader, options=options).read_video(video)
    padded, whole = (batch[0].numpy() for batch in seen)
    np.testing.assert_array_equal(whole, cut[1].mouth)
    assert padded.shape[0] == WINDOW
    np.testing.assert_array_equal(padded, np.pad(cut[0].mouth, ((11, 12), (0, 0), (0, 0)), mode="edge"))


def test_faces_have_readings_of_their_own_the_largest_first(reader, face, tmp_path):
    frames = [np.full((300, 600, 3), 90, np.uint8) for _ in range(36)]
    for t, frame in enumerate(frames):
        frame[4:260, 4:260] = face
        if t >= 4:
            frame[60:252, 380:572] = cv2.resize(face, (192, 192), interpolation=cv2.INTER_AREA)
    video = write_video(tmp_path / "v.mp4", frames)
    large, small = reader.read_video(video, all_faces=True)
    assert [(r.face, r.start, len(r.points_TKD)) for r in (large, small)] == [(0, 0, 36), (1, 5, 31)]
    assert [w.start for w in large.windows] == [0, 5, 7] and [w.start for w in small.windows] == [5, 7]
    assert np.nanmax(large.points_TKD[..., 0]) < 300 < np.nanmin(small.points_TKD[..., 0])
    (only,) = reader.read_video(video)
    np.testing.assert_allclose(only.points_TKD, large.points_TKD, atol=2)


def test_a_face_that_is_small_in_its_frame_is_read(reader, face, tmp_path):
    frame = np.full((720, 1280, 3), 90, np.uint8)
    frame[400:600, 900:1100] = cv2.resize(face, (200, 200), interpolation=cv2.INTER_AREA)
    (reading,) = reader.read_video(write_video(tmp_path / "v.mp4", [frame] * 2))
    assert (np.abs(reading.points_TKD - (1000, 500)) < 100).all() and len(reading.windows) == 1


def test_no_window_has_a_cut_in_it_or_lacks_the_face(reader, face, tmp_path):
    still, turned = np.full((256, 512, 3), 90, np.uint8), np.full((256, 512, 3), 90, np.uint8)
    still[:, :256], turned[:, 256:] = face, face
    empty = np.full((256, 512, 3), 90, np.uint8)
    video = write_video(tmp_path / "v.mp4", [still] * 33 + [turned] * 40 + [empty] * 40)
    (reading,) = reader.read_video(video)
    seen = np.isfinite(reading.points_TKD).all(axis=(1, 2))
    there = np.flatnonzero(reading.points_TKD[:, 30, 0] > 256)[0]
    spans = [(w.start, w.stop) for w in reading.windows]
    assert spans[:3] == [(0, 29), (5, 34), (10, 39)] and there == 39  # where after a cut any face will do
    assert all(stop <= there or start >= there for start, stop in spans)
    assert spans[3:] == [(a, a + WINDOW) for a in (39, 44, 49, 54)]
    assert all(2 * seen[a:b].sum() >= b - a for a, b in spans) and not seen[73:].any()


def test_below_the_threshold_the_reader_abstains(reader, face, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * 3)

    def likeliest(**more):
        (window,) = dataclasses.replace(reader, **more).read_video(video)[0].windows
        return window.words[0][1], window.known

    plain, known = likeliest(temperature=None, threshold=None)
    assert known
    assert likeliest(temperature=None, threshold=plain + 0.01) == (plain, False)
    assert likeliest(temperature=None, threshold=plain - 0.01) == (plain, True)
    assert likeliest(temperature=100.0, threshold=None)[0] == pytest.approx(0.25, abs=0.05)


def test_a_reader_takes_temperature_and_threshold_of_its_checkpoint(trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "best.pt")
    save_checkpoint(tmp_path / "c.pt", dataclasses.replace(checkpoint, temperature=1.5, threshold=0.7))
    reader = load_reader(tmp_path / "c.pt", device="cpu")
    assert (reader.temperature, reader.threshold) == (1.5, 0.7)


@pytest.fixture
def load_with(trained_run, tmp_path):
    """A reader of the trained run whose checkpoint has other parameters."""

    def loaded(**parameters):
        checkpoint = load_checkpoint(trained_run / "best.pt")
        changed = dataclasses.replace(checkpoint, parameters=checkpoint.parameters | parameters)
        save_checkpoint(tmp_path / "changed.pt", changed)
        return load_reader(tmp_path / "changed.pt", device="cpu")

    return loaded


def test_crops_are_aligned_to_the_mean_face_of_training(load_with, face, cut, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * 3)
    published = mean_face().tolist()
    larger = ((mean_face() - 128) * 1.2 + 128).tolist()
    for given in (None, published, larger):
        load_with(mean_face=given).read_video(video)
    assert np.array_equal(cut[0].mouth, cut[1].mouth)
    assert cut[2].scale == pytest.approx(1.2 * cut[0].scale, rel=1e-3)
    with pytest.raises(ValueError, match="mean face"):
        load_with(mean_face="0" * 64)


def test_without_the_box_of_training_nothing_is_guessed(load_with):
    with pytest.raises(ValueError, match=r"does not hold the box .*--box X,Y,W,H.* train again"):
        load_with(profile="fixed")


def test_exact_crops_are_cut_from_colour(load_with, face, cut, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * 3)
    for exact in (False, True):
        load_with(exact=exact).read_video(video)
    frames = list(read_frames(video, color=True))
    points = track(read_frames(video), load_detector("mesh")).points
    (wanted,) = crop_clips(frames, [Window(None, 3, points)], CropParameters(exact=True))
    assert np.array_equal(cut[1].mouth, wanted.mouth)
    assert not np.array_equal(cut[0].mouth, wanted.mouth)


def test_another_detector_than_in_training_is_warned_of(load_with, capsys):
    load_with(detector="mesh", identity=load_detector("mesh").identity)
    load_with(profile="fixed", box=[80, 116, 96, 96], detector="fan", identity="fan-12345678")
    assert capsys.readouterr().err == ""
    load_with(detector="fan", identity="fan-12345678")
    load_with(detector="archive", persons=None)
    err = capsys.readouterr().err
    assert "fan-12345678" in err and "landmarks of archive" in err


def test_what_cannot_be_read_says_why(reader, tmp_path):
    noise = np.random.default_rng(0).integers(0, 60, (128, 128, 3), np.uint8)
    with pytest.raises(ClipFailure, match="face"):
        reader.read_video(write_video(tmp_path / "noise.mp4", [noise] * 5))
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "nowhere.mp4"):
        with pytest.raises(ClipFailure, match=name):
            reader.read_video(tmp_path / name)


def test_what_is_sound_of_a_damaged_video_is_read(reader, face, tmp_path, capsys):
    whole = write_video(tmp_path / "whole.mkv", [np.roll(face, t // 8, axis=1) for t in range(60)]).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    (reading,) = reader.read_video(tmp_path / "cut.mkv")
    assert 0 < len(reading.points_TKD) < 60 and reading.windows[-1].stop == len(reading.points_TKD)
    err = capsys.readouterr().err
    assert "cut.mkv" in err and "It is read up to there" in err


def test_a_day_of_video_is_read_and_no_more(reader, face, monkeypatch, tmp_path, capsys):
    assert predict.LONGEST / reader.fps == 24 * 3600
    monkeypatch.setattr(predict, "LONGEST", 4)
    (reading,) = reader.read_video(write_video(tmp_path / "v.mp4", [face] * 6))
    assert len(reading.points_TKD) == reading.windows[-1].stop < 6
    assert "has more than 4 frames at 25 fps" in capsys.readouterr().err


def test_folders_stand_for_the_videos_below_them(tmp_path):
    for name in ("b/2.MP4", "b/1.mpg", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_videos([tmp_path / "x.bin", tmp_path])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["x.bin", "b/1.mpg", "b/2.MP4"]
    with pytest.raises(ValueError, match="no videos"):
        (tmp_path / "empty").mkdir()
        find_videos([tmp_path / "empty"])


def test_videos_of_a_store_are_read_as_those_of_a_disk(bucket, reader, face, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * 5)
    for name in ("r/b/2.MP4", "r/1.mp4", "r/a.txt"):
        (bucket / name).upload(video)
    found = find_videos([bucket / "r", bucket / "r/a.txt"])
    assert found == [bucket / "r/1.mp4", bucket / "r/b/2.MP4", bucket / "r/a.txt"]
    (reading,) = reader.read_video(found[0])
    assert reading.windows == reader.read_video(video)[0].windows
    write_video_read(found[0], [reading], tmp_path / "o.mp4", fps=25)
    assert len(list(read_frames(tmp_path / "o.mp4"))) == 5
    with pytest.raises(ClipFailure, match=r"s3://.*/none\.mp4 is no file"):
        reader.read_video(bucket / "none.mp4")
    with pytest.raises(ValueError, match="no videos"):
        (bucket / "empty/a.txt").upload(video)
        find_videos([bucket / "empty"])
