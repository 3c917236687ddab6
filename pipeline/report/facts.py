"""What was done, with what, and how to do it again: told by the records and by plan.yaml."""

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lipprep.pipeline.inputs import digest
from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.plan import STAGE_VERSIONS, Chunk, stage_parameters
from lipprep.pipeline.status import as_json as states
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.crop_files import is_crop_file

_LRW = re.compile(r"([^/]+)/(train|val|test)/\1_\d+\.[A-Za-z0-9]+")
_GRID = re.compile(r"video/[^/]+/[^/]+\.[A-Za-z0-9]+")
_LOOKS = 1000  # clips whose paths tell how a corpus is laid out


@dataclass(frozen=True)
class Stage:
    """What a stage has and was made with. `row` is that of `lipprep status --timing`."""

    name: str
    row: Mapping
    version: int
    parameters: dict
    fingerprint: str | None
    fingerprints: str
    packages: tuple[str, ...]
    cpus: tuple[str, ...]

    @property
    def begun(self) -> bool:
        """Whether any of its chunks was made."""
        return self.row["missing"] < self.row["chunks"]

    @property
    def ok(self) -> int:
        return self.row["clips"].get("ok", 0)

    @property
    def failed(self) -> int:
        return sum(self.row["clips"].values()) - self.ok


def stages(chunks: Sequence[Chunk], wanted: Wanted) -> list[Stage]:
    """The stages of a survey. A stage's fingerprint, of those of its chunks, is there once all of them are fresh."""
    parameters = stage_parameters(wanted)
    found = []
    for row in states(chunks, timing=True):
        mine = [c for c in chunks if c.stage == row["stage"]]
        headers = [c.header for c in mine if c.header is not None]
        lines = [f"{c.tar.stem}  {c.state:7}  {(c.header or {}).get('fingerprint') or '-'}" for c in mine]
        packages = {f"{name} {version}" for h in headers for name, version in h.get("packages", {}).items()}
        found.append(
            Stage(
                name=row["stage"],
                row=row,
                version=STAGE_VERSIONS[row["stage"]],
                parameters=parameters[row["stage"]],
                fingerprint=digest([c.fingerprint for c in mine]) if row["fresh"] == row["chunks"] else None,
                fingerprints="\n".join(lines),
                packages=tuple(sorted(packages)),
                cpus=tuple(sorted({str(h.get("cpu")) for h in headers})),
            )
        )
    return found


def manifest_digest(manifest: Manifest) -> str:
    """The sha256 of the manifest's file."""
    return hashlib.sha256(manifest.path.read_bytes()).hexdigest()


def commands(manifest: Manifest, wanted: Wanted, made: Sequence[Stage], named: Mapping) -> list[str]:
    """The commands that make the same again, with every flag that differs from its default.

    How a manifest was made is not recorded: its first command is told by its layout, and is a comment where that tells
    nothing, or where clips were left out since.
    """
    path, default = str(manifest.path), Wanted()
    where = ["-m", path, *_flag("-w", named.get("work"), "work")]
    out = _flag("-o", named.get("shards"), "shards")
    if named.get("root") is not None:
        where += ["--root", str(named["root"])]
    # Of crops from files the profile is never taken for granted.
    profile = [] if wanted.profile == default.profile and not wanted.from_crops else ["--profile", wanted.profile]
    if wanted.profile == "fixed":
        profile += [] if wanted.box is None else ["--box", ",".join(map(str, wanted.box))]
    elif wanted.crop_size != default.crop_size:
        profile += ["--crop-size", str(wanted.crop_size)]
    profile += ["--exact"] if wanted.exact else []
    profile += _flag("--mean-face", wanted.mean_face, None)
    codec = _flag("--codec", wanted.codec, default.codec)
    codec += _flag("--quality", wanted.quality, default.quality) if wanted.codec == "jpeg" else []
    codec += _flag("--licence", wanted.licence, None)
    if wanted.from_crops:
        size = ["--crop-size", str(wanted.crop_size)] if "--crop-size" not in profile else []
        listing = _flag("--annotations", wanted.annotations, None) + _flag("--labels", wanted.labels, None)
        source = ["--from-crops", str(manifest.root)]
        if manifest.filtered is not None:  # to list them again would undo it
            return [_as_it_is(manifest), shlex.join(["lipprep", "shards", *where, *out, *profile, *size, *codec])]
        return [shlex.join(["lipprep", "shards", *source, *where, *out, *profile, *size, *codec, *listing])]
    lines = [_manifest_command(manifest)]
    names = [stage.name for stage in made]
    stored = any(s.name == "crops" and s.begun for s in made)
    if "landmarks" in names:
        detector = _flag("--detector", wanted.detector, default.detector)
        detector += _flag("--archive", wanted.archive, None) + _flag("--persons", wanted.persons, None)
        lines.append(shlex.join(["lipprep", "landmarks", *where, *detector]))
    if stored:
        lines.append(shlex.join(["lipprep", "crops", *where, *profile]))
    lines.append(shlex.join(["lipprep", "shards", *where, *out, *([] if stored else profile), *codec]))
    return lines


def _flag(name: str, value: object, default: object) -> list[str]:
    return [] if value is None or str(value) == str(default) else [name, str(value)]


def _manifest_command(manifest: Manifest) -> str:
    some = manifest.clips[:: max(1, len(manifest.clips) // _LOOKS)]
    kind, more = None, []
    if all(_LRW.fullmatch(c.video) for c in some):
        kind = "lrw"
    elif all(_GRID.fullmatch(c.video) and c.start is not None for c in some):
        kind = "grid"
        unseen = sorted({c.speaker for c in manifest.clips if c.split == "unseen" and c.speaker})
        more = ["--unseen-speakers", ",".join(unseen)] if unseen else []
    if kind is None or is_crop_file(manifest.clips[0].video) or manifest.filtered is not None:
        return _as_it_is(manifest)
    more += _flag("--seed", manifest.seed, 0) + _flag("--chunk-size", manifest.chunk_size, 512)
    return shlex.join(["lipprep", "manifest", kind, str(manifest.root), "-o", str(manifest.path), *more])


def _as_it_is(manifest: Manifest) -> str:
    path = shlex.quote(str(manifest.path))
    if manifest.filtered is not None:
        filtered = shlex.join(["lipprep", "manifest", "filter", manifest.filtered])
        return f"# {path} as it is: what `{filtered}` left of another manifest"
    return f"# the manifest {path} as it is: its own command is not recorded"


def pretty(parameters: Mapping) -> str:
    """Parameters as indented JSON, short lists in a line."""
    return json.dumps({k: v if not isinstance(v, tuple) else list(v) for k, v in parameters.items()}, indent=1)


def plan_lines(wanted: Wanted) -> str:
    """All that is wanted, a line each, as plan.yaml has it."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in dataclasses.asdict(wanted).items())
