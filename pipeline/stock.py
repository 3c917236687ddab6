"""What a chunk is made from: the tar of the stage before, and all that was made of its clips already."""

import contextlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lipprep.pipeline.inputs import file_digest
from lipprep.pipeline.journal import attempts
from lipprep.pipeline.make import Job, Made, failed
from lipprep.pipeline.manifest import Clip
from lipprep.pipeline.records import read_entries, read_header, uncommit
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers, read_members


@dataclass(frozen=True)
class Above:
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


def open_above(tar: Path | None, extension: str, stage: str, files: contextlib.ExitStack) -> Above | None:
    if tar is None:
        return None
    header, entries = read_header(tar), {e["key"]: e for e in read_entries(tar)}
    if header is None or not entries or file_digest(tar) != header["tar"]["sha256"]:
        if header == read_header(tar):  # not made anew while it was read
            uncommit(tar)
        raise ValueError(f"{tar} was damaged since it was made: run `lipprep {stage}` to make it again")
    return Above(entries, set(header.get("absent", ())), files.enter_context(TarMembers(tar)), extension, stage)


def crc32(members: dict[str, bytes]) -> int:
    """A check of a clip's members in their order: it tells damage; that of the whole tar is its sha256."""
    check = 0
    for payload in members.values():
        check = zlib.crc32(payload, check)
    return check


class Stock:
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
            if crc32(members) == entry["crc32"]:
                return entry, members
        return None
