"""What a chunk is made from: the tar of the stage before, and all that was made of its clips already."""

import contextlib
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.inputs import file_digest
from lipprep.pipeline.journal import attempts
from lipprep.pipeline.make import Job, Made, failed
from lipprep.pipeline.manifest import Clip
from lipprep.pipeline.record_form import Entry
from lipprep.pipeline.records import all_entries, read_header, read_record, uncommit
from lipprep.stages.atomic import fetched
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers, read_members
from lipprep.stages.stopwatch import spent

_FEW = 16  # clips of a remote tar that are fetched one by one; for more, the tar is


@dataclass(frozen=True)
class Above:
    """The chunk that this one is made from: its entries by key, the videos out of reach then, and its members."""

    entries: dict[str, Entry]
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


def open_above(job: Job, stage: str, extension: str, files: contextlib.ExitStack) -> Above | None:
    """Open the tar of `stage` that the chunk of `job` is made from; None where it is made from no such one.

    Raises ValueError where it is damaged, and lets the stage make it again.
    """
    tar = {"landmarks": job.landmarks, "crops": job.crops}[stage]
    if tar is None:
        return None
    header, lines = read_record(tar)
    entries = {e["key"]: e for e in lines}
    whole = header is not None and all(clip.key in entries for clip in job.clips)
    with spent("wait"):
        local = files.enter_context(fetched(tar)) if whole else None
    if local is None or file_digest(local) != header["tar"]["sha256"]:
        if header == read_header(tar):  # not made anew while it was read
            uncommit(tar)
        raise UserError(f"{tar} was damaged since it was made: run `lipprep {stage}` to make it again")
    return Above(entries, set(header.get("absent", ())), files.enter_context(TarMembers(local)), extension, stage)


def crc32(members: dict[str, bytes]) -> int:
    """A check of a clip's members in their order: it tells damage; that of the whole tar is its sha256."""
    check = 0
    for payload in members.values():
        check = zlib.crc32(payload, check)
    return check


class Stock:
    """All that was made before and may be copied: (tar, entry) by key, of committed and of unfinished tars."""

    def __init__(self, job: Job) -> None:
        tars = [job.tar, *job.old]
        found = list(zip(tars, all_entries(tars), strict=True))
        found += [(attempt.tar, attempt.entries) for attempt in attempts(job.tar, job.unfinished)]
        self._retry = job.retry
        self._places: dict[str, list[tuple[Path | RemotePath, dict]]] = {clip.key: [] for clip in job.clips}
        self._clips: Counter = Counter()  # of this chunk in each tar
        self._files = contextlib.ExitStack()
        self._local: dict[RemotePath, Path] = {}
        self._fetching = Lock()  # threads read ahead
        for tar, entries in found:
            for entry in entries:
                if entry["key"] in self._places:
                    self._places[entry["key"]].append((tar, entry))
                    self._clips[tar] += 1

    def __enter__(self) -> "Stock":
        return self

    def __exit__(self, *_) -> None:
        self._files.close()

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
                payloads = read_members(self._at_hand(tar), entry["offset"], names)
            except (ValueError, OSError):  # cut short, replaced, gone, or on a bad sector
                continue
            members = dict(zip(entry["members"], payloads, strict=True))
            if crc32(members) == entry["crc32"]:
                return entry, members
        return None

    def _at_hand(self, tar: Path | RemotePath) -> Path | RemotePath:
        """Where a tar is best read: a remote one that holds many of the clips is fetched, once."""
        if not isinstance(tar, RemotePath) or self._clips[tar] <= _FEW:
            return tar
        with self._fetching:
            if tar not in self._local:
                self._local[tar] = self._files.enter_context(fetched(tar))
            return self._local[tar]
