"""From any video to the likeliest words: the whole chain that made the training crops, on one window.

Shapes: T frames, S side of a crop in pixels, C words (classes).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lipprep.stages.crop import CropParameters, Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.held import HeldPath
from lipprep.stages.landmarks import Detector, load_detector, track
from lipprep.stages.remote import RemotePath
from lipprep.stages.video import probe, read_frames
from lipprep.train.augment import eval_batch
from lipprep.train.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from lipprep.train.config import config_from
from lipprep.train.device import choose_device, load_model, reading
from lipprep.train.draws import AugmentOptions
from lipprep.train.errors import explained
from lipprep.train.metrics import warn

_LESS = "end what else runs there, or use --device cpu"  # memory
WINDOW = 29  # frames: a clip of LRW, 1.16 seconds


@dataclass(frozen=True)
class Reader:
    """A model, and what it needs to see a video as it saw its training clips.

    `face` is the mean face (68, 2) that the clips were aligned to, None for the published one.
    """

    model: torch.nn.Module
    labels: list[str]
    fps: float
    crop: CropParameters
    face: np.ndarray | None
    options: AugmentOptions
    detector: Detector
    device: torch.device
    precision: str

    def read(self, video: Path | RemotePath, *, count: int) -> list[tuple[str, float]]:
        """The `count` likeliest words and their probabilities, the likeliest first.

        Raises ClipFailure where the video cannot be read, or shows no face, and RemoteError as its store does.
        """
        if isinstance(video, RemotePath):
            video = HeldPath(video)  # which is read more than once
        frames = centre_frames(video, fps=self.fps, num_frames=WINDOW)
        points = track(frames, self.detector).points if self.crop.needs_landmarks else None
        if self.crop.exact:
            frames = centre_frames(video, fps=self.fps, num_frames=WINDOW, color=True)
        (crop,) = crop_clips(frames, [Window(None, len(frames), points)], self.crop, face=self.face)
        if isinstance(crop, ClipFailure):
            raise crop
        lengths_B = torch.tensor([len(crop.mouth)])
        video_BTSS = torch.from_numpy(crop.mouth)[None].to(self.device)
        with torch.inference_mode(), reading(self.device, self.precision), explained(_LESS):
            x_B1TSS = eval_batch(video_BTSS, lengths_B, self.options)
            logits_C = self.model(x_B1TSS, lengths_B.to(self.device))[0]
        best = logits_C.float().softmax(0).topk(min(count, len(self.labels)))
        words = [self.labels[i] for i in best.indices.tolist()]
        return list(zip(words, best.values.tolist(), strict=True))


def load_reader(run: Path, *, device: str = "auto") -> Reader:
    """The reader of a run folder (its best.pt) or a checkpoint file.

    Raises ValueError where there is none, or it does not say which mean face its clips were aligned to, or which box
    they were cut with.
    """
    path = find_checkpoint(run)
    reader = reader_of(load_checkpoint(path), path, device=device)
    if reader.model.boundary is not None:
        warn(
            "the model was trained to be told where a word begins and ends, which of a video is not known: its "
            "accuracy is the one that `lipprep evaluate` gives without word boundaries"
        )
    return reader


def reader_of(checkpoint: Checkpoint, path: Path, *, device: str) -> Reader:
    """The reader of a checkpoint that was read from `path`; what it raises is what `load_reader` does."""
    parameters = checkpoint.parameters
    config = config_from(checkpoint.config)
    where = choose_device(device)
    known = {f.name for f in dataclasses.fields(CropParameters)}
    given = {name: value for name, value in parameters.items() if name in known and value is not None}
    if "box" in given:
        given["box"] = tuple(given["box"])
    elif checkpoint.profile == "fixed":
        raise ValueError(
            f"{path} was trained on crops of profile fixed, but does not hold the box that they were cut with: pack "
            "them again, `lipprep shards --from-crops DIR --profile fixed --box X,Y,W,H`, and train again on those"
        )
    crop = CropParameters(**given)
    detector = load_detector("mesh")
    face = parameters.get("mean_face")
    if crop.needs_landmarks and isinstance(face, str):
        raise ValueError(
            f"{path} was trained on crops aligned to a mean face of its own, but holds only that face's digest: "
            "make the shards and train again, or predict with a model trained on the published mean face"
        )
    trained_with = parameters.get("identity") or parameters.get("detector")
    if crop.needs_landmarks and trained_with not in (None, "mesh", detector.identity):
        warn(
            f"the model was trained on crops by landmarks of {trained_with}, and reads here by those of "
            f"{detector.identity}: its answers may be worse for it"
        )
    with explained(_LESS):
        model = load_model(checkpoint, where)
    return Reader(
        model=model,
        labels=checkpoint.labels,
        fps=checkpoint.fps,
        crop=crop,
        face=np.array(face, np.float64) if crop.needs_landmarks and face is not None else None,
        options=config.augment,
        detector=detector,
        device=where,
        precision=config.precision,
    )


def centre_frames(video: Path | RemotePath, *, fps: float, num_frames: int, color: bool = False) -> list:
    """The middle `num_frames` frames of a video taken at `fps`, as `read_frames` has them; all of a shorter one.

    Raises ClipFailure where the video cannot be read or has no frames.
    """
    for total in (lambda: round(probe(video).duration * fps), lambda: sum(1 for _ in read_frames(video, fps=fps))):
        length = total()
        first = max(0, (length - num_frames) // 2)
        frames = list(read_frames(video, fps=fps, first=first, last=first + min(length, num_frames), color=color))
        # A header that promises too much is found out here, and the frames are counted.
        if frames and len(frames) == min(length, num_frames):
            return frames
    raise ClipFailure("unreadable", f"{video} has no frames")
