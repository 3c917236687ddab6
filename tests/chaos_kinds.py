"""The kinds of faults of chaos.py. Each draws all that it will do, sets the scene, and strikes once.

What must hold right after the fault is checked here; that the re-run brings the undisturbed bytes, in the scene.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial

from chaos_faults import Command, Ended, SmallDisk, can_mount, damage_file, damage_video, failing
from chaos_scene import STAGES, Scene

INTERRUPTED = 130


def draw_before(scene: Scene) -> None:
    """Set a moment before the stage; some of it is always left to make."""
    before = scene.rng.choices(("nothing", "part", "stale"), (1, 5, 2) if scene.stage == "landmarks" else (1, 1, 1))
    scene.set(before[0], later=scene.rng.random() < 0.5)


def draw_moment(scene: Scene) -> tuple[int, float]:
    """After how many records a fault strikes, and how many seconds later; so that most strike before the end."""
    records = scene.rng.randrange(max(1, round(0.7 * len(scene.pending))))
    return records, scene.rng.uniform(0, 2) * scene.pace


def reach(scene: Scene, command: Command, moment: tuple[int, float], known: set[int]) -> bool:
    """Wait for a moment at which a worker is at work that is not among the `known`; False if the command ends first."""
    records, delay = moment
    if not command.wait_for(lambda: scene.made() >= records and set(command.workers()) - known):
        return False
    time.sleep(delay)
    return command.process.poll() is None


def kill_worker(scene: Scene) -> None:
    """kill -9 of up to three workers, one after the other: the command itself must go on and end well."""
    draw_before(scene)
    blows = [(draw_moment(scene), scene.rng.random()) for _ in range(scene.rng.randint(1, 3))]
    command = scene.start(scene.stage, *scene.back)
    known: set[int] = set()
    killed = 0
    for moment, which in blows:
        if not reach(scene, command, moment, known):
            break
        living = command.workers()
        known |= set(living)
        if living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(living[int(which * len(living))], signal.SIGKILL)
                killed += 1
    ended = scene.end(command)
    scene.result.struck = killed > 0
    scene.check_committed()
    if ended.code != 0:
        scene.result.problems.append(f"{killed} killed workers ended the command with {ended.code}: {ended.message}")
    crashed = ended.report["failed"].get("crashed", 0) if ended.report else 0
    # A clip whose process was killed three times, whenever it was tried, is rightly set aside.
    if crashed and killed < 3:
        scene.result.problems.append(f"{killed} killed workers cost {crashed} clips")
    if crashed:
        scene.redo_flags = ("--retry-failed=crashed",)


def kill_driver(scene: Scene) -> None:
    """kill -9 of the driver, at its start or at work: its workers must go as well."""
    draw_before(scene)
    early = scene.rng.random() < 0.2
    start, moment = scene.rng.uniform(0, 1), draw_moment(scene)
    command = scene.start(scene.stage, *scene.back)
    if early:
        time.sleep(start)
    else:
        reach(scene, command, moment, set())
    command.send(signal.SIGKILL)
    ended = scene.end(command, killed=True)
    scene.result.struck = ended.code == -signal.SIGKILL
    scene.check_committed()


def stop(scene: Scene, number: int) -> None:
    """SIGTERM or SIGINT: the command must end soon, without orphans, and say how to go on."""
    draw_before(scene)
    group = number == signal.SIGINT and scene.rng.random() < 0.5
    moment = draw_moment(scene)
    command = scene.start(scene.stage, *scene.back)
    reach(scene, command, moment, set())
    sent = time.monotonic()
    command.send(number, group=group)
    command.wait_for(lambda: False)
    seconds = time.monotonic() - sent
    ended = scene.end(command)
    scene.check_committed()
    if ended.code == 0:
        return
    scene.result.struck = True
    scene.result.stop_seconds = seconds
    if ended.code != INTERRUPTED:
        scene.result.problems.append(f"the signal ended the command with {ended.code}: {ended.message}")
    elif "again" not in ended.stderr:
        scene.result.problems.append(f"it does not say how to go on: {ended.message}")
    if seconds > scene.stop_seconds:
        scene.result.problems.append(f"it took {seconds:.1f} s to stop")


def check_disk_error(scene: Scene, ended: Ended, number: int) -> None:
    """A full or failing disk ends a command with exit code 1 and one message that names the cause."""
    scene.check_committed()
    if ended.code == 0:
        return
    scene.result.struck = True
    if ended.code != 1 or os.strerror(number) not in ended.stderr or len(re.findall("^Error", ended.stderr, re.M)) != 1:
        scene.result.problems.append(
            f"{errno.errorcode[number]} ended the command with {ended.code}, not with one message: {ended.message}"
        )
    elif number == errno.ENOSPC and not re.search(r"takes about [\d.]+ [kMG]B", ended.message):
        scene.result.problems.append(f"it does not say how much room is needed: {ended.message}")


def failing_writes(scene: Scene, name: str) -> None:
    """ENOSPC or EIO at a write or a sync of every process."""
    draw_before(scene)
    where = scene.rng.choice(("write", "sync"))
    share = scene.rng.random()
    most = sum(scene.sizes()) // 2 if where == "write" else len(scene.pending)
    environment = failing(scene.folder / "site", name, where, int(share * most / scene.workers))
    ended = scene.run(scene.stage, environment=environment)
    check_disk_error(scene, ended, getattr(errno, name))


def disk_full(scene: Scene) -> None:
    """A disk that is too small for the stage's folder; then it grows, or its content moves."""
    if not can_mount(scene.folder.parent / "mount"):
        failing_writes(scene, "ENOSPC")
        return
    scene.disk = SmallDisk(scene.folder / ("shards" if scene.stage == "shards" else "work"))
    draw_before(scene)
    share, grows = scene.rng.uniform(0, 0.9), scene.rng.random() < 0.5
    # What is stale gives its own room back.
    need = max(scene.sizes()) if (scene.place(scene.stage) / f"{scene.pending[0]}.tar").exists() else sum(scene.sizes())
    scene.disk.resize(scene.disk.used() + max(4096, int(share * need)))
    ended = scene.run(scene.stage)
    check_disk_error(scene, ended, errno.ENOSPC)
    if grows:
        scene.disk.resize(256 << 20)
    else:
        scene.disk.move_away()
        scene.disk = None


