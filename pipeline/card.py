"""The data set card, README.md beside the shards: what they hold, for people and for the sites that publish data sets.

It names no folder and no machine, and for the same shards it is the same to the byte.
"""

import dataclasses
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from lipprep import __version__
from lipprep.io.errors import UserError
from lipprep.pipeline.inputs import digest
from lipprep.pipeline.manifest import Clip, Manifest
from lipprep.stages.lrw import is_lrw
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import SPLITS, Index, Shard
from lipprep.stages.untrusted import markdown, printable, read_text

CARD = "README.md"
_VERSION = 2  # raised when cards say something else of the same shards
_MARK = "<!-- lipprep card"
_MAX_CARD = 1 << 20  # bytes
_MAX_LICENCE = 200  # characters
_SHOWN = 100  # words
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Those that dataset hubs have a name of their own for; any other licence is "other" to them.
_LICENCES = (
    "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0",
    "cc0-1.0", "mit", "odbl", "odc-by", "pddl",
)  # fmt: skip
# The fields of KEY.json and their types as Hugging Face's `datasets` names them: it would guess them from the first
# clips, and fail where a field is null in these and not in later ones.
_FIELDS = {
    "label": "int64",
    "word": "string",
    "word_start": "float64",
    "word_end": "float64",
    "duration": "float64",
    "speaker": "string",
    "num_frames": "int64",
    "split": "string",
}
# What is told of the clips, as far as their records have it.
_FIGURES = {
    "num_frames": "frames",
    "duration": "the word's duration, seconds",
    "scale": "scale from the source to the crop",
    "outside": "share of frames whose crop leaves the source's frame",
    "brightness": "mean gray level, 0 to 255",
    "black": "share of frames that show nothing",
    "frozen": "share of steps between frames that change nothing",
    "sharpness": "sharpness, gray levels",
    "movement": "mean change from frame to frame, gray levels",
    "jump": "largest change between two frames, in parts of the median one",
}


@dataclass
class _Split:
    """What the shards hold of one split; the speaker of `nameless` clips is not known."""

    clips: int = 0
    frames: int = 0
    nameless: int = 0
    words: Counter = field(default_factory=Counter)
    speakers: set[str] = field(default_factory=set)


class Tally:
    """Adds up the clips of shards, chunk by chunk, while their records are read."""

    def __init__(self) -> None:
        self.splits = {split: _Split() for split in SPLITS}
        self.figures = {name: array("d") for name in _FIGURES}
        self.videos: set[str] = set()

    def add(self, clips: Sequence[Clip], entries: Sequence[dict]) -> None:
        """Add a chunk: its clips and their lines in its record, both in the manifest's order."""
        for clip, entry in zip(clips, entries, strict=True):
            if entry["status"] != "ok":
                continue
            split, known = self.splits[clip.split], {**entry["figures"], "duration": clip.duration}
            split.clips += 1
            split.frames += known["num_frames"]
            split.words[clip.word] += 1
            if clip.speaker is None:
                split.nameless += 1
            else:
                split.speakers.add(clip.speaker)
            self.videos.add(clip.video)
            for name, values in self.figures.items():
                if (value := known.get(name)) is not None:
                    values.append(value)


def usual_length(tally: Tally) -> int | None:
    """Return the median number of frames of the clips in `tally`, None where there are none."""
    lengths = tally.figures["num_frames"]
    return round(float(np.median(np.frombuffer(lengths)))) if lengths else None


def check_licence(licence: str) -> None:
    """Raise ValueError for what is no name of a licence: it stands in a plan, a table and a card, in one line."""
    if not licence.isprintable() or len(licence) > _MAX_LICENCE or "${" in licence:
        raise UserError(
            f"--licence {printable(licence)[:60]!r} is no licence's name: give one line of up to {_MAX_LICENCE} "
            'characters, as "CC BY 4.0"'
        )


def card_mark(index: Index, manifest: Manifest, licence: str | None) -> str:
    """The line that tells a card from other texts, and that of these shards from others."""
    about = dataclasses.asdict(dataclasses.replace(index, offsets={}))
    made_from = digest([_VERSION, about, licence, _kind(manifest)])[:16]
    return f"{_MARK} {made_from}: lipprep writes this file anew; without this line it is yours and stays as it is -->"


def card_in(folder: Path | RemotePath) -> str | None:
    """The mark of the card in `folder`; "" where its README.md is none of lipprep's, None where there is none."""
    path = folder / CARD
    if not path.exists() and not path.is_symlink():
        return None
    try:
        lines = read_text(path, "card", limit=_MAX_CARD).splitlines()
    except (ValueError, OSError):  # a folder of that name, say
        return ""
    return next((line for line in lines if line.startswith(_MARK)), "")


