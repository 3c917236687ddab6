import pickle

import cv2
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from lipprep.stages.landmarks import load_detector, track
from lipprep.stages.landmarks.mesh import IBUG_68, network_file

STABLE = [33, 36, 39, 42, 45, 48, 54]  # nose, eye corners, mouth corners


@pytest.fixture(scope="module")
def mesh():
    return load_detector("mesh")


@pytest.fixture(scope="module")
def gray(portrait):
    return cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)


def points_of(detector, frame):
    (face,) = detector.faces(frame)
    points, _ = detector.fit(frame, face)
    return points


def test_the_points_have_the_places_of_ibug_68(mesh, gray):
    points = points_of(mesh, gray)
    assert points.shape == (68, 2) and points.dtype == np.float32
    right_eye, left_eye = points[36:42].mean(axis=0), points[42:48].mean(axis=0)
    mouth, nose, chin = points[48:68].mean(axis=0), points[30], points[8]
    assert right_eye[0] < nose[0] < left_eye[0]
    assert max(right_eye[1], left_eye[1]) < nose[1] < mouth[1] < chin[1]
    assert (points[17:27, 1].max()) < min(points[36:48, 1]) + 3  # brows above eyes
    assert points[48, 0] < points[60, 0] + 3 < points[64, 0] < points[54, 0] + 3  # inner lip inside the outer
    assert points[51, 1] < points[62, 1] < points[66, 1] + 1 and points[66, 1] < points[57, 1]
    # The pupils are the darkest places of the eyes' boxes.
    for eye in (points[36:42], points[42:48]):
        (x0, y0), (x1, y1) = eye.min(axis=0).astype(int), np.ceil(eye.max(axis=0)).astype(int)
        assert gray[y0:y1, x0:x1].min() < 80


def test_the_points_are_the_networks(mesh, gray):
    turned = cv2.warpAffine(gray, cv2.getRotationMatrix2D((128, 120), 15, 0.8), (256, 256))
    (detected,) = mesh.faces(turned)
    _, face = mesh.fit(turned, detected)
    points, _ = mesh.fit(turned, face)
    x, y, side, angle = face.region
    # Corners of the 256x256 patch (its pixels 0 and 256), brought to the frame.
    half = np.array([[-1, -1], [1, -1], [-1, 1]]) * side / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (half @ rotation.T + (x, y)).astype(np.float32)
    to_frame = cv2.getAffineTransform(np.array([[0, 0], [256, 0], [0, 256]], np.float32), corners)
    patch = cv2.warpAffine(
        turned, to_frame, (256, 256), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    network = Interpreter(str(network_file("face_landmarks_detector")), num_threads=1)
    network.allocate_tensors()
    colour = np.repeat(patch[None, :, :, None], 3, axis=3)
    network.set_tensor(network.get_input_details()[0]["index"], colour / np.float32(255))
    network.invoke()
    vertices = network.get_tensor(network.get_output_details()[0]["index"]).reshape(478, 3)
    expected = vertices[IBUG_68, :2] @ to_frame[:, :2].T + to_frame[:, 2]
    assert np.abs(points - expected).max() < 0.05  # a pixel of the patch may round to the next level


def test_the_points_of_a_frame_outlive_the_next_frame(mesh, gray):
    (face,) = mesh.faces(gray)
    points, tracked = mesh.fit(gray, face)
    kept = points.copy()
    moved, _ = mesh.fit(np.roll(gray, 6, axis=1), tracked)
    assert np.abs(moved - points).max() > 3
    np.testing.assert_array_equal(points, kept)


@pytest.mark.parametrize("angle", [-25, 0, 20])
@pytest.mark.parametrize("scale", [0.6, 1.0])
@pytest.mark.parametrize("shift", [(0, 0), (-12, 9)])
def test_the_points_follow_the_face(mesh, gray, angle, scale, shift):
    matrix = cv2.getRotationMatrix2D((128, 120), angle, scale)
    matrix[:, 2] += shift
    moved = cv2.warpAffine(gray, matrix, (256, 256), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    expected = points_of(mesh, gray) @ matrix[:, :2].T + matrix[:, 2]
    error = np.linalg.norm(points_of(mesh, moved) - expected, axis=1)
    assert error[STABLE].mean() < 1.2 and error[17:].mean() < 1.5


def test_a_face_in_a_wide_or_tall_frame_is_where_it_is(mesh, gray):
    points = points_of(mesh, gray)
    for top, left, height, width in ((20, 300, 320, 720), (400, 10, 800, 300)):
        frame = np.full((height, width), 90, np.uint8)
        frame[top : top + 256, left : left + 256] = gray
        error = np.linalg.norm(points_of(mesh, frame) - points - (left, top), axis=1)
        assert error[STABLE].max() < 2.5


def test_a_face_that_fills_the_frame_is_found(mesh, gray):
    points = points_of(mesh, gray)
    (x0, y0), (x1, y1) = points.min(axis=0).astype(int), points.max(axis=0).astype(int)
    x0, y0 = max(x0, 0), max(y0, 0)
    close = np.ascontiguousarray(gray[y0:y1, x0:x1])
    assert len(mesh.faces(close)) == 1
    error = np.linalg.norm(points_of(mesh, close) - (points - (x0, y0)), axis=1)
    assert error[STABLE].mean() < 4


def test_no_face(mesh, gray):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256), np.uint8)
    (face,) = mesh.faces(gray)
    for frame in (np.zeros((256, 256), np.uint8), noise):
        assert mesh.fit(frame, face) == (None, None)
        assert np.isnan(track([frame], mesh).points).all()


def test_two_faces(mesh, gray):
    frame = np.hstack([gray, gray])
    faces = mesh.faces(frame)
    assert len(faces) == 2
    left, right = sorted((mesh.fit(frame, face)[0] for face in faces), key=lambda points: points[30, 0])
    assert np.abs(right - left - (256, 0))[STABLE].max() < 1


def test_track_follows_a_moving_face_and_repeats_itself(mesh, face_frames):
    frames = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in face_frames]
    clip = track(frames, mesh)
    assert clip.points.shape == (29, 68, 2) and clip.points.dtype == np.float32 and clip.max_faces == 1
    drift = np.arange(29)[:, None, None] * np.array([0.4, 0.2])
    assert np.abs((clip.points - drift) - clip.points[:1])[:, STABLE].max() < 1
    track(frames[::-1], mesh)
    np.testing.assert_array_equal(track(iter(frames), mesh).points, clip.points)
    other = pickle.loads(pickle.dumps(mesh))
    np.testing.assert_array_equal(track(frames, other).points, clip.points)


def test_identity_is_the_networks(mesh):
    assert (mesh.name, mesh.identity) == ("mesh", "mesh-c7d54204")


def test_unknown_detectors_are_listed():
    with pytest.raises(ValueError, match="mesh, fan, dlib"):
        load_detector("haar")


def test_a_small_face_in_a_large_frame_is_followed(mesh, gray):
    frame = np.full((720, 1280), 90, np.uint8)
    frame[300:420, 900:1020] = cv2.resize(gray, (120, 120), interpolation=cv2.INTER_AREA)
    assert not mesh.faces(frame)
    first, second = (track([frame, frame], mesh).points for _ in range(2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)  # nothing of a clip is remembered in the next
    x, y = first[0].mean(0)
    assert 900 < x < 1020 and 300 < y < 420
