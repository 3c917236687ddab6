"""The options and warnings about drawn splits, for the commands that list clips."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lipprep.pipeline.sources import Row
    from lipprep.pipeline.splits import Drawn

_NAMED = 8  # words or videos that a warning names
SPLIT_BY = click.option(
    "--split-by",
    type=click.Choice(["speaker", "video"]),
    help="What stays in one split, where splits are drawn: all videos of a speaker, or each video for itself.  "
    "[default: speaker, where speakers are known]",
)
SPEAKER_FROM = click.option(
    "--speaker-from",
    metavar="folder|CSV|REGEX",
    help="Who speaks in a video: the first folder below ROOT, a .csv with the columns video and speaker, or a regular "
    "expression of which the first group is found in the path.",
)


def tell_splits(
    rows: Sequence["Row"], drawn: "Drawn", *, split_by: str | None, speaker_from: str | None = None
) -> None:
    """Warn of speakers in several splits, and of words that a split lacks; `drawn` is what became of `rows`."""
    from lipprep.pipeline.splits import shared_speakers

    if shared := shared_speakers(rows):
        _warn(
            f"{_in_several(shared)}: a network is then measured on people whom it was trained on. Give each speaker "
            "one split, or none: splits are then drawn by speaker"
        )
    if drawn.by is None:
        if split_by is not None:
            _warn("--split-by does nothing: every clip has a split already")
    elif drawn.by == "video" and split_by != "video" and any(row.speaker for row in rows):
        shared = shared_speakers(drawn.rows)
        _warn(
            "splits are drawn by video: to draw them by speaker takes three speakers who share no video"
            + (f". {_in_several(shared)}" if shared else "")
        )
    elif drawn.by == "video" and split_by == "speaker":
        _warn("--split-by speaker does nothing: the speaker of no clip is known")
    if speaker_from or drawn.by == "speaker":
        _tell_nameless(rows, " after --speaker-from" if speaker_from else "")
    if drawn.by is not None:
        _tell_absent(drawn)


def _tell_nameless(rows: Sequence["Row"], after: str) -> None:
    if nameless := sorted({row.video for row in rows} - {row.video for row in rows if row.speaker}):
        _warn(f"{len(nameless)} videos have no speaker{after}, and each counts as one of its own: {_some(nameless)}")


def _tell_absent(drawn: "Drawn") -> None:
    words = {split: {row.word for row in drawn.rows if row.split == split} for split in ("train", "val", "test")}
    if drawn.groups < 3 and not words["val"] | words["test"]:
        _warn(
            "all clips are for training, as three splits need three videos at least that are different files: there "
            f"are {drawn.groups}"
        )
        return
    every = {row.word for row in drawn.rows}
    for split, known in words.items():
        if absent := sorted(every - known):
            _warn(
                f"{len(absent)} of {len(every)} words have no clip in {split} ({_some(absent)}): more clips of them, "
                "or another --seed, may help"
            )


def _in_several(shared: Mapping[str, Sequence[str]]) -> str:
    from lipprep.stages.untrusted import printable

    speaker, splits = next(iter(shared.items()))
    are = "speaker is" if len(shared) == 1 else "speakers are"
    return f"{len(shared)} {are} in more than one split (e.g. {printable(speaker)} in {' and '.join(splits)})"


def _some(names: Sequence[str]) -> str:
    from lipprep.stages.untrusted import printable

    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return printable(", ".join(names[:_NAMED])) + more


def _warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)
