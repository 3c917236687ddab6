"""What a worker does with one chunk: every clip into the tar or, with its reason, into the record.

A clip whose own inputs are unchanged is copied from where it was stored before: the chunk's old tar, another
chunk's that it was dealt to, or what a killed attempt left behind. What a clip becomes depends on its inputs
alone, never on what was made before or beside it.
"""

import contextlib
import hashlib
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lipprep.pipeline.inputs import (
    archive_name,
    content,
    digest,
    file_digest,
    source_content,
    source_stat,
    without_content,
)
from lipprep.pipeline.journal import Journal, attempts, clear_attempts
from lipprep.pipeline.make import GROUP, LANDMARKS, MOUTH, Job, Made, failed, pack, reason, sample_json, span
from lipprep.pipeline.manifest import Clip, groups
from lipprep.pipeline.pool import leave_if_orphaned
from lipprep.pipeline.records import commit, maker, read_entries, read_header, uncommit
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers, read_members
from lipprep.stages.shard.writer import TarWriter
from lipprep.stages.video import SEEK_BEYOND


@dataclass(frozen=True)
class _Above:
    """The chunk that this one is made from: its entries by key, the videos out of reach then, and its members."""

    entries: dict[str, dict]
    absent: set[str]
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
        if header == read_header(tar):  # not made anew while it was read
            uncommit(tar)
        raise ValueError(f"{tar} was damaged since it was made: run `lipprep {stage}` to make it again")
    return _Above(entries, set(header.get("absent", ())), files.enter_context(TarMembers(tar)), extension, stage)


def _crc32(members: dict[str, bytes]) -> int:
    """A check of a clip's members in their order: it tells damage; that of the whole tar is its sha256."""
    check = 0
    for payload in members.values():
        check = zlib.crc32(payload, check)
    return check


class _Stock:
    """All that was made before and may be copied: (tar, entry) by key, of committed and of unfinished tars."""

    def __init__(self, job: Job) -> None:
        found = [(tar, read_entries(tar)) for tar in (job.tar, *job.old)]
        found += [(attempt.tar, attempt.entries) for attempt in attempts(job.tar)]
        self._retry = job.retry
        self._places: dict[str, list[tuple[Path, dict]]] = {clip.key: [] for clip in job.clips}
        for tar, entries in found:
            for entry in entries:
                if entry["key"] in self._places:
                    self._places[entry["key"]].append((tar, entry))

    def sources(self, clips: list[Clip]) -> list[dict]:
        """The sources that clips were made from before."""
        return [e["source"] for clip in clips for _, e in self._places[clip.key] if e["source"]]

    def reuse(self, key: str, inputs: str) -> tuple[dict, dict[str, bytes]] | None:
        """The old entry and members of a clip with the same inputs; None where it must be made."""
        for tar, entry in self._places[key]:
            if entry["inputs"] != inputs:
                continue
            if entry["status"] != "ok":
                kinds = {entry["class"], entry.get("upstream", {}).get("class")}
                if self._retry is None or (self._retry != "" and self._retry not in kinds):
                    return entry, {}
                continue
            names = [f"{key}.{extension}" for extension in entry["members"]]
            try:
                members = dict(zip(entry["members"], read_members(tar, entry["offset"], names), strict=True))
            except ValueError:  # cut short, or replaced
                continue
            if _crc32(members) == entry["crc32"]:
                return entry, members
        return None


def run_job(job: Job) -> dict:
    """Make one chunk and commit it; return its record's header."""
    cv2.setNumThreads(1)  # one process a core
    with contextlib.ExitStack() as files:
        landmarks = _open_above(job.landmarks, LANDMARKS, "landmarks", files)
        chunk = _Chunk(job, _Stock(job), landmarks, _open_above(job.crops, MOUTH, "crops", files))
        tar = files.enter_context(TarWriter(job.tar, job.attempt))
        journal = files.enter_context(Journal(job.tar, job.attempt))
        entries, computed = [], 0
        for video, clips in groups(job.clips, job.fps):
            journal.working([clip.key for clip in clips], job.clip_timeout * len(clips))
            for entry, members, new in chunk.video(video, clips):
                if members:
                    entry = {**entry, "offset": tar.offset}
                    for extension, payload in members.items():
                        tar.add(f"{entry['key']}.{extension}", payload)
                    tar.flush()
                journal.done(entry)
                entries.append(entry)
                computed += new
        journal.rest()
        leave_if_orphaned()
        header = {**job.header, "attempt": job.attempt, "computed": computed, "end": tar.offset}
        if chunk.disturbed:
            header["fingerprint"] = None  # the next run finds it stale, and makes again what failed
        if landmarks is None:
            header |= _for_other_stages(chunk, entries)
        header = commit(tar, header, entries)
    clear_attempts(job.tar)
    return header


def _for_other_stages(chunk: "_Chunk", entries: list[dict]) -> dict:
    """What the next stage depends on beside the tar: the content of all sources, those out of reach, what failed."""
    known = {c.video: content(e["source"]) for c, e in zip(chunk.job.clips, entries, strict=True)}
    why = [[e["key"], e["class"], e["message"]] for e in entries if e["status"] != "ok"]
    absent = sorted(video for video, stat in chunk.seen.items() if stat is None)
    return {"content": digest(sorted(known.items())), "absent": absent, "failed": digest(why)}


