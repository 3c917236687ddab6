import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
from skimage import data

from lipprep.stages.align import mean_face
from lipprep.stages.crop import CropParameters, Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks import load_detector, track
from lipprep.stages.video import read_frames
from lipprep.train import predict
from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.predict import centre_frames, load_reader
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


@pytest.mark.parametrize("count", [29, 3])
def test_a_face_gets_words_and_probabilities(count, reader, face, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * count)
    words = reader.read(video, count=9)
    assert sorted(word for word, _ in words) == ["down", "grow", "shrink", "up"]
    probabilities = [p for _, p in words]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert probabilities == sorted(probabilities, reverse=True)
    assert reader.read(video, count=2) == words[:2]


@pytest.mark.parametrize(("fps", "length"), [(25, 60), (50, 121), (25, 20), (12, 30)])
def test_the_window_is_the_middle_in_time(fps, length, tmp_path):
    # each frame is as bright as its time
    frames = [np.full((64, 64, 3), 40 + 150 * i // length, np.uint8) for i in range(length)]
    taken = centre_frames(write_video(tmp_path / "v.mp4", frames, fps=fps), fps=25.0, num_frames=29)
    seconds = length / fps
    assert len(taken) == min(29, round(seconds * 25))
    times = np.array([(np.asarray(frame).mean() - 40) / 150 * seconds for frame in taken])
    assert times.mean() == pytest.approx(seconds / 2, abs=0.1)
    assert times[-1] - times[0] == pytest.approx(len(taken) / 25, abs=0.15)


@pytest.fixture
def load_with(trained_run, tmp_path):
    """A reader of the trained run whose checkpoint has other parameters."""

    def loaded(**parameters):
        checkpoint = load_checkpoint(trained_run / "best.pt")
        changed = dataclasses.replace(checkpoint, parameters=checkpoint.parameters | parameters)
        save_checkpoint(tmp_path / "changed.pt", changed)
        return load_reader(tmp_path / "changed.pt", device="cpu")

    return loaded


@pytest.fixture
def cut(monkeypatch):
    """The mouth crops that readers cut from here on."""
    made = []

    def kept(*args, **kwargs):
        made.extend(crop_clips(*args, **kwargs))
        return made[-1:]

    monkeypatch.setattr(predict, "crop_clips", kept)
    return made


def test_crops_are_aligned_to_the_mean_face_of_training(load_with, face, cut, tmp_path):
    video = write_video(tmp_path / "v.mp4", [face] * 3)
    published = mean_face().tolist()
    larger = ((mean_face() - 128) * 1.2 + 128).tolist()
    for given in (None, published, larger):
        load_with(mean_face=given).read(video, count=1)
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
        load_with(exact=exact).read(video, count=1)
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
        reader.read(write_video(tmp_path / "noise.mp4", [noise] * 5), count=1)
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "nowhere.mp4"):
        with pytest.raises(ClipFailure, match=name):
            reader.read(tmp_path / name, count=1)


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
    assert reader.read(found[0], count=4) == reader.read(video, count=4)
    with pytest.raises(ClipFailure, match=r"s3://.*/none\.mp4 is no file"):
        reader.read(bucket / "none.mp4", count=1)
    with pytest.raises(ValueError, match="no videos"):
        (bucket / "empty/a.txt").upload(video)
        find_videos([bucket / "empty"])
