"""The page: what was gathered and pictured, put into the template. Everything that files say is escaped there."""

import base64
import functools
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from markupsafe import Markup

from lipprep import __version__
from lipprep.pipeline.figures import ClipTable, read_table
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.pipeline.plan import Chunk, Layout, stages_of, survey
from lipprep.pipeline.report import facts
from lipprep.pipeline.report.charts import PARTS, bar, heat, histogram
from lipprep.pipeline.report.gather import FIGURES, Gathered, gather, summaries
from lipprep.pipeline.report.pictures import FRAMES, Frames, draw_landmarks, picture_clips, thumbnail
from lipprep.pipeline.suspicion import Suspect, rank
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.atomic import check_own, replacing
from lipprep.stages.failures import FAILURES
from lipprep.stages.remote import RemotePath
from lipprep.stages.store import masked
from lipprep.stages.untrusted import printable

DRAWN = 12  # first frames with landmarks
_TRIED = 24  # clips that are tried for them
_LONGEST = 400  # characters of a message
_USUAL_LENGTH = 1.16  # seconds of a clip, where its length is not known: LRW's
# What to do about clips of each class of failures, beside what their messages say.
REMEDIES = {
    "unreadable": "Copy the file again, or say with --root where the videos are.",
    "truncated": "Copy the file again: it is whole at its source, or its clips end too late.",
    "no_video": "Leave it out: it holds no picture.",
    "no_face": "Where the picture shows a face, try --detector fan; where not, leave the clip out.",
    "too_short": "Leave it out, or give it a longer window.",
    "too_long": "Cut it into windows, or pack with --codec npy.",
    "landmarks_missing": "Add its file to the archive, or find landmarks with --detector mesh.",
    "landmarks_mismatch": "Find its landmarks again: they are of another video, or of another version of it.",
    "bad_landmarks": "Add its file to the archive again, or find landmarks with --detector mesh.",
    "bad_crops": "Make its crops again as its message says, or leave it out.",
    "error": "Its message says what could not be done; --retry-failed=error tries again.",
    "crashed": "Look at the file by itself; --retry-failed=crashed tries again.",
    "timeout": "Give it more time: --clip-timeout SECONDS --retry-failed=timeout.",
}


@dataclass(frozen=True)
class Found:
    """All that is known of a data set, before any picture is read."""

    manifest: Manifest
    layout: Layout
    wanted: Wanted
    chunks: list[Chunk]
    table: ClipTable
    suspects: list[Suspect]
    gathered: Gathered

    @property
    def shown(self) -> int:
        """How many clips the page shows."""
        return len(self.gathered.shown)

    def plain(self, most: int) -> dict:
        """Counts, figures and the `most` most suspicious clips in plain containers."""
        keys = self.table.clips
        return {
            "dataset": self.manifest.name,
            "planned": len(keys),
            "counts": self.gathered.counts,
            "stages": {
                s.name: {"ok": s.ok, "failed": s.failed, **s.row["clips_by_state"]}
                for s in facts.stages(self.chunks, self.wanted)
            },
            "figures": summaries(self.gathered),
            "suspicion": [
                {"key": keys[s.index].key, "score": round(float(s.score), 6), "reasons": list(s.reasons)}
                for s in self.suspects[:most]
            ],
        }


def look(manifest: Manifest, layout: Layout, wanted: Wanted) -> Found:
    """Read the records of a data set, and choose what the page shows."""
    chunks = survey(manifest, layout, wanted, stages_of(wanted))
    table = read_table(manifest, layout, stages=stages_of(wanted))
    suspects = rank(table)
    return Found(manifest, layout, wanted, chunks, table, suspects, gather(table, suspects))


def write_page(out: Path | RemotePath, found: Found, *, named: Mapping, workers: int) -> int:
    """Write the page atomically; its size in bytes. `named` are the places as the user called them."""
    check_own(out, b": data set report</title>")
    # A speaker's name may hold half of a surrogate pair, which no file can.
    page = render(found, named=named, workers=workers).encode("utf-8", "backslashreplace")
    with replacing(out) as file:
        file.write(page)
    return len(page)


