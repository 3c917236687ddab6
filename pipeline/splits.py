"""Draw splits such that nothing leaks: no speaker, no video, and no video under another name is in two of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lipprep.pipeline.deal import seeded_rank
from lipprep.pipeline.inputs import content_digest, file_stat
from lipprep.stages.remote import RemotePath

if TYPE_CHECKING:
    from lipprep.pipeline.sources import Row

FRACTIONS = {"test": 0.1, "val": 0.1}  # of drawn splits; the rest is for training
_SLACK = 1.2  # of a split's share: a group that fills it beyond goes elsewhere


def same_files(root: Path | RemotePath, videos: Iterable[str]) -> list[list[str]]:
    """Videos with the same content under several names. Only those of one size are looked into."""
    by_size: dict[int, list[str]] = {}
    for video in sorted(videos):
        if found := file_stat(root / video):
            by_size.setdefault(found["size"], []).append(video)
    same: dict[tuple[int, str], list[str]] = {}
    for size, named in by_size.items():
        for video in named if len(named) > 1 else ():
            if content := content_digest(root / video):
                same.setdefault((size, content), []).append(video)
    return [named for named in same.values() if len(named) > 1]


def groups(videos: Iterable[str], together: Iterable[Iterable[str]]) -> dict[str, str]:
    """Return the group of each video, named by its first one: videos that are listed together are in one.

    >>> groups(["a", "b", "c", "d"], [["a", "b"], ["b", "c"]])
    {'a': 'a', 'b': 'a', 'c': 'a', 'd': 'd'}
    """
    videos = sorted(videos)
    first = {video: video for video in videos}

    def head(video: str) -> str:
        while first[video] != video:
            first[video] = video = first[first[video]]
        return video

    for members in together:
        members = [video for video in members if video in first]
        for video in members[1:]:
            one, other = sorted((head(members[0]), head(video)))
            first[other] = one
    return {video: head(video) for video in videos}


def draw(clips: Mapping[str, int], group_of: Mapping[str, str], seed: int) -> dict[str, str]:
    """The split of each video, drawn group by group, so that test and val come near their share of all `clips`.

    `clips` are the clips of each video. Where there are at least three groups, every split has one.
    """
    size: Counter[str] = Counter()
    for video, count in clips.items():
        size[group_of[video]] += count
    left = sorted(size, key=lambda group: seeded_rank(seed, "split", group))
    split: dict[str, str] = {}
    for n, (name, fraction) in enumerate(FRACTIONS.items()):
        if len(size) < 3:
            break
        spare = len(left) - (len(FRACTIONS) - n)  # the splits that follow need one each
        share, chosen, filled = fraction * size.total(), [], 0
        for group in left:
            if len(chosen) < spare and filled < share and filled + size[group] <= _SLACK * share:
                chosen.append(group)
                filled += size[group]
        chosen = chosen or [min(left, key=size.__getitem__)]  # where all are larger than its share
        split |= dict.fromkeys(chosen, name)
        left = [group for group in left if group not in split]
    return {video: split.get(group_of[video], "train") for video in clips}


@dataclass(frozen=True)
class Drawn:
    """Rows that all have a split, and how those that had none came to it.

    `by` is "speaker" or "video", None where every row had a split; `groups` counts what was not taken apart.
    """

    rows: list["Row"]
    by: str | None
    groups: int


def draw_splits(
    rows: Iterable["Row"], *, seed: int, by: str = "speaker", same: Iterable[list[str]] | None = None
) -> Drawn:
    """Draw a split for each row that has none.

    By speaker, where speakers are known: their videos are one group, as are those of speakers who share a video, and
    each video without a speaker. Videos of a group of which some have a split follow these. By video where `by` says
    so, or there are fewer than three groups: then each word (or, of sentences, each speaker) has its share of every
    split. `same` are videos with the same content under several names, which stay together; where it is given, shares
    are of all clips instead.
    """
    rows = list(rows)
    free = [row for row in rows if row.split is None]
    if not free:
        return Drawn(rows, None, 0)
    clips = Counter(row.video for row in rows)
    group_of: dict[str, str] = {}
    speakers: dict[str, dict[str, None]] = {}
    for row in rows if by == "speaker" else ():
        if row.speaker is not None:
            speakers.setdefault(row.speaker, {})[row.video] = None
    if speakers:
        group_of = groups(clips, [*speakers.values(), *(same or ())])
    if len(set(group_of.values())) < 3:
        by, group_of = "video", groups(clips, same or ())
    given: dict[str, Counter[str]] = {}  # by group
    for row in rows:
        if row.split is not None:
            given.setdefault(group_of[row.video], Counter())[row.split] += 1
    most = {group: min(counts, key=lambda name: (-counts[name], name)) for group, counts in given.items()}
    split = {video: most[group] for video, group in group_of.items() if group in most}
    free = [row for row in free if row.video not in split]
    if by == "video" and same is None:
        split |= _by_stratum(free, seed)
    else:
        split |= draw(Counter(row.video for row in free), group_of, seed)
    split |= {row.video: row.split for row in rows if row.split is not None}
    drawn = [row if row.split is not None else msgspec.structs.replace(row, split=split[row.video]) for row in rows]
    return Drawn(drawn, by, len(set(group_of.values())))


def _by_stratum(rows: Sequence["Row"], seed: int) -> dict[str, str]:
    """Draw the split of each video, word by word where each video has one word, else (sentences) speaker by speaker."""
    words: dict[str, set[str]] = {}
    for row in rows:
        words.setdefault(row.video, set()).add(row.word)
    single = all(len(w) == 1 for w in words.values())
    strata: dict[str, set[str]] = {}
    for row in rows:
        strata.setdefault(row.word if single else row.speaker or "", set()).add(row.video)
    split: dict[str, str] = {}
    for videos in strata.values():
        ranked = sorted(videos, key=lambda v: seeded_rank(seed, "split", v))
        position = 0
        for name, fraction in FRACTIONS.items():
            count = round(fraction * len(ranked)) or (len(ranked) >= 3)
            split |= dict.fromkeys(ranked[position : position + count], name)
            position += count
        split |= dict.fromkeys(ranked[position:], "train")
    return split


def shared_speakers(rows: Iterable["Row"]) -> dict[str, list[str]]:
    """Return the speakers whose clips are in more than one split, with these splits; rows without one are passed over.

    Both are sorted.
    """
    seen: dict[str, set[str]] = {}
    for row in rows:
        if row.speaker is not None and row.split is not None:
            seen.setdefault(row.speaker, set()).add(row.split)
    return {speaker: sorted(splits) for speaker, splits in sorted(seen.items()) if len(splits) > 1}