class _Chunk:
    """Makes a chunk's clips, video by video."""

    def __init__(self, job: Job, stock: _Stock, landmarks: _Above | None, crops: _Above | None) -> None:
        self.job = job
        self.seen: dict[str, dict | None] = {}  # size and time of each source, as it was when it was read
        self._stock, self._landmarks, self._crops = stock, landmarks, crops
        self._archive = job.wanted.archive if job.stage == "landmarks" else None

    @property
    def disturbed(self) -> bool:
        """Whether sources came, went or changed since the run began: a disk that was away for a moment, say."""
        if self._landmarks is None:
            return digest(list(self.seen.items())) != self.job.header["sources"]
        return any(stat is None and video not in self._landmarks.absent for video, stat in self.seen.items())

    def video(self, video: str, clips: list[Clip]) -> Iterator[tuple[dict, dict[str, bytes], bool]]:
        """The entry and members of each clip of one video, and whether they are new."""
        job, whole = self.job, span(clips)
        source = None
        if self._landmarks is None:
            known = self._stock.sources(clips)
            source = source_content(job.root, video, self._archive, () if job.deep else known)
            self.seen[video] = source and without_content(source)
            if source is None and known:
                source = known[0]  # the video is out of reach, not another one: what was made of it stays
        ready: dict[str, tuple[dict, dict[str, bytes], bool]] = {}
        wanting: list[tuple[Clip, str, dict | None]] = []  # clip, its inputs' digest, its source
        for clip in clips:
            mine = source if self._landmarks is None else self._landmarks.entries[clip.key]["source"]
            inputs = _inputs(job, clip, whole, self._landmarks, mine)
            found = self._stock.reuse(clip.key, inputs)
            if found is None:
                wanting.append((clip, inputs, mine))
                continue
            entry, members = found
            if job.stage == "shards" and members:  # a label or a word's time may have been corrected
                members["json"] = sample_json(clip, entry["figures"]["num_frames"])
                entry = {**entry, "crc32": _crc32(members)}
            ready[clip.key] = ({**entry, "source": mine}, members, False)
        if wanting:
            ready |= self._make(video, clips, whole, wanting)
        return (ready[clip.key] for clip in clips)

    def _make(
        self, video: str, clips: list[Clip], whole: tuple, wanting: list[tuple[Clip, str, dict | None]]
    ) -> dict[str, tuple[dict, dict[str, bytes], bool]]:
        """Make the clips of one video that are not there yet."""
        job, landmarks, crops = self.job, self._landmarks, self._crops
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
            if any(made[clip.key].failure for clip in todo) and self._is_lost(video):
                # What failed for want of the video is made once it is back.
                wanting = [
                    (c, i, s) if made[c.key].failure is None else (c, _inputs(job, c, whole, landmarks, None), None)
                    for c, i, s in wanting
                ]
        seconds = round((time.perf_counter() - began) / len(wanting), 6)
        return {
            clip.key: (_entry(job, clip, made[clip.key], inputs, source, seconds), made[clip.key].members or {}, True)
            for clip, inputs, source in wanting
        }

    def _is_lost(self, video: str) -> bool:
        """Whether the video that clips failed of is gone, or another than it was a moment ago."""
        now = source_stat(self.job.root, video, self._archive)
        lost = now is None if self._landmarks is not None else now != self.seen[video]
        if lost:
            self.seen[video] = now
        return lost


def _inputs(job: Job, clip: Clip, whole: tuple, landmarks: _Above | None, source: dict | None) -> str:
    """A digest of all that the clip's output depends on, but for what a shard says of it beside its crops."""
    # Of the table of persons only the clip's own line matters.
    parameters = {name: value for name, value in job.parameters.items() if name != "persons"}
    parts = [job.stage, job.header["version"], parameters, job.fps]
    parts += [clip.key, clip.video, clip.start, clip.num_frames, content(source)]
    if clip.start is not None:
        # A tracked face depends on where in the video tracking began, and a frame's number on whether it was sought.
        sought = whole[0] if whole[0] > SEEK_BEYOND * job.fps else 0
        parts.append(whole if job.stage == "landmarks" else sought)
    if job.persons:
        parts.append(job.persons.get(archive_name(clip.video)))
    if landmarks is not None:
        entry = landmarks.entries[clip.key]
        parts += [entry.get("digest"), entry.get("class"), entry.get("message")]
    return digest(parts)


def _entry(job: Job, clip: Clip, made: Made, inputs: str, source: dict | None, seconds: float) -> dict:
    """The clip's line of the record."""
    entry = {"key": clip.key, "status": "ok" if made.failure is None else "failed", **(made.failure or {})}
    # What is not known is null: JSON has no other word for it.
    figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in made.figures.items()}
    entry |= {"source": source, "inputs": inputs, "seconds": seconds, "maker": maker(), "figures": figures}
    if made.members is not None:
        entry |= {"members": list(made.members), "crc32": _crc32(made.members)}
        if job.stage == "landmarks":  # what others are made from
            entry["digest"] = hashlib.sha256(b"".join(made.members.values())).hexdigest()
    return entry
