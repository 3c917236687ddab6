import numpy as np
import pytest

from lipprep.stages.landmarks import BatchDetector, Face, choose_face, track, track_clips

FRAME = (200, 400)


def face(x, y, side, **more):
    return Face((x - side / 2, y - side / 2, x + side / 2, y + side / 2), 0.9, **more)


def test_the_central_and_largest_face_is_chosen():
    central, small, edge = face(200, 100, 60), face(200, 100, 30), face(380, 20, 70)
    assert choose_face([small, edge, central], FRAME, None) is central
    assert choose_face([edge, small], FRAME, None) is edge  # more than twice the size
    assert choose_face([], FRAME, None) is None


def test_a_face_is_kept_from_frame_to_frame():
    before = face(300, 100, 40)
    near, central = face(310, 104, 40), face(200, 100, 90)
    assert choose_face([central, near], FRAME, before) is near
    assert choose_face([face(100, 100, 90)], FRAME, before) is None


class Scripted:
    """A detector of drawn scenes: a frame's number says where the faces are."""

    name = identity = "scripted"

    def __init__(self, scenes, *, tracks=True):
        self.scenes, self.tracks, self.detected, self.fitted = scenes, tracks, [], []

    def frames(self):
        return [np.full(FRAME, index, np.uint8) for index in range(len(self.scenes))]

    def faces(self, frame):
        self.detected.append(int(frame[0, 0]))
        return [face(x, 100, 60) for x in self.scenes[frame[0, 0]]]

    def fit(self, frame, found):
        index = int(frame[0, 0])
        self.fitted.append(index)
        wanted = (found.box[0] + found.box[2]) / 2
        x = min(self.scenes[index], key=lambda x: abs(x - wanted), default=None)
        if x is None or abs(x - wanted) > 30:
            return None, None
        return np.full((68, 2), x, np.float32), face(x, 100, 60, tracked=True) if self.tracks else None


def xs(clip):
    return clip.points[:, 0, 0].tolist()


def test_a_tracked_clip_is_detected_once_and_counted_every_12_frames():
    detector = Scripted([[200 + t] for t in range(30)])
    clip = track(detector.frames(), detector)
    assert xs(clip) == [200 + t for t in range(30)]
    assert detector.detected == [0, 12, 24]
    assert detector.fitted == list(range(30))
    assert clip.max_faces == 1


def test_most_faces_are_counted():
    detector = Scripted([[200]] * 12 + [[200, 100, 300]] * 3)
    assert track(detector.frames(), detector).max_faces == 3


def test_a_frame_without_a_face_is_nan_and_others_do_not_step_in():
    detector = Scripted([[200, 300]] * 3 + [[300]] * 2 + [[200, 300]] * 3)
    clip = track(detector.frames(), detector)
    np.testing.assert_array_equal(xs(clip), [200] * 3 + [np.nan] * 2 + [200] * 3)


@pytest.mark.parametrize("tracks", [True, False])
def test_after_a_cut_another_face_is_taken(tracks):
    detector = Scripted([[100]] * 3 + [[300]] * 9, tracks=tracks)
    clip = track(detector.frames(), detector)
    np.testing.assert_array_equal(xs(clip), [100] * 3 + [np.nan] * 6 + [300] * 3)


def test_a_track_on_no_detected_face_is_dropped():
    detector = Scripted([[200]] * 24)
    detector.fit = lambda frame, found: (np.full((68, 2), found.box[0], np.float32), face(40, 30, 20))
    clip = track(detector.frames(), detector)
    assert xs(clip)[1] == 30 and xs(clip)[12] == 170


def test_no_frames_and_no_faces():
    assert track([], Scripted([])).points.shape == (0, 68, 2)
    detector = Scripted([[]] * 3)
    clip = track(detector.frames(), detector)
    assert np.isnan(clip.points).all() and clip.points.shape == (3, 68, 2) and clip.max_faces == 0


def test_clips_of_a_detector_of_single_frames_are_tracked_one_by_one():
    detector = Scripted([[200 + t] for t in range(5)])
    assert not isinstance(detector, BatchDetector)
    frames = detector.frames()
    assert [xs(clip) for clip in track_clips([frames[:3], [], frames[4:]], detector)] == [[200, 201, 202], [], [204]]
