"""The detector `mesh` on a torch device: the clips of a batch are tracked side by side, a frame of each at a time.

BlazeFace stays on the CPU, where it looks at every 12th frame. Everything between two frames of a clip (patch,
network, the next region) happens on the device. The host waits for it once a batch, and looks for faces in the later
frames first. Tested on the CPU as a torch device; it has never been run on a GPU.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from lipprep.stages.landmarks.batch import CLIPS_AT_ONCE
from lipprep.stages.landmarks.detector import Face, choose_face
from lipprep.stages.landmarks.facemesh import FaceMesh
from lipprep.stages.landmarks.mesh import (
    EYE_CORNERS,
    IBUG_68,
    MESH_SIZE,
    MIN_PRESENCE,
    REGION_SCALE,
    Mesh,
    network_file,
)
from lipprep.stages.landmarks.patches import DeviceFrames, inference, upload
from lipprep.stages.landmarks.track import COUNT_EVERY, ClipLandmarks, track
from lipprep.stages.stopwatch import spent

_MOST_CLIPS = 128  # bounds what the device holds beside the frames: about a gigabyte


class TorchMesh(Mesh):
    """The detector `mesh`, which tracks many clips at once on a torch device.

    The network alone agrees with LiteRT to 0.0004 pixels of its patch, and in the same region the points are those of
    `Mesh` to 0.01 pixels: so it has its name and identity. Over a clip, where every region comes from the points
    before, they are 0.02 pixels apart in the mean, and 0.17 at most (0.67 in frames 2600 pixels wide); points of `Mesh`
    itself move as far when one pixel of the first frame changes by one gray level. A clip's points do not depend on the
    other clips, but for the last digits. `faces` and `fit` are those of `Mesh`, on the CPU.
    """

    clips_at_once = CLIPS_AT_ONCE

    def __init__(self, *, device: str) -> None:
        self.device = device

    def __getstate__(self) -> dict:
        return {"device": self.device}

    @cached_property
    def _network(self) -> FaceMesh:
        return FaceMesh(network_file("face_landmarks_detector")).to(self.device)

    def track_clips(self, clips: Sequence[Sequence[np.ndarray]]) -> list[ClipLandmarks]:
        """Give what `track` gives for each clip, gray frames (H, W) uint8.

        A clip in which `track` would do more than follow one face from its first frame (none there, one lost, one
        that a detection contradicts) is done again by `track` itself.
        """
        with spent("detect"):
            seen = {index: faces for index, clip in enumerate(clips) if len(clip) and (faces := self.faces(clip[0]))}
        found: dict[int, ClipLandmarks] = {}
        order = sorted(seen, key=lambda index: -len(clips[index]))
        for start in range(0, len(order), _MOST_CLIPS):
            batch = {index: clips[index] for index in order[start : start + _MOST_CLIPS]}
            with spent(self.name), inference():
                faces = [choose_face(seen[index], clip[0].shape, None) for index, clip in batch.items()]
                table = self._follow(list(batch.values()), faces)
            with spent("detect"):  # meanwhile the device is at work
                later = [[self.faces(frame) for frame in clip[COUNT_EVERY::COUNT_EVERY]] for clip in batch.values()]
            with spent(self.name):
                followed = np.split(table.cpu().numpy(), np.cumsum([len(clip) for clip in batch.values()])[:-1])
            for (index, clip), rows, faces in zip(batch.items(), followed, later, strict=True):
                points, boxes, presence = rows[:, :136].reshape(-1, 68, 2), rows[:, 136:140], rows[:, 140]
                if presence.min() >= MIN_PRESENCE and _confirmed(boxes, faces, clip):
                    found[index] = ClipLandmarks(points, max(map(len, [seen[index], *faces])))
        return [found[index] if index in found else track(clip, self) for index, clip in enumerate(clips)]

    def _follow(self, clips: list[Sequence[np.ndarray]], faces: list[Face]) -> torch.Tensor:
        """Follow the faces through clips, the longest first, whatever is there.

        Gives a row (141,) for each frame, clip after clip: its 68 points, the box of all points, the presence of a
        face. They are on the device, which may not have begun to compute them.
        """
        lengths = np.array([len(clip) for clip in clips])
        running = [int((lengths > t).sum()) for t in range(lengths[0])]
        frames = DeviceFrames([clip[t] for t, count in enumerate(running) for clip in clips[:count]], self.device)
        # regions: (N, 4), x, y, side and angle, of the clips that go on
        regions = upload(np.array([face.region for face in faces], np.float32), self.device)
        kept = upload(IBUG_68, self.device)
        rows, start = [], 0
        for t, count in enumerate(running):
            regions = regions[:count]
            presence = torch.ones(count, device=regions.device)
            for _ in range(2 if t == 0 else 1):  # as in Mesh.fit
                points, logits = self._fit_all(frames, slice(start, start + count), regions)
                presence = presence.minimum(logits.sigmoid())
                # Where there is no face the region stays, so that no coordinate runs away; `track` has the last word.
                regions = torch.where(presence[:, None] >= MIN_PRESENCE, _next_regions(points), regions)
            rows.append(torch.cat([points[:, kept].flatten(1), points.amin(1), points.amax(1), presence[:, None]], 1))
            start += count
        starts = np.cumsum(running) - running
        order = np.concatenate([starts[:length] + position for position, length in enumerate(lengths)])
        return torch.cat(rows)[upload(order, self.device)]

    def _fit_all(self, frames: DeviceFrames, which: slice, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the points (N, 478, 2) in pixels of the frames and the logits (N,) of a face: Mesh._points of many."""
        x, y, side, angle = regions.unbind(dim=1)
        scale = side / MESH_SIZE
        cos, sin = scale * angle.cos(), scale * angle.sin()
        half = MESH_SIZE / 2
        to_x = torch.stack([cos, -sin, x - half * (cos - sin)], dim=1)
        to_y = torch.stack([sin, cos, y - half * (sin + cos)], dim=1)
        patches = frames.patches(which, torch.stack([to_x, to_y], dim=1), MESH_SIZE, replicate=True)
        points, logits = self._network(patches / 255)
        return torch.stack([_mapped(points, to_x), _mapped(points, to_y)], dim=2), logits


