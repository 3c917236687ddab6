"""What a worker does with one chunk: every clip into the tar or, with its reason, into the record.

A clip whose own inputs are unchanged is copied from the chunk's old tar. What a clip becomes depends on its
inputs alone, never on what was made before or beside it.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from lipprep.pipeline.manifest import Clip, groups
from lipprep.pipeline.plan import ROW_FIELDS, archive_name, digest, file_digest, source_stat
from lipprep.pipeline.records import commit, read_entries, read_header, uncommit
from lipprep.pipeline.wanted import Wanted, crop_parameters, load_mean_face
from lipprep.stages.crop import Crop, Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks import Detector, load_detector, track
from lipprep.stages.shard.codec import encode_mouth, npy_array, npy_bytes
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.shard.writer import TarWriter
from lipprep.stages.video import read_frames

LANDMARKS = "landmarks.npy"
MOUTH = "mouth.npy"


@dataclass(frozen=True)
class Job:
    """One chunk of one stage, with all that a worker needs; it crosses to other processes and machines.

    `tar` is what to make. `landmarks` is the tar it is made from, None for the landmarks themselves and for a
    fixed box; `crops` that of stored crops, for shards made from them. `header` is what the new record's
    header says of its inputs. `retry` names the failure classes to try again ("" all of them).
    """

    stage: str
    clips: list[Clip]
    root: Path
    fps: float
    wanted: Wanted
    parameters: dict
    header: dict
    tar: Path
    landmarks: Path | None = None
    crops: Path | None = None
    persons: dict[str, int] | None = None
    device: str = "cpu"
    retry: str | None = None


@dataclass(frozen=True)
class Made:
    """What became of one clip: the members to store, by extension, or why there are none; and its figures."""

    members: dict[str, bytes] | None
    figures: dict
    failure: dict | None = None


def failed(kind: str, message: str, **more: object) -> Made:
    """A clip that cannot be used."""
    return Made(None, {}, {"class": kind, "message": message, **more})


def _of(failure: Exception) -> Made:
    if isinstance(failure, ClipFailure):
        return failed(failure.kind, str(failure))
    # A fault of ours or of a library's must not cost the chunk; its clip is named, with all that is known.
    return failed("error", f"{type(failure).__name__}: {failure}")


@cache
def _detector(name: str, device: str) -> Detector:
    return load_detector(name, device=device)  # one a process: interpreters and networks cross no border


@cache
def _face(path: str | None) -> np.ndarray:
    return load_mean_face(path and Path(path))


def _span(clips: list[Clip]) -> tuple[int, int | None]:
    """The frames of a video that its clips see together: [first, last), last None for the whole video."""
    if any(c.start is None for c in clips):
        return 0, None
    return max(0, min(c.start for c in clips)), max(1, max(c.start + c.num_frames for c in clips))


def _landmark_group(job: Job, video: str, clips: list[Clip], _: list) -> list[Made]:
    """Landmarks of the clips of one video: its frames are decoded and tracked once."""
    if job.wanted.detector == "archive":
        from lipprep.stages.landmarks.archive import read_archive

        name = archive_name(video)
        found = read_archive(Path(job.wanted.archive), name, person=(job.persons or {}).get(name, 0))
        first = 0
    else:
        first, last = _span(clips)
        frames = read_frames(job.root / video, fps=job.fps, first=first, last=last)
        found = track(frames, _detector(job.wanted.detector, job.device))
    made = []
    for clip in clips:
        points, count = found.points, len(found.points)
        if clip.start is not None and count:
            # Frames beyond the video's ends repeat its edge frame.
            points = points[np.clip(np.arange(clip.start, clip.start + clip.num_frames) - first, 0, count - 1)]
        seen = np.isfinite(points).all(axis=(1, 2)) if len(points) else np.zeros(0, bool)
        if not count or (clip.start or 0) >= first + count:
            made.append(failed("too_short", f"the clip starts at frame {clip.start or 0}, {video} has {first + count}"))
        elif not seen.any():
            made.append(failed("no_face", f"no face was found in any of {len(points)} frames"))
        else:
            figures = {
                "num_frames": len(points),
                "face_share": round(float(seen.mean()), 4),
                **_figures(points[seen]),
            }
            figures["max_faces"] = found.max_faces
            made.append(Made({LANDMARKS: npy_bytes(points.astype(np.float32))}, figures))
    return made


def _figures(points: np.ndarray) -> dict:
    """Face size (distance of the outer eye corners) and jitter (mean second difference there), pixels."""
    size = np.linalg.norm(points[:, 45] - points[:, 36], axis=1).mean()
    jitter = None
    if len(points) > 2:
        jitter = round(float(np.linalg.norm(np.diff(points[:, [36, 45]], n=2, axis=0), axis=2).mean()), 4)
    return {"face_size": round(float(size), 3), "jitter": jitter}


def _boxed(frames: Iterable, box: tuple[int, int, int, int], video: str) -> list[np.ndarray]:
    """The box of every frame: all that a fixed profile keeps of a video. ClipFailure where it leaves the frame."""
    x, y, w, h = box
    patches = []
    for frame in frames:
        H, W = frame.shape[:2]
        if x + w > W or y + h > H:
            raise ClipFailure("error", f"the box {x},{y},{w},{h} leaves the {W}x{H} frames of {video}: change --box")
        patches.append(np.ascontiguousarray(frame[y : y + h, x : x + w]))
    return patches


def _cut(job: Job, video: str, clips: list[Clip], points: list[np.ndarray | None]) -> list[Crop | ClipFailure]:
    first, last = _span(clips)
    frames = read_frames(job.root / video, fps=job.fps, first=first, last=last, color=job.wanted.exact)
    parameters = crop_parameters(job.wanted)
    if not parameters.needs_landmarks:
        frames = _boxed(frames, parameters.box, video)  # how many there are, only they tell
        parameters = dataclasses.replace(parameters, box=(0, 0, *parameters.box[2:]))
    windows = [
        Window(c.start, (c.num_frames or len(frames)) if p is None else len(p), p)
        for c, p in zip(clips, points, strict=True)
    ]
    face = _face(job.wanted.mean_face)
    return crop_clips(frames, windows, parameters, first=first, face=face)


def _crop_figures(crop: Crop) -> dict:
    return {
        "num_frames": len(crop.mouth),
        "scale": round(crop.scale, 4),
        "outside": round(crop.outside, 4),
        "brightness": round(crop.brightness, 2),
    }


def _crop_group(job: Job, video: str, clips: list[Clip], points: list) -> list[Made]:
    """Mouth crops of the clips of one video: its frames are decoded once."""
    return [
        Made({MOUTH: npy_bytes(crop.mouth)}, _crop_figures(crop)) if isinstance(crop, Crop) else _of(crop)
        for crop in _cut(job, video, clips, points)
    ]


def _pack(job: Job, clip: Clip, mouth: np.ndarray, figures: dict) -> Made:
    try:
        extension, payload = encode_mouth(mouth, codec=job.wanted.codec, quality=job.wanted.quality)
    except ValueError as error:
        return failed("too_long", str(error))
    sample = {
        "label": clip.label,
        "word": clip.word,
        "word_start": clip.word_start,
        "word_end": clip.word_end,
        "duration": clip.duration,
        "speaker": clip.speaker,
        "num_frames": len(mouth),
        "split": clip.split,
    }
    return Made({extension: payload, "json": json.dumps(sample).encode()}, figures)


def _shard_group(job: Job, video: str, clips: list[Clip], inputs: list) -> list[Made]:
    """Samples of the clips of one video, whose crops are cut in passing."""
    return [
        _pack(job, c, crop.mouth, _crop_figures(crop)) if isinstance(crop, Crop) else _of(crop)
        for c, crop in zip(clips, _cut(job, video, clips, inputs), strict=True)
    ]


_GROUP: dict[str, Callable[[Job, str, list[Clip], list], list[Made]]] = {
    "landmarks": _landmark_group,
    "crops": _crop_group,
    "shards": _shard_group,
}


@dataclass(frozen=True)
class _Above:
    """The chunk that this one is made from: its entries by key, and its members."""

    entries: dict[str, dict]
    members: TarMembers
    extension: str
    stage: str

    def input(self, key: str) -> np.ndarray:
        return npy_array(self.members.read(f"{key}.{self.extension}"))

    def has(self, key: str) -> bool:
        return self.entries[key]["status"] == "ok"

    def failure(self, key: str) -> Made | None:
        entry = self.entries[key]
        if entry["status"] == "ok":
            return None
        origin = entry["upstream"] if entry["class"] == "upstream" else {"stage": self.stage, "class": entry["class"]}
        return failed("upstream", entry["message"], upstream=origin)


def _open_above(tar: Path | None, extension: str, stage: str, files: contextlib.ExitStack) -> _Above | None:
    if tar is None:
        return None
    header, entries = read_header(tar), {e["key"]: e for e in read_entries(tar)}
    if header is None or file_digest(tar) != header["tar"]["sha256"]:
        uncommit(tar)
        raise ValueError(f"{tar} was damaged since it was made: run `lipprep {stage}` to make it again")
    return _Above(entries, files.enter_context(TarMembers(tar)), extension, stage)


def _content(members: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(members.values())).hexdigest()


@dataclass(frozen=True)
class _Old:
    """The chunk as it was made before: what of it can be copied."""

    entries: dict[str, dict]
    members: TarMembers | None
    retry: str | None

    def reuse(self, key: str, inputs: str) -> tuple[dict, dict[str, bytes]] | None:
        """The old entry and members of a clip with the same inputs; None where it must be made."""
        entry = self.entries.get(key)
        if entry is None or entry["inputs"] != inputs:
            return None
        if entry["status"] != "ok":
            kinds = {entry["class"], entry.get("upstream", {}).get("class")}
            return None if self.retry == "" or self.retry in kinds else (entry, {})
        if self.members is None or any(f"{key}.{e}" not in self.members for e in entry["members"]):
            return None
        members = {e: self.members.read(f"{key}.{e}") for e in entry["members"]}
        return (entry, members) if _content(members) == entry["digest"] else None  # damaged since


def _open_old(job: Job, files: contextlib.ExitStack) -> _Old:
    entries = {e["key"]: e for e in read_entries(job.tar)}
    members = None
    if entries:
        with contextlib.suppress(ValueError):
            members = files.enter_context(TarMembers(job.tar))
    return _Old(entries, members, job.retry)


def run_job(job: Job) -> dict:
    """Make one chunk and commit it; return its record's header."""
    cv2.setNumThreads(1)  # one process a core
    with contextlib.ExitStack() as files:
        old = _open_old(job, files)
        landmarks = _open_above(job.landmarks, LANDMARKS, "landmarks", files)
        crops = _open_above(job.crops, MOUTH, "crops", files)
        tar = files.enter_context(TarWriter(job.tar))
        entries = []
        for entry, members in _entries(job, old, landmarks, crops):
            if members:
                entry = {**entry, "offset": tar.offset}
                for extension, payload in members.items():
                    tar.add(f"{entry['key']}.{extension}", payload)
            entries.append(entry)
        return commit(tar, {**job.header, "end": tar.offset}, entries)


