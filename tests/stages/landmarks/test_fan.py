import pickle

import numpy as np
import pytest

from lipprep.stages.landmarks import Face, load_detector
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


def test_heat_maps_are_decoded_to_a_fraction_of_a_pixel():
    places = np.random.default_rng(0).uniform(2, 61, (68, 2))
    np.testing.assert_allclose(decode_heatmaps(gaussians(places)), places, atol=1e-3)
    corners = [(0, 0), (63, 63), (0, 20.3)]
    np.testing.assert_allclose(decode_heatmaps(gaussians(corners)), corners, atol=1e-3)
    assert np.isfinite(decode_heatmaps(np.zeros((3, 64, 64), np.float32))).all()
    assert np.isfinite(decode_heatmaps(-np.ones((3, 64, 64), np.float32))).all()


def test_missing_weights_say_what_to_put_where(weights, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    with pytest.raises(ValueError, match=WEIGHTS) as error:
        load_detector("fan")
    assert str(weights) in str(error.value)


def test_a_bright_spot_is_found_where_it_is(weights):
    """A network that answers with its own input: the crop, the map back and the decoding must agree."""
    torch = pytest.importorskip("torch")
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


def test_the_network_of_the_package_runs(weights):
    torch = pytest.importorskip("torch")
    from face_alignment.models import FAN

    torch.manual_seed(0)
    torch.save(FAN(4).state_dict(), weights)
    points, _ = Fan().fit(np.random.default_rng(0).integers(0, 255, (256, 256), np.uint8), Face((60, 60, 190, 190), 1))
    assert points.shape == (68, 2) and np.isfinite(points).all()