def render(found: Found, *, named: Mapping, workers: int) -> str:
    """The page's HTML: the same for the same records, tars and videos."""
    from jinja2 import Environment, StrictUndefined
    from tqdm import tqdm

    table, gathered = found.table, found.gathered
    progress = functools.partial(tqdm, desc="crops", unit="clip")
    pictures = picture_clips(table, gathered.shown, gathered.averaged, progress, workers=workers)
    made = facts.stages(found.chunks, found.wanted)
    places, frames = _places(gathered), Frames(table)
    script = _part("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": _number,
        "printable": _legible,
        "short": _short,
        "printable_lines": _printable_lines,
    }
    return environment.from_string(_part("template.html")).render(
        manifest=found.manifest,
        version=__version__,
        counts=gathered.counts,
        classes=FAILURES,
        remedies=REMEDIES,
        sprites=pictures.sprites,
        averages=pictures.averages,
        lost=pictures.lost,
        frames=FRAMES,
        cards=[_card(found, row, places[row], pictures.sprites.at.get(row)) for row in gathered.shown],
        sheets=[sheet for sheet in gathered.sheets if sheet.figure is None],
        outliers=[sheet for sheet in gathered.sheets if sheet.figure is not None],
        sheet_names={sheet.name for sheet in gathered.sheets},
        choices=_choices(found),
        failures=_failures(found, frames),
        spreads=[(spread, histogram(spread)) for spread in gathered.spreads],
        centre=gathered.centre,
        heat=gathered.centre and heat(gathered.centre),
        drawn=_landmarks(found, frames),
        stages=made,
        bars={s.name: bar(s.row["timing"]["parts"], label=f"{s.name}: seconds of work by part") for s in made},
        parts=PARTS,
        manifest_sha256=facts.manifest_digest(found.manifest),
        plan=facts.plan_lines(found.wanted),
        pretty=facts.pretty,
        commands=[_legible(line) for line in facts.commands(found.manifest, found.wanted, made, named)],
        script=Markup(script),  # this and the style are the package's own
        style=Markup(_part("page.css")),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _part(name: str) -> str:
    return resources.files("lipprep.pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _number(value: float) -> str:
    """A number for people: 12,345 or 0.0123."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _printable_lines(text: str) -> str:
    return "\n".join(map(_legible, text.splitlines()))


def _legible(text: object) -> str:
    """Text without anything that is invisible or, as passwords in URLs, not for others' eyes."""
    return printable(masked(str(text)))


def _places(gathered: Gathered) -> dict[int, list[str]]:
    """Where each row stands in which sheets: `random:3`."""
    places: dict[int, list[str]] = defaultdict(list)
    for sheet in gathered.sheets:
        for n, row in enumerate(sheet.rows):
            places[row].append(f"{sheet.name}:{n}")
    return places


@dataclass(frozen=True)
class _Card:
    """One clip on the page. `sheets` says where it stands in which sheet, `seconds` how long it is played."""

    row: int
    clip: Clip
    kind: str
    message: str
    seconds: float
    sheets: str
    figures: str
    reasons: tuple[str, ...]
    sprite: tuple[int, int] | None


def _card(found: Found, row: int, places: list[str], sprite: tuple[int, int] | None) -> _Card:
    table = found.table
    values = {name: float(column[row]) for name, column in table.columns.items() if np.isfinite(column[row])}
    told = [f"{f.title}\t{f.say(values[f.name])}" for f in FIGURES if f.name in values]
    if {"centre_x", "centre_y"} <= set(values):
        told.append(f"Mouth centre\t{values['centre_x']:.0f}, {values['centre_y']:.0f} px")
    seconds = values.get("num_frames", _USUAL_LENGTH * found.manifest.fps) / found.manifest.fps
    return _Card(
        row=row,
        clip=table.clips[row],
        kind=table.kinds[row],
        message=table.messages[row],
        seconds=round(min(max(seconds, 0.4), 6.0), 2),
        sheets=" ".join(places),
        figures="\n".join(told),
        reasons=found.gathered.reasons.get(row, ()),
        sprite=sprite,
    )


def _choices(found: Found) -> dict[str, list]:
    """What the clips that are shown can be filtered by."""
    clips = [found.table.clips[row] for row in found.gathered.shown]
    return {
        "word": sorted({c.word for c in clips}),
        "speaker": sorted({c.speaker for c in clips if c.speaker is not None}),
        "split": sorted({c.split for c in clips}),
        "splits": list(Counter(c.split for c in found.table.clips).items()),
        "kind": sorted({found.table.kinds[row] for row in found.gathered.shown}),
    }


@dataclass(frozen=True)
class _Failure:
    """A clip that failed, with the first frame of its video where that can be decoded."""

    row: int
    clip: Clip
    stage: str
    message: str
    picture: str | None


def _failures(found: Found, frames: Frames) -> list[tuple[str, int, list[_Failure]]]:
    """Each class of failures that there is, with how many failed by it and some of them; the commonest first."""
    table, shown = found.table, {}
    failed = next((s.rows for s in found.gathered.sheets if s.name == "failed"), ())
    for row in failed:
        frame = frames(row)
        failure = _Failure(
            row, table.clips[row], table.stages[row], table.messages[row], None if frame is None else thumbnail(frame)
        )
        shown.setdefault(table.kinds[row], []).append(failure)
    return [(kind, count, shown.get(kind, [])) for kind, count in found.gathered.counts.items() if kind in FAILURES]


def _landmarks(found: Found, frames: Frames) -> list[tuple[Clip, str]]:
    """First frames with landmarks: of the most suspicious clips and of random ones, in turn."""
    sheets = {s.name: s.rows for s in found.gathered.sheets}
    turns = itertools.zip_longest(sheets.get("random", ())[:_TRIED], sheets.get("suspicious", ())[:_TRIED])
    rows = list(dict.fromkeys(row for pair in turns for row in pair if row is not None))[:_TRIED]
    drawn: list[tuple[Clip, str]] = []
    for row in rows:
        if len(drawn) < DRAWN and (picture := draw_landmarks(found.table, frames, row)) is not None:
            drawn.append((found.table.clips[row], picture))
    return drawn
