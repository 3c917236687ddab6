"""The deep look: every clip decoded, and judged as the picture that a trainer would get.

Thresholds, in gray levels of 255 and in parts of a clip's contrast (the standard deviation of its pixels). They
stand between what was measured: films of people speaking darkened to a twentieth have a contrast of 1.5 and 1 % of
their pixels above 6; their steps between frames are 7 % of the contrast and more, at any compression, those of
one frame repeated 1 % and less, whose landmarks, and so its crops, still tremble.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.verify_chunk import Chunk, Entry, Findings, Members, read_chunk
from lipprep.pipeline.verify_tar import MOST_KEPT
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.codec import decode_mouth, npy_array

BLACK = 4  # 99 % of a black clip's pixels are no brighter
FLAT = 1.0  # contrast that no frame of a flat clip exceeds
FROZEN = 0.02  # a smaller step is none, as the mean difference of two frames / contrast
_FEW_STEPS = 3  # a photograph whose crop jumped has fewer; frames are repeated at low rates and beyond a video's end
_SHORT = 6  # frames: in a shorter clip a single step may be all that its video has
_LONGEST_JSON = 1 << 16  # bytes
_ARRAYS = {"landmarks": ("landmarks.npy",), "crops": ("mouth.npy",), "shards": ("mouth.jpg", "mouth.npy")}

AT_FAULT = (
    "look at the clip's video; where it is at fault, take it out of the corpus, list the clips again with "
    "`lipprep manifest` and {again}"
)


@dataclass(frozen=True)
class Look:
    """One tar to look into, and what its clips must be: of this stage and split, with these labels.

    `again` and `size` are those of `read_chunk`. `labels` is None without an index to tell, `split` "".
    """

    tar: Path | RemotePath
    again: str
    size: int
    stage: str
    split: str
    labels: tuple[str, ...] | None


def look(task: Look) -> Chunk:
    """Read a tar and its record as `read_chunk` does, and judge each clip in it."""
    cv2.setNumThreads(1)  # one process a core
    judged, name = Findings(task.again), task.tar.name
    pixels: dict[str, bytes] = {}
    videos: dict[tuple[str, str | None], str] = {}
    sides: dict[str, int] = {}

    def visit(key: str, members: Members, entry: Entry | None) -> None:
        before = len(judged.listed)
        videos.setdefault((re.sub(r"@-?\d+$", "", key), entry and entry.source), key)
        array = _judge(_Clip(key, name, judged), members, entry, task)
        if array is None or task.stage == "landmarks":
            return
        sides[key] = array.shape[1]
        if len(judged.listed) == before:
            pixels[key] = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()[:16]

    keep = (*_ARRAYS[task.stage], "json") if task.stage == "shards" else _ARRAYS[task.stage]
    chunk = read_chunk(task.tar, task.again, task.size, keep=keep, visit=visit)
    chunk.pixels, chunk.videos = pixels, videos
    side = chunk.header and chunk.header["parameters"].get("crop_size")
    for key in [key for key in sides if side not in (None, sides[key])]:
        _Clip(key, name, judged).damaged("shape", f"its crops are {sides[key]} pixels wide, its record says {side}")
    chunk.findings.listed += judged.listed
    return chunk


@dataclass(frozen=True)
class _Clip:
    """Where the findings of one clip go."""

    key: str
    tar: str
    findings: Findings

    def damaged(self, kind: str, message: str) -> None:
        """What making the tar again mends."""
        self.findings.add(kind, self.tar, message, key=self.key, remove=[self.tar])

    def at_fault(self, kind: str, message: str) -> None:
        """What the video itself shows."""
        self.findings.add(kind, self.tar, message, key=self.key, remedy=AT_FAULT.format(again=self.findings.again))


def _judge(clip: _Clip, members: Members, entry: Entry | None, task: Look) -> np.ndarray | None:
    """List what is wrong with one clip; return its array, None where it has none that can be used."""
    array = _decode(clip, members, _ARRAYS[task.stage])
    if array is not None:
        if task.stage == "landmarks":
            _judge_landmarks(clip, array)
        elif fault := picture_fault(array):
            clip.at_fault(*fault)
        if entry is not None and entry.num_frames not in (None, len(array)):
            clip.damaged("shape", f"it has {len(array)} frames, its record says {entry.num_frames}")
    if task.stage == "shards":
        _judge_json(clip, members.get("json"), task, None if array is None else len(array))
    return array


def _decode(clip: _Clip, members: Members, names: tuple[str, ...]) -> np.ndarray | None:
    name = next((n for n in names if n in members), None)
    if name is None:
        clip.damaged("undecodable", f"it has no {' or '.join(names)} of at most {MOST_KEPT >> 20} MiB")
        return None
    try:
        array = npy_array(members[name]) if name == "landmarks.npy" else decode_mouth(name, members[name])
    except Exception as error:  # hostile bytes make decoders raise whatever they trip over
        clip.damaged("undecodable", f"its {name} cannot be decoded: {error}")
        return None
    if array.ndim != 3 or not array.size:
        clip.damaged("shape", f"its {name} has shape {array.shape}: no frames")
        return None
    return array


def _judge_landmarks(clip: _Clip, points_TLC: np.ndarray) -> None:
    if points_TLC.shape[1:] != (68, 2) or points_TLC.dtype != np.float32:
        clip.damaged("shape", f"landmarks of shape {points_TLC.shape}, {points_TLC.dtype}: expected (T, 68, 2) float32")
    elif not np.isfinite(points_TLC).all(axis=(1, 2)).any():
        clip.damaged("no_landmarks", "not one of its frames has a face")


def picture_fault(mouth_TSS: np.ndarray) -> tuple[str, str] | None:
    """What is wrong with the picture of mouth crops (T, S, S) uint8: (kind, message), or None.

    `black`: 99 % of the pixels are at most BLACK. `flat`: no frame's standard deviation exceeds FLAT. `frozen`:
    fewer than 3 steps between frames reach FROZEN, or none in a clip of fewer than 6 frames; never of a single frame.
    """
    if np.count_nonzero(mouth_TSS <= BLACK) >= 0.99 * mouth_TSS.size:
        return "black", "the clip is black"
    if max(_contrast(frame_SS) for frame_SS in mouth_TSS) <= FLAT:
        return "flat", "the clip has no contrast: every frame is of one gray"
    pixels = mouth_TSS[0].size
    steps = [cv2.norm(a, b, cv2.NORM_L1) / pixels for a, b in itertools.pairwise(mouth_TSS)]
    least = FROZEN * _contrast(mouth_TSS.reshape(-1, mouth_TSS.shape[2]))
    if steps and sum(step >= least for step in steps) < (_FEW_STEPS if len(mouth_TSS) >= _SHORT else 1):
        return "frozen", f"its {len(mouth_TSS)} frames are (nearly) one and the same picture"
    return None


def _contrast(picture_HW: np.ndarray) -> float:
    return float(cv2.meanStdDev(picture_HW)[1][0, 0])


# What a trainer may read of a sample's json, as its types.
_FIELDS = {
    "label": (int,),
    "word": (str,),
    "word_start": (int, float, type(None)),
    "word_end": (int, float, type(None)),
    "duration": (int, float, type(None)),
    "speaker": (str, type(None)),
    "num_frames": (int,),
    "split": (str,),
}


def _judge_json(clip: _Clip, payload: bytes | None, task: Look, frames: int | None) -> None:
    try:
        if payload is None or len(payload) > _LONGEST_JSON:
            raise UserError("there is none, or one too long")
        sample = json.loads(payload)
        if wrong := [n for n, kinds in _FIELDS.items() if n not in sample or type(sample[n]) not in kinds]:
            raise UserError(f"{', '.join(wrong)} is missing or of a wrong type")
        if not all(math.isfinite(sample[n] or 0) for n in ("word_start", "word_end", "duration")):
            raise UserError("a time is not finite")
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        clip.damaged("bad_json", f"its json is not well-formed: {error}")
        return
    label, labels = sample["label"], task.labels
    if labels is not None and (not 0 <= label < len(labels) or labels[label] != sample["word"]):
        there = repr(labels[label]) if 0 <= label < len(labels) else f"none of {len(labels)} labels"
        clip.damaged("bad_label", f"its label is {label} and its word {sample['word']!r}; by the index that is {there}")
    if task.split and sample["split"] != task.split:
        clip.damaged("wrong_split", f"its json says split {sample['split']!r}, its shard is of {task.split}")
    if frames not in (None, sample["num_frames"]):
        clip.damaged("shape", f"it has {frames} frames, its json says {sample['num_frames']}")


def find_duplicates(chunks: Iterable[Chunk], findings: Findings) -> None:
    """List clips whose crops are those of another clip, pixel for pixel."""
    first: dict[bytes, tuple[str, str]] = {}
    for chunk in chunks:
        for key, digest in chunk.pixels.items():
            name, other = first.setdefault(digest, (chunk.name, key))
            if other != key:
                clip = _Clip(key, chunk.name, findings)
                clip.at_fault("duplicate_clip", f"it has the same pixels as clip {other} in {name}")


def find_leakage(chunks: Iterable[tuple[str, Chunk]], findings: Findings) -> None:
    """List videos that clips of two splits come from; `chunks` with their splits.

    A video is told by the clip's key up to its `@` and, where records have it, by the digest of its content:
    the same content under two names leaks as well, other content under the same name does not.
    """
    by_name: dict[str, list[_Seen]] = {}
    by_content: dict[str, list[_Seen]] = {}
    for split, chunk in chunks:
        for (name, content), key in chunk.videos.items():
            here = _Seen(split, chunk.name, name, content)
            other = _meet(by_name.setdefault(here.name, []), here)
            if here.content is not None:
                other = _meet(by_content.setdefault(here.content, []), here) or other
            if other is not None:
                findings.add(
                    "leakage",
                    chunk.name,
                    f"its video is in split {other.split} too, as {other.name} in {other.tar}",
                    key=key,
                    remedy=f"leave the video in one split, list the clips again with `lipprep manifest` "
                    f"and {findings.again}",
                )


@dataclass(frozen=True)
class _Seen:
    """A video in a split: the tar with its first clip there, its name and, where known, its content."""

    split: str
    tar: str
    name: str
    content: str | None


def _meet(seen: list[_Seen], here: _Seen) -> _Seen | None:
    """Note a video, once a split; return the one of another split that it is, when it is noted."""
    if any((s.split, s.name, s.content) == (here.split, here.name, here.content) for s in seen):
        return None
    seen.append(here)
    same = (s for s in seen if None in (s.content, here.content) or s.content == here.content)
    return next((s for s in same if s.split != here.split), None)
