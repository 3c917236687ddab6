"""Which words of a video's timings become clips, with an account of every one that does not."""

import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import msgspec

from lipprep.pipeline.captions.timing import Timing
from lipprep.pipeline.captions.words import normalise, script
from lipprep.pipeline.sources import FPS, GRID_FRAMES, window

MIN_DURATION = 0.08  # seconds: two frames, the least in which a mouth moves
MAX_DURATION = GRID_FRAMES / FPS  # seconds: what a clip holds. Beyond it, a pause was often counted in
_PAST_END = 0.1  # seconds that a word may end after its video, or start before: aligners and containers round
_MOST_BEYOND = 0.1  # share of a file's words outside the video, above which it is another one's
_FEW = 4  # words: of fewer nothing is concluded about a file
_AT_ONCE = 300  # words at one moment, which no file of timings has

# Why a word is no clip, in the order in which it is asked; said as "301 too short".
DROPPED = {
    "silence": "silence or noise",
    "untimed": "without times",
    "rough": "with guessed times (--rough keeps them)",
    "doubtful": "below --min-confidence",
    "doubled": "listed twice",
    "foreign": "in files that are probably another video's",
    "beyond": "outside their video",
    "short": "too short",
    "long": "too long",
    "overlapping": "overlapping another by more than half",
    "unwanted": "not asked for",
    "infrequent": "less frequent than the --max-words first",
    "few": "in too few clips",
    "unseen": "where the video cannot be decoded",
    "no_face": "without a face",
    "faces": "of two faces or more",
    "small": "of a small face",
}


class Spoken(msgspec.Struct, frozen=True, gc=False):
    """A word of a video that may become a clip; times in seconds."""

    video: str
    word: str
    start: float
    end: float
    rough: bool = False


@dataclass(frozen=True)
class Choice:
    """What is asked of a word; `wanted` None takes every word. See the options of `lipprep manifest captions`."""

    case: str = "upper"
    rough: bool = False
    min_confidence: float | None = None
    min_duration: float = MIN_DURATION
    max_duration: float = MAX_DURATION
    wanted: Set[str] | None = None
    min_clips: int = 1
    max_words: int | None = None


@dataclass
class Account:
    """What became of all words: `words` of `read` videos were read, `dropped` counts those that are no clips.

    It does so by why, see DROPPED. `notes` are (file, what is odd about it).
    """

    words: int = 0
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[tuple[str, str]] = field(default_factory=list)
    confident: bool = False  # whether any word came with a confidence
    scripts: dict[str, str] = field(default_factory=dict)  # of the words of a file, by file
    hits: dict[str, tuple[int, int]] = field(default_factory=dict)  # words of a file, and those that are asked for

    def note(self, file: str, message: str) -> None:
        self.notes.append((file, message))


def choose(
    timings: Sequence[Timing], *, video: str, file: str, duration: float, choice: Choice, account: Account
) -> list[Spoken]:
    """The words of one video that may become clips, by time; `duration` is the video's, 0 where it is not known.

    All others are counted in `account`, where it is noted what makes `file` look like another video's or language's.
    """
    account.words += len(timings)
    drop = account.dropped
    sound: list[Timing] = []
    for said in timings:
        word = normalise(said.word, choice.case)
        account.confident |= said.confidence is not None
        if word is None:
            drop["silence"] += 1
        elif said.start is None or said.end is None:
            drop["untimed"] += 1
        elif said.rough and not choice.rough:
            drop["rough"] += 1
        elif said.confidence is not None and said.confidence < (choice.min_confidence or 0):
            drop["doubtful"] += 1
        else:
            sound.append(msgspec.structs.replace(said, word=word))
    rough = {(s.start, s.end, s.word): s.rough for s in sound}
    spoken = [Spoken(video, word, start, end, guessed) for (start, end, word), guessed in sorted(rough.items())]
    drop["doubled"] += len(sound) - len(spoken)
    if (letters := script(s.word for s in spoken)) and len(spoken) >= _FEW:
        account.scripts[file] = letters
    end = duration or math.inf
    outside = [s.start < -_PAST_END or not 0 <= s.end <= end + _PAST_END for s in spoken]
    late = sum(outside)
    if late > max(1, _MOST_BEYOND * len(spoken)):
        drop["foreign"] += len(spoken)
        account.note(
            file,
            f"{late:,} of its {len(spoken):,} words lie outside {video} ({duration:.1f} s): it is probably "
            "another video's, and none of its words is taken",
        )
        return []
    kept = []
    for one, missed in zip(spoken, outside, strict=True):
        if missed:
            drop["beyond"] += 1
        elif one.end - one.start < choice.min_duration - 1e-6:
            drop["short"] += 1
        elif one.end - one.start > choice.max_duration + 1e-6:
            drop["long"] += 1
        else:
            kept.append(msgspec.structs.replace(one, start=max(one.start, 0.0)))
    kept = _apart(kept, file, account)
    if choice.wanted is None:
        return kept
    wanted = [one for one in kept if one.word in choice.wanted]
    drop["unwanted"] += len(kept) - len(wanted)
    account.hits[file] = len(kept), len(wanted)
    return wanted