def _entries(
    job: Job, old: _Old, landmarks: _Above | None, crops: _Above | None
) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """Every clip's entry and members, in the chunk's order, video by video."""
    for video, clips in groups(job.clips, job.fps):
        span = _span(clips)
        known: dict[str, tuple[dict, dict[str, bytes]]] = {}
        wanting: list[tuple[Clip, str, dict | None]] = []  # clip, its inputs' digest, its source
        for clip in clips:
            source, inputs = _inputs(job, clip, span, landmarks)
            if source is None and landmarks is None and (kept := old.entries.get(clip.key, {}).get("source")):
                # The video is out of reach, not another one: what was made of it stays.
                source, inputs = kept, _inputs(job, clip, span, landmarks, source=kept)[1]
            found = old.reuse(clip.key, inputs)
            if found is None:
                wanting.append((clip, inputs, source))
            else:
                known[clip.key] = found
        known |= _make(job, video, clips, wanting, landmarks, crops)
        yield from (known[clip.key] for clip in clips)


def _inputs(
    job: Job, clip: Clip, span: tuple, landmarks: _Above | None, *, source: dict | None = None
) -> tuple[dict | None, str]:
    """The clip's source, looked up unless given, and a digest of all that its output depends on."""
    parts = [job.stage, job.header["version"], job.parameters, job.fps]
    parts.append([getattr(clip, name) for name in ROW_FIELDS[job.stage]])
    if landmarks is None:
        archive = job.wanted.archive if job.stage == "landmarks" else None
        source = source or source_stat(job.root, clip.video, archive)
        # A tracked face depends on where in the video tracking began.
        parts += [source, span if job.stage == "landmarks" and clip.start is not None else None]
    else:
        entry = landmarks.entries[clip.key]
        source = entry["source"]
        parts += [source, entry.get("digest"), entry.get("class")]
    return source, digest(parts)


