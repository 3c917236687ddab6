"""Workers and drivers that die, hang or are told to stop: nothing is lost, nothing is made twice."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from traps import PATIENCE, POSIX, entries, strays, tars, until

from lipprep.pipeline.journal import attempts
from lipprep.pipeline.records import read_entries, read_header
from lipprep.stages.shard.index import load_index


@POSIX
@pytest.mark.cluster
def test_a_worker_killed_from_outside_costs_nothing(chain, trapped):
    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    keys = ["ABOUT/train/ABOUT_00002", "BLACK/train/BLACK_00003"]
    done = trapped("landmarks", "-j", 2, "--json", traps=dict.fromkeys(keys, "once"))
    figures = json.loads(done.stdout)
    assert figures["ok"] == 12 and figures["failed"] == {}
    assert tars("work/m/landmarks") == whole and not strays()
    assert "a worker died" in done.stderr


@POSIX
@pytest.mark.parametrize("kind", [pytest.param("segfault", marks=pytest.mark.cluster), "kill"])
def test_a_clip_that_kills_its_process_is_condemned_and_costs_no_other(chain, trapped, lipprep, kind):
    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    guilty = "ABOUT/train/ABOUT_00002"
    arguments = ["landmarks", "-j", 2, "--json", "--max-failures", "100%"]
    figures = json.loads(trapped(*arguments, traps={guilty: kind}).stdout)
    assert figures["ok"] == 11 and figures["failed"] == {"crashed": 1}
    assert "killed its process, alone as well" in entries("work/m/landmarks")[guilty]["message"]
    again = json.loads(trapped(*arguments, traps={guilty: kind}).stdout)
    assert again["chunks_made"] == 0  # it is not tried again
    retried = json.loads(lipprep("landmarks", "-j", 1, "--json", "--retry-failed=crashed").stdout)
    assert retried["ok"] == 12 and retried["clips_computed"] == 1
    assert tars("work/m/landmarks") == whole and not strays()


@POSIX
@pytest.mark.cluster
def test_a_clip_that_hangs_is_cut_off(chain, trapped, lipprep):
    chain(stages=("landmarks",))
    done = trapped("shards", "--clip-timeout", 3, "--max-failures", "100%", traps={"BLACK/val/BLACK_00005": "hang"})
    assert "timeout: 1" in done.stdout
    failure = json.loads(lipprep("failures", "--json").stdout)[0]
    assert failure["key"] == "BLACK/val/BLACK_00005" and failure["class"] == "timeout" and failure["stage"] == "shards"
    assert "no end after 3 s" in failure["message"] and load_index(Path("shards")).failures["val"] == {"timeout": 1}
    lipprep("shards", "-j", 1, "--retry-failed=timeout")
    assert load_index(Path("shards")).failures["val"] == {}


@POSIX
@pytest.mark.cluster
def test_a_video_that_cannot_be_read_to_its_end_is_given_up(chain, trapped, lipprep):
    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    key = "BLACK/train/BLACK_00003"
    arguments = ["landmarks", "-j", 1, "--json", "--clip-timeout", 1, "--max-failures", "100%"]
    figures = json.loads(trapped(*arguments, traps={key: "mute"}).stdout)
    assert figures["ok"] == 11 and figures["failed"] == {"timeout": 1}
    assert "could not be read within 5 s" in entries("work/m/landmarks")[key]["message"]
    lipprep("landmarks", "-j", 1, "--retry-failed=timeout")
    assert tars("work/m/landmarks") == whole and not strays()


def test_what_was_made_in_this_process_up_to_an_interrupt_is_kept(chain, lipprep, monkeypatch):
    from lipprep.pipeline import make

    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    plain, calls = make.GROUP["landmarks"], []

    def interrupted(job, video, clips, inputs):
        calls.append(video)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(job, video, clips, inputs)

    with monkeypatch.context() as patched:
        patched.setitem(make.GROUP, "landmarks", interrupted)
        lipprep("landmarks", "--engine", "serial", code=130)
    figures = json.loads(lipprep("landmarks", "--engine", "serial", "--json").stdout)
    assert figures["ok"] == 12 and figures["clips_computed"] == 11
    assert tars("work/m/landmarks") == whole and not strays()


def test_a_fault_of_ours_in_reading_ahead_costs_its_clips_alone(chain, lipprep, monkeypatch):
    from lipprep.pipeline import chunk

    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    plain = chunk.source_content
    with monkeypatch.context() as patched:
        broken = lambda root, video, *more: 1 / 0 if "BLACK_00003" in str(video) else plain(root, video, *more)  # noqa: E731
        patched.setattr(chunk, "source_content", broken)
        lipprep("landmarks", "--engine", "serial", "--max-failures", "100%")
    assert "ZeroDivisionError" in entries("work/m/landmarks")["BLACK/train/BLACK_00003"]["message"]
    lipprep("landmarks", "-j", 1)
    assert tars("work/m/landmarks") == whole


def test_videos_that_do_not_come_end_the_run_as_their_disk_is_to_blame(tmp_path, monkeypatch):
    from concurrent.futures import BrokenExecutor

    from lipprep.pipeline import supervise
    from lipprep.pipeline.journal import Journal
    from lipprep.pipeline.make import Job
    from lipprep.pipeline.manifest import Clip
    from lipprep.pipeline.wanted import Wanted

    clips = [Clip(f"k{n}", f"v{n}.mp4", "train", "w", 0, 0) for n in range(5)]
    job = Job("landmarks", clips, tmp_path, 25.0, Wanted(), {}, {}, tmp_path / "train-00000.tar")
    died = []

    def work(jobs):
        """Hang at the first video that is not given up."""
        (mine,) = jobs
        at = next(clip.key for clip in mine.clips if clip.key not in mine.condemned)
        with Journal(mine.tar, mine.attempt, mine.unfinished) as journal:
            journal.reading([at], None)
            journal._file.write(b"Timeout (0:11:00)!\n")
            journal.keep = True
        died.append(at)
        raise supervise.WorkerDied(BrokenExecutor("exit codes of the workers are {EXIT(1)}"))
        yield

    monkeypatch.setattr(supervise, "run_all", lambda _, __, jobs, *, ahead: work(jobs))
    with pytest.raises(ValueError, match=r"cannot be read within 600 s \(k0, k1, k2\): does their disk answer"):
        supervise.supervise([job], workers=1, done=lambda *_: None)
    assert died == ["k0", "k1", "k2"]


def test_without_a_journal_a_clip_is_found_by_halves(tmp_path, monkeypatch):
    """At most log2(chunk) + 2 tries find the clip, wherever it stands."""
    from lipprep.pipeline import supervise
    from lipprep.pipeline.journal import Attempt
    from lipprep.pipeline.make import Job
    from lipprep.pipeline.manifest import Clip
    from lipprep.pipeline.wanted import Wanted

    clips = [Clip(f"k{n}", f"v{n}.mp4", "train", "w", 0, 0) for n in range(512)]
    job = Job("landmarks", clips, tmp_path, 25.0, Wanted(), {}, {}, tmp_path / "train-00000.tar")
    silent = Attempt("0", job.tar, [], None, "")
    for guilty in (0, 1, 255, 256, 300, 511):
        tries = []

        def die(_, part, guilty=guilty, tries=tries):
            tries.append(len(part))
            return (silent, "SIGKILL(-9)") if clips[guilty] in part else None

        monkeypatch.setattr(supervise, "_try_alone", die)
        assert supervise.guilty(job, silent) == ([f"k{guilty}"], "crashed", "SIGKILL(-9)")
        assert len(tries) <= 9 + 2
    monkeypatch.setattr(supervise, "_try_alone", lambda *_: None)
    assert supervise.guilty(job, silent) == ((), "", "")


@POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_stops_at_once_and_can_go_on(chain, lipprep, start, how):
    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    process = start("landmarks", "-j", 2)
    until(lambda: list(Path("work").rglob("*.jsonl")) or process.poll() is not None)
    workers = process.children(recursive=True) if process.is_running() else []
    process.send_signal(how)
    told = time.monotonic()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, 130)
    assert process.returncode == 0 or ("run the same command again to go on" in said and "Traceback" not in said)
    assert time.monotonic() - told < PATIENCE
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    kept = {p: p.stat().st_mtime_ns for p in Path("work").rglob("*.tar") if read_header(p) is not None}
    lipprep("landmarks", "-j", 1)
    assert tars("work/m/landmarks") == whole and not strays()
    assert kept and {p: p.stat().st_mtime_ns for p in kept} == kept


@POSIX
def test_a_driver_killed_in_mid_run_costs_only_what_was_in_flight(chain, lipprep, start):
    chain()
    whole = tars("work/m/landmarks")
    shutil.rmtree("work")
    process = start("landmarks", "-j", 2)
    until(lambda: list(Path("work").rglob("*.jsonl")) or process.poll() is not None)
    workers = process.children(recursive=True) if process.is_running() else []
    process.kill()
    kept = {p: p.stat().st_mtime_ns for p in Path("work").rglob("*.tar") if read_header(p) is not None}
    lipprep("landmarks", "-j", 1)  # at once, beside workers that do not know yet
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert tars("work/m/landmarks") == whole and not strays()
    assert kept and {p: p.stat().st_mtime_ns for p in kept} == kept


@POSIX
def test_no_index_stands_over_old_and_new_shards(chain, lipprep, start):
    chain()
    process = start("shards", "-j", 1, "--profile", "lrw2022", "--replace")

    def new_ones() -> int:
        headers = [read_header(tar) for tar in Path("shards").glob("*.tar")]
        return sum(h is not None and h["parameters"]["profile"] == "lrw2022" for h in headers)

    until(lambda: new_ones() or process.poll() is not None)
    process.kill()
    process.wait()
    if 0 < new_ones() < 8:
        with pytest.raises(ValueError, match=r"no index\.json"):
            load_index(Path("shards"))
    lipprep("shards", "-j", 1)
    assert load_index(Path("shards")).profile == "lrw2022"


def test_what_a_killed_attempt_had_done_is_copied(chain, lipprep, tmp_path):
    """Its unfinished tar may end anywhere, and its journal too."""
    chain()
    scratch = Path("work/m/scratch/landmarks")
    scratch.mkdir(parents=True, exist_ok=True)
    tar = Path("work/m/landmarks/train-00000.tar")
    whole, lines = tar.read_bytes(), read_entries(tar)
    for tar_end, journal_end in ((0, 0), (-1, -1), (-1024 - len(whole) // 4, -1), (700, -40), (100, 10)):
        tar.with_suffix(".jsonl").unlink(missing_ok=True)
        tar.unlink()
        journal = b"".join(
            json.dumps({"working": [e["key"]]}).encode() + b"\n" + json.dumps(e).encode() + b"\n" for e in lines
        )
        (scratch / ".train-00000.tar.abc.tmp").write_bytes(whole[: tar_end or None])
        (scratch / ".train-00000.journal.abc.tmp").write_bytes(journal[: journal_end or None])
        (scratch / ".train-00000.jsonl.1.tmp").write_text('{"lipprep_record": 3}\n')  # it died as it committed
        assert len(attempts(tar, scratch)) == 1
        figures = json.loads(lipprep("landmarks", "-j", 1, "--json").stdout)
        assert tar.read_bytes() == whole and not strays()
        assert figures["clips_made"] == len(lines)
        if tar_end == 0:
            assert figures["clips_computed"] == 0


@POSIX
def test_two_runs_do_not_work_in_one_folder(chain, lipprep, monkeypatch):
    from lipprep.pipeline.lock import alone_in
    from lipprep.stages import lock

    monkeypatch.setattr(lock, "_PATIENCE", 0)
    chain(stages=("landmarks",))
    with alone_in(Path("shards")):
        message = lipprep("shards", "-j", 1, code=1).stderr
        assert f"another run (process {os.getpid()} on {socket.gethostname()}) is at work in" in message
    lipprep("shards", "-j", 1)


@POSIX
def test_a_disk_that_is_away_for_a_moment_costs_no_clip(chain, lipprep, corpus, tmp_path, monkeypatch):
    """What fails while the videos are out of reach is made by the next run, although nothing looks changed then."""
    from lipprep.pipeline import chunk
    from lipprep.pipeline.manifest import load_manifest
    from lipprep.pipeline.plan import Layout, survey
    from lipprep.pipeline.run import make_jobs
    from lipprep.pipeline.wanted import read_wanted

    chain()
    landmarks, whole = tars("work/m/landmarks"), tars("shards")
    own = shutil.copytree(corpus, tmp_path / "own")
    for stage in ("landmarks", "shards"):
        lipprep(stage, "-j", 1, "--root", own)  # the same files in another place
    layout = Layout(Path("work/m").absolute(), Path("shards").absolute())
    manifest, wanted = load_manifest(Path("manifests/m.jsonl"), root=own), read_wanted(layout.plan)
    for stage in ("landmarks", "shards"):
        chunks = [c for c in survey(manifest, layout, wanted) if c.stage == stage]
        folder = layout.folder(stage)
        for path in folder.glob("*-*"):
            path.unlink()
        jobs = list(make_jobs(stage, manifest, layout, wanted, chunks))
        own.rename(tmp_path / "away")
        for job in jobs[:3]:
            assert chunk.run_job(job)["counts"] == {"unreadable": 1}
        (tmp_path / "away").rename(own)
        reasons = json.loads(lipprep("status", "--json", "--root", own).stdout)
        mine = next(row for row in reasons if row["stage"] == stage)
        assert mine["reasons"] == {"videos came, went or changed while it was made": 3}
        figures = json.loads(lipprep(stage, "-j", 1, "--json", "--root", own).stdout)
        assert figures["ok"] == 12 and figures["clips_computed"] == 12
    assert tars("work/m/landmarks") == landmarks and tars("shards") == whole
