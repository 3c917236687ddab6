"""From any video to the likeliest words: the chain that made the training crops, on windows that slide over it.

A window is as long as the training clips usually were, and is cut and aligned by itself, as a training clip is: its
answer is the one that a clip of those frames would get. The landmarks of a video are found once, and no more of its
frames are held than a window has, so that a long video takes time alone.

A video that is shorter than a window is read as it is by a network that was trained on clips of many lengths
(`augment.variable_length`); for others its edge frames are repeated, as one length is all that they know.

Shapes: T frames, K points, S side of a crop in pixels, C words (classes).
"""

import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lipprep.io.errors import UserError
from lipprep.stages.crop import CropParameters, Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.held import HeldPath
from lipprep.stages.landmarks import Detector, load_detector, track
from lipprep.stages.landmarks.faces import FaceTrack, track_faces
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable
from lipprep.stages.video import SoundFrames, read_frames
from lipprep.train.augment import eval_batch
from lipprep.train.checkpoint import LRW_FRAMES, Checkpoint, find_checkpoint, load_checkpoint
from lipprep.train.config import config_from
from lipprep.train.device import choose_device, load_model, reading
from lipprep.train.draws import AugmentOptions
from lipprep.train.errors import explained
from lipprep.train.metrics import warn

_LESS = "end what else runs there, or use --device cpu"  # memory
STEP = 5  # frames from one window to the next, a fifth of a second
LONGEST = 24 * 3600 * 25  # frames of a video: a day, whose landmarks are a gigabyte
_JUMP = 0.5  # of the distance of the outer eye corners: no face moves so far from a frame to the next, but cuts do
_AT_ONCE = 16  # windows in one pass of the network: more are not faster

Words = tuple[tuple[str, float], ...]  # with their probabilities, the likeliest first


@dataclass(frozen=True)
class WindowReading:
    """What was read in the frames `start` to `stop` (exclusive) of a video, at the reader's frame rate.

    `known` is False where the likeliest word is less likely than the threshold: the reader abstains.
    """

    start: int
    stop: int
    words: Words
    known: bool


@dataclass(frozen=True)
class FaceReading:
    """One face of a video, and what was read from its lips.

    It is there from frame `start` on. `points_TKD` (T, 68, 2) float32 are its points in pixels of the source, NaN where
    it is not seen. `mouth_TSS` uint8 are the mouth crops of every `mouth_every`-th of its frames as they were read, in
    the window whose middle is nearest; black where none was, and without frames where none were asked for.
    """

    face: int
    start: int
    points_TKD: np.ndarray
    mouth_TSS: np.ndarray
    windows: tuple[WindowReading, ...]
    mouth_every: int = 1


class _Job(NamedTuple):
    """Frames `start` to `stop` of the video, to be read from a face."""

    stop: int
    face: int
    start: int


