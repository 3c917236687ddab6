import dataclasses
import itertools

import numpy as np
import pytest
from skimage import data

from lipprep.train.camera import by_clock, camera_frames, open_camera, read_camera
from lipprep.train.checkpoint import LRW_FRAMES as WINDOW
from lipprep.train.predict import load_reader


class Filmed:
    """A camera that shows given frames, then ends; `times` are the clock's, one a frame."""

    def __init__(self, frames, times):
        self.frames, self.times, self.released = iter(frames), iter(times), False

    def read(self):
        frame = next(self.frames, None)
        return frame is not None, frame

    def clock(self):
        return next(self.times, 1e9)

    def release(self):
        self.released = True


def numbers(stamped, fps):
    return list(by_clock([(seconds, name) for name, seconds in enumerate(stamped)], fps=fps))


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [
        ([0, 0.1, 0.2], [(0, 0), (1, 1), (2, 2)]),
        ([0, 0.05, 0.12, 0.2], [(0, 0), (1, 2), (2, 3)]),  # faster: some are left out
        ([0, 0.21, 0.4], [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]),  # slower: some are repeated
        ([0, 0.1, 3.0, 3.1], [(0, 0), (1, 1), (30, 2), (31, 3)]),  # nothing stands for seconds
    ],
)
def test_frames_are_taken_by_the_clock(seconds, frames):
    assert numbers(seconds, 10) == frames


def test_a_camera_is_read_to_its_end_or_for_some_seconds_and_released():
    for seconds, count in ((None, 20), (0.5, 13)):
        camera = Filmed(range(20), (7 + t / 25 for t in itertools.count()))
        frames = list(camera_frames(camera, fps=25, seconds=seconds, clock=camera.clock))
        assert frames == [(n, n) for n in range(count)] and camera.released
    camera = Filmed(itertools.count(), (t / 25 for t in itertools.count()))
    frames = camera_frames(camera, fps=25, clock=camera.clock)
    next(frames)
    frames.close()
    assert camera.released


@pytest.fixture(scope="module")
def reader(trained_run):
    return load_reader(trained_run, device="cpu")


def test_a_window_is_read_every_few_frames_as_of_a_video(reader):
    face = np.ascontiguousarray(data.astronaut()[0:256, 96:352, ::-1])
    frames = [np.roll(face, t // 4, axis=1) for t in range(36)]
    # A camera that stood still for a second: windows begin anew.
    stamped = [*enumerate(frames), *((90 + t, frame) for t, frame in enumerate(frames[:30]))]
    read = list(read_camera(reader, stamped, count=4))
    assert [(face, window.start, window.stop) for face, window in read] == [
        *((0, start, start + WINDOW) for start in (0, 5)),
        (0, 90, 90 + WINDOW),
    ]
    assert dict(read[0][1].words) == pytest.approx(dict(read[2][1].words))
    exact = dataclasses.replace(reader, crop=dataclasses.replace(reader.crop, exact=True))
    ((_, window),) = read_camera(exact, enumerate(frames[:WINDOW]), count=4)
    assert dict(window.words) == pytest.approx(dict(read[0][1].words), abs=0.05)


def test_the_largest_face_is_read_or_all(reader):
    face = np.ascontiguousarray(data.astronaut()[0:256, 96:352, ::-1])
    frame = np.full((300, 508, 3), 90, np.uint8)
    frame[30:222, 10:202], frame[4:260, 240:496] = face[::4, ::4].repeat(3, 0).repeat(3, 1), face
    stamped = [(n, frame) for n in range(WINDOW)]
    everyone = dict(read_camera(reader, stamped, all_faces=True))
    assert sorted(everyone) == [0, 1]
    ((number, window),) = read_camera(reader, stamped)
    stamped = [(n, frame[:, 220:]) for n in range(WINDOW)]
    ((_, alone),) = read_camera(reader, stamped)
    assert dict(window.words) == pytest.approx(dict(everyone[number].words), abs=1e-5)
    assert dict(window.words) == pytest.approx(dict(alone.words), abs=0.05)


def test_a_camera_that_is_not_there(capfd):
    with pytest.raises(ValueError, match=r"no camera 97.*--camera with another number"):
        open_camera(97)
    assert capfd.readouterr().err == ""
