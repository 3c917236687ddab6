import cv2
import numpy as np
import pytest

from lipprep.stages.landmarks import Face, load_detector
from lipprep.stages.landmarks.faces import FaceTracker, track_faces
from lipprep.stages.landmarks.tiles import Tiles

FRAME = (200, 400)


class Scripted:
    """A detector of drawn scenes: each frame's faces as (x, side); `blind` frames are those it detects nothing in."""

    name = identity = "scripted"

    def __init__(self, scenes, *, blind=()):
        self.scenes, self.blind, self.detected = scenes, blind, []

    def frames(self):
        return [np.full(FRAME, index, np.uint8) for index in range(len(self.scenes))]

    def faces(self, frame):
        index = int(frame[0, 0])
        self.detected.append(index)
        return [] if index in self.blind else [self._face(x, side) for x, side in self.scenes[index]]

    def _face(self, x, side, **more):
        return Face((x - side / 2, 100 - side / 2, x + side / 2, 100 + side / 2), 0.9, **more)

    def fit(self, frame, face):
        """As tracking detectors do, the nearest face in reach, whoever's it is."""
        wanted = (face.box[0] + face.box[2]) / 2
        near = [one for one in self.scenes[frame[0, 0]] if abs(one[0] - wanted) < 35]
        if not near:
            return None, None
        x, side = min(near, key=lambda one: abs(one[0] - wanted))
        points = np.full((68, 2), (x, 100), np.float32)
        points[0] -= side / 2
        points[1] += side / 2
        return points, self._face(x, side, tracked=True)


def xs(track):
    return track.points_TKD[:, 2, 0].tolist()


def test_each_face_has_one_track_the_largest_first():
    detector = Scripted([[(100 + t, 40), (300 - t, 60)] for t in range(30)])
    large, small = track_faces(detector.frames(), detector)
    assert xs(large) == [300 - t for t in range(30)] and xs(small) == [100 + t for t in range(30)]
    assert (large.start, large.stop, large.size, small.size) == (0, 30, 60, 40)
    assert large.points_TKD.shape == (30, 68, 2) and large.points_TKD.dtype == np.float32
    assert detector.detected == [0, 5, 10, 15, 20, 25]


def test_a_face_that_comes_later_is_found_within_a_few_frames():
    detector = Scripted([[(100, 40)]] * 7 + [[(100, 40), (300, 60)]] * 8)
    late, first = track_faces(detector.frames(), detector)
    assert (late.start, len(late.points_TKD)) == (10, 5) and (first.start, len(first.points_TKD)) == (0, 15)


@pytest.mark.parametrize("away", [12, 13])
def test_a_face_lost_for_a_moment_is_the_same_again(away):
    detector = Scripted([[(100, 40), (300, 60)]] * 3 + [[(300, 60)]] * away + [[(115, 40), (300, 60)]] * 7)
    large, *small = track_faces(detector.frames(), detector)
    assert large.size == 60 and len(large.points_TKD) == 10 + away
    if away == 12:
        np.testing.assert_array_equal(xs(small[0]), [100] * 3 + [np.nan] * 12 + [115] * 7)
    assert [track.start for track in small] == ([0] if away == 12 else [0, 20])


def test_a_face_found_elsewhere_is_another():
    detector = Scripted([[(100, 40)]] * 3 + [[(180, 40)]] * 3)
    assert [(track.start, xs(track)) for track in track_faces(detector.frames(), detector)] == [
        (0, [100] * 3),
        (3, [180] * 3),
    ]


def test_two_tracks_never_follow_one_face():
    # One is hidden where the other is, and within its reach.
    detector = Scripted([[(150, 40), (180, 44)]] * 4 + [[(178, 44)]] * 4 + [[(150, 40), (178, 44)]] * 4)
    tracker = FaceTracker(detector)
    steps = [{n: float(points[2, 0]) for n, points in tracker.step(f).items()} for f in detector.frames()]
    assert steps == [{0: 150, 1: 180}] * 4 + [{1: 178}] * 4 + [{0: 150, 1: 178}] * 4


def test_what_no_look_confirms_is_dropped():
    detector = Scripted([[(100, 40)]] * 100, blind=range(1, 100))
    (track,) = track_faces(detector.frames(), detector)
    assert len(track.points_TKD) == 80


def test_two_real_faces_are_followed_apart(portrait):
    mesh = load_detector("mesh")
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(gray, (192, 192), interpolation=cv2.INTER_AREA)

    def frame(t):
        canvas = np.full((280, 560), 90, np.uint8)
        canvas[10 : 10 + 256, 2 + t : 258 + t] = gray
        if t >= 2:
            canvas[40 : 40 + 192, 330 - t : 522 - t] = small
        return canvas

    large, late = track_faces(map(frame, range(8)), mesh, detect_every=3)
    assert (large.start, large.stop, late.start, late.stop) == (0, 8, 3, 8)
    drift = large.points_TKD[:, 30] - large.points_TKD[0, 30]
    np.testing.assert_allclose(drift, [(t, 0) for t in range(8)], atol=0.7)
    assert np.abs(late.points_TKD[:, 30, 0] - large.points_TKD[3:, 30, 0]).min() > 200


def test_no_frames_and_no_faces():
    assert track_faces([], Scripted([])) == []
    detector = Scripted([[]] * 3)
    assert track_faces(detector.frames(), detector) == [] and detector.detected == [0]


@pytest.mark.parametrize(("side", "x", "y"), [(110, 900, 300), (200, 40, 30), (420, 700, 150)])
def test_faces_of_all_sizes_are_found_in_large_frames(portrait, side, x, y):
    mesh = load_detector("mesh")
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    frame = np.full((720, 1280), 90, np.uint8)
    frame[y : y + side, x : x + side] = cv2.resize(gray, (side, side), interpolation=cv2.INTER_AREA)
    (track,) = track_faces([frame], mesh)
    (wanted,) = track_faces([gray], mesh)
    error = (track.points_TKD[0] - (x, y)) * 256 / side - wanted.points_TKD[0]
    assert np.linalg.norm(error, axis=1).mean() < 4


def test_a_large_and_a_small_face_are_found_together(portrait):
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    frame = np.full((720, 1280), 90, np.uint8)
    frame[100:612, 100:612] = cv2.resize(gray, (512, 512))
    frame[300:420, 900:1020] = cv2.resize(gray, (120, 120), interpolation=cv2.INTER_AREA)
    mesh = load_detector("mesh")
    tracks = track_faces([frame] * 2, mesh)
    assert [track.points_TKD.shape[0] for track in tracks] == [2, 2]
    assert tracks[0].size == pytest.approx(512 / 120 * tracks[1].size, rel=0.1)
    assert len(Tiles(mesh).faces(frame)) == 1  # which will do where one is looked for


def test_parts_are_looked_at_now_and_then():
    class Blind(Scripted):
        def faces(self, frame):
            self.detected.append(frame.shape[0])
            return []

    frame = np.zeros((1024, 1024), np.uint8)
    for small_too, between in ((False, [1024]), (True, [1024] + [512] * 9)):
        detector = Blind([])
        tiles = Tiles(detector, small_too=small_too)
        for _ in range(6):
            tiles.faces(frame)
        whole = [1024] + [512] * 9 + [256] * 49
        assert detector.detected == whole + 4 * between + whole
