"""Landmarks from dlib's 68-point shape predictor (Kazemi and Sullivan 2014) on faces of its HOG detector.

The predictor's weights were trained on 300-W, whose licence excludes commercial use. Its points are whole
pixels, and so less steady than those of the embedded detector.
"""

import math
from functools import cached_property
from pathlib import Path

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.landmarks.detector import Face, weights_identity


class Dlib:
    """The detector `dlib`. Raises ValueError where its packages are not installed."""

    name = "dlib"

    def __init__(self) -> None:
        try:
            import dlib
            import face_recognition_models
        except ImportError as error:
            raise UserError(
                f'the detector dlib needs packages that are missing ({error}): pip install "lipprep[dlib]"'
            ) from error
        self._dlib = dlib
        self._weights = Path(face_recognition_models.pose_predictor_model_location())

    def __reduce__(self):
        return type(self), ()  # neither a module nor dlib's objects can be pickled

    @property
    def identity(self) -> str:
        return weights_identity("dlib", self._weights)

    @cached_property
    def _hog(self):
        return self._dlib.get_frontal_face_detector()

    @cached_property
    def _predictor(self):
        return self._dlib.shape_predictor(str(self._weights))

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of a gray frame (H, W) uint8; faces under 80 pixels are looked for only if no other is."""
        for upsample in (0, 1):
            boxes, scores, _ = self._hog.run(frame, upsample, 0.0)
            if boxes:
                break
        return [
            Face((box.left(), box.top(), box.right() + 1, box.bottom() + 1), 1 / (1 + math.exp(-score)))
            for box, score in zip(boxes, scores, strict=True)
        ]

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray, None]:
        """Give the 68 points (68, 2) float32 in pixels; every frame is detected anew, so no next face."""
        x0, y0, x1, y1 = (round(side) for side in face.box)
        shape = self._predictor(frame, self._dlib.rectangle(x0, y0, x1 - 1, y1 - 1))
        return np.array([(point.x, point.y) for point in shape.parts()], np.float32), None
