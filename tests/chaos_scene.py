"""One round of chaos.py: the state it begins in, the commands it runs, and what must hold after each."""

import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_faults import Command, Ended, SmallDisk

from lipprep.pipeline.records import read_header
from lipprep.stages.lock import LOCK

STAGES = ("landmarks", "crops", "shards")
ORPHAN_SECONDS = 30  # how long a worker may outlive a driver that was killed
MOST_RUNS = 4  # of one stage, to follow what its messages say
REMEDY = re.compile(r"run `lipprep (landmarks|crops|shards)\b")
# What a stage is made with where a parameter was changed, and how it is changed back.
OTHERWISE = {"crops": ("--crop-size", "88"), "shards": ("--quality", "80")}
BACK = {"crops": ("--crop-size", "96"), "shards": ("--quality", "95")}


@dataclass(frozen=True)
class Case:
    """A round as planned: all that it does is drawn from `seed`."""

    number: int
    corpus: str
    kind: str
    stage: str
    seed: int


@dataclass
class Result:
    """What a round came to: figures of the last stage at the end, and all that went wrong."""

    case: Case
    struck: bool = False
    planned: int = 0
    ok: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failed_on_the_way: dict[str, int] = field(default_factory=dict)
    reruns: int = 0
    stop_seconds: float | None = None
    tracebacks: int = 0
    orphans: int = 0
    differences: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def troubles(self) -> list[str]:
        """All that went wrong, a line each."""
        counted = {
            "tracebacks": self.tracebacks,
            "orphans": self.orphans,
            f"differences, e.g. {', '.join(self.differences[:4])}": len(self.differences),
        }
        return [*self.problems, *(f"{count} {name}" for name, count in counted.items() if count)]


@dataclass(frozen=True)
class Corpus:
    """A corpus that was brought to shards undisturbed, in `home`.

    `videos` has those of every chunk, `pace` the seconds that a stage took a chunk, `reference` the digests of
    a stage's files; `lipprep` runs a command there.
    """

    name: str
    home: Path
    clips: int
    videos: Mapping[str, list[str]]
    pace: Mapping[str, float]
    reference: Mapping[str, dict[str, str]]
    lipprep: Callable[..., str]

    def otherwise(self, stage: str) -> Path:
        """A folder where `stage` was made with another parameter; made when it is first asked for."""
        folder = self.home / f"otherwise-{stage}"
        if not folder.is_dir():
            shutil.copytree(self.home / "work", folder / "work")
            shutil.copytree(self.home / "shards", folder / "shards")
            out = ("-o", folder / "shards") if stage == "shards" else ()
            self.lipprep(stage, "-m", f"{self.name}.jsonl", "-w", folder / "work", *out, *OTHERWISE[stage])
        return folder


