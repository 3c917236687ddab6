"""What a worker does with one chunk: every clip into the tar or, with its reason, into the record.

A clip whose own inputs are unchanged is copied from where it was stored before: the chunk's old tar, another
chunk's that it was dealt to, or what a killed attempt left behind. What a clip becomes depends on its inputs
alone, never on what was made before or beside it.
"""

import contextlib
import hashlib
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lipprep.pipeline.inputs import content, digest, file_digest, file_stat, source_content
from lipprep.pipeline.journal import Journal, attempts, clear_attempts
from lipprep.pipeline.make import GROUP, LANDMARKS, MOUTH, Job, Made, failed, pack, reason, sample_json, span
from lipprep.pipeline.manifest import Clip, groups
from lipprep.pipeline.pool import leave_if_orphaned
from lipprep.pipeline.records import commit, read_entries, read_header, uncommit
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.shard.writer import TarWriter


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
    if header is None or not entries or file_digest(tar) != header["tar"]["sha256"]:
        uncommit(tar)
        raise ValueError(f"{tar} was damaged since it was made: run `lipprep {stage}` to make it again")
    return _Above(entries, files.enter_context(TarMembers(tar)), extension, stage)


def _crc32(members: dict[str, bytes]) -> int:
    """A check of a clip's members in their order: it tells damage; that of the whole tar is its sha256."""
    check = 0
    for payload in members.values():
        check = zlib.crc32(payload, check)
    return check


@dataclass(frozen=True)
class _Old:
    """A tar that holds clips made before, and their entries by key."""

    entries: dict[str, dict]
    members: TarMembers | None

    def read(self, entry: dict) -> dict[str, bytes] | None:
        """The members of a clip; None where they are not there, or not those that were stored."""
        names = {e: f"{entry['key']}.{e}" for e in entry.get("members", ())}
        if names and (self.members is None or any(name not in self.members for name in names.values())):
            return None
        try:
            members = {e: self.members.read(name) for e, name in names.items()}
        except ValueError:  # cut short
            return None
        return members if not names or _crc32(members) == entry["crc32"] else None


class _Stock:
    """All that was made before and may be copied."""

    def __init__(self, job: Job, files: contextlib.ExitStack) -> None:
        found = [(tar, read_entries(tar)) for tar in (job.tar, *job.old)]
        found += [(attempt.tar, attempt.entries) for attempt in attempts(job.tar)]
        self._retry = job.retry
        self._olds = [
            _Old({e["key"]: e for e in entries}, self._members(tar, files)) for tar, entries in found if entries
        ]

    @staticmethod
    def _members(tar: Path, files: contextlib.ExitStack) -> TarMembers | None:
        with contextlib.suppress(ValueError, OSError):
            return files.enter_context(TarMembers(tar, whole=False))
        return None

    def entries(self, key: str) -> Iterator[dict]:
        """What is known of a clip from before."""
        return (old.entries[key] for old in self._olds if key in old.entries)

    def reuse(self, key: str, inputs: str) -> tuple[dict, dict[str, bytes]] | None:
        """The old entry and members of a clip with the same inputs; None where it must be made."""
        for old in self._olds:
            entry = old.entries.get(key)
            if entry is None or entry["inputs"] != inputs:
                continue
            if entry["status"] != "ok" and self._retry is not None:
                kinds = {entry["class"], entry.get("upstream", {}).get("class")}
                if self._retry == "" or self._retry in kinds:
                    continue
            if (members := old.read(entry)) is not None:
                return entry, members
        return None


def run_job(job: Job) -> dict:
    """Make one chunk and commit it; return its record's header."""
    cv2.setNumThreads(1)  # one process a core
    computed = 0
    with contextlib.ExitStack() as files:
        stock = _Stock(job, files)
        landmarks = _open_above(job.landmarks, LANDMARKS, "landmarks", files)
        crops = _open_above(job.crops, MOUTH, "crops", files)
        tar = files.enter_context(TarWriter(job.tar, job.attempt))
        journal = files.enter_context(Journal(job.tar, job.attempt))
        entries = []
        for entry, members, new in _entries(job, stock, journal, landmarks, crops):
            if members:
                entry = {**entry, "offset": tar.offset}
                for extension, payload in members.items():
                    tar.add(f"{entry['key']}.{extension}", payload)
                tar.flush()
            journal.done(entry)
            entries.append(entry)
            computed += new
        header = {**job.header, "attempt": job.attempt, "computed": computed, "end": tar.offset}
        if landmarks is None:
            header |= _for_other_stages(job, entries)
        leave_if_orphaned()
        header = commit(tar, header, entries)
    clear_attempts(job.tar)
    return header


def _for_other_stages(job: Job, entries: list[dict]) -> dict[str, str]:
    """Digests of what the next stage reads beside the tar: the content of all sources, and what failed, and why."""
    # With a video out of reach, what was made of it stays here; what is made of it there may fail.
    known = {
        clip.video: [content(entry["source"]), file_stat(job.root / clip.video) is not None]
        for clip, entry in zip(job.clips, entries, strict=True)
    }
    why = [[e["key"], e["class"], e["message"]] for e in entries if e["status"] != "ok"]
    return {"content": digest(sorted(known.items())), "failed": digest(why)}


