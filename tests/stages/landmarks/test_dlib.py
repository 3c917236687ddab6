import importlib.util
import pickle

import cv2
import numpy as np
import pytest

from lipprep.stages.landmarks import load_detector


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dlib", None)
    with pytest.raises(ValueError, match=r"lipprep\[dlib\]"):
        load_detector("dlib")


@pytest.mark.skipif(importlib.util.find_spec("dlib") is None, reason="the extra dlib is not installed")
def test_it_agrees_with_the_mesh(portrait):
    pytest.importorskip("face_recognition_models")
    gray = cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY)
    detector, mesh = pickle.loads(pickle.dumps(load_detector("dlib"))), load_detector("mesh")
    assert detector.identity.startswith("dlib-")
    (face,) = detector.faces(gray)
    assert 0 < face.score < 1
    points, following = detector.fit(gray, face)
    expected, _ = mesh.fit(gray, mesh.faces(gray)[0])
    assert points.shape == (68, 2) and points.dtype == np.float32 and following is None
    assert np.linalg.norm(points - expected, axis=1)[17:].mean() < 6
