"""How many faces are seen while a word is said, and how large: what the timings of a video do not tell.

Only stretches that hold words are decoded. What was found is kept in a file beside the manifest, so that an
interrupted or changed command looks only where nothing has looked before.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import msgspec
import numpy as np

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.choose import Account, Spoken
from lipprep.pipeline.inputs import digest, file_stat
from lipprep.pipeline.manifest import STRETCH
from lipprep.pipeline.sources import FPS
from lipprep.stages.atomic import replacing
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks.detector import Detector
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import is_file

DETECTOR = "mesh"
_GAP = 25  # frames without a word after which decoding begins anew: seeking costs about as much
_LOST = 0.1  # share of a word's frames in which its face may be lost
_EYES = (36, 45)  # iBUG's outer corners
_MAX_LINE = 1 << 20  # bytes of the file of what was found
_VERSION = 1  # of what is found; another one is looked for anew


class Span(msgspec.Struct, frozen=True):
    """Frames `first` to `last` (exclusive) of a video, and the frames of each of the words that they hold."""

    video: str
    first: int
    last: int
    words: tuple[tuple[int, int], ...]


class Seen(msgspec.Struct, frozen=True):
    """During a word: `faces` tracked, and of the largest the `share` of frames it is seen in, and its `size`, pixels.

    The size is the distance between the outer eye corners, the median of the frames; 0 without a face.
    """

    faces: int
    share: float
    size: float


class _Found(msgspec.Struct, frozen=True):
    """A line of the file of what was found: of the span with the digest `span`, each word, or why there is nothing."""

    span: str
    words: tuple[Seen, ...] = ()
    failure: str | None = None


def spans(spoken: Sequence[Spoken]) -> Iterator[tuple[Span, list[Spoken]]]:
    """What is decoded in one go, of words by video and time: until a second has no word, or 30 s are full."""
    begun: list[Spoken] = []
    first = last = 0
    for one in spoken:
        begin, end = _frames(one)
        if begun and (one.video != begun[0].video or begin > last + _GAP or end - first > STRETCH * FPS):
            yield Span(begun[0].video, first, last, tuple(map(_frames, begun))), begun
            begun = []
        first, last = (begin, end) if not begun else (first, max(last, end))
        begun.append(one)
    if begun:
        yield Span(begun[0].video, first, last, tuple(map(_frames, begun))), begun


def _frames(one: Spoken) -> tuple[int, int]:
    begin = round(one.start * FPS)
    return begin, max(begin + 1, round(one.end * FPS))


@cache
def _detector() -> Detector:
    from lipprep.stages.landmarks import load_detector

    return load_detector(DETECTOR)


def look(root: Path | RemotePath, span: Span) -> list[Seen]:
    """Each word of a span: the faces that are seen meanwhile. Raises ClipFailure where the video cannot be decoded."""
    from lipprep.stages.landmarks.faces import track_faces
    from lipprep.stages.video import read_frames

    count = span.last - span.first
    frames = read_frames(root / span.video, fps=FPS, first=span.first, last=span.last)
    eyes = []  # of each face: (count,), NaN where it is not seen
    for track in track_faces(map(np.asarray, frames), _detector()):
        corners = track.points_TKD[:, _EYES[0]] - track.points_TKD[:, _EYES[1]]
        eyes.append(np.full(count, np.nan))
        eyes[-1][track.start : track.start + len(corners)] = np.hypot(corners[:, 0], corners[:, 1])
    return [_seen([row[begin - span.first : end - span.first] for row in eyes]) for begin, end in span.words]


def _task(root: Path | RemotePath, task: tuple[str, Span]) -> list[Seen]:
    return look(root, task[1])


def _seen(eyes: list[np.ndarray]) -> Seen:
    here = [row[np.isfinite(row)] for row in eyes]
    sizes = sorted(((float(np.median(row)), len(row)) for row in here if len(row)), reverse=True)
    if not sizes:
        return Seen(0, 0.0, 0.0)
    return Seen(len(sizes), sizes[0][1] / len(eyes[0]), round(sizes[0][0], 2))


def look_at_all(
    root: Path | RemotePath, spoken: Sequence[Spoken], *, kept: Path, workers: int, account: Account
) -> list[tuple[Spoken, Seen]]:
    """Every word, by video and time, with the faces that are seen meanwhile, on `workers` processes.

    What is found is added to the file `kept` at once. Words of videos that cannot be decoded are counted in `account`.
    Raises ValueError where a worker process dies.
    """
    from tqdm import tqdm

    from lipprep.pipeline.pool import WorkerDied, pool, run_all

    identity = _detector().identity
    status = cache(lambda video: file_stat(root / video))
    tasks = {}
    for span, words in spans(spoken):
        key = digest([_VERSION, identity, span.video, status(span.video), span.first, span.last, span.words])
        tasks[key] = (span, words)
    known = _read(kept, tasks)
    kept.parent.mkdir(parents=True, exist_ok=True)
    # What is of no use any more goes; what follows is added line by line, each in one write.
    with replacing(kept) as file:
        for found in known.values():
            file.write(_line(found))
    todo = [key for key in tasks if key not in known]
    words = sum(len(tasks[key][1]) for key in todo)
    try:
        with kept.open("ab", buffering=0) as file, tqdm(total=words, desc="faces", unit="word") as bar:
            if todo:
                with pool(min(workers, len(todo))) as executor:
                    queue = ((key, tasks[key][0]) for key in todo)
                    for (key, span), done in run_all(executor, partial(_task, root), queue, ahead=lambda: 2 * workers):
                        try:
                            known[key] = _Found(key, tuple(done.result()))
                        except ClipFailure as failure:
                            known[key] = _Found(key, failure=str(failure))
                        file.write(_line(known[key]))
                        bar.update(len(span.words))
    except WorkerDied as death:
        raise UserError(
            f"a worker process was killed ({death}). What was found is kept: run the same command again, with fewer "
            "--workers where memory was short"
        ) from death
    together = []
    failed: set[str] = set()
    for key, (span, words) in tasks.items():
        found = known[key]
        if found.failure is None:
            together += zip(words, found.words, strict=True)
            continue
        account.dropped["unseen"] += len(words)
        if span.video not in failed:
            failed.add(span.video)
            account.note(span.video, found.failure)
    return together


def _line(found: _Found) -> bytes:
    return msgspec.json.encode(found) + b"\n"


def _read(kept: Path, tasks: dict[str, tuple[Span, list[Spoken]]]) -> dict[str, _Found]:
    """What is known of `tasks` already. Lines that are none, as a killed command leaves, say nothing."""
    known: dict[str, _Found] = {}
    if not is_file(kept):
        return known
    decoder = msgspec.json.Decoder(_Found)
    with kept.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            try:
                found = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            task = tasks.get(found.span)
            if task is not None and (found.failure is not None or len(found.words) == len(task[1])):
                known[found.span] = found
    return known


def choose_faces(
    seen: Sequence[tuple[Spoken, Seen]], *, one_face: bool, min_face: float, account: Account
) -> list[Spoken]:
    """Words during which a face is seen: with `one_face` a single one throughout, of at least `min_face` pixels."""
    chosen = []
    for one, found in seen:
        if not found.faces or (one_face and found.faces == 1 and found.share < 1 - _LOST):
            account.dropped["no_face"] += 1
        elif one_face and found.faces > 1:
            account.dropped["faces"] += 1
        elif found.size < min_face:
            account.dropped["small"] += 1
        else:
            chosen.append(one)
    return chosen
