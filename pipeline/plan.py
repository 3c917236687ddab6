"""What is wanted, what is there, and what therefore is fresh, stale or missing, and why."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lipprep.pipeline.manifest import Clip, Manifest, chunk_name
from lipprep.pipeline.records import read_header
from lipprep.pipeline.wanted import Wanted

STAGES = ("landmarks", "crops", "shards")
# Raised whenever a stage's output changes for the same input: what was made before is then stale.
STAGE_VERSIONS = {"landmarks": 1, "crops": 1, "shards": 1}
# The fields of a manifest's row that a stage reads; a change in another leaves its output fresh.
ROW_FIELDS = {
    "landmarks": ("key", "video", "start", "num_frames"),
    "crops": ("key", "video", "start", "num_frames"),
    "shards": tuple(f.name for f in dataclasses.fields(Clip) if f.name != "chunk"),
}


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """The sha256 of a value of plain containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def stage_parameters(wanted: Wanted) -> dict[str, dict]:
    """What each stage reads of what is wanted: what its fingerprint holds and its record shows."""
    landmarks: dict = {"detector": wanted.detector}
    if wanted.detector == "archive":
        landmarks["archive"] = str(Path(wanted.archive).resolve())
        landmarks["persons"] = wanted.persons and file_digest(Path(wanted.persons))
    else:
        landmarks["identity"] = wanted.identity
    crops: dict = {"profile": wanted.profile, "crop_size": wanted.crop_size, "exact": wanted.exact}
    if wanted.profile == "fixed":
        crops["box"] = list(wanted.box)
    elif wanted.profile != "unaligned":
        crops["mean_face"] = wanted.mean_face and file_digest(Path(wanted.mean_face))
    shards: dict = {"codec": wanted.codec}
    if wanted.codec == "jpeg":
        shards["quality"] = wanted.quality
    return {"landmarks": landmarks, "crops": crops, "shards": {**crops, **shards}}


def upstream(stage: str, wanted: Wanted) -> str | None:
    """The stage whose tars `stage` is made from.

    Shards are made from landmarks: whether the crops between were stored changes nothing. A fixed box needs
    no landmarks.
    """
    return None if stage == "landmarks" or wanted.profile == "fixed" else "landmarks"


def source_stat(root: Path, video: str, archive: str | None) -> dict | None:
    """Size and modification time of a clip's video, and of its landmark file in an archive; None where missing."""
    stat = _stat(root / video)
    if stat is not None and archive is not None:
        from lipprep.stages.landmarks.archive import archive_file

        path = archive_file(Path(archive), archive_name(video))
        stat["archive"] = path and _stat(path)
    return stat


def _stat(path: Path) -> dict | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def archive_name(video: str) -> str:
    """The name of a video's landmark file in an archive: its path without the ending."""
    return PurePosixPath(video).with_suffix("").as_posix()


def sources_digest(clips: list[Clip], root: Path, archive: str | None) -> str:
    """A digest of size and mtime of all sources of a chunk: a replaced one makes the chunk stale."""
    return digest([(video, source_stat(root, video, archive)) for video in dict.fromkeys(c.video for c in clips)])


@dataclass(frozen=True)
class Chunk:
    """One chunk of one stage: where its tar stands, and whether it is what is wanted.

    `state` is fresh, stale or missing, `reason` says why it is stale, `header` is its record's where there is
    one. `rows` and `inputs` digest what a run would read, `fingerprint` all that its output depends on; the
    last two are None where the chunk that it is made from is not fresh.
    """

    stage: str
    split: str
    number: int
    clips: list[Clip] = field(repr=False)
    tar: Path
    state: str
    reason: str
    header: dict | None = field(repr=False)
    rows: str
    inputs: dict | None
    fingerprint: str | None

    def wanted_header(self, fps: float, parameters: dict) -> dict:
        """What the header of the record to make says of its inputs."""
        return {
            "stage": self.stage,
            "version": STAGE_VERSIONS[self.stage],
            "fps": fps,
            "parameters": parameters,
            "rows": self.rows,
            "sources": self.inputs["sources"],
            "fingerprint": self.fingerprint,
        }


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


def _why(old: Mapping, new: Mapping) -> str:
    """The difference of two sets of parameters in the user's terms: `crop_size 88 -> 96`."""
    return ", ".join(
        f"{name} {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    )


def survey(manifest: Manifest, layout: Layout, wanted: Wanted, stages: tuple[str, ...] = STAGES) -> list[Chunk]:
    """The state of every chunk of `stages`, from the records' headers and the sources' sizes and times alone."""
    parameters = stage_parameters(wanted)
    aligned = upstream("shards", wanted) is not None
    chunks: list[Chunk] = []
    for (split, number), clips in manifest.chunks().items():
        first = None
        if aligned or "landmarks" in stages:
            first = _judge(
                "landmarks", split, number, clips, manifest, layout, parameters["landmarks"], None, wanted.archive
            )
        for stage in stages:
            if stage == "landmarks":
                chunks.append(first)
            else:
                above = first if aligned else None
                chunks.append(_judge(stage, split, number, clips, manifest, layout, parameters[stage], above))
    return chunks


def _judge(
    stage: str,
    split: str,
    number: int,
    clips: list[Clip],
    manifest: Manifest,
    layout: Layout,
    parameters: dict,
    above: Chunk | None,
    archive: str | None = None,
) -> Chunk:
    tar = layout.tar(stage, split, number)
    header = read_header(tar)
    rows = digest([[getattr(c, name) for name in ROW_FIELDS[stage]] for c in clips])
    if above is None:
        inputs = {"sources": sources_digest(clips, manifest.root, archive)}
    else:
        inputs = None
        if above.state == "fresh":
            inputs = {"tar": above.header["tar"]["sha256"], "sources": above.header["sources"]}
    parts = {"version": STAGE_VERSIONS[stage], "fps": manifest.fps, "parameters": parameters, "rows": rows}
    fingerprint = None if inputs is None else digest({"stage": stage, **parts, **inputs})
    if header is None:
        state, reason = "missing", ""
    elif header["fingerprint"] == fingerprint:
        state, reason = "fresh", ""
    else:
        state, reason = "stale", "another stage's output changed"
        if header["version"] != parts["version"]:
            reason = f"made by version {header['version']} of the stage, this is {parts['version']}"
        elif header["parameters"] != parameters:
            reason = _why(header["parameters"], parameters)
        elif header["rows"] != rows:
            reason = "the manifest's clips changed"
        elif header["fps"] != manifest.fps:
            reason = f"fps {header['fps']} -> {manifest.fps}"
        elif above is None:
            reason = "videos were replaced or touched"
            if missing := sum(not (manifest.root / video).is_file() for video in {c.video for c in clips}):
                reason = f"{missing} of its videos are missing below {manifest.root}"
        else:
            reason = "its landmarks changed" if above.state == "fresh" else f"its landmarks are {above.state}"
    return Chunk(stage, split, number, clips, tar, state, reason, header, rows, inputs, fingerprint)
