"""Landmarks from the two networks inside the package: MediaPipe's BlazeFace and Face Mesh (Apache-2.0).

BlazeFace (short range) finds faces in a 128x128 picture of the frame; Face Mesh v2 gives 478 points in a
256x256 patch round one face. A face is detected once and then tracked: the region of the next frame comes
from the points of this one. 68 of the 478 points stand for the iBUG-68 ones. Those of the eyes, brows, nose
and lips are the same places; the jaw's are not (they lie 13-16 % of the inter-ocular distance apart).
"""

import contextlib
import math
import os
from collections.abc import Iterator
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

from lipprep.stages.landmarks.detector import Face, Region, weights_identity

# Mesh vertices at the iBUG-68 places.
# fmt: off
IBUG_68 = np.array([
    34, 227, 177, 215, 138, 136, 149, 148, 152, 377, 378, 365, 367, 435, 401, 447, 264,  # jaw
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # brows
    168, 197, 195, 4, 240, 97, 2, 326, 460,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 40, 37, 0, 267, 270, 291, 405, 314, 17, 84, 181,  # outer lip
    78, 82, 13, 312, 308, 317, 14, 87,  # inner lip
])
# fmt: on
EYE_CORNERS = (33, 263)  # the outer ones: they level the tracked region

DETECTOR_SIZE = 128
MESH_SIZE = 256
MIN_SCORE = 0.5
MIN_SCORE_LOW = 0.3  # for faces that fill the frame, which BlazeFace scores at 0.46-0.58
BORDER = 1 / 6  # of the frame's side, replicated round it for such faces
MAX_IOU = 0.3
MIN_PRESENCE = 0.5
REGION_SCALE = 1.5  # of the larger side of the face's box, for both kinds of region (MediaPipe's graphs)


def network_file(name: str) -> Path:
    return Path(str(files("lipprep.stages") / "data" / f"{name}.tflite"))


def _anchors() -> np.ndarray:
    """Give BlazeFace's 896 anchor centres (896, 2), x and y in 0..1: two a cell of 16x16, six of 8x8."""
    grids = []
    for cells, per_cell in ((16, 2), (8, 6)):
        ys, xs = np.mgrid[:cells, :cells]
        centres = (np.stack([xs, ys], axis=-1).reshape(-1, 2) + 0.5) / cells
        grids.append(np.repeat(centres, per_cell, axis=0))
    return np.concatenate(grids).astype(np.float32)


ANCHORS = _anchors()


