"""The words of all videos below a folder, read from the files of timings that belong to them."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from lipprep.io.errors import UserError
from lipprep.pipeline.ahead import ahead
from lipprep.pipeline.captions.choose import Account, Choice, Spoken, choose, note_strangers
from lipprep.pipeline.captions.match import Matches, homes
from lipprep.pipeline.captions.read import TimingFile, read_timings
from lipprep.pipeline.captions.timing import Timing
from lipprep.pipeline.manifest import check_video_path, clip_key
from lipprep.pipeline.sources import FPS
from lipprep.stages.remote import RemotePath

if TYPE_CHECKING:
    from lipprep.stages.video import VideoInfo

_THREADS = 16  # that open videos: headers wait for the disk, or for a store
_TABLES = 8  # CTM files that are held, as one may have the words of many videos

Folder = Path | RemotePath


def adopt(matches: Matches, folder: Folder, account: Account) -> Matches:
    """Find the videos of CTM files that have the words of many, by the names in their lines."""
    videos = [*matches.timings, *matches.untimed]
    home = homes(videos)
    timings = dict(matches.timings)
    orphans: list[str] = []
    for file in matches.orphans:
        if not file.lower().endswith(".ctm"):
            orphans.append(file)
            continue
        try:
            names = [name for name in read_timings(folder / file).words if name is not None]
        except UserError as error:
            account.note(file, str(error))
            continue
        found = {name: _home(home, name) for name in names}
        for video in [video for mine in found.values() for video in mine]:
            timings[video] = [*timings.get(video, []), file]
        orphans += [f"{file} ({name})" for name in names if not found[name]] if any(found.values()) else [file]
    untimed = [video for video in videos if video not in timings]
    return replace(matches, timings=dict(sorted(timings.items())), untimed=sorted(untimed), orphans=orphans)


def _home(home: Callable[[str], list[str]], name: str) -> list[str]:
    """The videos of a name in a CTM file, with its ending or without."""
    with contextlib.suppress(UserError):
        return home(name) or home(str(PurePosixPath(name).with_suffix("")))
    return []


def _mine(read: TimingFile, video: str, file: str) -> list[Timing]:
    """The words of one video in a file. Raises ValueError where the file has none of it."""
    stem = PurePosixPath(video).with_suffix("")
    for name in (None, str(stem), stem.name, video, PurePosixPath(video).name):
        if name in read.words:
            return read.words[name]
    if len(read.words) == 1 and PurePosixPath(file).stem.startswith(stem.name):
        return next(iter(read.words.values()))
    raise UserError(f"{file}: no line is of {stem.name}")


def collect(
    root: Folder, folder: Folder, matches: Matches, *, choice: Choice, tier: str | None = None, account: Account
) -> list[Spoken]:
    """The words that may become clips, by video and time: of videos below `root`, with timings below `folder`.

    What cannot be read is noted in `account`, and the next file of the same video is tried.
    """
    from tqdm import tqdm

    tables = lru_cache(_TABLES)(read_timings)
    spoken: list[Spoken] = []
    named: dict[str, str] = {}
    with contextlib.closing(ahead(matches.timings, partial(_probe, root), threads=_THREADS)) as opened:
        for video, future in tqdm(opened, total=len(matches.timings), desc="timings", unit="video"):
            try:
                check_video_path(video)
                info = future.result()
            except UserError as error:  # ClipFailure among them
                account.note(video, str(error))
                continue
            if (other := named.setdefault(clip_key(video), video)) != video:
                account.note(video, f"it has the name of {other}, and clips would have one key: rename one of them")
                continue
            if not info.duration:
                account.note(video, "its header has no length: words beyond its end are not noticed")
            for file in matches.timings[video]:
                try:
                    read = (tables if file.lower().endswith(".ctm") else read_timings)(folder / file, tier=tier)
                    timings = _from_first_frame(_mine(read, video, file), info.start)
                except UserError as error:
                    account.note(file, str(error))
                    continue
                if read.fallback:
                    account.note(file, f"read as {read.fallback}, for it is no UTF-8: look whether its words are right")
                spoken += choose(
                    timings, video=video, file=file, duration=info.duration, choice=choice, account=account
                )
                account.read += 1
                break
    note_strangers(account)
    return spoken


def _probe(root: Folder, video: str) -> "VideoInfo":
    from lipprep.stages.video import probe

    return probe(root / video)


def _from_first_frame(timings: list[Timing], start: float) -> list[Timing]:
    """Timings count from where a file begins, frames from the first one, which is shown `start` seconds later."""
    if abs(start) < 0.5 / FPS:
        return timings
    return [
        said if said.start is None else msgspec.structs.replace(said, start=said.start - start, end=said.end - start)
        for said in timings
    ]
