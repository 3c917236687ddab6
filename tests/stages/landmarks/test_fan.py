import pickle
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from face_alignment.models import FAN

from lipprep.stages.landmarks import BatchDetector, Face, load_detector, track, track_clips
from lipprep.stages.landmarks.fan import WEIGHTS, Fan, decode_heatmaps
from lipprep.stages.stopwatch import time_by_part


def gaussians(places, size=64):
    ys, xs = np.mgrid[:size, :size]
    return np.stack([np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 2) for x, y in places]).astype(np.float32)


def weights_below(folder, monkeypatch):
    """Where the weights are looked for from now on."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    path = folder / "hub" / "checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return weights_below(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def random_network(tmp_path_factory):
    """The network of the package with random weights, as `Fan` loads it from their file."""
    torch.manual_seed(0)
    network = FAN(4)
    network.l3.bias.data += 3  # untrained, some of its last heat maps are below 0 throughout: no face
    with pytest.MonkeyPatch.context() as patch:
        torch.save(network.state_dict(), weights_below(tmp_path_factory.mktemp("fan"), patch))
        return Fan()._network


@pytest.fixture
def random_fan(weights, random_network):
    weights.touch()
    fan = Fan()
    fan.__dict__["_network"] = random_network
    return fan


def decoded(heatmaps):
    return decode_heatmaps(torch.from_numpy(heatmaps)[None])[0].numpy()


def answering(fan, network):
    """`fan` with a network that gives its crops, made smaller and changed by `network`, as all heat maps."""
    pooled = torch.nn.AvgPool2d(4)
    fan.__dict__["_network"] = lambda batch: network(pooled(batch)[:, :1]).expand(-1, 68, -1, -1)
    return fan


def test_heat_maps_are_decoded_to_a_fraction_of_a_pixel():
    places = np.random.default_rng(0).uniform(2, 61, (68, 2))
    np.testing.assert_allclose(decoded(gaussians(places)), places, atol=1e-3)
    corners = [(0, 0), (63, 63), (0, 20.3)]
    np.testing.assert_allclose(decoded(gaussians(corners)), corners, atol=1e-3)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_a_heat_map_without_a_peak_has_no_place(value):
    maps = gaussians([(20, 30)] * 3)
    maps[1] = value
    maps[2, 5, 5] = np.nan
    places = decoded(maps)
    np.testing.assert_allclose(places[0], (20, 30), atol=1e-3)
    assert np.isnan(places[1:]).all()


def test_missing_weights_say_what_to_put_where(weights, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    with pytest.raises(ValueError, match=WEIGHTS) as error:
        load_detector("fan")
    assert str(weights) in str(error.value)


def test_a_bright_spot_is_found_where_it_is(weights):
    """A network that answers with its own input: the crop, the map back and the decoding must agree."""
    weights.write_bytes(b"weights")
    fan = answering(Fan(), lambda maps: maps)
    assert fan.identity.startswith("fan-")
    ys, xs = np.mgrid[:300, :400]
    for x, y in ((150.0, 120.0), (171.3, 139.6)):
        frame = (255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * 5**2))).astype(np.uint8)
        points, following = fan.fit(frame, Face((90, 70, 210, 200), 0.9))
        assert points.shape == (68, 2) and points.dtype == np.float32 and following is None
        np.testing.assert_allclose(points, np.tile([x, y], (68, 1)), atol=0.15)
    assert "_network" not in vars(pickle.loads(pickle.dumps(fan)))


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_a_frame_without_a_peak_is_one_without_a_face(weights, portrait, nothing):
    """The network answers nothing to dim crops, in which the detector sees a face all the same."""
    weights.write_bytes(b"weights")
    fan = answering(Fan(), lambda maps: torch.where(maps.amax((1, 2, 3), keepdim=True) > 0.5, maps, nothing))
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    dim = gray // 2
    assert fan.fit(dim, fan.faces(dim)[0]) == (None, None)
    clips = [[gray, dim, gray], [dim], [gray]]
    found = track_clips(clips, fan)
    missed = [np.isnan(landmarks.points).all(axis=(1, 2)).tolist() for landmarks in found]
    assert missed == [[False, True, False], [True], [False]]
    for clip, landmarks in zip(clips, found, strict=True):
        np.testing.assert_allclose(landmarks.points, track(clip, fan).points, atol=1e-3)


def test_the_device_works_while_further_frames_are_detected(weights, portrait, monkeypatch):
    """The meta device has no data: whatever asks it for some fails, and only the result's way back does so."""
    monkeypatch.setattr("lipprep.stages.landmarks.fan.BATCH", 2)
    weights.write_bytes(b"weights")
    done = []
    fan = answering(Fan(device="meta"), lambda maps: done.append(len(maps)) or maps)
    faces = fan.faces
    monkeypatch.setattr(fan, "faces", lambda frame: done.append("detect") or faces(frame))
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        track_clips([[gray] * 3, [gray] * 2], fan)
    assert done == [*["detect"] * 2, 2, *["detect"] * 2, 2, "detect", 1]


def test_time_is_counted_by_part(weights, portrait, monkeypatch):
    """On a clock that goes on by 2 with each detection and by 30 with each batch."""
    now = [0]
    monkeypatch.setattr("lipprep.stages.stopwatch.time", SimpleNamespace(perf_counter=lambda: sum(now)))
    weights.write_bytes(b"weights")
    fan = answering(Fan(), lambda maps: now.append(30) or maps)
    faces = fan.faces
    monkeypatch.setattr(fan, "faces", lambda frame: now.append(2) or faces(frame))
    time_by_part()
    track_clips([[cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)] * 5], fan)
    parts = time_by_part()
    assert (parts["detect"], parts["fan"]) == (10, 60)
    monkeypatch.undo()
    time_by_part()  # back to the clock of the world


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
