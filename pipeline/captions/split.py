"""Splits between which nothing leaks: no speaker, no video, and no video under another name."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lipprep.pipeline.deal import seeded_rank
from lipprep.pipeline.inputs import content_digest, file_stat
from lipprep.pipeline.sources import FRACTIONS
from lipprep.stages.remote import RemotePath

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


def groups(videos: Iterable[str], speakers: Mapping[str, str], same: Iterable[list[str]]) -> dict[str, str]:
    """The group of each video, named by its first one: those of a speaker, and of one content, are in one.

    >>> groups(["a", "b", "c", "d"], {"a": "ann", "b": "ann"}, [["b", "c"]])
    {'a': 'a', 'b': 'a', 'c': 'a', 'd': 'd'}
    """
    videos = sorted(videos)
    first = {video: video for video in videos}

    def head(video: str) -> str:
        while first[video] != video:
            first[video] = video = first[first[video]]
        return video

    of: dict[str, list[str]] = {}
    for video in videos:
        if video in speakers:
            of.setdefault(speakers[video], []).append(video)
    for together in [*of.values(), *same]:
        together = [video for video in together if video in first]
        for video in together[1:]:
            one, other = sorted((head(together[0]), head(video)))
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
