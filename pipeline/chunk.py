"""What a worker does with one chunk: every clip into the tar or, with its reason, into the record.

A clip whose own inputs are unchanged is copied from where it was stored before: the chunk's old tar, another
chunk's that it was dealt to, or what a killed attempt left behind. What a clip becomes depends on its inputs
alone, never on what was made before or beside it.
"""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import cv2

from lipprep.pipeline.ahead import ahead
from lipprep.pipeline.inputs import (
    archive_name,
    content,
    content_digest,
    digest,
    read_through,
    source_content,
    source_stat,
    without_content,
)
from lipprep.pipeline.journal import Journal, clear_attempts
from lipprep.pipeline.make import (
    LANDMARKS,
    MOUTH,
    Job,
    Made,
    failed,
    make_groups,
    pack,
    sample_json,
    span,
    together,
    unmade,
)
from lipprep.pipeline.manifest import Clip, groups
from lipprep.pipeline.pool import Unwanted, leave_if_orphaned, stop_if_unwanted
from lipprep.pipeline.records import commit, maker
from lipprep.pipeline.stock import Above, Stock, crc32, open_above
from lipprep.stages.held import HeldPath
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.writer import TarWriter
from lipprep.stages.stopwatch import spent, time_by_part
from lipprep.stages.store import RemoteError
from lipprep.stages.video import SEEK_BEYOND

_HELD = 1 << 28  # bytes of remote videos that wait to be worked on together
READING = 5  # times as long as for a clip that is worked on is waited for one that is read


def run_job(job: Job, *, tag: str | None = None) -> dict:
    """Make one chunk and commit it; return its record's header.

    `tag` names this attempt where several are made of one job.
    """
    cv2.setNumThreads(1)  # one process a core
    time_by_part()  # what is counted from here on is this chunk's
    with contextlib.ExitStack() as files:
        landmarks = open_above(job, "landmarks", LANDMARKS, files)
        crops = open_above(job, "crops", MOUTH, files)
        stock = files.enter_context(Stock(job))
        tar = files.enter_context(TarWriter(job.tar, tag or job.attempt, scratch=job.unfinished))
        journal = files.enter_context(Journal(job.tar, tag or job.attempt, job.unfinished))
        chunk = _Chunk(job, stock, landmarks, crops, journal)
        try:
            entries, computed = _fill(tar, chunk, journal)
            end = tar.offset
            with spent("write"):
                tar.close()
            chunk.spent.update(time_by_part())
            header = {**job.header, "attempt": job.attempt, "computed": computed, "end": end}
            if chunk.disturbed:
                header["fingerprint"] = None  # the next run finds it stale, and makes again what failed
            if landmarks is None:
                header |= _for_other_stages(chunk, entries)
            header = commit(tar, {**header, "parts": chunk.spent}, entries)
        except (KeyboardInterrupt, RemoteError, Unwanted):
            tar.keep = journal.keep = True  # the next run goes on from here, as after a kill
            raise
    clear_attempts(job.tar, job.unfinished)
    return header


def _fill(tar: TarWriter, chunk: "_Chunk", journal: Journal) -> tuple[list[dict], int]:
    """Make a chunk's clips and add them to its tar; their entries, and how many were computed."""
    job, entries, computed = chunk.job, [], 0
    with contextlib.closing(ahead(groups(job.clips, job.fps), chunk.look)) as videos:
        for some in _batches(videos, job, journal):
            keys = [clip.key for group in some for clip in group.clips]
            stop_if_unwanted()
            journal.working(keys, _seconds(job, len(keys)))
            for entry, members, new in chunk.videos(some):
                with spent("write"):
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
    stop_if_unwanted()
    return entries, computed


def _seconds(job: Job, clips: int) -> float | None:
    """How long so many clips may take."""
    return job.clip_timeout and job.clip_timeout * clips


def _for_other_stages(chunk: "_Chunk", entries: list[dict]) -> dict:
    """What the next stage depends on beside the tar: the content of all sources, those out of reach, what failed."""
    known = {c.video: content(e["source"]) for c, e in zip(chunk.job.clips, entries, strict=True)}
    why = [[e["key"], e["class"], e["message"]] for e in entries if e["status"] != "ok"]
    absent = sorted(video for video, stat in chunk.seen.items() if stat is None)
    return {"content": digest(sorted(known.items())), "absent": absent, "failed": digest(why)}


