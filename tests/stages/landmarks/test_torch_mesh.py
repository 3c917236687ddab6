import pickle
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lipprep.stages.landmarks import BatchDetector, Face, load_detector, track, track_clips
from lipprep.stages.landmarks.detector import Region
from lipprep.stages.landmarks.facemesh import FaceMesh
from lipprep.stages.landmarks.mesh import network_file
from lipprep.stages.landmarks.torch_mesh import TorchMesh
from lipprep.stages.stopwatch import time_by_part

NETWORK = network_file("face_landmarks_detector")


@pytest.fixture(scope="module")
def mesh():
    return load_detector("mesh")


@pytest.fixture(scope="module")
def torch_mesh():
    return TorchMesh(device="cpu")


@pytest.fixture(scope="module")
def gray(portrait):
    return cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)


def placed(gray, *, angle, scale, centre, shape=(256, 256), noise=0.0):
    """The portrait turned and scaled about its face, which is moved to `centre`."""
    matrix = cv2.getRotationMatrix2D((128, 115), angle, scale)
    matrix[:, 2] += np.array(centre) - (128, 115)
    picture = cv2.warpAffine(gray, matrix, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    grain = np.random.default_rng(int(scale * 1e4)).normal(0, noise, shape)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def moving(gray, length, *, shape=(256, 256), scale=1.0, phase=0.0):
    """A face that sways, nods and comes nearer."""
    height, width = shape
    return [
        placed(
            gray,
            angle=12 * np.sin(phase + t / 5),
            scale=scale * (1 + 0.1 * np.sin(phase + t / 7)),
            centre=(width / 2 + 12 * np.sin(t / 4), height / 2 + 8 * np.cos(t / 6)),
            shape=shape,
            noise=3,
        )
        for t in range(length)
    ]


def black(length, shape=(256, 256)):
    return [np.zeros(shape, np.uint8)] * length


def assert_close(clip, expected):
    assert clip.max_faces == expected.max_faces
    assert clip.points.shape == expected.points.shape and clip.points.dtype == np.float32
    error = np.linalg.norm(clip.points - expected.points, axis=2)
    assert error.mean() < 0.05 and error.max() < 0.4  # of Mesh itself where a pixel changes by one level: 0.03 and 0.3


def test_the_network_is_that_of_litert(gray):
    from ai_edge_litert.interpreter import Interpreter

    litert = Interpreter(model_path=str(NETWORK), num_threads=1)
    litert.allocate_tensors()
    rng = np.random.default_rng(0)
    patches = [
        placed(gray, angle=angle, scale=scale, centre=rng.uniform(110, 146, 2), noise=noise)
        for angle in (-35, 0, 20)
        for scale, noise in ((0.8, 0), (1.2, 4), (1.6, 20))
    ]
    patches += [np.zeros((256, 256), np.uint8), rng.integers(0, 255, (256, 256), np.uint8)]
    with torch.inference_mode():
        points, logits = FaceMesh(NETWORK)(torch.from_numpy(np.stack(patches)) / 255)
    assert points.shape == (len(patches), 478, 2) and logits.shape == (len(patches),)
    for patch, ours, logit in zip(patches, points.numpy(), logits.tolist(), strict=True):
        litert.set_tensor(litert.get_input_details()[0]["index"], np.dstack([patch] * 3)[None] / np.float32(255))
        litert.invoke()
        vertices, presence, _ = (litert.get_tensor(output["index"]) for output in litert.get_output_details())
        np.testing.assert_allclose(ours, vertices.reshape(478, 3)[:, :2], atol=0.005)
        assert logit == pytest.approx(presence.item(), abs=0.005)


def test_single_frames_of_any_size_agree(mesh, torch_mesh, gray):
    clips = [
        [placed(gray, angle=angle, scale=scale, centre=centre, shape=shape)]
        for angle, scale, centre, shape in (
            (0, 1.0, (128, 115), (256, 256)),
            (-25, 0.7, (60, 90), (240, 320)),
            (15, 2.2, (700, 500), (1080, 1920)),
            (5, 1.5, (100, 90), (180, 190)),  # the patch leaves the frame
        )
    ]
    for clip, found in zip(clips, track_clips(clips, torch_mesh), strict=True):
        expected = track(clip, mesh)
        assert found.max_faces == expected.max_faces == 1
        error = np.linalg.norm(found.points - expected.points, axis=2)
        assert error.mean() < 0.03 and error.max() < 0.15  # OpenCV 5: 0.003 and 0.04; 4 rounds coordinates to 1/32


def test_many_clips_are_tracked_as_one_by_one(mesh, torch_mesh, gray):
    vanishing = moving(gray, 20)
    vanishing[7:10] = black(3)
    clips = [
        moving(gray, 16),
        moving(gray, 5, shape=(240, 320), scale=0.8, phase=1),
        [],
        black(3, (100, 100)),
        vanishing,
        moving(gray, 1),
        moving(gray, 26, shape=(360, 288), phase=2),
    ]
    expected = [track(clip, mesh) for clip in clips]
    found = track_clips(clips, torch_mesh)
    for index in (0, 1, 5, 6):
        assert_close(found[index], expected[index])
    for index in (2, 3, 4):
        np.testing.assert_array_equal(found[index].points, expected[index].points)
        assert found[index].max_faces == expected[index].max_faces
    assert np.isnan(found[4].points).all(axis=(1, 2)).tolist() == [7 <= t < 10 for t in range(20)]
    assert track_clips([], torch_mesh) == []


def test_more_clips_than_fit_at_once(mesh, torch_mesh, gray, monkeypatch):
    monkeypatch.setattr("lipprep.stages.landmarks.torch_mesh._MOST_CLIPS", 2)
    clips = [moving(gray, length, phase=length) for length in (2, 4, 1, 3, 2)]
    for clip, found in zip(clips, track_clips(clips, torch_mesh), strict=True):
        assert_close(found, track(clip, mesh))


@pytest.mark.parametrize(("kept", "contradicts"), [(slice(1, 2), True), (slice(0, 0), False), (slice(0, 2), False)])
def test_later_detections_count_and_correct(mesh, torch_mesh, gray, monkeypatch, kept, contradicts):
    """Two faces side by side, of which the detector sees some in frame 12, and the left one else."""
    pair = np.hstack([gray, gray])
    clip = [pair.copy() for _ in range(14)]
    clip[12][:2] = 0
    left, right = sorted(mesh.faces(pair), key=lambda face: face.box[0])
    for detector in (mesh, torch_mesh):
        monkeypatch.setattr(detector, "faces", lambda frame: [left, right][kept] if frame[0, 0] == 0 else [left])
    expected, (found,) = track(clip, mesh), track_clips([clip], torch_mesh)
    assert (expected.points[12:, :, 0].min() > 256) == contradicts
    assert_close(found, expected)


@pytest.mark.parametrize("where", [np.nan, 1e30])
def test_a_region_that_is_nowhere_has_no_face(mesh, torch_mesh, gray, monkeypatch, where):
    lost = Face((0, 0, 10, 10), 0.9, Region(where, where, where, 0.0))
    for detector in (mesh, torch_mesh):
        monkeypatch.setattr(detector, "faces", lambda frame: [lost])
        (found,) = track_clips([[gray] * 2], detector)
        assert np.isnan(found.points).all() and found.points.shape == (2, 68, 2) and found.max_faces == 1


def test_time_is_counted_by_part(torch_mesh, gray):
    time_by_part()
    track_clips([[gray]], torch_mesh)
    assert {"detect", "mesh"} <= time_by_part().keys()


def test_it_is_the_detector_mesh(mesh, torch_mesh):
    assert isinstance(torch_mesh, BatchDetector) and not isinstance(mesh, BatchDetector)
    copy = pickle.loads(pickle.dumps(torch_mesh))
    assert (copy.name, copy.identity, copy.device) == (mesh.name, mesh.identity, "cpu")


class CountingHostTensors(TorchDispatchMode):
    """Counts the tensors that are made of data on the host."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def made(self):
        return self.calls["aten.lift_fresh.default"]


def test_host_and_device_do_not_wait_for_each_other_between_frames(gray):
    """The meta device has no data: whatever asks it for some fails, and only the result's way back does so."""
    made = []
    for length in (1, 3):
        detector = TorchMesh(device="meta")
        assert next(detector._network.parameters()).is_meta  # made of host data, so before counting
        with CountingHostTensors() as tensors, pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
            detector.track_clips([[gray] * length, [gray]])
        made.append(tensors.made)
        assert tensors.calls["aten.conv2d.default"] == 105 * (length + 1)
    assert made[0] == made[1] > 0


def test_the_device_works_while_later_frames_are_detected(gray, monkeypatch):
    done = []
    detector = TorchMesh(device="meta")
    network, faces = detector._network, detector.faces
    detector.__dict__["_network"] = lambda patches: done.append("network") or network(patches)
    monkeypatch.setattr(detector, "faces", lambda frame: done.append("detect") or faces(frame))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        detector.track_clips([[gray] * 13])
    assert done == ["detect", *["network"] * 14, "detect"]  # the first frame takes two