def _make(
    job: Job,
    video: str,
    clips: list[Clip],
    wanting: list[tuple[Clip, str, dict | None]],
    landmarks: _Above | None,
    crops: _Above | None,
) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """Make the clips of one video that are not there yet."""
    began = time.perf_counter()
    made: dict[str, Made] = {}
    for clip, _, _ in wanting:
        if landmarks is not None and (failure := landmarks.failure(clip.key)) is not None:
            made[clip.key] = failure
        elif crops is not None and crops.has(clip.key):
            mouth = crops.input(clip.key)
            made[clip.key] = _pack(job, clip, mouth, {"num_frames": len(mouth)})
    todo = [c for c, _, _ in wanting if c.key not in made]
    if todo and job.stage == "landmarks":
        todo = clips  # all of the video's clips, so that tracking begins where it began
    if todo:
        try:
            inputs = [None if landmarks is None else landmarks.input(c.key) for c in todo]
            results = _GROUP[job.stage](job, video, todo, inputs)
        except Exception as error:
            results = [_of(error)] * len(todo)
        made |= {c.key: m for c, m in zip(todo, results, strict=True)}
    seconds = round((time.perf_counter() - began) / max(1, len(wanting)), 6)
    return {
        clip.key: (_entry(clip, made[clip.key], inputs, source, seconds), made[clip.key].members or {})
        for clip, inputs, source in wanting
    }


def _entry(clip: Clip, made: Made, inputs: str, source: dict | None, seconds: float) -> dict:
    """The clip's line of the record."""
    entry = {"key": clip.key, "status": "ok" if made.failure is None else "failed", **(made.failure or {})}
    entry |= {"source": source, "inputs": inputs, "seconds": seconds, "figures": made.figures}
    if made.members is not None:
        entry |= {"members": list(made.members), "digest": _content(made.members)}
    return entry