def card_text(index: Index, manifest: Manifest, tally: Tally, *, licence: str | None) -> str:
    """The card, in Markdown, of shards that hold the clips in `tally`; `licence` None: nobody has stated one."""
    clips = sum(split.clips for split in tally.splits.values())
    size, words = index.crop_size, len(index.labels)
    parts = [
        _front(index, clips, licence) + "\n" + card_mark(index, manifest, licence),
        f"# {markdown(index.dataset)}",
        f"{clips:,} clips of {words} {'word' if words == 1 else 'words'}, each a mouth that says one: {size} x {size} "
        f"pixels, gray, {index.fps:g} frames a second. WebDataset shards, written by lipprep {__version__}.",
        "## Licence",
        _terms(index, licence),
        "## Clips",
        *_counts(index, tally),
        "## Words",
        _words(index, tally),
        "## Clips that are in no shard",
        _failures(index),
        "## Sources and crops",
        _table(("", ""), [("sources", _sources(manifest, tally)), *_parameters(index)]),
        "## Figures",
        "Of the clips in the shards, as far as it is known:",
        _figures(tally),
        "## Files",
        f"{len(index.shards)} shards, {sum(s.bytes for s in index.shards):,} bytes, fingerprint `{index.fingerprint}`.",
        _list(
            [
                ("`SPLIT-NNNNN.tar`", f"a clip is `KEY.{_member(index)}`, its mouth, and `KEY.json`: {_JSON}"),
                (
                    "`index.json`, `index.npz`",
                    "labels, parameters, sizes and sha256 of the shards, where clips begin",
                ),
                ("`SPLIT-NNNNN.jsonl`", _RECORDS),
            ]
        ),
        "## Load it",
        _loading(index),
        "## Check it",
        "`lipprep verify .` in this folder reads every byte; `--deep` decodes every clip. Without lipprep:",
        _CHECK,
    ]
    return "\n\n".join(parts) + "\n"


_JSON = ", ".join(f"`{name}`" for name in _FIELDS) + "; null is not known"
_RECORDS = (
    "a record beside each shard: what its clips were made from, their figures, and why others failed. Nothing that "
    "reads the clips needs it. Its messages may name the folders of videos: to publish the shards, leave it out"
)
_CHECK = """```python
import hashlib, json, pathlib

for shard in json.loads(pathlib.Path("index.json").read_text())["shards"]:
    tar = pathlib.Path(shard["name"]).read_bytes()
    assert hashlib.sha256(tar).hexdigest() == shard["sha256"], shard["name"]
```"""