@dataclass
class _Face:
    """A face and what has been read from its lips so far."""

    track: FaceTrack
    every: int  # of which frames crops are kept
    mouth_TSS: np.ndarray
    windows: list[WindowReading] = field(default_factory=list)

    def add(self, window: WindowReading, mouth_TSS: np.ndarray) -> None:
        """Add a window later than those before, and its crops."""
        first = window.start
        for before in self.windows[-1:]:  # the frames beyond the middle between them
            first = max(first, (before.start + before.stop + first + window.stop) // 4)
        padding = (len(mouth_TSS) - (window.stop - window.start)) // 2
        for frame in range(first, window.stop):
            row, between = divmod(frame - self.track.start, self.every)
            if not between and row < len(self.mouth_TSS):
                self.mouth_TSS[row] = mouth_TSS[padding + frame - window.start]
        self.windows.append(window)


@dataclass(frozen=True)
class Reader:
    """A model, and what it needs to see a video as it saw its training clips.

    `face` is the mean face (68, 2) that the clips were aligned to, None for the published one. Logits are divided by
    `temperature`, so that probabilities say how often the reader is right; None where that was not measured. Below the
    probability `threshold` it abstains, None: never. Windows have `window` frames.
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
    temperature: float | None
    threshold: float | None
    window: int = LRW_FRAMES

    def read_video(
        self,
        video: Path | RemotePath,
        *,
        all_faces: bool = False,
        count: int = 5,
        step: int = STEP,
        mouth_every: int = 1,
        watched: Callable[[Iterable], Iterable] = iter,
    ) -> list[FaceReading]:
        """Read a video of any size, frame rate and length: one reading a face, the largest first.

        Without `all_faces` that is the one face that a clip is about: the largest and most central, and after a cut
        whoever is it then. Every `step` frames a window is read, and its `count` likeliest words are listed; not where
        the face is seen in less than half of its frames. Crops of every `mouth_every`-th frame are kept, of 0 none.
        The video is decoded twice, and its frames go through `watched`, a progress bar for example.

        A video that ends before it should, or is damaged, is read up to there, with a warning. Raises ClipFailure where
        nothing can be read or no face is shown, and RemoteError as its store does.
        """
        if isinstance(video, RemotePath):
            video = HeldPath(video)  # which is read more than once
        sound = SoundFrames(read_frames(video, fps=self.fps, longest=LONGEST))
        tracks = self._tracks(watched(sound), all_faces=all_faces)
        if sound.failure is not None and not tracks:
            raise sound.failure
        if not tracks:
            raise ClipFailure(
                "no_face",
                f"no face was found in {printable(video)}: one must be seen from the front, upright, and be no smaller "
                "than a 25th of the picture's larger side",
            )
        if sound.failure is not None:
            warn(f"{sound.failure}. It is read up to there")
        S, kept = self.crop.crop_size, mouth_every or sys.maxsize
        faces = [_Face(t, kept, np.zeros((-(-len(t.points_TKD) // kept), S, S), np.uint8)) for t in tracks]
        whole = read_frames(video, fps=self.fps, color=self.crop.exact, longest=LONGEST)
        frames = watched(SoundFrames(whole))
        for some in _in_rows(self._cut(frames, tracks, step, video)):
            read = self.words_of([mouth_TSS for _, mouth_TSS in some], count=count)
            for (job, mouth_TSS), words in zip(some, read, strict=True):
                window = WindowReading(job.start, job.stop, words, self.knows(words))
                faces[job.face].add(window, mouth_TSS)
        return [
            FaceReading(
                face=n,
                start=face.track.start,
                points_TKD=face.track.points_TKD,
                mouth_TSS=face.mouth_TSS if mouth_every else face.mouth_TSS[:0],
                windows=tuple(face.windows),
                mouth_every=mouth_every or 1,
            )
            for n, face in enumerate(faces)
        ]

    def crop_window(self, frames: Sequence, points_TKD: np.ndarray) -> np.ndarray:
        """The mouth crops (T, S, S) uint8 of one window, whose `frames` are as `read_frames` has them.

        Of a short one, edge frames are repeated where the network wants that. Raises ClipFailure where none can be cut.
        """
        points = points_TKD if self.crop.needs_landmarks else None
        (crop,) = crop_clips(frames, [Window(None, len(frames), points)], self.crop, face=self.face)
        if isinstance(crop, ClipFailure):
            raise crop
        missing = self.window - len(frames)
        if missing <= 0 or self.options.variable_length:
            return crop.mouth
        return np.pad(crop.mouth, ((missing // 2, missing - missing // 2), (0, 0), (0, 0)), mode="edge")

    def words_of(self, mouths: Sequence[np.ndarray], *, count: int) -> list[Words]:
        """The `count` likeliest words of mouth crops, (T, S, S) uint8 each; those of one length are read together."""
        words: dict[int, Words] = {}
        for T in {len(mouth_TSS) for mouth_TSS in mouths}:
            rows = [row for row, mouth_TSS in enumerate(mouths) if len(mouth_TSS) == T]
            video_BTSS = torch.from_numpy(np.stack([mouths[row] for row in rows])).to(self.device)
            lengths_B = torch.full((len(rows),), T)
            with torch.inference_mode(), reading(self.device, self.precision), explained(_LESS):
                x_B1TSS = eval_batch(video_BTSS, lengths_B, self.options)
                logits_BC = self.model(x_B1TSS, lengths_B.to(self.device)).float() / (self.temperature or 1.0)
            best = logits_BC.softmax(1).topk(min(count, len(self.labels)))
            for row, indices, values in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
                words[row] = tuple(zip([self.labels[i] for i in indices], values, strict=True))
        return [words[row] for row in range(len(mouths))]

    def knows(self, words: Words) -> bool:
        """Whether the likeliest of `words` is likely enough."""
        return self.threshold is None or words[0][1] >= self.threshold

    def _tracks(self, frames: Iterable, *, all_faces: bool) -> list[FaceTrack]:
        if all_faces and self.crop.needs_landmarks:
            return track_faces(frames, self.detector)
        if self.crop.needs_landmarks:
            points_TKD = track(frames, self.detector).points
            return [FaceTrack(0, points_TKD)] if np.isfinite(points_TKD).any() else []
        count = sum(1 for _ in frames)
        return [FaceTrack(0, np.full((count, 68, 2), np.nan, np.float32))] if count else []

    def _cut(
        self, frames: Iterable, tracks: list[FaceTrack], step: int, video: Path | RemotePath
    ) -> Iterator[tuple[_Job, np.ndarray]]:
        """The windows to read and their crops, each as soon as its last frame comes by."""
        jobs = deque(
            sorted(_Job(stop, n, start) for n, t in enumerate(tracks) for start, stop in _windows(t, self.window, step))
        )
        held: deque = deque(maxlen=self.window)
        count = 0
        for count, frame in enumerate(frames, 1):
            held.append(frame)
            while jobs and jobs[0].stop == count:
                job = jobs.popleft()
                points_TKD, start = tracks[job.face].points_TKD, tracks[job.face].start
                window = list(held)[job.start - job.stop :]
                try:
                    mouth_TSS = self.crop_window(window, points_TKD[job.start - start : job.stop - start])
                except ClipFailure as failure:
                    if failure.kind != "bad_landmarks":
                        raise
                    continue  # points that no face has, in one window: the others are read
                yield job, mouth_TSS
        if jobs:
            raise ClipFailure("unreadable", f"{printable(video)} had more than {count} frames a moment ago")


def _windows(track: FaceTrack, length: int, step: int) -> list[tuple[int, int]]:
    """The windows of `length` frames in which a face is read: every `step`, and at its end, but never across a cut."""
    seen_T = np.isfinite(track.points_TKD).all(axis=(1, 2))
    seen_T |= not seen_T.any()  # by a profile that needs no landmarks, everywhere
    windows = []
    for first, stop in _shots(track.points_TKD):
        starts = [first] if stop - first <= length else [*range(first, stop - length, step), stop - length]
        windows += [(start, min(start + length, stop)) for start in starts]
    whole = len(seen_T) <= length  # a clip: it is for its user to say that there is nothing to see
    return [(track.start + a, track.start + b) for a, b in windows if whole or 2 * seen_T[a:b].sum() >= b - a]


def _shots(points_TKD: np.ndarray) -> list[tuple[int, int]]:
    """Where a face does not jump: first frames and those after the last, from end to end."""
    seen = np.flatnonzero(np.isfinite(points_TKD).all(axis=(1, 2)))
    before_NKD, after_NKD = points_TKD[seen[:-1]], points_TKD[seen[1:]]
    moved_N = np.linalg.norm(after_NKD - before_NKD, axis=2).mean(axis=1)
    eyes_N = np.linalg.norm(before_NKD[:, 36] - before_NKD[:, 45], axis=1)
    cuts = seen[1:][moved_N > _JUMP * eyes_N].tolist()
    return list(itertools.pairwise([0, *cuts, len(points_TKD)]))


def _in_rows(cut: Iterable[tuple[_Job, np.ndarray]]) -> Iterator[list[tuple[_Job, np.ndarray]]]:
    row = []
    for one in cut:
        row.append(one)
        if len(row) == _AT_ONCE:
            yield row
            row = []
    if row:
        yield row


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
        raise UserError(
            f"{path} was trained on crops of profile fixed, but does not hold the box that they were cut with: pack "
            "them again, `lipprep shards --from-crops DIR --profile fixed --box X,Y,W,H --replace`, and train again on "
            "those"
        )
    crop = CropParameters(**given)
    detector = load_detector("mesh")
    face = parameters.get("mean_face")
    if crop.needs_landmarks and isinstance(face, str):
        raise UserError(
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
        temperature=checkpoint.temperature,
        threshold=checkpoint.threshold,
        window=checkpoint.window,
    )