def file_too_large(scene: Scene) -> None:
    """A limit on the size of files, as quotas and old file systems have."""
    draw_before(scene)
    limit = int(scene.rng.uniform(0.02, 0.95) * max(scene.sizes()))
    ended = scene.run(scene.stage, limit=limit)
    check_disk_error(scene, ended, errno.EFBIG)


def damaged_artefact(scene: Scene) -> None:
    """A flipped bit, a cut or a loss in what this stage or one before it has made."""
    here = STAGES.index(scene.stage)
    target = scene.rng.choice(STAGES[: here + 1])
    ending = scene.rng.choice(("tar", "tar", "jsonl", "index") if target == "shards" else ("tar", "tar", "jsonl"))
    how = scene.rng.choice(("flip", "cut", "remove"))
    scene.set("all" if target == scene.stage else "nothing", later=False)
    files = sorted(scene.place(target).glob(f"{ending}.*" if ending == "index" else f"*.{ending}"))
    path = scene.rng.choice(files)
    damage_file(path, how, scene.rng)
    scene.note(f"{how} {target}/{path.name}")
    scene.remedies, scene.redo_from = True, target
    if target == scene.stage and ending == "tar" and how == "flip":
        # The stage itself takes a tar of the right size for whole.
        ended = scene.verify()
        named = set(re.findall(r"[a-z]+-\d{5}\.tar", ended.stdout + ended.stderr))
        scene.result.struck = ended.code == 1 and path.name in named
        if not scene.result.struck:
            scene.result.problems.append(
                f"verify ends with {ended.code} and does not name {path.name}: {ended.message}"
            )
        for name in named:
            (scene.place(target) / name).unlink()
    elif target != scene.stage:
        scene.settle(scene.stage, remedies=True)
    # No chunk is made again for an index, but its own bytes are compared.
    scene.result.struck |= ending == "index"


def damaged_input(scene: Scene) -> None:
    """A video that is rubbish, empty, cut or missing at first, and then as it was."""
    scene.set("part" if scene.rng.random() < 0.5 else "nothing", later=False)
    chunk = scene.rng.choice(scene.pending)
    video = scene.rng.choice(scene.corpus.videos[chunk])
    how = scene.rng.choice(("rubbish", "empty", "cut", "missing", "disguised"))
    touched, onwards = scene.rng.random() < 0.5, scene.rng.random() < 0.5
    path = scene.folder / "videos" / video
    damage_video(path, how, scene.rng)
    scene.note(f"{how} {video}, restored with {'another' if touched else 'its own'} time")
    here = STAGES.index(scene.stage)
    for stage in STAGES[here:] if onwards else [scene.stage]:
        scene.settle(stage, "--max-failures", "100%", remedies=True)
    scene.result.struck |= bool(scene.result.failed_on_the_way)
    shutil.copy2(scene.corpus.home / "videos" / video, path)
    if touched:
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    elif how == "disguised":
        # Size and time do not tell it from the video that failed.
        scene.redo_flags = ("--retry-failed",)
    scene.redo_from = "landmarks"


KINDS: dict[str, Callable[[Scene], None]] = {
    "kill-worker": kill_worker,
    "kill-driver": kill_driver,
    "sigterm": partial(stop, number=signal.SIGTERM),
    "sigint": partial(stop, number=signal.SIGINT),
    "enospc": disk_full,
    "eio": partial(failing_writes, name="EIO"),
    "efbig": file_too_large,
    "artefact": damaged_artefact,
    "input": damaged_input,
}