@dataclass
class _Group:
    """The clips of one video: those that are `ready`, and those `wanting`, with their inputs' digest and source.

    `stat` is the video's as it was looked at; `held` are the bytes of a remote one.
    """

    video: str
    clips: list[Clip]
    stat: dict | None = None
    held: HeldPath | None = None
    ready: dict[str, tuple[dict, dict[str, bytes], bool]] = field(default_factory=dict)
    wanting: list[tuple[Clip, str, dict | None]] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)


def _batches(
    videos: Iterator[tuple[tuple[str, list[Clip]], "Future[_Group]"]], job: Job, journal: Journal
) -> Iterator[list[_Group]]:
    """The videos that are worked on together, fewer where they take much memory."""
    some: list[_Group] = []
    size = together(job)
    for (_, clips), future in videos:
        if not future.done():
            # To wait for a disk is no clip's fault, but for one that hangs nobody would wait for ever.
            journal.reading([clip.key for clip in clips], _seconds(job, READING))
        with spent("wait"):
            some.append(future.result())
        if len(some) == size or sum(group.held.held for group in some if group.held is not None) > _HELD:
            yield some
            some = []
    if some:
        yield some


class _Chunk:
    """Makes a chunk's clips, video by video, or some videos at a time."""

    def __init__(self, job: Job, stock: Stock, landmarks: Above | None, crops: Above | None, journal: Journal) -> None:
        self.job = job
        self.seen: dict[str, dict | None] = {}  # size and time of each source, as it was when it was read
        self._others: set[str] = set()  # videos that are not those that their landmarks were found in
        self.spent: Counter = Counter()  # seconds by part, beside those of the clips that are made
        self._stock, self._landmarks, self._crops, self._journal = stock, landmarks, crops, journal
        self._archive = job.wanted.archive if job.stage == "landmarks" else None

    @property
    def disturbed(self) -> bool:
        """Whether sources came, went or changed since the run began: a disk that was away for a moment, say."""
        if self._landmarks is None:
            return digest(list(self.seen.items())) != self.job.header["sources"]
        gone = any(stat is None and video not in self._landmarks.absent for video, stat in self.seen.items())
        return gone or bool(self._others)

    def look(self, group: tuple[str, list[Clip]]) -> _Group:
        """What is to be known of a video before it is worked on, told by a thread that reads ahead.

        What can be copied of its clips is, and of the others it is said what they are made from. The video was read
        here if it is wanted, so that it need not be waited for when it is decoded.
        """
        video, clips = group
        try:
            return self._look(video, clips)
        except (OSError, RemoteError):  # of what was made before: no clip's fault
            raise
        except Exception as error:
            made = unmade(error, self.job, clips)
            return _Group(
                video,
                clips,
                ready={clip.key: (_entry(self.job, clip, made, "", None, {}), {}, True) for clip in clips},
            )

    def _look(self, video: str, clips: list[Clip]) -> _Group:
        job, group, path = self.job, _Group(video, clips), self.job.root / video
        if isinstance(path, RemotePath):
            group.held = path = HeldPath(path)
        source, known = None, []
        if self._landmarks is None:
            known = self._stock.sources(clips)
            # With an archive the video is not decoded.
            where = video if group.held is None or self._archive else path
            if all(job.condemned.get(clip.key, ("",))[0] == "timeout" for clip in clips):
                source = source_stat(job.root, where, self._archive)  # to read it may be what took so long
                source = source and {**source, "sha256": None}
            else:
                source = source_content(job.root, where, self._archive, () if job.deep else known)
            group.stat = source and without_content(source)
            if source is None and known:
                source = known[0]  # the video is out of reach, not another one: what was made of it stays
        whole = span(clips)
        for clip in clips:
            mine = source if self._landmarks is None else self._landmarks.entries[clip.key]["source"]
            inputs = _inputs(job, clip, whole, self._landmarks, mine)
            found = self._stock.reuse(clip.key, inputs)
            if found is None:
                group.wanting.append((clip, inputs, mine))
                continue
            entry, members = found
            if job.stage == "shards" and members:  # a label or a word's time may have been corrected
                members["json"] = sample_json(clip, entry["figures"]["num_frames"])
                entry = {**entry, "crc32": crc32(members)}
            group.ready[clip.key] = ({**entry, "source": mine}, members, False)
        decoded = self._crops is None and not self._archive
        read = source is not None and (job.deep or source not in known)  # for its digest
        if decoded and not read and any(self._failure(clip) is None for clip, _, _ in group.wanting):
            if group.held is None:
                read_through(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    group.held.fetch()
        return group

    def videos(self, groups: Sequence[_Group]) -> Iterator[tuple[dict, dict, bool]]:
        """The entry and members of each clip of some videos, and whether they are new."""
        if self._landmarks is None:
            self.seen.update((group.video, group.stat) for group in groups)
        self._make(groups)
        for group in groups:
            for clip in group.clips:
                yield group.ready[clip.key]

    def _make(self, groups: Sequence["_Group"]) -> None:
        """Make the clips of some videos that are not there yet."""
        job, landmarks, crops = self.job, self._landmarks, self._crops
        self.spent.update(time_by_part())
        todo: list[tuple[_Group, list[Clip]]] = []
        for group in groups:
            for clip, _, _ in group.wanting:
                if (failure := self._failure(clip)) is not None:
                    group.made[clip.key] = failure
                elif crops is not None and crops.has(clip.key):
                    figures = crops.entries[clip.key]["figures"]
                    group.made[clip.key] = pack(job, clip, crops.input(clip.key), figures)
            clips = [clip for clip, _, _ in group.wanting if clip.key not in group.made]
            if clips and job.stage == "landmarks":
                clips = group.clips  # all of the video's clips, so that tracking begins where it began
            if clips:
                todo.append((group, clips))
        for group, _ in todo:
            if group.held is not None:
                group.held.waiting = self._journal.waiting
        held = {group.video: group.held for group, _ in todo if group.held is not None}
        job = replace(job, held=held) if held else job
        tasks = [
            (group.video, clips, [None if landmarks is None else landmarks.input(c.key) for c in clips])
            for group, clips in todo
        ]

        def clock(count: int) -> None:
            self._journal.clock(_seconds(job, count))

        for (group, clips), made in zip(todo, make_groups(job, tasks, clock) if tasks else (), strict=True):
            group.made = {clip.key: m for clip, m in zip(clips, made, strict=True)} | group.made
            if any(m.failure for m in made) and self._is_lost(group.video):
                # What failed for want of the video is made once it is back.
                whole = span(group.clips)
                group.wanting = [
                    (c, i, s)
                    if group.made[c.key].failure is None
                    else (c, _inputs(job, c, whole, landmarks, None), None)
                    for c, i, s in group.wanting
                ]
        count = sum(len(group.wanting) for group in groups)
        parts = {part: round(seconds / count, 6) for part, seconds in time_by_part().items()} if count else {}
        for group in groups:
            group.held = None  # so that few are in memory
            for clip, inputs, source in group.wanting:
                made = group.made[clip.key]
                group.ready[clip.key] = (_entry(job, clip, made, inputs, source, parts), made.members or {}, True)

    def _failure(self, clip: Clip) -> Made | None:
        """What is known to be wrong with a clip before it is made."""
        if self._landmarks is not None and (failure := self._landmarks.failure(clip.key)) is not None:
            return failure
        return failed(*self.job.condemned[clip.key]) if clip.key in self.job.condemned else None

    def _is_lost(self, video: str) -> bool:
        """Whether the video that clips failed of is gone, or another than it was."""
        self._journal.rest()
        now = source_stat(self.job.root, video, self._archive)
        if self._landmarks is None or now is None:
            lost = now != self.seen.get(video, {})
            if lost:
                self.seen[video] = now
            return lost
        # Looked at only where a clip failed: size and time may be those of the video that the landmarks were found in.
        sources = [self._landmarks.entries[c.key]["source"] for c in self.job.clips if c.video == video]
        if {s and s["sha256"] for s in sources} & {None, content_digest(self.job.root / video)}:
            return False
        self._others.add(video)
        return True


def _inputs(job: Job, clip: Clip, whole: tuple, landmarks: Above | None, source: dict | None) -> str:
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


def _entry(job: Job, clip: Clip, made: Made, inputs: str, source: dict | None, parts: dict) -> dict:
    """The clip's line of the record. `parts` are the seconds that it took, by part."""
    entry = {"key": clip.key, "status": "ok" if made.failure is None else "failed", **(made.failure or {})}
    # What is not known is null: JSON has no other word for it.
    figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in made.figures.items()}
    entry |= {"source": source, "inputs": inputs, "parts": parts, "maker": maker(job.device), "figures": figures}
    if made.members is not None:
        entry |= {"members": list(made.members), "crc32": crc32(made.members)}
        if job.stage == "landmarks":  # what others are made from
            entry["digest"] = hashlib.sha256(b"".join(made.members.values())).hexdigest()
    return entry