def _apart(spoken: list[Spoken], file: str, account: Account) -> list[Spoken]:
    """Words, by time, without those that share more than half of the shorter one, or their window, with another.

    Both of two go: which of them is seen, nobody knows.
    """
    hidden: set[int] = set()
    active: list[int] = []
    for n, one in enumerate(spoken):
        active = [m for m in active if spoken[m].end > one.start]
        if len(active) > _AT_ONCE:
            account.note(file, f"it has over {_AT_ONCE} words at {one.start:g} s: none of its words is taken")
            account.dropped["overlapping"] += len(spoken)
            return []
        for m in active:
            other = spoken[m]
            shared = min(one.end, other.end) - one.start
            if shared > 0.5 * min(one.end - one.start, other.end - other.start) + 1e-6:
                hidden |= {n, m}
        active.append(n)
    kept, frames = [], set()
    for n, one in enumerate(spoken):
        first = window(one.video, one.word, one.start, one.end).start
        if n not in hidden and first not in frames:
            frames.add(first)
            kept.append(one)
    account.dropped["overlapping"] += len(spoken) - len(kept)
    return kept


def choose_words(spoken: Sequence[Spoken], choice: Choice, account: Account) -> list[Spoken]:
    """Clips of words that have at least `min_clips` of them, and of those the `max_words` most frequent."""
    count = Counter(one.word for one in spoken)
    enough = {word for word, clips in count.items() if clips >= choice.min_clips}
    # Sorted by name where they are as frequent, so that the choice is the same wherever it is made.
    kept = set(sorted(enough, key=lambda word: (-count[word], word))[: choice.max_words])
    account.dropped["few"] += sum(clips for word, clips in count.items() if word not in enough)
    account.dropped["infrequent"] += sum(count[word] for word in enough - kept)
    return [one for one in spoken if one.word in kept]


def note_strangers(account: Account) -> None:
    """Note files in another script than most, and those without a word of what is asked for where some are expected."""
    words, hits = (sum(n) for n in zip(*account.hits.values(), strict=True)) if account.hits else (0, 0)
    for file, (mine, hit) in account.hits.items():
        if not hit and mine * hits >= _FEW * words > 0:
            account.note(file, f"none of its {mine:,} words is asked for: is it in another language?")
    usual = Counter(account.scripts.values()).most_common(1)
    for file, letters in account.scripts.items():
        if letters != usual[0][0]:
            account.note(
                file, f"its words are {letters.capitalize()}, most files' {usual[0][0].capitalize()}: another language?"
            )


def said(account: Account, clips: int) -> str:
    """What became of all words, in a sentence.

    >>> said(Account(words=12, dropped=Counter(short=3, long=2)), 7)
    '12 words: 3 too short, 2 too long; 7 are clips'
    """
    lost = [f"{account.dropped[why]:,} {text}" for why, text in DROPPED.items() if account.dropped[why]]
    return f"{account.words:,} words: {', '.join(lost) or 'none dropped'}; {clips:,} are clips"
