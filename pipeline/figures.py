"""The figures of all clips of a corpus in one table, from the records of whatever stages were run.

Shapes: N clips, in the manifest's order.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lipprep.pipeline.likeness import groups_of, off_centre
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.pipeline.plan import STAGES, Layout
from lipprep.pipeline.record_form import RECORDED_NUMBERS, RECORDED_TEXTS, Entry
from lipprep.pipeline.records import Headers, all_entries, root_class
from lipprep.stages.quality import FACE, LOOK, face_vector, look_vector, motion_bits
from lipprep.stages.remote import RemotePath

OK, PENDING = "ok", "pending"
TEXTS = RECORDED_TEXTS
NUMBERS = (*RECORDED_NUMBERS, "off_centre")
_DESCRIPTIONS = {"face": (face_vector, FACE), "look": (look_vector, LOOK**2)}
_READ = {"face": face_vector, "look": look_vector, "motion": motion_bits}
_LARGEST = 1e12  # beyond any figure


class Place(NamedTuple):
    """Where the members of a clip stand: from byte `offset` of `tar` on, named by their `extensions`."""

    tar: Path | RemotePath
    offset: int
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class ClipTable:
    """What is known of each clip of `manifest`.

    `kinds` has for each "ok", the class of its failure, or "pending" where no stage has come to it; `messages` and
    `stages` say why and where it failed (else ""). `columns` are its numbers by figure, (N,) float64, NaN where one is
    not known, `texts` those that are texts, None where not known. `crops` says where its mouth crops can be read, in
    the shards or, where there are none, in the tars of the stage crops; `landmarks` the same of its points.
    """

    manifest: Manifest
    kinds: list[str]
    messages: list[str]
    stages: list[str]
    columns: Mapping[str, np.ndarray] = field(repr=False)
    texts: Mapping[str, list[str | None]] = field(repr=False)
    crops: list[Place | None] = field(repr=False)
    landmarks: list[Place | None] = field(repr=False)

    @property
    def clips(self) -> tuple[Clip, ...]:
        return self.manifest.clips

    def __len__(self) -> int:
        return len(self.kinds)

    def vectors(self, name: str) -> np.ndarray:
        """The descriptions `face` or `look` as numbers, (N, F) float32, NaN where one is not known."""
        read, count = _DESCRIPTIONS[name]
        vectors_NF = np.full((len(self), count), np.nan, np.float32)
        for row, text in enumerate(self.texts[name]):
            if text is not None:
                vectors_NF[row] = read(text)
        return vectors_NF


def read_table(manifest: Manifest, layout: Layout, *, stages: Sequence[str] = STAGES) -> ClipTable:
    """Read the records of `stages`, of which any may be missing or half done, to a table.

    What a clip is comes from the last stage that has it. Records that are damaged, or another data set's, say nothing,
    nor do figures that are none: shards may have come from anybody.
    """
    rows = {clip.key: row for row, clip in enumerate(manifest.clips)}
    N = len(manifest.clips)
    table = ClipTable(
        manifest,
        kinds=[PENDING] * N,
        messages=[""] * N,
        stages=[""] * N,
        columns={name: np.full(N, np.nan) for name in NUMBERS},
        texts={name: [None] * N for name in TEXTS},
        crops=[None] * N,
        landmarks=[None] * N,
    )
    for stage in STAGES:
        if stage not in stages:
            continue
        header_of = Headers(layout.folder(stage))
        tars = [layout.tar(stage, split, number) for split, number in manifest.chunks()]
        tars = [tar for tar in tars if (header := header_of(tar)) and header.get("dataset") == manifest.name]
        read = tqdm(all_entries(tars), total=len(tars), desc=f"records of {stage}", unit="chunk", disable=not tars)
        for tar, entries in zip(tars, read, strict=True):
            for entry in entries:
                if (row := rows.get(entry["key"])) is not None:
                    _add(table, row, stage, tar, entry)
    table.columns["off_centre"][:] = off_centre(table.vectors("look"), groups_of(manifest.clips))
    return table


def _add(table: ClipTable, row: int, stage: str, tar: Path | RemotePath, entry: Entry) -> None:
    """What one stage's record says of a clip, over what the stages before said."""
    if entry["status"] == OK:
        table.kinds[row], table.messages[row], table.stages[row] = OK, "", ""
        place = Place(tar, entry["offset"], tuple(entry["members"]))
        if stage == "landmarks":
            table.landmarks[row] = place
        else:
            table.crops[row] = place
    else:
        table.kinds[row], table.messages[row] = root_class(entry), entry["message"]
        table.stages[row] = entry["upstream"]["stage"] if entry["class"] == "upstream" else stage
        table.crops[row] = None
    for name, value in entry["figures"].items():
        if name in table.columns and value is not None and abs(value) <= _LARGEST:
            table.columns[name][row] = value
        elif name in table.texts and isinstance(value, str):
            with contextlib.suppress(ValueError):
                _READ[name](value)
                table.texts[name][row] = value