@contextlib.contextmanager
def _no_greeting() -> Iterator[None]:
    """Send away what LiteRT's C++ says of its delegate on stderr, in the midst of progress bars; no option does."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Network:
    """A tflite network of one square float input on one thread, fed with gray pictures: gray * scale + offset.

    XNNPACK, the interpreter's default delegate, makes it more than twice as fast; OpResolverType.AUTO is
    named so that this does not hang on a default.
    """

    def __init__(self, name: str, scale: float, offset: float) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        with _no_greeting():
            self._interpreter = Interpreter(
                model_path=str(network_file(name)),
                num_threads=1,
                experimental_op_resolver_type=OpResolverType.AUTO,
            )
            self._interpreter.allocate_tensors()
        details = self._interpreter.get_input_details()[0]
        self._input = self._interpreter.tensor(details["index"])
        self._outputs = [details["index"] for details in self._interpreter.get_output_details()[:2]]
        self._levels = np.arange(256, dtype=np.float32) * np.float32(scale) + np.float32(offset)
        # An invocation leaves the caches to the network's weights: what comes between two of them costs the less, the
        # fewer arrays it touches and calls it makes.
        self._values = np.empty(details["shape"][1:3], np.float32)

    def __call__(self, gray: np.ndarray) -> list[np.ndarray]:
        """Run on a gray picture, the same in all three channels; give copies of the first two outputs."""
        cv2.LUT(gray, self._levels, self._values)
        # Straight into the tensor, of which no view may outlive this line: invoke() refuses.
        cv2.cvtColor(self._values, cv2.COLOR_GRAY2BGR, self._input()[0])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -80), 80)))


class Mesh:
    """The embedded detector. It can be pickled; each copy starts interpreters of its own when first used."""

    name = "mesh"

    @property
    def identity(self) -> str:
        return weights_identity("mesh", network_file("face_landmarks_detector"))

    def __getstate__(self) -> dict:
        return {}  # interpreters survive neither pickling nor another thread

    @cached_property
    def _detector(self) -> _Network:
        return _Network("face_detector", 1 / 127.5, -1)

    @cached_property
    def _mesh(self) -> _Network:
        return _Network("face_landmarks_detector", 1 / 255, 0)

    @cached_property
    def _patch(self) -> np.ndarray:
        return np.empty((MESH_SIZE, MESH_SIZE), np.uint8)

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of a gray frame (H, W) uint8, best score first.

        Faces that score less than 0.5 count only where there is none above: they are looked for in the
        frame with a replicated border, then in the frame as it is, down to 0.3.
        """
        boxes, scores = self._candidates(frame)
        faces = _merge(boxes, scores, MIN_SCORE)
        if not faces:
            dy, dx = (round(side * BORDER) for side in frame.shape)
            bordered = cv2.copyMakeBorder(frame, dy, dy, dx, dx, cv2.BORDER_REPLICATE)
            wide_boxes, wide_scores = self._candidates(bordered)
            wide_boxes -= np.array([dx, dy], np.float32)
            faces = _merge(wide_boxes, wide_scores, MIN_SCORE_LOW) or _merge(boxes, scores, MIN_SCORE_LOW)
        return faces

    def _candidates(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give those of 896 candidates that score at least 0.3: points (K, 8, 2) in pixels, and scores (K,).

        The points are two corners of the box and six key points.
        """
        height, width = frame.shape
        side = max(height, width)
        size = (max(1, round(width * DETECTOR_SIZE / side)), max(1, round(height * DETECTOR_SIZE / side)))
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        left, top = (DETECTOR_SIZE - size[0]) // 2, (DETECTOR_SIZE - size[1]) // 2
        letterbox = np.zeros((DETECTOR_SIZE, DETECTOR_SIZE), np.uint8)
        letterbox[top : top + size[1], left : left + size[0]] = small
        regressors, logits = self._detector(letterbox)
        scores = 1 / (1 + np.exp(-logits[0, :, 0].clip(-80, 80)))
        kept = np.flatnonzero(scores >= MIN_SCORE_LOW)
        # raw: (K, 8, 2), in the network's pixels: box centre and box size, then offsets of key points
        raw = regressors[0, kept].reshape(-1, 8, 2)
        points = raw + ANCHORS[kept, None] * DETECTOR_SIZE
        half = raw[:, 1] / 2
        centre = points[:, 0].copy()
        points[:, 0], points[:, 1] = centre - half, centre + half
        points = (points - np.array([left, top], np.float32)) * (
            np.array([width, height], np.float32) / np.array(size, np.float32)
        )
        return points, scores[kept]

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray | None, Face | None]:
        """Give the 68 points (68, 2) float32 in pixels and the tracked face, or (None, None) without a face.

        A detection's region is coarse: for such a face the network runs twice, the second time on the
        region of its own points.
        """
        assert face.region is not None
        for _ in range(1 if face.tracked else 2):
            points, presence = self._points(frame, face.region)
            if presence < MIN_PRESENCE:
                return None, None
            face = _tracked(points, presence)
        return points.T[IBUG_68], face

    def _points(self, frame: np.ndarray, region: Region) -> tuple[np.ndarray, float]:
        """Give the 478 points (2, 478) float32 in pixels of the frame, and the probability of a face."""
        scale, half = region.side / MESH_SIZE, MESH_SIZE / 2
        cos, sin = scale * math.cos(region.angle), scale * math.sin(region.angle)
        # to_frame: pixels of the 256x256 patch -> pixels of the frame
        to_frame = np.array(
            [[cos, -sin, region.x - half * (cos - sin)], [sin, cos, region.y - half * (sin + cos)]], np.float64
        )
        cv2.warpAffine(
            frame,
            to_frame,
            (MESH_SIZE, MESH_SIZE),
            self._patch,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        vertices, logit = self._mesh(self._patch)
        xy1 = vertices.reshape(-1, 3)
        xy1[:, 2] = 1
        return (to_frame @ xy1.T).astype(np.float32), _sigmoid(logit.item())


def _merge(points: np.ndarray, scores: np.ndarray, min_score: float) -> list[Face]:
    """Merge overlapping candidates into faces: BlazeFace's weighted non-maximum suppression.

    Each group is averaged by score, and takes the score of its best (Bazarevsky et al. 2019, "BlazeFace").
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= min_score]
    points, scores = points[order], scores[order]
    faces = []
    while len(scores):
        low, high = points[:, 0], points[:, 1]
        common = np.clip(np.minimum(high, high[0]) - np.maximum(low, low[0]), 0, None).prod(axis=1)
        areas = (high - low).prod(axis=1)
        same = common > MAX_IOU * (areas + areas[0] - common)
        same[0] = True
        merged = np.average(points[same], axis=0, weights=scores[same])
        faces.append(_detected(merged, float(scores[0])))
        points, scores = points[~same], scores[~same]
    return faces


def _detected(points: np.ndarray, score: float) -> Face:
    """Make a face of two box corners and six key points (the first two are the eyes), (8, 2) pixels."""
    low, high = points[0], points[1]
    x, y = (low + high) / 2
    dx, dy = points[3] - points[2]
    region = Region(float(x), float(y), REGION_SCALE * float((high - low).max()), float(np.arctan2(dy, dx)))
    return Face((*map(float, low), *map(float, high)), score, region)


def _tracked(points: np.ndarray, presence: float) -> Face:
    """Make the face to look for next of the points (2, 478): their bounding box in the frame levelled by the eyes."""
    dx, dy = points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]
    angle = float(np.arctan2(dy, dx))
    cos, sin = math.cos(angle), math.sin(angle)
    levelled = np.array([[cos, sin], [-sin, cos]], np.float32) @ points
    low, high = levelled.min(axis=1), levelled.max(axis=1)
    u, v = ((low + high) / 2).tolist()
    region = Region(cos * u - sin * v, sin * u + cos * v, REGION_SCALE * float((high - low).max()), angle)
    return Face((*points.min(axis=1).tolist(), *points.max(axis=1).tolist()), presence, region, True)
