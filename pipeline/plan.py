"""What is wanted, what is there, and what therefore is fresh, stale or missing, and why."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from lipprep.pipeline.inputs import (
    content_digest,
    digest,
    file_digest,
    file_stat,
    looking,
    source_files,
    sources_digest,
)
from lipprep.pipeline.manifest import Clip, Manifest, chunk_name
from lipprep.pipeline.records import Headers, read_entries
from lipprep.pipeline.wanted import Wanted, load_mean_face
from lipprep.stages.remote import REQUESTS, RemotePath
from lipprep.stages.scratch import local_scratch

STAGES = ("landmarks", "crops", "shards")
# Raised whenever a stage's output, or what its records say of it, changes for the same input: what was made before is
# then stale. 2: small faces in large frames are found; more figures.
STAGE_VERSIONS = {"landmarks": 2, "crops": 2, "shards": 2}
# The fields of a manifest's row that a stage reads; a change in another leaves its output fresh. Those of _RARE count
# only in chunks where a clip has them.
ROW_FIELDS = {
    "landmarks": ("key", "video", "start", "num_frames", "tracked_from", "tracked_to"),
    "crops": ("key", "video", "start", "num_frames", "tracked_from", "tracked_to"),
    "shards": tuple(name for name in Clip.__struct_fields__ if name not in ("chunk", "rough")),
}
_RARE = {"tracked_from", "tracked_to"}


def stage_parameters(wanted: Wanted) -> dict[str, dict]:
    """What each stage reads of what is wanted: what its fingerprint holds and its record shows."""
    landmarks: dict = {"detector": wanted.detector}
    if wanted.detector == "archive":
        landmarks["persons"] = wanted.persons and file_digest(Path(wanted.persons))
    else:
        landmarks["identity"] = wanted.identity
    crops: dict = {"profile": wanted.profile, "crop_size": wanted.crop_size}
    if wanted.from_crops:
        crops["crops_from"] = "files"
    else:
        crops["exact"] = wanted.exact
    if wanted.profile == "fixed" and wanted.box is not None:
        crops["box"] = list(wanted.box)
    if wanted.profile not in ("fixed", "unaligned"):
        crops["mean_face"] = wanted.mean_face and file_digest(Path(wanted.mean_face))
    shards: dict = {"codec": wanted.codec}
    if wanted.codec == "jpeg":
        shards["quality"] = wanted.quality
    return {"landmarks": landmarks, "crops": crops, "shards": {**crops, **shards}}


def index_parameters(wanted: Wanted) -> dict:
    """Return what an index says of how its crops were cut and stored: the points of a mean face, not its file."""
    parameters = stage_parameters(wanted)["shards"]
    if parameters.get("mean_face") is not None:
        # Whoever has weights trained on these crops must be able to cut others like them.
        parameters["mean_face"] = load_mean_face(Path(wanted.mean_face)).tolist()
    return parameters


def upstream(stage: str, wanted: Wanted) -> str | None:
    """The stage whose tars `stage` is made from.

    Shards are made from landmarks: whether the crops between were stored changes nothing. A fixed box needs
    no landmarks, and neither do crops in files.
    """
    return None if stage == "landmarks" or wanted.profile == "fixed" or wanted.from_crops else "landmarks"


def stages_of(wanted: Wanted) -> tuple[str, ...]:
    """The stages that lead to the shards that are wanted, in their order."""
    if wanted.from_crops:
        return STAGES[2:]
    return STAGES if upstream("shards", wanted) else STAGES[1:]


@dataclass(frozen=True)
class Chunk:
    """One chunk of one stage: where its tar stands, and whether it is what is wanted.

    `state` is fresh, stale or missing, `reason` says why it is not fresh, `header` is its record's where there is
    one. `rows` digests each field of the manifest that the stage reads, `sources` the sizes and times of the
    videos that it reads (None where it is made from another stage's tars), `fingerprint` all that its output
    depends on: None where the chunk that it is made from is not fresh.
    """

    stage: str
    split: str
    number: int
    clips: list[Clip] = field(repr=False)
    tar: Path
    state: str
    reason: str
    header: dict | None = field(repr=False)
    rows: dict[str, str]
    sources: str | None
    fingerprint: str | None

    def wanted_header(self, fps: float, parameters: dict) -> dict:
        """What the header of the record to make says of its inputs."""
        return {
            "stage": self.stage,
            "version": STAGE_VERSIONS[self.stage],
            "fps": fps,
            "parameters": parameters,
            "rows": self.rows,
            "sources": self.sources,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Slice:
    """The `number`-th (from 1) of `of` parts of the chunks: what one of many independent runs makes."""

    number: int = 1
    of: int = 1

    @property
    def whole(self) -> bool:
        return self.of == 1

    def __contains__(self, index: int) -> bool:
        """Whether the chunk that is `index`-th (from 0) of all belongs to it."""
        return index % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Slice()


@dataclass(frozen=True)
class Layout:
    """Where the artefacts of one manifest stand: `work`/NAME/STAGE, and the shards in `out`."""

    work: Path
    out: Path

    def folder(self, stage: str) -> Path:
        return self.out if stage == "shards" else self.work / stage

    def tar(self, stage: str, split: str, number: int) -> Path:
        return self.folder(stage) / f"{chunk_name(split, number)}.tar"

    @property
    def plan(self) -> Path:
        return self.work / "plan.yaml"

    def scratch(self, stage: str) -> Path | None:
        """The folder of a stage's unfinished files, WORK/NAME/scratch/STAGE; of shards one for each `out`.

        None for a folder in a store: each machine has its own below TMPDIR.
        """
        if isinstance(self.folder(stage), RemotePath):
            return None
        name = f"shards-{digest(str(self.out))[:8]}" if stage == "shards" else stage
        folder = self.work / "scratch" / name
        return local_scratch(folder) if isinstance(folder, RemotePath) else folder

    def earlier(self, stage: str) -> Path | RemotePath:
        """The folder of earlier tars that are set aside until their clips are copied; in the store, of one there."""
        scratch = self.scratch(stage)
        return self.folder(stage) / ".lipprep-earlier" if scratch is None else scratch / "earlier"

    def lent(self, stage: str) -> Path | RemotePath:
        """The folder of tars of the manifest that this one was filtered from."""
        if stage != "shards":
            return self.earlier(stage)
        remote = isinstance(self.work, RemotePath)
        return self.work / "shards" / ".lipprep-earlier" if remote else self.work / "scratch" / "shards" / "earlier"

    @property
    def logs(self) -> Path:
        """The folder that tracebacks of internal errors are logged in."""
        return self.work / "logs"


def differences(old: Mapping, new: Mapping) -> str:
    """Return the difference of two sets of parameters in the user's terms: `crop_size 88 -> 96`."""
    return ", ".join(
        "another mean_face"
        if isinstance(old.get(name) or new.get(name), list) and name == "mean_face"
        else f"{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def survey(
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    stages: tuple[str, ...] = STAGES,
    *,
    deep: bool = False,
    part: Slice = WHOLE,
) -> list[Chunk]:
    """The state of every chunk of `stages` in `part`, from the records' headers and the sources' sizes and times alone.

    With `deep`, the sources' contents are compared as well: every video is read.
    """
    judge = _Judge(manifest, layout, wanted, deep)
    aligned = upstream("shards", wanted) is not None
    chunks: list[Chunk] = []
    for index, ((split, number), clips) in enumerate(manifest.chunks().items()):
        if index not in part:
            continue
        rows: dict[str, str] = {}
        first = None
        if aligned or "landmarks" in stages:
            first = judge.chunk("landmarks", split, number, clips, rows, None)
        for stage in stages:
            chunks.append(
                first
                if stage == "landmarks"
                else judge.chunk(stage, split, number, clips, rows, first if aligned else None)
            )
    return chunks


class _Judge:
    """Compares what is wanted with what is there, chunk by chunk."""

    def __init__(self, manifest: Manifest, layout: Layout, wanted: Wanted, deep: bool) -> None:
        self._manifest, self._layout, self._deep = manifest, layout, deep
        self._parameters = stage_parameters(wanted)
        self._archive = wanted.archive
        self._look = looking(manifest.root)
        self._headers = {stage: Headers(layout.folder(stage)) for stage in STAGES}

    def chunk(
        self, stage: str, split: str, number: int, clips: list[Clip], known: dict[str, str], above: Chunk | None
    ) -> Chunk:
        """The state of one chunk. `known` keeps the digests of its rows' fields from one stage to the next."""
        for name in ROW_FIELDS[stage]:
            if name not in known:
                values = list(map(attrgetter(name), clips))
                known[name] = digest(values) if name not in _RARE or any(v is not None for v in values) else ""
        wanted = {
            "version": STAGE_VERSIONS[stage],
            "fps": self._manifest.fps,
            "parameters": self._parameters[stage],
            "rows": {name: known[name] for name in ROW_FIELDS[stage] if known[name]},
        }
        archive = self._archive if stage == "landmarks" else None
        sources = fingerprint = None
        if above is None:
            sources = sources_digest(dict.fromkeys(c.video for c in clips), self._manifest.root, archive, self._look)
            fingerprint = digest({"stage": stage, **wanted, "sources": sources})
        elif above.state == "fresh":
            fingerprint = digest({"stage": stage, **wanted, "made_from": _result(above.header)})
        tar = self._layout.tar(stage, split, number)
        header = self._headers[stage](tar)
        if header is None:
            state, reason = "missing", ""
            if self._headers[stage].has_record(tar):
                reason = "its tar or record was cut or damaged, or is of another version of lipprep"
        elif header["fingerprint"] == fingerprint:
            state, reason = "fresh", ""
            if self._deep and above is None and (changed := self._changed(tar, clips, archive)):
                state, reason = "stale", f"{changed} of its sources have other content, of the same size and time"
        else:
            state, reason = "stale", self._reason(header, wanted, above, clips, archive)
        return Chunk(stage, split, number, clips, tar, state, reason, header, wanted["rows"], sources, fingerprint)

    def _reason(self, header: dict, wanted: dict, above: Chunk | None, clips: list[Clip], archive: str | None) -> str:
        """Why a committed chunk is not what is wanted, in the user's terms."""
        if header["fingerprint"] is None:
            return "videos came, went or changed while it was made"
        if header["version"] != wanted["version"]:
            return f"made by version {header['version']} of the stage, this is {wanted['version']}"
        if header["parameters"] != wanted["parameters"]:
            return differences(header["parameters"], wanted["parameters"])
        if header["fps"] != wanted["fps"]:
            return f"fps {header['fps']} -> {wanted['fps']}"
        if changed := [name for name, value in wanted["rows"].items() if header["rows"].get(name) != value]:
            if "key" in changed:
                return "clips came into the chunk or left it"
            return f"the manifest's {', '.join(changed)} changed"
        if above is not None:
            return "its landmarks changed" if above.state == "fresh" else f"its landmarks are {above.state}"
        if missing := sum(self._look(video) is None for video in {c.video for c in clips}):
            return f"{missing} of its videos are missing below {self._manifest.root}"
        return f"videos{' or landmark files' if archive else ''} were replaced or touched"

    def _changed(self, tar: Path, clips: list[Clip], archive: str | None) -> int:
        """How many source files of a chunk have another content than when it was made."""
        sources = {e["key"]: e["source"] for e in read_entries(tar)}
        videos = {c.video: sources.get(c.key) for c in clips}
        root = self._manifest.root

        def changed(video: str) -> int:
            count = 0
            for name, path in source_files(root, video, archive).items():
                part = videos[video] if name == "video" or videos[video] is None else videos[video].get(name)
                if part is not None and file_stat(path) is not None:
                    count += part.get("sha256") != content_digest(path)
            return count

        with ThreadPoolExecutor(REQUESTS if isinstance(root, RemotePath) else 1) as threads:
            return sum(threads.map(changed, videos))


def _result(header: dict) -> str:
    """All that another stage reads of a chunk: its tar, the videos that it was made from, and what failed."""
    return digest([header["tar"]["sha256"], *map(header.get, ("content", "absent", "failed"))])
