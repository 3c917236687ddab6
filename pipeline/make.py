"""What is done to the clips of one video, stage by stage: a video's frames are decoded once for all of them."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lipprep.io.errors import LOG, UserError, debugging, log_internal_error
from lipprep.pipeline.inputs import archive_name
from lipprep.pipeline.manifest import Clip
from lipprep.pipeline.wanted import Wanted, crop_parameters, load_mean_face
from lipprep.stages.crop import Crop, Window, crop_clips, reach_failure
from lipprep.stages.crop_files import read_crops
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks import BatchDetector, ClipLandmarks, Detector, load_detector, track, track_clips
from lipprep.stages.quality import face_quality, mouth_quality
from lipprep.stages.remote import RemotePath
from lipprep.stages.scratch import local_scratch
from lipprep.stages.shard.codec import check_frames, encode_mouth, most_frames, npy_bytes
from lipprep.stages.stopwatch import spent, spent_on
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import printable
from lipprep.stages.video import SoundFrames, read_frames

LANDMARKS = "landmarks.npy"
MOUTH = "mouth.npy"
CLIP_TIMEOUT = 120.0  # seconds: hundreds of times what a clip of a word takes
_MAX_MESSAGE = 5000  # characters: longer than any path
_HELD = 1 << 27  # bytes of decoded frames that wait to be tracked together


@dataclass(frozen=True)
class Job:
    """One chunk of one stage, with all that a worker needs; it crosses to other processes and machines.

    `tar` is what to make; until it is whole it lies in the folder `scratch` (None: in the machine's own below TMPDIR).
    `landmarks` is the tar it is made from, None for the landmarks themselves, for a fixed box
    and for crops in files; `crops` that of stored crops, for shards made from them. `header` is what the new record's
    header says of its inputs. `retry` names the failure classes to try again ("" all of them). `old` are other
    tars that hold clips of this chunk. `attempt` names this attempt. `condemned` are the clips that are not
    worked on any more, with class and message. A clip that takes more than `clip_timeout` seconds ends the
    process. `deep` does not trust a source's size and time of change. `together` lets a detector that gains by it work
    on several videos at once. `held` are remote videos that are in memory already. `logs` is the folder that tracebacks
    of internal errors are logged in.
    """

    stage: str
    clips: list[Clip]
    root: Path | RemotePath
    fps: float
    wanted: Wanted
    parameters: dict
    header: dict
    tar: Path | RemotePath
    scratch: Path | None = None
    landmarks: Path | RemotePath | None = None
    crops: Path | RemotePath | None = None
    persons: dict[str, int] | None = None
    device: str = "cpu"
    retry: str | None = None
    old: tuple[Path | RemotePath, ...] = ()
    attempt: str = "0"
    condemned: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    clip_timeout: float | None = CLIP_TIMEOUT
    deep: bool = False
    together: bool = True
    held: Mapping[str, RemotePath] = field(default_factory=dict)
    logs: Path | None = None

    @property
    def unfinished(self) -> Path:
        """The folder of what is unfinished, on this machine or where all machines see it."""
        folder = local_scratch(self.tar.parent) if self.scratch is None else self.scratch
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def path(self, video: str) -> Path | RemotePath:
        """Where a video is read from."""
        return self.held.get(video) or self.root / video


@dataclass(frozen=True)
class Made:
    """What became of one clip: the members to store, by extension, or why there are none; and its figures."""

    members: dict[str, bytes] | None
    figures: dict
    failure: dict | None = None


def failed(kind: str, message: str, **more: object) -> Made:
    """A clip that cannot be used."""
    return Made(None, {}, {"class": kind, "message": printable(message, _MAX_MESSAGE), **more})


def refused(failure: ClipFailure) -> Made:
    """Return the outcome of a clip that cannot be used, for the reason that `failure` gives."""
    return failed(failure.kind, str(failure))


def unmade(error: Exception, job: Job, clips: Sequence[Clip]) -> Made:
    """Return the outcome of `clips`, which raised `error`; a fault of lipprep's is logged with its traceback."""
    if isinstance(error, ClipFailure):
        return refused(error)
    if isinstance(error, UserError):
        return failed("error", str(error))
    # A fault of ours or of a library's must not cost the chunk.
    log_internal_error(error, f"{job.stage} {' '.join(clip.key for clip in clips)}", job.logs)
    if debugging():
        traceback.print_exception(error)
    where = "a log below TMPDIR" if job.logs is None else f"logs/{LOG} in the work folder"
    return failed("error", f"internal error, a fault in lipprep ({type(error).__name__}: {error}): see {where}")


@cache
def _detector(name: str, device: str) -> Detector:
    return load_detector(name, device=device)  # one a process: interpreters and networks cross no border


@cache
def _face(path: str | None) -> np.ndarray:
    return load_mean_face(path and Path(path))


def span(clips: list[Clip]) -> tuple[int, int | None]:
    """The frames of a video that its clips see together: [first, last), last None for the whole video."""
    if any(c.start is None for c in clips):
        return 0, None
    first = min(min(c.start, c.start if c.tracked_from is None else c.tracked_from) for c in clips)
    last = max(max(c.start + c.num_frames, c.tracked_to or 0) for c in clips)
    return max(0, first), max(1, last)


def _landmark_group(job: Job, video: str, clips: list[Clip], _: list) -> list[Made]:
    """Landmarks of the clips of one video: its frames are decoded and tracked once."""
    if job.wanted.detector == "archive":
        from lipprep.stages.landmarks.archive import read_archive

        name = archive_name(video)
        with spent("decode"):
            found = read_archive(Path(job.wanted.archive), name, person=(job.persons or {}).get(name, 0))
        return _landmarks(video, clips, found, None)
    frames = _frames_to_track(job, video, clips)
    found = track(spent_on("decode", map(np.asarray, frames)), _detector(job.wanted.detector, job.device))
    return _landmarks(video, clips, found, frames)


def _frames_to_track(job: Job, video: str, clips: list[Clip]) -> SoundFrames:
    first, last = span(clips)
    return SoundFrames(read_frames(job.path(video), fps=job.fps, first=first, last=last), first=first)


def _landmarks(video: str, clips: list[Clip], found: ClipLandmarks, frames: SoundFrames | None) -> list[Made]:
    """Each clip's part of what was `found` in the frames that its video's clips see; `frames` None: in an archive."""
    first = 0 if frames is None else span(clips)[0]
    made = []
    for clip in clips:
        if frames is not None and (failure := frames.lacks(clip.start, clip.num_frames)) is not None:
            made.append(refused(failure))
            continue
        points, count = found.points, len(found.points)
        if (failure := reach_failure(clip.start, clip.num_frames, first + count, video)) is not None:
            made.append(refused(failure))
            continue
        if clip.start is not None:
            # Frames beyond the video's ends repeat its edge frame.
            points = points[np.clip(np.arange(clip.start, clip.start + clip.num_frames) - first, 0, count - 1)]
        seen = np.isfinite(points).all(axis=(1, 2))
        if not seen.any():
            made.append(failed("no_face", f"no face was found in any of {len(points)} frames"))
        else:
            figures = {
                "num_frames": len(points),
                "face_share": round(float(seen.mean()), 4),
                "max_faces": found.max_faces,
                **face_quality(points),
            }
            made.append(Made({LANDMARKS: npy_bytes(points.astype(np.float32))}, figures))
    return made


def _landmark_groups(
    job: Job, videos: list[tuple[str, list[Clip]]], detector: BatchDetector, clock: Callable[[int], None]
) -> list[list[Made]]:
    """Landmarks of the clips of several videos, whose frames a detector works on together."""
    made: list[list[Made]] = [[] for _ in videos]
    held: list[tuple[int, SoundFrames, list[np.ndarray]]] = []  # what is decoded and not tracked yet
    size = 0  # of it, bytes

    def track_held() -> None:
        clock(sum(len(videos[n][1]) for n, _, _ in held))
        _track_held(job, held, videos, detector, made)

    for n, (video, clips) in enumerate(videos):
        clock(len(clips))
        try:
            frames = _frames_to_track(job, video, clips)
            rest = spent_on("decode", map(np.asarray, frames))
            pictures = _up_to(_HELD, rest)
            room = _HELD - sum(picture.nbytes for picture in pictures)
            if room < 0:  # a long video goes frame by frame, whatever is worked on beside it
                made[n] = _landmarks(video, clips, track(chain(pictures, rest), detector), frames)
                continue
        except RemoteError:  # the network's fault, and no clip's
            raise
        except Exception as error:
            made[n] = [unmade(error, job, clips)] * len(clips)
            continue
        if held and size > room:
            track_held()
            held, size = [], 0
        held.append((n, frames, pictures))
        size += _HELD - room
    if held:
        track_held()
    return made


def _up_to(limit: int, pictures: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Pictures until they take more than `limit` bytes, or there are no more."""
    taken = []
    for picture in pictures:
        taken.append(picture)
        limit -= picture.nbytes
        if limit < 0:
            break
    return taken


def _track_held(
    job: Job, held: list, videos: list[tuple[str, list[Clip]]], detector: BatchDetector, made: list
) -> None:
    tracked = _track_all([pictures for _, _, pictures in held], detector)
    for (n, frames, _), found in zip(held, tracked, strict=True):
        if isinstance(found, Exception):
            made[n] = [unmade(found, job, videos[n][1])] * len(videos[n][1])
        else:
            made[n] = _landmarks(*videos[n], found, frames)


def _track_all(clips: list[list[np.ndarray]], detector: BatchDetector) -> list[ClipLandmarks | Exception]:
    """The landmarks of clips, together; where that fails each by itself, so that none fails for another."""
    import torch

    try:
        return track_clips(clips, detector)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device has too little memory ({str(error).splitlines()[0]}): let fewer workers share it (-j)"
        ) from error
    except Exception as error:
        if len(clips) == 1:
            return [error]
        return [_track_all([clip], detector)[0] for clip in clips]


def _boxed(frames: Iterable, box: tuple[int, int, int, int], video: str) -> Iterator[np.ndarray]:
    """The box of every frame: all that a fixed profile keeps of a video. ClipFailure where it leaves the frame."""
    x, y, w, h = box
    for frame in frames:
        H, W = frame.shape[:2]
        if x + w > W or y + h > H:
            raise ClipFailure("error", f"the box {x},{y},{w},{h} leaves the {W}x{H} frames of {video}: change --box")
        yield np.ascontiguousarray(frame[y : y + h, x : x + w])


def _cut(job: Job, video: str, clips: list[Clip], points: list[np.ndarray | None]) -> list[Crop | ClipFailure]:
    first, last = span(clips)
    read = read_frames(job.path(video), fps=job.fps, first=first, last=last, color=job.wanted.exact)
    sound = SoundFrames(read, first=first)
    frames = spent_on("decode", sound)
    parameters = crop_parameters(job.wanted)
    if not parameters.needs_landmarks:
        frames = _boxed(frames, parameters.box, video)
        if first == 0 and last is None:  # how many there are, only they tell
            frames = list(islice(frames, most_frames("npy", parameters.crop_size) + 1))
        parameters = dataclasses.replace(parameters, box=(0, 0, *parameters.box[2:]))
    windows, failures = {}, {}
    for clip, p in zip(clips, points, strict=True):
        count = (clip.num_frames or len(frames)) if p is None else len(p)
        try:  # before memory is taken for so many
            check_frames(count, job.wanted.codec if job.stage == "shards" else "npy", parameters.crop_size)
            windows[clip.key] = Window(clip.start, count, p)
        except UserError as error:
            failures[clip.key] = ClipFailure("too_long", str(error))
    with spent("warp"):
        cut = crop_clips(frames, list(windows.values()), parameters, first=first, face=_face(job.wanted.mean_face))
    made = failures | dict(zip(windows, cut, strict=True))
    return [sound.lacks(clip.start, clip.num_frames) or made[clip.key] for clip in clips]


def _crop_figures(crop: Crop) -> dict:
    with spent("figures"):
        return {
            "num_frames": len(crop.mouth),
            "scale": round(crop.scale, 4),
            "outside": round(crop.outside, 4),
            **mouth_quality(crop.mouth),
        }


def _crop_group(job: Job, video: str, clips: list[Clip], points: list) -> list[Made]:
    """Mouth crops of the clips of one video: its frames are decoded once."""
    return [
        Made({MOUTH: npy_bytes(crop.mouth)}, _crop_figures(crop)) if isinstance(crop, Crop) else refused(crop)
        for crop in _cut(job, video, clips, points)
    ]


def pack(job: Job, clip: Clip, mouth: np.ndarray, figures: dict) -> Made:
    """The sample of a clip whose mouth crops (T, S, S) uint8 are there."""
    try:
        with spent("encode"):
            extension, payload = encode_mouth(mouth, codec=job.wanted.codec, quality=job.wanted.quality)
    except UserError as error:
        return failed("too_long", str(error))
    return Made({extension: payload, "json": sample_json(clip, len(mouth))}, figures)


def sample_json(clip: Clip, num_frames: int) -> bytes:
    """What a shard says of a clip beside its crops."""
    sample = {
        "label": clip.label,
        "word": clip.word,
        "word_start": clip.word_start,
        "word_end": clip.word_end,
        "duration": clip.duration,
        "speaker": clip.speaker,
        "num_frames": num_frames,
        "split": clip.split,
    }
    return json.dumps(sample).encode()


def _shard_group(job: Job, video: str, clips: list[Clip], inputs: list) -> list[Made]:
    """Samples of the clips of one video, whose crops are cut in passing; or of the crops that a file holds."""
    if job.wanted.from_crops:
        with spent("decode"):
            mouth = read_crops(job.path(video), crop_size=job.wanted.crop_size, profile=job.wanted.profile)
        with spent("figures"):
            figures = {"num_frames": len(mouth), **mouth_quality(mouth)}
        return [pack(job, clip, mouth, figures) for clip in clips]
    return [
        pack(job, c, crop.mouth, _crop_figures(crop)) if isinstance(crop, Crop) else refused(crop)
        for c, crop in zip(clips, _cut(job, video, clips, inputs), strict=True)
    ]


GROUP: dict[str, Callable[[Job, str, list[Clip], list], list[Made]]] = {
    "landmarks": _landmark_group,
    "crops": _crop_group,
    "shards": _shard_group,
}


def together(job: Job) -> int:
    """How many videos are worked on together: several where the detector gains by it."""
    detector = _batch_detector(job) if job.together else None
    return 1 if detector is None else detector.clips_at_once


def make_groups(job: Job, groups: list[tuple[str, list[Clip], list]], clock: Callable[[int], None]) -> list[list[Made]]:
    """What becomes of the clips of some videos: (video, clips, what each is made from).

    `clock` is called with the number of clips that are worked on from then on.
    """
    if (detector := _batch_detector(job)) is not None:
        return _landmark_groups(job, [(video, clips) for video, clips, _ in groups], detector, clock)
    made = []
    for video, clips, inputs in groups:
        try:
            made.append(GROUP[job.stage](job, video, clips, inputs))
        except RemoteError:  # the network's fault, and no clip's
            raise
        except Exception as error:
            made.append([unmade(error, job, clips)] * len(clips))
    return made


def _batch_detector(job: Job) -> BatchDetector | None:
    if job.stage != "landmarks" or job.wanted.detector == "archive":
        return None
    detector = _detector(job.wanted.detector, job.device)
    return detector if isinstance(detector, BatchDetector) else None
