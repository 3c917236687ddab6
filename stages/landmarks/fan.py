"""Landmarks from FAN (Bulat and Tzimiropoulos 2017, "How far are we from solving the 2D & 3D face alignment
problem?"), the network of the face-alignment package.

Faces come from the embedded BlazeFace, and are cropped as face-alignment crops its own detectors' boxes. Its
points are whole heat map pixels and a quarter; ours are the maximum of a Gaussian through the neighbours of
the peak. Tested on the network with random weights and on drawn heat maps: the published weights are not
part of this package. One face takes about a third of a second on a CPU core: this detector wants a GPU.
"""

import os
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from lipprep.stages.landmarks.detector import Face, weights_identity
from lipprep.stages.landmarks.mesh import Mesh

WEIGHTS = "2DFAN4-11f355bf06.pth.tar"
WEIGHTS_URL = f"https://www.adrianbulat.com/downloads/python-fan/{WEIGHTS}"
CROP_SIZE = 256
HEATMAP_SIZE = 64
# face-alignment's own: pixels of the crop's side for each unit of width + height, and the shift upwards.
SIDE_SCALE = 200 / 195
SHIFT_UP = 0.12


def weights_path() -> Path:
    """Give the file where torch.hub, and so face-alignment, looks for the weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    home = Path(os.environ.get("TORCH_HOME", cache)).expanduser()
    return home / "hub" / "checkpoints" / WEIGHTS


class Fan:
    """The detector `fan`. Raises ValueError where its weights are missing; nothing is ever downloaded."""

    name = "fan"

    def __init__(self, *, device: str = "cpu") -> None:
        self.device = device
        self.weights = weights_path()
        if not self.weights.is_file():
            raise ValueError(
                f"the detector fan needs its weights: put {WEIGHTS} ({WEIGHTS_URL}, 96 MB) at {self.weights}, "
                "or use the detector mesh, which needs nothing"
            )
        self._blazeface = Mesh()

    @property
    def identity(self) -> str:
        return weights_identity("fan", self.weights)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_network"}

    @cached_property
    def _network(self):  # a torch module: (N, 3, 256, 256) float32 in 0..1 -> (N, 68, 64, 64)
        from face_alignment import FaceAlignment, LandmarksType

        # compile needs a C++ compiler; `folder` is the one detector that loads no weights of its own.
        loaded = FaceAlignment(
            LandmarksType.TWO_D, device=self.device, flip_input=False, compile=False, face_detector="folder"
        )
        return loaded.face_alignment_net

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of a gray frame (H, W) uint8."""
        return self._blazeface.faces(frame)

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray, None]:
        """Give the 68 points (68, 2) float32 in pixels; every frame is detected anew, so no next face."""
        import torch

        x0, y0, x1, y1 = face.box
        width, height = x1 - x0, y1 - y0
        step = SIDE_SCALE * (width + height) / CROP_SIZE  # pixels of the frame for each of the crop
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2 - SHIFT_UP * height])
        corner = middle - step * CROP_SIZE / 2
        # Pixel centres lie half a pixel from the corners of both pictures.
        to_frame = np.column_stack([step * np.eye(2), corner + step / 2 - 0.5])
        crop = cv2.warpAffine(frame, to_frame, (CROP_SIZE,) * 2, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        batch = torch.from_numpy(crop).to(self.device).float().div(255).expand(1, 3, -1, -1)
        with torch.inference_mode():
            output = self._network(batch)
        heatmaps = (output[-1] if isinstance(output, list) else output)[0].float().cpu().numpy()
        points = (decode_heatmaps(heatmaps) + 0.5) * (CROP_SIZE / HEATMAP_SIZE)
        return (points * step + corner - 0.5).astype(np.float32), None


def decode_heatmaps(heatmaps: np.ndarray) -> np.ndarray:
    """Give the peak of each heat map (N, H, W) as x, y in its pixels (N, 2), to a fraction of one.

    Through the logarithms of the highest pixel and its two neighbours goes a parabola, in x and in y: exact
    for the Gaussians that the network was trained to draw. A peak on the border keeps that coordinate.
    """
    count, height, width = heatmaps.shape
    index = np.arange(count)
    y, x = np.unravel_index(heatmaps.reshape(count, -1).argmax(axis=1), (height, width))
    floor = np.maximum(heatmaps[index, y, x], 1e-6)[:, None, None] * 1e-3
    logs = np.log(np.maximum(heatmaps, floor))

    def offset(before: np.ndarray, peak: np.ndarray, after: np.ndarray) -> np.ndarray:
        curvature = before - 2 * peak + after
        flat = curvature > -1e-9
        return np.where(flat, 0, (before - after) / np.where(flat, 1, 2 * curvature))

    peak = logs[index, y, x]
    inner_x, inner_y = (x > 0) & (x < width - 1), (y > 0) & (y < height - 1)
    left, right = np.maximum(x - 1, 0), np.minimum(x + 1, width - 1)
    up, down = np.maximum(y - 1, 0), np.minimum(y + 1, height - 1)
    dx = np.where(inner_x, offset(logs[index, y, left], peak, logs[index, y, right]), 0)
    dy = np.where(inner_y, offset(logs[index, up, x], peak, logs[index, down, x]), 0)
    return np.stack([x + dx, y + dy], axis=1)