def artefacts(folder: Path, name: str, stage: str) -> Path:
    """Where a stage's artefacts stand below `folder`."""
    return folder / "shards" if stage == "shards" else folder / "work" / name / stage


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file; of records, which hold times, that they are there. The lock of runs is no artefact."""
    return {
        p.name: "" if p.is_dir() or p.suffix == ".jsonl" else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.glob("*"))
        if p.name != LOCK
    }


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The names of files that are missing, of other bytes, or not among those wanted."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


class Scene:
    """A folder in which one round is played. Leaving the `with` block ends its processes and unmounts its disk."""

    def __init__(self, case: Case, corpus: Corpus, folder: Path, *, stop_seconds: float) -> None:
        self.case, self.corpus, self.folder, self.stop_seconds = case, corpus, folder, stop_seconds
        self.stage = case.stage
        self.rng = random.Random(case.seed)
        self.workers = self.rng.choice((1, 2))
        self.result = Result(case)
        self.disk: SmallDisk | None = None
        self.pending: list[str] = []
        self.pace = corpus.pace[case.stage]
        self.back: tuple[str, ...] = ()
        # How the round goes on after its fault: from which stage, with which flags, whether messages name remedies.
        self.redo_from, self.redo_flags, self.remedies = self.stage, (), False
        self.redoing = False
        self._command: Command | None = None
        self._before: dict[str, tuple[int, int]] = {}
        folder.mkdir()

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_) -> None:
        if self._command is not None:
            self._command.kill()
        if self.disk is not None:
            self.disk.move_away()

    # The state that a round begins in.

    def place(self, stage: str) -> Path:
        """Where the round's artefacts of a stage stand."""
        return artefacts(self.folder, self.corpus.name, stage)

    def of_reference(self, stage: str) -> Path:
        """Where the undisturbed artefacts of a stage stand."""
        return artefacts(self.corpus.home, self.corpus.name, stage)

    def copy(self, stage: str, chunks: Sequence[str]) -> None:
        """Bring some chunks of a stage in place as the undisturbed run made them."""
        self.place(stage).mkdir(parents=True, exist_ok=True)
        for chunk in chunks:
            for ending in ("tar", "jsonl"):
                shutil.copy2(self.of_reference(stage) / f"{chunk}.{ending}", self.place(stage))

    def set(self, before: str, *, later: bool) -> None:
        """Bring the folder to a moment before the stage.

        Of the stage itself there is `nothing`, a `part`, `all`, or all of it is `stale`: made with another
        parameter that is then changed back, or from videos that were touched since. `later` stages are there
        as they will be in the end, or not at all.
        """
        name, stage, home = self.corpus.name, self.stage, self.corpus.home
        shutil.copy2(home / f"{name}.jsonl", self.folder)
        shutil.copytree(home / "videos", self.folder / "videos")
        (self.folder / "work" / name).mkdir(parents=True, exist_ok=True)
        here = STAGES.index(stage)
        plan = home / "work" / name / "plan.yaml"
        chunks = sorted(self.corpus.videos)
        for earlier in STAGES[:here]:
            self.copy(earlier, chunks)
        for after in STAGES[here + 1 :] if later else ():
            shutil.copytree(self.of_reference(after), self.place(after), dirs_exist_ok=True)
        # Landmarks cost most by far: a round makes some of them.
        most = 0.5 if stage == "landmarks" else 0.9
        some = sorted(self.rng.sample(chunks, round(self.rng.uniform(0.2, most) * len(chunks)) or 1))
        self.pending = {"all": [], "part": some, "nothing": chunks, "stale": chunks}[before]
        if before == "stale" and stage == "landmarks":
            self.pending = some
            self.pace = min(self.corpus.pace.values())  # a video that was only touched is not looked at again
            self.copy(stage, chunks)
            for video in {self.folder / "videos" / v for chunk in some for v in self.corpus.videos[chunk]}:
                os.utime(video, ns=(video.stat().st_atime_ns, video.stat().st_mtime_ns + 10**9))
        elif before == "stale":
            other = self.corpus.otherwise(stage)
            shutil.copytree(artefacts(other, name, stage), self.place(stage), dirs_exist_ok=True)
            plan, self.back = other / "work" / name / "plan.yaml", BACK[stage]
        else:
            self.copy(stage, [c for c in chunks if c not in self.pending])
            if before == "all" and stage == "shards":
                for index in ("index.json", "index.npz"):
                    shutil.copy2(self.of_reference(stage) / index, self.place(stage))
        if plan.is_file() and (stage != "landmarks" or before != "nothing"):
            shutil.copy2(plan, self.folder / "work" / name)
        self.note(f"{self.case}\n{before}, {len(self.pending)} of {len(chunks)} chunks pending, later={later}")

    def sizes(self) -> list[int]:
        """What the pending chunks will take on a disk, bytes each, tar and record in whole pages."""
        return [
            sum(
                -(-(self.of_reference(self.stage) / f"{c}.{e}").stat().st_size // 4096) * 4096 for e in ("tar", "jsonl")
            )
            for c in self.pending
        ]

    # The commands, and what must hold after each.

    def note(self, text: str) -> None:
        """Keep a line for whoever looks into the folder."""
        with (self.folder / "log.txt").open("a") as log:
            log.write(text + "\n")

    def start(self, stage: str, *flags: str, **how) -> Command:
        """Start a stage's command; `made()` counts from here."""
        out = ("-o", "shards") if stage == "shards" else ()
        arguments = ("-m", f"{self.corpus.name}.jsonl", "-w", "work", *out, "-j", str(self.workers), "--json", *flags)
        self._before = self._records(stage)
        self._command = Command(stage, *arguments, folder=self.folder, **how)
        return self._command

    def _records(self, stage: str) -> dict[str, tuple[int, int]]:
        found = {}
        for record in self.place(stage).glob("*.jsonl"):
            try:
                stat = record.stat()
            except FileNotFoundError:  # it is being replaced
                continue
            found[record.name] = (stat.st_ino, stat.st_mtime_ns)
        return found

    def made(self) -> int:
        """How many records the running command has committed."""
        return sum(self._before.get(name) != stat for name, stat in self._records(self.stage).items())

    def end(self, command: Command, *, killed: bool = False) -> Ended:
        """Wait for a command's end and look at what it left."""
        ended = command.end(orphan_seconds=ORPHAN_SECONDS if killed else self.stop_seconds)
        self._command = None
        self.note(f"$ lipprep {' '.join(ended.arguments)}\n{ended.stdout}{ended.stderr}exit code {ended.code}")
        if ended.hung:
            self.result.problems.append(f"{ended.arguments[0]} hung and was killed")
        if ended.orphans:
            self.note("left: " + "\n".join(ended.orphans))
        self.result.orphans += len(ended.orphans)
        self.result.tracebacks += (ended.stdout + ended.stderr).count("Traceback (most recent call last)")
        if (report := ended.report) is not None:
            failed = Counter(report["failed"])
            if not report["planned"] == report["ok"] + failed.total() == self.corpus.clips:
                self.result.problems.append(f"clips do not add up: {json.dumps(report)}")
            if not self.redoing:
                self.result.failed_on_the_way = dict(failed | Counter(self.result.failed_on_the_way))
        return ended

    def run(self, stage: str, *flags: str, **how) -> Ended:
        """Run a stage's command to its end."""
        return self.end(self.start(stage, *(self.back if stage == self.stage else ()), *flags, **how))

    def settle(self, stage: str, *flags: str, remedies: bool = False) -> dict | None:
        """Run a stage until it is done and return its report; with `remedies`, run what its messages name."""
        for _ in range(MOST_RUNS if remedies else 1):
            self.result.reruns += self.redoing and stage == self.stage
            ended = self.run(stage, *flags)
            if ended.code == 0:
                return ended.report
            named = REMEDY.search(ended.stderr)
            if not remedies or named is None:
                break
            self.result.struck = True  # damage was noticed
            if named[1] != stage and self.settle(named[1], *flags, remedies=True) is None:
                return None
        self.result.problems.append(f"{stage} does not go on: exit code {ended.code}, {ended.message}")
        return None

    def verify(self) -> Ended:
        """Read all that the stage has made."""
        self._command = Command("verify", str(self.place(self.stage)), folder=self.folder)
        return self.end(self._command)

    def check_committed(self) -> None:
        """What has a record is whole, at any moment."""
        for stage in STAGES:
            for tar in self.place(stage).glob("*.tar"):
                header = read_header(tar)
                if header is not None and hashlib.sha256(tar.read_bytes()).hexdigest() != header["tar"]["sha256"]:
                    self.result.problems.append(f"{stage}/{tar.name} is committed and not whole")

    def play(self, fault: Callable[["Scene"], None]) -> Result:
        """Let the fault strike, go on, and compare."""
        fault(self)
        self.redoing = True
        result, report = self.result, None
        for stage in STAGES[STAGES.index(self.redo_from) :]:
            remedies = self.remedies or stage != self.stage
            report = self.settle(stage, *self.redo_flags, remedies=remedies)
            if self.remedies and stage == self.redo_from and report is not None:
                result.struck |= report["chunks_made"] > 0  # all was made before: the damage was noticed
        if self.disk is not None:
            self.disk.move_away()
            self.disk = None
        if report is not None:
            result.planned, result.ok, result.failed = report["planned"], report["ok"], report["failed"]
            if result.ok != self.corpus.clips:
                result.problems.append(f"not all clips are in the shards: {json.dumps(report)}")
        for stage in STAGES:
            found = digests(self.place(stage))
            result.differences += [f"{stage}/{name}" for name in differences(found, self.corpus.reference[stage])]
        return result
