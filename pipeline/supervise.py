"""The supervisor: it sees that every chunk is made, whatever dies on the way.

A worker process that dies takes its pool with it. What it had done of its chunk is kept by its journal, and a
new pool goes on. The clips that it worked on are suspected and tried again alone: a process that was killed
from outside does not make its clip guilty. A clip that kills its process alone, too, is condemned, and so is
one that hangs; the record says so, and it is not tried again unless that is asked for.
"""

import contextlib
import dataclasses
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.pipeline.chunk import READING, run_job
from lipprep.pipeline.journal import Attempt, read_attempt
from lipprep.pipeline.make import Job
from lipprep.pipeline.manifest import Clip, groups
from lipprep.pipeline.pool import WorkerDied, pool, run_all
from lipprep.pipeline.records import Headers
from lipprep.stages.remote import RemotePath

_MUTE = 3  # videos that do not come: it is their disk
BARREN = 3  # deaths in a row that brought nothing forward: then fewer processes, or a message
_PROBES = "probe"  # folder of what suspects leave when they are tried alone


def supervise(jobs: Collection[Job], *, workers: int, done: Callable[[Path, dict], None]) -> None:
    """Make the chunk of every job on `workers` processes; `done` gets each tar and its record's header.

    Raises ValueError where chunks could not be made since what they are made from is damaged, after all others
    are made; or where worker processes are killed again and again. OSError where a disk does not take what is
    written: at once.
    """
    pending = {job.tar: job for job in jobs}
    attempts: dict[Path, str] = {}  # those that were committed
    reached: dict = {}  # how many clips of a chunk its furthest attempt has come to
    damaged: list[UserError] = []
    silent: set[Path] = set()
    mute: list[str] = []
    deaths: list[set[str]] = []  # the clips in flight at the deaths since something was brought forward
    while pending:
        attempt = uuid.uuid4().hex[:12]
        batch = [dataclasses.replace(job, attempt=attempt) for job in pending.values()]
        try:
            with pool(min(workers, len(batch))) as executor:
                for job, future in run_all(executor, run_job, batch, ahead=lambda count=2 * workers: count):
                    try:
                        header = future.result()
                    except OSError:
                        raise
                    except UserError as error:
                        damaged.append(error)
                    else:
                        done(job.tar, header)
                        deaths.clear()
                        attempts[job.tar] = attempt
                    del pending[job.tar]
        except WorkerDied as death:
            read = Headers(next(iter(pending)).parent)
            for tar in list(pending):  # what was committed without a word
                header = read(tar)
                if header is not None and header["attempt"] == attempt:
                    del pending[tar]
                    attempts[tar] = attempt
                    done(tar, header)
                    deaths.clear()
            found = {tar: read_attempt(tar, attempt, job.unfinished) for tar, job in pending.items()}
            left = {tar: attempted for tar, attempted in found.items() if attempted is not None}
            condemned = _judge(death, pending, left, silent, mute)
            forward = [tar for tar, found in left.items() if len(found.entries) > reached.get(tar, 0)]
            reached |= {tar: len(left[tar].entries) for tar in forward}
            if condemned or forward:
                deaths.clear()
            deaths.append({key for found in left.values() for key in found.working or ()})
            if len(deaths) > BARREN:
                workers = _retreat(death, pending, deaths, workers)
                deaths.clear()
        if not pending:
            # A worker of an earlier run, whose driver was killed, may have had its last word meanwhile.
            read = Headers(next(job.tar.parent for job in jobs))
            pending = {job.tar: job for job in jobs if _overwritten(job.tar, attempts, read)}
    for folder in {job.unfinished for job in jobs}:
        shutil.rmtree(probes(folder), ignore_errors=True)
    raise_damaged(damaged)


def supervise_here(jobs: Collection[Job], *, done: Callable[[Path, dict], None]) -> None:
    """The same one after another in this process, which dies with a clip that kills it."""
    damaged: list[UserError] = []
    for job in jobs:
        try:
            done(job.tar, run_job(dataclasses.replace(job, attempt=uuid.uuid4().hex[:12], clip_timeout=None)))
        except UserError as error:
            damaged.append(error)
    raise_damaged(damaged)


def raise_damaged(damaged: Sequence[UserError]) -> None:
    """Raise the first of the errors that chunks could not be made for, if there are any."""
    if damaged:
        more = f" (and {len(damaged) - 1} more chunks)" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more}")


def _overwritten(tar: Path | RemotePath, attempts: Mapping[Path | RemotePath, str], read: Headers) -> bool:
    header = read(tar)
    return tar in attempts and (header is None or header["attempt"] != attempts[tar])


def probes(scratch: Path) -> Path:
    """Return the folder that suspects, which are tried alone, leave what they make in."""
    return scratch / _PROBES


def say(message: str) -> None:
    """Tell the user what happened, past the progress bar."""
    tqdm.write(message, file=sys.stderr)


def _retreat(death: WorkerDied, pending: dict, deaths: Sequence[set[str]], workers: int) -> int:
    """How many workers to go on with when one after another dies of nothing that can be named."""
    if workers > 1:
        say(f"workers die one after another ({death.codes}): going on with {workers // 2}")
        return workers // 2
    if keys := set.intersection(*deaths):
        for tar, job in pending.items():
            if found := keys & {clip.key for clip in job.clips}:
                pending[tar] = condemn(job, found, "crashed", f"alone as well ({death.codes})")
        return workers
    raise UserError(
        f"worker processes die again and again ({death.codes}), each with another clip: is there too little memory? "
        "What is done is kept: run the same command again to go on"
    )


