"""Landmarks from FAN (Bulat and Tzimiropoulos 2017, "How far are we from solving the 2D & 3D face alignment
problem?"), the network of the face-alignment package.

Faces come from the embedded BlazeFace, and are cropped as face-alignment crops its own detectors' boxes. Its
points are whole heat map pixels and a quarter; ours are the maximum of a Gaussian through the neighbours of
the peak. One face takes about a third of a second on a CPU core: this detector wants a GPU, where it crops and
decodes too, and runs the network in half precision, a batch of frames while the next ones are looked through for faces.

Tested on the CPU, on the network with random weights and on drawn heat maps: the published weights are not part of
this package, and it has never been run on a GPU.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.landmarks.batch import CLIPS_AT_ONCE
from lipprep.stages.landmarks.detector import Face, weights_identity
from lipprep.stages.landmarks.mesh import Mesh
from lipprep.stages.landmarks.track import ClipLandmarks, track
from lipprep.stages.stopwatch import spent

if TYPE_CHECKING:
    import torch

WEIGHTS = "2DFAN4-11f355bf06.pth.tar"
WEIGHTS_URL = f"https://www.adrianbulat.com/downloads/python-fan/{WEIGHTS}"
CROP_SIZE = 256
HEATMAP_SIZE = 64
# face-alignment's own: pixels of the crop's side for each unit of width + height, and the shift upwards.
SIDE_SCALE = 200 / 195
SHIFT_UP = 0.12
BATCH = 128  # crops; in half precision about three gigabytes of activations
CPU_BATCH = 4  # a CPU gains nothing by more


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
        self.clips_at_once = 1 if device == "cpu" else CLIPS_AT_ONCE  # which a CPU gains nothing by
        self.weights = weights_path()
        if not self.weights.is_file():
            raise UserError(
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
    def _network(self) -> "torch.nn.Module":  # (N, 3, 256, 256) in 0..1 -> stages of (N, 68, 64, 64)
        import torch
        from face_alignment import FaceAlignment, LandmarksType

        # compile needs a C++ compiler; `folder` is the one detector that loads no weights of its own. On the CPU first:
        # for CUDA it would have cudnn choose its algorithms by timing, for the whole process.
        loaded = FaceAlignment(
            LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False, face_detector="folder"
        )
        return loaded.face_alignment_net.to(self.device, self._dtype, memory_format=torch.channels_last)

    @property
    def _dtype(self) -> "torch.dtype":
        import torch

        return torch.float16 if torch.device(self.device).type == "cuda" else torch.float32

    def faces(self, frame: np.ndarray) -> list[Face]:
        """Give every face of a gray frame (H, W) uint8."""
        return self._blazeface.faces(frame)

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray | None, None]:
        """Give the 68 points (68, 2) float32 in pixels, None where the network sees no face.

        Every frame is detected anew, so no next face.
        """
        from lipprep.stages.landmarks.patches import inference

        with inference():
            points = self._fit_batch([(frame, face)])[0].cpu().numpy()
        return (None if np.isnan(points).any() else points), None

    def track_clips(self, clips: Sequence[Sequence[np.ndarray]]) -> list[ClipLandmarks]:
        """Give what `track` gives for each clip, gray frames (H, W) uint8; the network sees many frames at once.

        A clip with a frame in which the network sees no face is done again by `track` itself, as such a frame bears
        on which face is chosen later.
        """
        import torch

        from lipprep.stages.landmarks.patches import inference

        with inference():
            queue = _Queue(self, CPU_BATCH if torch.device(self.device).type == "cpu" else BATCH)
            tracked = [track(clip, queue) for clip in clips]
            with spent(self.name):
                points = queue.collect()
        for index, clip in enumerate(tracked):
            chosen = np.isfinite(clip.points).all(axis=(1, 2))
            clip.points[chosen], points = np.split(points, [chosen.sum()])
            if np.isnan(clip.points[chosen]).any():
                tracked[index] = track(clips[index], self)
        return tracked

    def _fit_batch(self, found: list[tuple[np.ndarray, Face]]) -> "torch.Tensor":
        """Give the points (N, 68, 2) float32 of faces, each in its frame, NaN where the network draws no peak.

        They are on the device, which may not have begun to compute them.
        """
        import torch

        from lipprep.stages.landmarks.patches import DeviceFrames, upload

        x0, y0, x1, y1 = np.array([face.box for _, face in found]).T
        width, height = x1 - x0, y1 - y0
        step = SIDE_SCALE * (width + height) / CROP_SIZE  # pixels of the frame for each of the crop
        middle = np.stack([(x0 + x1) / 2, (y0 + y1) / 2 - SHIFT_UP * height], axis=1)
        corner = middle - step[:, None] * CROP_SIZE / 2
        # Pixel centres lie half a pixel from the corners of both pictures.
        to_frame = np.concatenate(
            [step[:, None, None] * np.eye(2), (corner + step[:, None] / 2 - 0.5)[:, :, None]], axis=2
        )
        frames = DeviceFrames([frame for frame, _ in found], self.device)
        on_device = upload(to_frame.astype(np.float32), self.device)
        crops = frames.patches(slice(None), on_device, CROP_SIZE, replicate=False).div(255)
        rgb = crops[:, None].expand(-1, 3, -1, -1).to(self._dtype, memory_format=torch.channels_last)
        output = self._network(rgb)
        heatmaps = (output[-1] if isinstance(output, list) else output).float()
        places = (decode_heatmaps(heatmaps) + 0.5) * (CROP_SIZE / HEATMAP_SIZE) - 0.5
        return places * on_device[:, :1, :1] + on_device[:, None, :, 2]


class _Queue:
    """A detector that queues the faces that `track` chooses for the device, a batch at a time; zeros are its points."""

    def __init__(self, fan: Fan, batch: int) -> None:
        self.name, self.identity, self.faces = fan.name, fan.identity, fan.faces
        self._fit_batch, self._batch = fan._fit_batch, batch
        self._waiting: list[tuple[np.ndarray, Face]] = []
        self._points: list[torch.Tensor] = []

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray, None]:
        self._waiting.append((frame, face))
        if len(self._waiting) == self._batch:
            self._launch()
        return np.zeros((68, 2), np.float32), None

    def _launch(self) -> None:
        self._points.append(self._fit_batch(self._waiting))
        self._waiting = []

    def collect(self) -> np.ndarray:
        """Give the points (N, 68, 2) of all faces; the host waits for the device here alone."""
        import torch

        if self._waiting:
            self._launch()
        return torch.cat(self._points).cpu().numpy() if self._points else np.empty((0, 68, 2), np.float32)


def decode_heatmaps(heatmaps: "torch.Tensor") -> "torch.Tensor":
    """Give the peak of each heat map (N, P, H, W) as x, y in its pixels (N, P, 2), to a fraction of one.

    Through the logarithms of the highest pixel and its two neighbours goes a parabola, in x and in y: exact
    for the Gaussians that the network was trained to draw. A peak on the border keeps that coordinate. NaN where there
    is no peak: in a map that is nowhere above 0, or not all of numbers.
    """
    import torch

    height, width = heatmaps.shape[2:]
    flat = heatmaps.flatten(2)
    index = flat.argmax(dim=2)
    y, x = index // width, index % width

    def log_at(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        return flat.gather(2, place[..., None])[..., 0].maximum(floor).log()

    def offset(before: torch.Tensor, after: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        curvature = before - 2 * peak + after
        curved = inner & (curvature <= -1e-9)
        return torch.where(curved, (before - after) / torch.where(curved, 2 * curvature, 1), 0)

    highest = flat.amax(dim=2)
    floor = highest.clamp(min=1e-6) * 1e-3
    peak = log_at(y, x)
    dx = offset(log_at(y, x - 1), log_at(y, x + 1), (x > 0) & (x < width - 1))
    dy = offset(log_at(y - 1, x), log_at(y + 1, x), (y > 0) & (y < height - 1))
    drawn = (highest > 0) & highest.isfinite()
    return torch.where(drawn[..., None], torch.stack([x + dx, y + dy], dim=-1), torch.nan)
