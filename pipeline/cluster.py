"""Chunks on a cluster: the rounds until all are made, and what a worker does when a chunk comes to it again.

A scheduler hands a chunk whose worker died to another one, and knows nothing of clips. Each attempt leaves its
journal, so the next one knows what the others died of: it copies what they had done, works on one video at a time,
and condemns a video that several of them died at. Of a chunk that goes to a store journals stay where the workers are;
its clips are tried by the driver, which knows no more than that it is among them.
"""

import dataclasses
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.chunk import run_job
from lipprep.pipeline.engines import Cluster, ClusterError, WorkerLost
from lipprep.pipeline.journal import Attempt, attempts
from lipprep.pipeline.make import Job
from lipprep.pipeline.manifest import groups
from lipprep.pipeline.pool import run_all
from lipprep.pipeline.supervise import BARREN, condemn, guilty, probes, raise_damaged, say
from lipprep.stages.remote import RemotePath

_DEATHS = 3  # at one video, which are its fault. Two workers may well be stopped from outside at it, one after another
_TOLD = 2  # the same, where the process has said that it faults or hangs


def supervise_cluster(jobs: Collection[Job], *, cluster: Cluster, done: Callable[[Path, dict], None]) -> None:
    """Make the chunk of every job on a cluster; `done` gets each tar and its record's header.

    Raises as `supervise` does; and ValueError where the cluster is gone.
    """
    attempt = uuid.uuid4().hex[:12]
    pending = {job.tar: dataclasses.replace(job, attempt=attempt) for job in jobs}
    reached: dict[Path, int] = {}  # how far the attempts at a chunk have come
    barren: Counter = Counter()  # rounds in which a chunk came no further
    damaged: list[UserError] = []
    while pending:
        for job, future in run_all(cluster, make_again, list(pending.values()), ahead=cluster.ahead):
            try:
                header = cluster.result(future)
            except WorkerLost as error:
                say(f"workers died at {job.tar.stem}, one after another ({error}): it is tried again")
                if isinstance(job.tar, RemotePath) and not _attempts(job):
                    keys, kind, codes = guilty(job, Attempt(job.attempt, job.tar, [], None, ""))
                    shutil.rmtree(probes(job.unfinished), ignore_errors=True)
                    if keys:
                        pending[job.tar] = condemn(job, keys, kind, f"alone as well ({codes})")
                        continue
                progress = sum(len(a.entries) + bool(a.working) for a in _attempts(job))
                barren[job.tar] = 0 if progress > reached.get(job.tar, 0) else barren[job.tar] + 1
                reached[job.tar] = progress
                if barren[job.tar] == BARREN:
                    raise UserError(
                        f"workers die again and again at {job.tar.stem} without a clip to blame: have they too little "
                        "memory? What is done is kept: run the same command again to go on"
                    ) from error
                continue
            except (OSError, ClusterError):
                raise
            except UserError as error:
                damaged.append(error)
            else:
                done(job.tar, header)
            del pending[job.tar]
    raise_damaged(damaged)


def _attempts(job: Job) -> list[Attempt]:
    return [left for left in attempts(job.tar, job.unfinished) if left.tag.startswith(f"{job.attempt}-")]


def make_again(job: Job) -> dict:
    """Run by a worker: make one chunk, wiser by the attempts at it that were killed; return its record's header."""
    return run_job(_wiser(job, _attempts(job)), tag=f"{job.attempt}-{uuid.uuid4().hex[:8]}")


def _wiser(job: Job, killed: Sequence[Attempt]) -> Job:
    if not killed:
        return job
    videos = [clips for _, clips in groups(job.clips, job.fps)]
    where = {clip.key: n for n, clips in enumerate(videos) for clip in clips}
    deaths, told, kinds = Counter(), Counter(), {}
    for left in killed:
        at = {where[key] for key in left.working or () if key in where}
        if len(at) == 1:  # of several that were worked on together, none can be blamed
            deaths.update(at)
            told.update(at if left.last_words else ())
            kinds |= dict.fromkeys(at, left.kind)
    job = dataclasses.replace(job, together=False)
    for n, count in deaths.items():
        if count >= _DEATHS or told[n] >= _TOLD:
            job = condemn(job, [clip.key for clip in videos[n]], kinds[n], f"{count} workers died")
    return job