def _judge(death: WorkerDied, pending: dict, left: dict, silent: set[Path], mute: list[str]) -> bool:
    """Find the clips that a worker died of, and condemn them; whether there were any.

    `silent` are the chunks that an attempt died at before without naming a clip, `mute` the clips whose videos did not
    come. Raises ValueError where these are too many: their disk is to blame.
    """
    # A process that ended itself has said so. Of those that were killed, and killed with it, nothing is known.
    told = {tar: found for tar, found in left.items() if found.last_words}
    condemned = False
    for tar, found in (told or left).items():
        job = pending[tar]
        if found.working is None and tar not in silent:
            silent.add(tar)  # it died between clips, most likely with another: that may tell
            continue
        if found.kind == "mute":  # to wait as long again would tell no more
            mute.append(found.working[0])
            if len(mute) == _MUTE:
                raise UserError(
                    f"videos cannot be read within {READING * job.clip_timeout:g} s ({', '.join(mute)}): does their "
                    "disk answer? What is done is kept: run the same command again to go on"
                )
            say(f"the video of {found.working[0]} cannot be read within {READING * job.clip_timeout:g} s: given up")
            pending[tar] = condemn(job, found.working, "mute", "")
            condemned = True
            continue
        say(f"a worker died ({death.codes}) at {(found.working or [tar.stem])[0]}: it is tried again alone")
        keys, kind, codes = guilty(job, found)
        if keys:
            pending[tar] = condemn(job, keys, kind, f"alone as well ({codes})")
            condemned = True
        else:
            # What was made of it alone need not be made again.
            alone = sorted(probes(job.unfinished).glob(f"{tar.stem}-*.tar"))
            pending[tar] = dataclasses.replace(job, old=tuple(dict.fromkeys((*job.old, *alone))))
    return condemned


def condemn(job: Job, keys: Collection[str], kind: str, how: str) -> Job:
    """The job with the clips `keys` of a video, which crashed or timed out, as failed; `how` it is known."""
    if kind == "mute":
        kind, seconds = "timeout", READING * job.clip_timeout
        message = f"its video could not be read within {seconds:g} s: see to its disk, then --retry-failed=timeout"
    elif kind == "timeout":
        message = (
            f"no end after {job.clip_timeout * len(keys):g} s: if the machine was merely slow, raise --clip-timeout "
            "and run again with --retry-failed=timeout"
        )
    else:
        message = (
            f"it killed its process, {how}: out of memory, or a fault in a codec. --retry-failed=crashed tries it again"
        )
    return dataclasses.replace(job, condemned={**job.condemned, **dict.fromkeys(keys, (kind, message))})


def guilty(job: Job, found: Attempt) -> tuple[Collection[str], str, str]:
    """Try clips of a job here: the keys of those that kill their process alone, too; their class, and the exit codes.

    Where the journal names the clips, they are tried; else the chunk, and then its halves.
    """
    videos = [clips for _, clips in groups(job.clips, job.fps)]
    if found.working is not None:
        videos = [clips for clips in videos if any(clip.key in found.working for clip in clips)]
    kind, codes = "", ""
    suspects: list[list[Clip]] = videos
    deaths = 0
    while suspects:
        # The whole first; then, as it is known to kill, one half of it tells of the other.
        part = suspects if not deaths or len(suspects) == 1 else suspects[: len(suspects) // 2]
        outcome = _try_alone(job, [clip for clips in part for clip in clips])
        if outcome is not None:
            died, codes = outcome
            deaths += 1
            kind = died.kind
            suspects = part
            if died.working is not None:
                suspects = [clips for clips in part if any(clip.key in died.working for clip in clips)]
        elif part == suspects:
            return (), "", ""
        else:
            suspects = suspects[len(part) :]
        # Twice, so that it takes three kills from outside, each at its moment, to condemn an innocent clip. One that
        # hangs does so for its whole time: once more is enough to tell it from a machine that was suspended.
        if len(suspects) == 1 and (deaths > 1 or kind != "crashed"):
            return [clip.key for clip in suspects[0]], kind, codes
    return (), "", ""


def _try_alone(job: Job, clips: list[Clip]) -> tuple[Attempt, str] | None:
    """What is left, with the exit codes, where these clips kill a process of their own; None where they do not."""
    for _ in range(BARREN):
        attempt = uuid.uuid4().hex[:12]
        folder = probes(job.unfinished)
        folder.mkdir(parents=True, exist_ok=True)
        tar = folder / f"{job.tar.stem}-{attempt}.tar"
        alone = dataclasses.replace(job, clips=clips, tar=tar, attempt=attempt, together=False, scratch=folder)
        try:
            with pool(1) as executor:
                for _, future in run_all(executor, run_job, [alone], ahead=lambda: 1):
                    with contextlib.suppress(UserError):
                        future.result()
            return None
        except WorkerDied as death:
            if (found := read_attempt(tar, attempt, folder)) is not None:
                return found, death.codes
            # It died before it began: no clip's fault.
    return None
