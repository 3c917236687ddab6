"""Which file of timings belongs to which video, and whose face a video shows."""

import csv
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.read import SUFFIXES
from lipprep.pipeline.sources import VIDEO_SUFFIXES
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import check_file, printable

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*")
_NO_TIMINGS = (".info.json", ".live_chat.json")  # what yt-dlp leaves beside a video
_MAX_TABLE = 1 << 26  # bytes of a table of speakers


@dataclass(frozen=True)
class Matches:
    """Paths from their folders on. `timings` are of each video that has some: those to be tried first come first.

    `untimed` are videos without, `orphans` timings without a video, `others` those in languages that are not asked for.
    """

    timings: dict[str, list[str]]
    untimed: list[str]
    orphans: list[str]
    others: list[str]


def files_below(folder: Path | RemotePath) -> list[str]:
    """The paths of all files below a folder, links followed, sorted. Hidden ones are passed over."""
    if isinstance(folder, RemotePath):
        below = [n for n, found in folder.files_below().items() if stat.S_ISREG(found.st_mode)]
        return sorted(n for n in below if not any(part.startswith(".") for part in n.split("/")))
    found: list[str] = []
    seen: set[tuple[int, int]] = set()  # a link may lead back
    for where, folders, files in os.walk(folder, followlinks=True):
        status = Path(where).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(where).relative_to(folder)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def is_timing_file(path: str) -> bool:
    """Whether a file is one of timings by its name.

    >>> [is_timing_file(n) for n in ("a.en.vtt", "a.TextGrid", "a.info.json", "a.txt")]
    [True, True, False, False]
    """
    return PurePosixPath(path).suffix.lower() in SUFFIXES and not path.lower().endswith(_NO_TIMINGS)


def homes(videos: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that gives the videos which a path without its ending belongs to.

    Where no folder fits, a name that videos of one path alone have will do.
    """
    of: dict[str, list[str]] = {}
    named: dict[str, set[str]] = {}
    for video in videos:
        stem = str(PurePosixPath(video).with_suffix(""))
        of.setdefault(stem, []).append(video)
        named.setdefault(PurePosixPath(stem).name, set()).add(stem)

    def home(stem: str) -> list[str]:
        only = named.get(PurePosixPath(stem).name, set())
        return of.get(stem) or (of[next(iter(only))] if len(only) == 1 else [])

    return home


def match(videos: Iterable[str], files: Iterable[str], *, language: str | None = None) -> Matches:
    """Find each video's timings: files of its path without the ending, and perhaps a language (`a.en.vtt`).

    Raises ValueError, naming one, where a video has timings in several languages and `language` does not choose.
    """
    videos = sorted(v for v in videos if PurePosixPath(v).suffix.lower() in VIDEO_SUFFIXES)
    home = homes(videos)
    found: dict[str, list[tuple[str, str]]] = {}  # of a video: (language, file)
    orphans = []
    for file in filter(is_timing_file, files):
        mine, tag = next(((home(stem), tag) for stem, tag in _stems(file) if home(stem)), ([], ""))
        for video in mine:
            found.setdefault(video, []).append((tag, file))
        if not mine:
            orphans.append(file)
    timings: dict[str, list[str]] = {}
    for video in videos:
        if chosen := _in_language(video, found.get(video, []), language):
            timings[video] = chosen
    taken = {file for chosen in timings.values() for file in chosen}
    others = {file for candidates in found.values() for _, file in candidates} - taken
    return Matches(timings, [v for v in videos if v not in timings], sorted(orphans), sorted(others))


def _stems(file: str) -> list[tuple[str, str]]:
    """What a video would be called that has these timings, and their language."""
    stem = PurePosixPath(file).with_suffix("")
    tag = stem.suffix[1:]
    return [(str(stem), ""), *([(str(stem.with_suffix("")), tag.lower())] if _LANGUAGE.fullmatch(tag) else [])]


def _in_language(video: str, candidates: list[tuple[str, str]], language: str | None) -> list[str]:
    """Those in one language, best first; those that name none do where no other is asked for and there."""
    tags = {tag for tag, _ in candidates if tag}
    if language is not None:
        wanted = language.lower().replace("_", "-")
        tags = {tag for tag in tags if tag == wanted or tag.replace("_", "-").startswith(f"{wanted}-")}
    elif len(several := {re.split("[-_]", tag)[0] for tag in tags}) > 1:
        raise UserError(
            f"{printable(video)} has timings in several languages ({', '.join(sorted(several))}): choose with --lang"
        )
    mine = [(tag, file) for tag, file in candidates if (tag in tags if tags else not tag)]
    # What was said comes before what was translated: yt-dlp calls it en-orig.
    return [file for _, file in sorted(mine, key=lambda c: (_rank(c[1]), not c[0].endswith("-orig"), c))]


def _rank(file: str) -> int:
    return SUFFIXES.index(PurePosixPath(file).suffix.lower())


def speakers_of(videos: Iterable[str], source: str | None) -> dict[str, str]:
    """The speaker of each video that has one, after `source`.

    `folder`: the first folder of its path. A file .csv with the columns video and speaker. Or a regular expression of
    which the first group is found in the path. Raises ValueError where `source` is none of these.
    """
    videos = list(videos)
    if source is None:
        return {}
    if source == "folder":
        return {video: video.split("/", 1)[0] for video in videos if "/" in video}
    if source.lower().endswith(".csv"):
        table = _read_speakers(Path(source))
        return {video: table[video] for video in videos if video in table}
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise UserError(f"--speaker-from {source!r} is no regular expression: {error}") from error
    if not pattern.groups:
        raise UserError(
            f"--speaker-from {source!r} is neither `folder` nor a .csv, and as a regular expression it has no group: "
            "write (...) round the speaker"
        )
    found = {video: pattern.search(video) for video in videos}
    return {video: hit[1] for video, hit in found.items() if hit and hit[1]}


def _read_speakers(path: Path) -> Mapping[str, str]:
    name = printable(check_file(path, "table of speakers", limit=_MAX_TABLE))
    speakers: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"video", "speaker"} <= set(rows.fieldnames or ()):
                raise UserError(f"{name} needs the columns video and speaker")
            for row in rows:
                video, speaker = (row["video"] or "").strip(), (row["speaker"] or "").strip()
                if video and speaker and speakers.setdefault(PurePosixPath(video).as_posix(), speaker) != speaker:
                    raise UserError(f"{name}, line {rows.line_num}: {video!r} has two speakers")
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"the table {name} is no CSV in UTF-8: {error}") from error
    return speakers