def _entries(
    job: Job, stock: _Stock, journal: Journal, landmarks: _Above | None, crops: _Above | None
) -> Iterator[tuple[dict, dict[str, bytes], bool]]:
    """Every clip's entry and members, and whether they are new, in the chunk's order, video by video."""
    for video, clips in groups(job.clips, job.fps):
        journal.working([clip.key for clip in clips], job.clip_timeout * len(clips))
        ready = _video_entries(job, stock, video, clips, landmarks, crops)
        yield from (ready[clip.key] for clip in clips)


def _video_entries(
    job: Job, stock: _Stock, video: str, clips: list[Clip], landmarks: _Above | None, crops: _Above | None
) -> dict[str, tuple[dict, dict[str, bytes], bool]]:
    """What `_entries` gives, by key, for the clips of one video."""
    whole = span(clips)
    source = None
    if landmarks is None:
        archive = job.wanted.archive if job.stage == "landmarks" else None
        known = [e["source"] for c in clips for e in stock.entries(c.key) if e["source"]]
        source = source_content(job.root, video, archive, () if job.deep else known)
        if source is None and known:
            source = known[0]  # the video is out of reach, not another one: what was made of it stays
    ready: dict[str, tuple[dict, dict[str, bytes], bool]] = {}
    wanting: list[tuple[Clip, str, dict | None]] = []  # clip, its inputs' digest, its source
    for clip in clips:
        mine = source if landmarks is None else landmarks.entries[clip.key]["source"]
        inputs = _inputs(job, clip, whole, landmarks, mine)
        found = stock.reuse(clip.key, inputs)
        if found is None:
            wanting.append((clip, inputs, mine))
            continue
        entry, members = found
        if job.stage == "shards" and members:  # a label or a word's time may have been corrected
            members["json"] = sample_json(clip, entry["figures"]["num_frames"])
            entry = {**entry, "crc32": _crc32(members)}
        ready[clip.key] = ({**entry, "source": mine}, members, False)
    if wanting:
        ready |= _make(job, video, clips, wanting, landmarks, crops)
    return ready


def _inputs(job: Job, clip: Clip, whole: tuple | None, landmarks: _Above | None, source: dict | None) -> str:
    """A digest of all that the clip's output depends on, but for what a shard says of it beside its crops."""
    parts = [job.stage, job.header["version"], job.parameters, job.fps]
    parts += [clip.key, clip.video, clip.start, clip.num_frames, content(source)]
    if landmarks is None:
        # A tracked face depends on where in the video tracking began.
        parts.append(whole if job.stage == "landmarks" and clip.start is not None else None)
    else:
        entry = landmarks.entries[clip.key]
        parts += [entry.get("digest"), entry.get("class"), entry.get("message")]
    return digest(parts)


def _make(
    job: Job,
    video: str,
    clips: list[Clip],
    wanting: list[tuple[Clip, str, dict | None]],
    landmarks: _Above | None,
    crops: _Above | None,
) -> dict[str, tuple[dict, dict[str, bytes], bool]]:
    """Make the clips of one video that are not there yet."""
    began = time.perf_counter()
    made: dict[str, Made] = {}
    for clip, _, _ in wanting:
        if landmarks is not None and (failure := landmarks.failure(clip.key)) is not None:
            made[clip.key] = failure
        elif clip.key in job.condemned:
            made[clip.key] = failed(*job.condemned[clip.key])
        elif crops is not None and crops.has(clip.key):
            mouth = crops.input(clip.key)
            made[clip.key] = pack(job, clip, mouth, {"num_frames": len(mouth)})
    todo = [c for c, _, _ in wanting if c.key not in made]
    if todo and job.stage == "landmarks":
        todo = clips  # all of the video's clips, so that tracking begins where it began
    if todo:
        try:
            inputs = [None if landmarks is None else landmarks.input(c.key) for c in todo]
            results = GROUP[job.stage](job, video, todo, inputs)
        except Exception as error:
            results = [reason(error)] * len(todo)
        made |= {c.key: m for c, m in zip(todo, results, strict=True) if c.key not in made}
    seconds = round((time.perf_counter() - began) / max(1, len(wanting)), 6)
    if landmarks is not None and file_stat(job.root / video) is None:
        # What failed for want of the video is made once it is back.
        wanting = [
            (clip, inputs, source)
            if made[clip.key].failure is None
            else (clip, _inputs(job, clip, None, landmarks, None), None)
            for clip, inputs, source in wanting
        ]
    return {
        clip.key: (_entry(job, clip, made[clip.key], inputs, source, seconds), made[clip.key].members or {}, True)
        for clip, inputs, source in wanting
    }


def _entry(job: Job, clip: Clip, made: Made, inputs: str, source: dict | None, seconds: float) -> dict:
    """The clip's line of the record."""
    entry = {"key": clip.key, "status": "ok" if made.failure is None else "failed", **(made.failure or {})}
    entry |= {"source": source, "inputs": inputs, "seconds": seconds, "figures": made.figures}
    if made.members is not None:
        entry |= {"members": list(made.members), "crc32": _crc32(made.members)}
        if job.stage == "landmarks":  # what others are made from
            entry["digest"] = hashlib.sha256(b"".join(made.members.values())).hexdigest()
    return entry