def _front(index: Index, clips: int, licence: str | None) -> str:
    """The YAML that dataset hubs read."""
    import yaml

    about: dict = {"pretty_name": printable(index.dataset)}
    if licence or _is_lrw(index):
        name = re.sub(r"[^a-z0-9.]+", "-", (licence or "lrw").lower()).strip("-")
        about |= {"license": name} if name in _LICENCES else {"license": "other", "license_name": name or "other"}
    else:
        about["license"] = "unknown"
    about |= {
        "task_categories": ["video-classification"],
        "tags": ["lip-reading", "visual-speech-recognition", "webdataset"],
        "size_categories": [next((name for most, name in _SIZES if clips < most), "n>10M")],
    }
    files = [{"split": split, "path": f"{split}-*.tar"} for split in _splits(index)]
    about["configs"] = [{"config_name": "default", "data_files": files}]
    about["dataset_info"] = {"features": _features(index)}
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _features(index: Index) -> list[dict]:
    """Return the columns that Hugging Face's `datasets` loads: the members of a clip, its key and its shard."""
    size, member = index.crop_size, _member(index)
    mouth = "image" if member == "mouth.jpg" else {"array3_d": {"shape": [None, size, size], "dtype": "uint8"}}
    return [
        {"name": member, "dtype": mouth},
        {"name": "json", "struct": [{"name": name, "dtype": kind} for name, kind in _FIELDS.items()]},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _is_lrw(index: Index) -> bool:
    return is_lrw(index.labels, [index.dataset])


def _terms(index: Index, licence: str | None) -> str:
    stated = markdown(licence) if licence else "Not stated: that of the videos"
    bound = (
        "LRW belongs to the BBC, which gives it by an agreement, for research only: neither its videos nor crops of "
        "them may be passed on."
    )
    if not _is_lrw(index):
        return f"{stated}."
    if licence:
        other = "By its words or its name this may be LRW or a part of it: where it is, no other licence holds."
        return f"{stated}. {other} {bound}"
    told = "By its words or its name, this is LRW or a part of it."
    return f"{told} {bound} Of other videos of such words, `lipprep shards --licence` states the licence."


def _counts(index: Index, tally: Tally) -> list[str]:
    rows = []
    for name in _splits(index):
        split, shards = tally.splits[name], [s for s in index.shards if s.split == name]
        told = [split.words[word] for word in index.labels]
        few_and_many = f"{min(told)} / {np.median(told):g} / {max(told)}" if told else ""
        speakers = f"{len(split.speakers):,}" if split.speakers else "not known"
        numbers = (split.clips, sum(index.failures.get(name, {}).values()), len(shards), sum(s.bytes for s in shards))
        hours = f"{split.frames / index.fps / 3600:.3g}"
        rows.append((name, *(f"{number:,}" for number in numbers), hours, few_and_many, speakers))
    head = ("split", "clips", "failed", "shards", "bytes", "hours", "clips a word: least / median / most", "speakers")
    return [_table(head, rows), *_speakers(tally)]


def _speakers(tally: Tally) -> list[str]:
    """What is known of the speakers of all splits: how many are in several of them."""
    seen = Counter(speaker for split in tally.splits.values() for speaker in split.speakers)
    if not seen:
        return []
    shared = sum(count > 1 for count in seen.values())
    nameless = sum(split.nameless for split in tally.splits.values())
    more = f" The speaker of {nameless:,} clips is not known." if nameless else ""
    return [f"Speakers: {len(seen):,}, and in more than one split {shared:,}.{more}"]


def _words(index: Index, tally: Tally) -> str:
    shown = ", ".join(map(markdown, index.labels[:_SHOWN]))
    rest = len(index.labels) - _SHOWN
    more = f", and {rest} more, which `index.json` lists" if rest > 0 else ""
    absent = sum(not any(split.words[word] for split in tally.splits.values()) for word in index.labels)
    none = f" {absent} of them have no clip." if absent else ""
    return f"{len(index.labels)}, a label being a position in this list: {shown}{more}.{none}"


def _failures(index: Index) -> str:
    kinds = sorted({kind for counts in index.failures.values() for kind in counts})
    if not kinds:
        return "None: all that were planned are there."
    splits = _splits(index)
    rows = [(f"`{kind}`", *(f"{index.failures.get(s, {}).get(kind, 0):,}" for s in splits)) for kind in kinds]
    return _table(("class", *splits), rows)


def _kind(manifest: Manifest) -> str:
    """Where the sources lay, without saying where."""
    root = manifest.root
    return f"a store ({str(root).partition('://')[0]})" if isinstance(root, RemotePath) else "a disk"


def _sources(manifest: Manifest, tally: Tally) -> str:
    kinds = Counter(PurePosixPath(video).suffix.lower() for video in tally.videos)
    told = ", ".join(f"{count:,} {markdown(suffix or 'without an ending')}" for suffix, count in sorted(kinds.items()))
    windows = sum(clip.start is not None for clip in manifest.clips)
    cut = f"; {windows:,} clips are windows of them" if windows else ""
    return f"{told or 'no'} files on {_kind(manifest)}{cut}"


def _parameters(index: Index) -> list[tuple[str, str]]:
    """How the crops were cut and stored: every parameter of every stage."""
    plain = dict(index.parameters)
    if "mean_face" in plain:
        plain["mean_face"] = "68 points of its own, in `index.json`" if plain["mean_face"] else "the published one"
    rows = [(name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in plain.items()]
    return [(f"`{name}`", value if name == "mean_face" else markdown(_word(value))) for name, value in rows]


def _word(value: object) -> str:
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _figures(tally: Tally) -> str:
    rows = []
    for name, what in _FIGURES.items():
        if values := tally.figures[name]:
            spread = np.percentile(np.frombuffer(values), [0, 5, 50, 95, 100])
            rows.append((what, f"{len(values):,}", *(f"{value:.4g}" for value in spread)))
    return _table(("", "clips", "least", "5 %", "median", "95 %", "most"), rows)


def _splits(index: Index) -> list[str]:
    return [split for split in SPLITS if any(s.split == split for s in index.shards)]


def _member(index: Index) -> str:
    return "mouth.npy" if index.parameters["codec"] == "npy" else "mouth.jpg"


def _loading(index: Index) -> str:
    """Five lines of webdataset that read the first split."""
    first = next((s.split for s in index.shards if s.samples), index.shards[0].split)
    member, size = _member(index), index.crop_size
    crops = f'clip["{member}"]' + (f".reshape(-1, {size}, {size})" if member == "mouth.jpg" else "")
    lines = (
        "import webdataset",
        "",
        f'shards = "{_pattern([s for s in index.shards if s.split == first])}"',
        'for clip in webdataset.WebDataset(shards, shardshuffle=False).decode("l8"):',
        f"    mouth = {crops}  # (T, {size}, {size}) uint8, T frames",
        '    word, label = clip["json"]["word"], clip["json"]["label"]',
    )
    return "\n".join(("```python", *lines, "```"))


def _pattern(shards: Sequence[Shard]) -> str:
    """The names of shards as webdataset takes them, where their numbers have no gaps; else that of the first."""
    first, last = shards[0].name, shards[-1].name
    stem, _, low = first.removesuffix(".tar").rpartition("-")
    high = last.removesuffix(".tar").rpartition("-")[2]
    gapless = len(low) == len(high) and int(high) - int(low) == len(shards) - 1
    return f"{stem}-{{{low}..{high}}}.tar" if gapless and len(shards) > 1 else first


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _list(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"* {name}: {text}" for name, text in rows)
