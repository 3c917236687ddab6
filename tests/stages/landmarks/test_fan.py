import pickle

import cv2
import numpy as np
import pytest
import torch
from face_alignment.models import FAN

from lipprep.stages.landmarks import BatchDetector, Face, load_detector, track, track_clips
from lipprep.stages.landmarks.fan import WEIGHTS, Fan, decode_heatmaps


def gaussians(places, size=64):
    ys, xs = np.mgrid[:size, :size]
    return np.stack([np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 2) for x, y in places]).astype(np.float32)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def random_fan(weights):
    torch.manual_seed(0)
    torch.save(FAN(4).state_dict(), weights)
    return Fan()


def decoded(heatmaps):
    return decode_heatmaps(torch.from_numpy(heatmaps)[None])[0].numpy()


def test_heat_maps_are_decoded_to_a_fraction_of_a_pixel():
    places = np.random.default_rng(0).uniform(2, 61, (68, 2))
    np.testing.assert_allclose(decoded(gaussians(places)), places, atol=1e-3)
    corners = [(0, 0), (63, 63), (0, 20.3)]
    np.testing.assert_allclose(decoded(gaussians(corners)), corners, atol=1e-3)
    assert np.isfinite(decoded(np.zeros((3, 64, 64), np.float32))).all()
    assert np.isfinite(decoded(-np.ones((3, 64, 64), np.float32))).all()


def test_missing_weights_say_what_to_put_where(weights, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    with pytest.raises(ValueError, match=WEIGHTS) as error:
        load_detector("fan")
    assert str(weights) in str(error.value)


def test_a_bright_spot_is_found_where_it_is(weights):
    """A network that answers with its own input: the crop, the map back and the decoding must agree."""
    weights.write_bytes(b"weights")
    fan = Fan()
    assert fan.identity.startswith("fan-")
    pooled = torch.nn.AvgPool2d(4)
    fan.__dict__["_network"] = lambda batch: pooled(batch)[:, :1].expand(-1, 68, -1, -1)
    frame = gaussians([(0, 0)], 300)[0]
    ys, xs = np.mgrid[:300, :400]
    for x, y in ((150.0, 120.0), (171.3, 139.6)):
        frame = (255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * 5**2))).astype(np.uint8)
        points, following = fan.fit(frame, Face((90, 70, 210, 200), 0.9))
        assert points.shape == (68, 2) and points.dtype == np.float32 and following is None
        np.testing.assert_allclose(points, np.tile([x, y], (68, 1)), atol=0.15)
    assert "_network" not in vars(pickle.loads(pickle.dumps(fan)))


def test_the_network_of_the_package_runs(random_fan):
    frame = np.random.default_rng(0).integers(0, 255, (256, 256), np.uint8)
    points, _ = random_fan.fit(frame, Face((60, 60, 190, 190), 1))
    assert points.shape == (68, 2) and np.isfinite(points).all()


def test_the_crop_is_that_of_opencv(random_fan, monkeypatch):
    """The same network on the crop that cv2 cuts: centres of pixels, zeros round the frame, whole gray levels."""
    seen = []
    network = random_fan._network
    random_fan.__dict__["_network"] = lambda batch: seen.append(batch) or network(batch)
    ys, xs = np.mgrid[:200, :300]
    frame = (128 + 60 * np.sin(xs / 9) + 60 * np.cos(ys / 7)).astype(np.uint8)
    random_fan.fit(frame, Face((40, 30, 180, 160), 1))
    step = 200 / 195 * (140 + 130) / 256
    corner = np.array([110, 95 - 0.12 * 130]) - step * 128 + step / 2 - 0.5
    crop = cv2.warpAffine(
        frame, np.column_stack([step * np.eye(2), corner]), (256, 256), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    assert seen[0].shape == (1, 3, 256, 256) and seen[0].dtype == torch.float32
    assert (255 * seen[0][0] - torch.from_numpy(crop)).abs().mean() < 0.5


def test_many_clips_are_those_that_track_gives(random_fan, portrait, monkeypatch):
    monkeypatch.setattr("lipprep.stages.landmarks.fan.CPU_BATCH", 2)
    assert isinstance(random_fan, BatchDetector)
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    black = np.zeros_like(gray)
    clips = [[gray, black, np.hstack([gray, gray])], [], [black] * 2, [np.pad(gray, 20)[:, 7:]]]
    found = track_clips(clips, random_fan)
    for clip, landmarks in zip(clips, found, strict=True):
        expected = track(clip, random_fan)
        np.testing.assert_allclose(landmarks.points, expected.points, atol=1e-2)
        assert landmarks.points.dtype == np.float32 and landmarks.max_faces == expected.max_faces
    assert np.isnan(found[0].points).all(axis=(1, 2)).tolist() == [False, True, False]
    assert [landmarks.max_faces for landmarks in found] == [2, 0, 0, 1]
    assert track_clips([], random_fan) == []