def _mapped(points: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Give one coordinate (N, P) of points (N, P, 2) under a row (N, 3) of an affine map.

    Written out, as a device may do matrix products in fewer bits than pixels of a large frame have.
    """
    a, b, c = row[:, :, None].unbind(dim=1)
    return a * points[..., 0] + b * points[..., 1] + c


def _next_regions(points: torch.Tensor) -> torch.Tensor:
    """Give the regions (N, 4) of the next frame for points (N, 478, 2): those of mesh._tracked."""
    dx, dy = (points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]).unbind(dim=1)
    angle = torch.atan2(dy, dx)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (torch.stack([cos, sin, zero], dim=1), torch.stack([-sin, cos, zero], dim=1))
    levelled = torch.stack([_mapped(points, row) for row in rows], dim=2)
    low, high = levelled.amin(dim=1), levelled.amax(dim=1)
    u, v = ((low + high) / 2).unbind(dim=1)
    side = REGION_SCALE * (high - low).amax(dim=1)
    return torch.stack([cos * u - sin * v, sin * u + cos * v, side, angle], dim=1)


def _confirmed(boxes: np.ndarray, later: list[list[Face]], clip: Sequence[np.ndarray]) -> bool:
    """Whether each of the `later` detections overlaps the face that was followed until then, or saw none at all."""
    return all(
        not found or choose_face(found, clip[t].shape, Face(tuple(boxes[t - 1]), 1)) is not None
        for t, found in zip(range(COUNT_EVERY, len(clip), COUNT_EVERY), later, strict=True)
    )
