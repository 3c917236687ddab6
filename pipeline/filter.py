"""A cleaner manifest of the clips whose figures fit a condition; what was made of them is copied, not made anew.

The clips that stay keep their chunks. Landmarks depend on where tracking began, which was with a clip that may be gone:
the first clip that stays of such a stretch says where (`tracked_from`, `tracked_to`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.expression import Condition
from lipprep.pipeline.figures import OK, ClipTable
from lipprep.pipeline.make import span
from lipprep.pipeline.manifest import Clip, Manifest, groups
from lipprep.pipeline.moved import lend
from lipprep.pipeline.plan import STAGES, Layout
from lipprep.pipeline.supervise import say
from lipprep.pipeline.wanted import read_wanted, write_wanted


@dataclass(frozen=True)
class Filtered:
    """A manifest of the clips that stay, and why the others do not: their numbers by reason."""

    manifest: Manifest
    left_out: dict[str, int]


def filter_manifest(table: ClipTable, condition: Condition, columns: dict[str, np.ndarray], path: Path) -> Filtered:
    """The clips of `table` that are whole and that `condition` holds for, as a manifest to be saved at `path`.

    `columns` are the figures that the condition names, (N,) float64. Raises ValueError where no clip stays, saying why.
    """
    whole = np.array([kind == OK for kind in table.kinds])
    known = np.logical_and.reduce([np.isfinite(columns[name]) for name in condition.names])
    stays = whole & condition.holds(columns)
    left_out = Counter(kind for kind in table.kinds if kind != OK)
    for name in condition.names:
        if unknown := int((whole & ~np.isfinite(columns[name])).sum()):
            left_out[f"{name} not known"] = unknown
    if against := int((whole & known & ~stays).sum()):
        left_out["against the condition"] = against
    if not stays.any():
        why = ", ".join(f"{kind}: {count}" for kind, count in left_out.items())
        raise UserError(f"no clip of {table.manifest.path} stays ({why}): nothing was written")
    clips = _with_spans(table.manifest, stays)
    before = table.manifest.filtered
    filtered = condition.text if before is None else f"({before}) and ({condition.text})"
    kept = replace(table.manifest, path=path, clips=tuple(_without_gaps(clips)), filtered=filtered)
    return Filtered(kept, dict(left_out))


def _with_spans(manifest: Manifest, stays: np.ndarray) -> list[Clip]:
    """The clips that stay; of each stretch the first says which frames all of its clips saw, where these see fewer.

    Where one of them was the whole video, no frames say so: windows that stay without it are made anew.
    """
    row, kept = 0, []
    for _, clips in groups(manifest.clips, manifest.fps):
        mine = [clip for n, clip in enumerate(clips, row) if stays[n]]
        row += len(clips)
        first, last = span(clips)
        if mine and last is not None and span(mine) != (first, last):
            mine[0] = msgspec.structs.replace(mine[0], tracked_from=first, tracked_to=last)
        kept += mine
    return kept


def _without_gaps(clips: Sequence[Clip]) -> list[Clip]:
    """The same, the chunks after one that lost all of its clips moved up."""
    numbers: dict[str, dict[int, int]] = {}
    for split, chunk in sorted({(clip.split, clip.chunk) for clip in clips}):
        mine = numbers.setdefault(split, {})
        mine[chunk] = len(mine)
    moved = (numbers[clip.split][clip.chunk] for clip in clips)
    return [c if c.chunk == n else msgspec.structs.replace(c, chunk=n) for c, n in zip(clips, moved, strict=True)]


def lend_artefacts(manifest: Manifest, old: Layout, new: Layout) -> int:
    """Let the stages of the filtered manifest copy what was made for `manifest`, and want the same; the number of tars.

    They get links to the tars, or copies where a disk has no links, which go once they have served. Stored crops are
    lent by links alone: they are large, and may never be asked for.
    """
    if old.work == new.work:
        return 0
    wanted = read_wanted(old.plan)
    count = sum(lend(manifest.name, old.folder(s), new.lent(s), copy=s != "crops") for s in STAGES)
    if count and not new.plan.exists():
        write_wanted(new.plan, wanted)
    elif count and read_wanted(new.plan) != wanted:
        say(f"warning: {new.plan} wants other settings than {old.plan}: what differs is made anew")
    return count
