"""`lipprep manifest captions`: the words of long videos, listed by files that say when each is said."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.command import Command, Number, Place
from lipprep.io.errors import UserError
from lipprep.pipeline.cli_splits import SPEAKER_FROM, SPLIT_BY, tell_splits
from lipprep.pipeline.options import FROM, JSON, LISTING, WORKERS, cores, options, words_of
from lipprep.stages.remote import RemotePath

if TYPE_CHECKING:
    from lipprep.pipeline.captions.choose import Account, Choice, Spoken

_NAMED = 8  # files of a kind that are named; --json names all
_SECONDS = Number(min=0)
TIMINGS = options(
    click.option("--timings", type=Place(), metavar="DIR", help="Where the timings lie.  [default: beside the videos]"),
    click.option(
        "--lang", help="The language of the timings, where there are several: en takes a.en.vtt, a.en-US.vtt."
    ),
    click.option("--tier", help="The tier of a TextGrid.  [default: `words`, or the first of intervals]"),
    click.option(
        "--rough", is_flag=True, help="Take words, too, whose times are guessed from those of a whole subtitle."
    ),
    click.option(
        "--case",
        type=click.Choice(["upper", "lower", "keep"]),
        default="upper",
        show_default=True,
        help="How labels are spelt: in capitals as LRW's.",
    ),
)
CHOICE = options(
    click.option(
        "--min-duration",
        type=_SECONDS,
        default=0.08,
        show_default=True,
        help="Seconds a word lasts at least: in two frames a mouth can move.",
    ),
    click.option(
        "--max-duration",
        type=_SECONDS,
        default=1.16,
        show_default=True,
        help="Seconds a word lasts at most: a clip's 29 frames; longer ones have pauses in them.",
    ),
    click.option("--min-confidence", type=Number(0, 1), help="Least confidence, where files have one (WhisperX, CTM)."),
    click.option(
        "--min-clips", type=click.IntRange(1), default=1, show_default=True, help="Only words with as many clips."
    ),
    click.option("--max-words", type=click.IntRange(1), help="Only the so many most frequent words."),
    click.option("--one-face", is_flag=True, help="Only words during which exactly one face is seen (decodes videos)."),
    click.option(
        "--min-face",
        type=Number(min=0),
        metavar="PX",
        help="Least distance of the outer eye corners, pixels, of the largest face (decodes videos).",
    ),
)


@click.command("captions", cls=Command)
@FROM
@LISTING
@TIMINGS
@CHOICE
@SPEAKER_FROM
@SPLIT_BY
@WORKERS
@JSON
def captions(
    root: Path | RemotePath,
    out: Path,
    base: Path | RemotePath | None,
    words: str | None,
    labels: Path | None,
    chunk_size: int,
    seed: int,
    speaker_from: str | None,
    split_by: str | None,
    as_json: bool,
    **how,
) -> None:
    """Videos of any length with their word timings beside them: a window a word, nothing is cut.

    Timings are WebVTT with times for words (automatic captions), TextGrid, GRID's .align, CTM, JSON of Gentle,
    WhisperX, Whisper and Montreal Forced Aligner, and roughly SRT and plain WebVTT: talk.mp4 with talk.en.vtt. No
    video is in two splits, and no speaker where --speaker-from names three.

    \b
    Example:
      lipprep manifest captions talks -o manifests/talks.jsonl --min-clips 50 --one-face --speaker-from folder
    """
    from lipprep.pipeline.captions.choose import Account, Choice, said
    from lipprep.pipeline.captions.match import speakers_of
    from lipprep.pipeline.cli_manifest import tell_listed
    from lipprep.pipeline.manifest import save_manifest
    from lipprep.pipeline.sources import make_manifest, read_labels, relative_to, window
    from lipprep.pipeline.splits import draw_splits, same_files, shared_speakers

    folder = how["timings"] or root
    for there in (root, folder):
        if not there.is_dir():
            raise UserError(f"there is no folder {there}")
    known = None if labels is None else read_labels(labels)
    names = ("case", "rough", "min_confidence", "min_duration", "max_duration", "min_clips", "max_words")
    choice = Choice(wanted=_wanted(words_of(words), known, how["case"]), **{name: how[name] for name in names})
    if choice.min_duration > choice.max_duration:
        raise UserError("--min-duration is more than --max-duration: no word has both")
    account = Account()
    matches = _matches(root, folder, how["lang"], account)
    speakers = speakers_of(matches.timings, speaker_from)
    spoken = _spoken(root, folder, matches, choice, account, out=out, **how)
    if not spoken:
        _tell_notes(account.notes)
        raise UserError(f"no word is left for a manifest. {said(account, 0)}")
    same = same_files(root, {one.video for one in spoken})
    listed = [window(o.video, o.word, o.start, o.end, speaker=speakers.get(o.video), rough=o.rough) for o in spoken]
    drawn = draw_splits(listed, seed=seed, by=split_by or "speaker", same=same)
    rows = drawn.rows if base is None else relative_to(base, root, drawn.rows)
    made = make_manifest(out, rows, root=base or root, labels=known, seed=seed, chunk_size=chunk_size)
    save_manifest(made)
    absent = sorted((choice.wanted or set()) - {one.word for one in spoken})
    if as_json:
        found = {
            "videos": account.read,
            "words": account.words,
            "dropped": {why: count for why, count in account.dropped.items() if count},
            "clips": len(made.clips),
            "labels": len(made.labels),
            "splits": Counter(c.split for c in made.clips),
            "words_without_clips": absent,
            "split_by": drawn.by,
            "groups": drawn.groups,
            "speakers_in_several_splits": sorted(shared_speakers(drawn.rows)),
            "same_files": same,
            "videos_without_timings": matches.untimed,
            "timings_without_video": matches.orphans,
            "timings_not_taken": matches.others,
            "notes": [{"file": file, "message": message} for file, message in account.notes],
        }
        click.echo(json.dumps(found))
        return
    _tell_files(account, matches, same)
    _tell_notes(account.notes)
    if choice.min_confidence is not None and not account.confident:
        click.echo("warning: --min-confidence does nothing: no file has confidences", err=True)
    if absent:
        click.echo(f"{len(absent)} words that are asked for have no clip: {_some(absent)}", err=True)
    click.echo(said(account, len(made.clips)))
    tell_listed(made)
    tell_splits(listed, drawn, split_by=split_by, speaker_from=speaker_from)


def _wanted(words: set[str] | None, labels: Sequence[str] | None, case: str) -> set[str] | None:
    """The words that are asked for; ValueError where a label is spelt as no word will be."""
    from lipprep.pipeline.captions.words import normalise
    from lipprep.stages.untrusted import printable

    for label in labels or ():
        if normalise(label, case) != label:
            raise UserError(
                f"the label {printable(label)!r} is not spelt as words are with --case {case}: choose another --case, "
                "or spell the label file so"
            )
    spelt = None if words is None else {normalise(word, case) for word in words} - {None}
    if labels is None or spelt is None:
        return spelt if labels is None else set(labels)
    return spelt & set(labels)


def _matches(root: Path | RemotePath, folder: Path | RemotePath, language: str | None, account: "Account"):
    """Which timings belong to which video; ValueError where there are none at all."""
    from lipprep.pipeline.captions.collect import adopt
    from lipprep.pipeline.captions.match import files_below, match

    videos = files_below(root)
    found = adopt(match(videos, videos if folder == root else files_below(folder), language=language), folder, account)
    if not found.timings and not found.untimed:
        raise UserError(f"there is no video below {root}")
    if not found.timings:
        _tell_notes(account.notes)
        spoken = f" in the language {language}" if language else ""
        where = "beside it" if folder == root else f"below {folder}"
        raise UserError(
            f"none of {len(found.untimed)} videos below {root} has timings{spoken} {where}: e.g. {found.untimed[0]} "
            "needs a file of its name that ends in .vtt, .srt, .TextGrid, .align, .ctm or .json"
        )
    return found


def _spoken(
    root: Path | RemotePath,
    folder: Path | RemotePath,
    matches,
    choice: "Choice",
    account: "Account",
    *,
    out: Path,
    tier: str | None,
    one_face: bool,
    min_face: float | None,
    workers: int | None,
    **_: object,
) -> "list[Spoken]":
    """The words that become clips."""
    import dataclasses

    from lipprep.pipeline.captions.choose import choose_words
    from lipprep.pipeline.captions.collect import collect

    spoken = collect(root, folder, matches, choice=choice, tier=tier, account=account)
    if one_face or min_face is not None:
        from lipprep.pipeline.captions.faces import choose_faces, look_at_all

        # Words that are too few already need no look.
        spoken = choose_words(spoken, dataclasses.replace(choice, max_words=None), account)
        kept = out.with_name(f".{out.stem}.faces")
        seen = look_at_all(root, spoken, kept=kept, workers=workers or cores(), account=account)
        spoken = choose_faces(seen, one_face=one_face, min_face=min_face or 0.0, account=account)
    return choose_words(spoken, choice, account)


def _some(names: Sequence[str]) -> str:
    from lipprep.stages.untrusted import printable

    more = f" and {len(names) - _NAMED} more (--json names all)" if len(names) > _NAMED else ""
    return printable(", ".join(names[:_NAMED])) + more


def _tell_files(account: "Account", matches, same: list[list[str]]) -> None:
    click.echo(f"{account.read} videos with timings read")
    for names, what in (
        (matches.untimed, "videos have no timings"),
        (matches.orphans, "timing files have no video"),
        (matches.others, "timing files are in another language"),
    ):
        if names:
            click.echo(f"{len(names)} {what}: {_some(names)}", err=True)
    for named in same:
        click.echo(f"the same file under {len(named)} names, kept in one split: {_some(named)}", err=True)


def _tell_notes(notes: Sequence[tuple[str, str]]) -> None:
    from lipprep.stages.untrusted import printable

    for file, message in notes[:_NAMED]:
        click.echo(printable(message if file in message else f"{file}: {message}"), err=True)
    if len(notes) > _NAMED:
        click.echo(f"{len(notes) - _NAMED} more files of which something is to be said (--json names all)", err=True)
