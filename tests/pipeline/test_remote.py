"""Videos, work and shards in an object store: the same bytes as on a disk, and networks that are at fault."""

import contextlib
import json
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from remote import Parts
from traps import PATIENCE, POSIX, tars, until

from lipprep.cli import main
from lipprep.pipeline import chunk, journal, records, sources, stock
from lipprep.pipeline.check import check_videos
from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.manifest import load_manifest
from lipprep.pipeline.plan import Layout, survey
from lipprep.pipeline.records import read_entries, read_header
from lipprep.pipeline.run import make_jobs
from lipprep.pipeline.space import needed_bytes
from lipprep.pipeline.wanted import Wanted, read_wanted
from lipprep.stages import held, lock, remote, store, video
from lipprep.stages.atomic import write_text
from lipprep.stages.lock import LOCK
from lipprep.stages.remote import RemotePath
from lipprep.stages.scratch import scratch
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import read_text

STAGES = ("landmarks", "crops", "shards")


@pytest.fixture(autouse=True)
def own_scratch(tmp_path, monkeypatch) -> Path:
    """What is written here of what goes to a store is this test's."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


LIST = ("manifest", "lrw", "-o", "manifests/m.jsonl", "--words", "ABOUT", "--chunk-size", "2")


@pytest.fixture
def videos(bucket, corpus) -> RemotePath:
    """The six clips of a word in a bucket."""
    for path in sorted((corpus / "ABOUT").rglob("*.mp4")):
        (bucket / "videos" / path.relative_to(corpus).as_posix()).upload(path)
    return bucket / "videos"


@pytest.fixture
def listed(lipprep, corpus) -> None:
    """Their manifest, of six chunks of a clip each, and nothing made yet."""
    lipprep(*LIST, corpus)


@pytest.fixture(scope="session")
def _on_disk(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("on_disk")
    with contextlib.chdir(folder):
        for command in ((*LIST, str(corpus)), *((stage, "--engine", "serial") for stage in STAGES)):
            assert CliRunner().invoke(main, command).exit_code == 0
    return folder


@pytest.fixture
def made(listed, _on_disk) -> Path:
    """The folder of what is made of them on a disk."""
    shutil.rmtree("manifests")
    shutil.copytree(_on_disk, ".", dirs_exist_ok=True)
    return Path()


@pytest.fixture
def flags(bucket, videos) -> Callable[..., list]:
    """What a stage's command is told so that all of it is in the bucket."""

    def of(stage: str, *more: object) -> list:
        out = ["-o", bucket / "shards"] if stage in ("shards", "index", "status", "failures") else []
        return [stage, "--root", videos, "-w", bucket / "work", *out, *more]

    return of


@pytest.fixture
def serial(lipprep, flags) -> Callable[..., dict]:
    """Run a stage in this process; give its figures."""

    def run(stage: str, *more: object) -> dict:
        done = lipprep(*flags(stage, "--engine", "serial", "--json", "--max-failures", "100%", *more))
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def asked(monkeypatch) -> Counter:
    """How often a store was asked for what."""
    counts: Counter = Counter()
    real = remote.ask

    def ask(root, path, call, *args, **options):
        counts[call, path] += 1
        return real(root, path, call, *args, **options)

    monkeypatch.setattr(remote, "ask", ask)
    return counts


def folder_of(place: Path | RemotePath, stage: str) -> Path | RemotePath:
    return place / "shards" if stage == "shards" else place / "work" / "m" / stage


def there(place: RemotePath, stage: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder_of(place, stage).glob("*.tar")}


def left(own_scratch: Path) -> list[str]:
    return [path.name for path in own_scratch.rglob("*") if path.is_file() and not path.name.startswith(LOCK)]


def again(path: RemotePath, monkeypatch) -> None:
    """Let the store be asked anew: at another address, say."""
    monkeypatch.setattr(store, "_filesystems", {})
    monkeypatch.setattr(store, "_answered", set())


def test_the_chain_gives_the_bytes_that_it_gives_on_a_disk(made, lipprep, bucket, serial, flags, asked, own_scratch):
    for stage in STAGES:
        asked.clear()
        figures = serial(stage)
        assert (figures["ok"], figures["clips_computed"]) == (6, 6)
        # Once to be decoded; and the first ones, where nothing is there yet, to tell what room is needed. Shards are
        # made from the stored crops.
        fetches = Counter({path: n for (call, path), n in asked.items() if call == "cat_file" and ".mp4" in path})
        assert fetches.total() == 6 + (6 if stage != "shards" else 0) and max(fetches.values()) <= 2
        assert there(bucket, stage) == tars(folder_of(Path(), stage))
    for name in ("index.json", "index.npz"):
        assert (bucket / "shards" / name).read_bytes() == (Path("shards") / name).read_bytes()
    assert left(own_scratch) == []
    assert json.loads((bucket / "work/report.json").read_text())["datasets"]["m"]["shards"]["ok"] == 6

    for stage in STAGES:  # and nothing more to do
        asked.clear()
        assert serial(stage)["chunks_made"] == 0
        assert asked.total() <= 52  # the index, the card and the accounts among them
        # A record that has not changed since this process read it is not read again.
        assert not [path for (call, path) in asked if call == "cat_file" and path.endswith((".jsonl", ".tar", ".mp4"))]
    rows = json.loads(lipprep(*flags("status", "--json", "--timing")).stdout)
    assert [row["fresh"] for row in rows] == [row["chunks"] for row in rows]
    assert json.loads(lipprep(*flags("failures", "--json")).stdout) == []
    for stage in STAGES:
        found = json.loads(lipprep("verify", folder_of(bucket, stage), "--json", "-j", 2).stdout)
        assert (found["findings"], found["clips"], found["stage"]) == ([], 6, stage)
    assert left(own_scratch) == []


def test_large_videos_are_streamed(made, bucket, serial, asked, monkeypatch):
    for module in (held, video):
        monkeypatch.setattr(module, "WHOLE", 1000)
    monkeypatch.setattr("lipprep.stages.video._AHEAD", 4000)
    serial("landmarks")
    assert there(bucket, "landmarks") == tars("work/m/landmarks")


@pytest.mark.parametrize("whole", [1000, remote.WHOLE])
def test_the_clock_of_a_clip_stands_still_while_a_store_is_asked(listed, bucket, videos, monkeypatch, whole):
    started, running, wrong = [], [False], []

    class Clock:
        def dump_traceback_later(self, *_, **__):
            started.append(True)
            running[0] = True

        def cancel_dump_traceback_later(self):
            running[0] = False

        enable = disable = lambda *_: None

    real = remote.ask

    def ask(root, path, call, *args, **options):
        if running[0] and threading.current_thread() is threading.main_thread():
            wrong.append((call, path))
        return real(root, path, call, *args, **options)

    monkeypatch.setattr(journal, "faulthandler", Clock())
    monkeypatch.setattr(remote, "ask", ask)
    for module in (held, video):
        monkeypatch.setattr(module, "WHOLE", whole)
    monkeypatch.setattr("lipprep.stages.video._AHEAD", 4000)
    layout, wanted = Layout(bucket / "work/m", bucket / "shards"), Wanted(identity="x")
    manifest = load_manifest(Path("manifests/m.jsonl"), root=videos)
    chunks = survey(manifest, layout, wanted, ("landmarks",))
    made, lost = list(make_jobs("landmarks", manifest, layout, wanted, chunks))[:2]
    assert chunk.run_job(made)["counts"] == {"ok": 1}
    (videos / lost.clips[0].video).unlink()
    assert chunk.run_job(lost)["counts"] == {"unreadable": 1}
    assert started and not wrong


def test_headers_are_read_again_when_they_have_changed(listed, bucket, serial, asked, monkeypatch):
    serial("landmarks")
    monkeypatch.setattr(records, "_USUAL_HEADER", 100)  # a header that is longer is read at a second go
    monkeypatch.setattr(records, "_known", {})
    folder = folder_of(bucket, "landmarks")
    paths = sorted(folder.glob("*.tar"))
    before = {path: read_header(path) for path in paths}
    asked.clear()
    headers = records.Headers(folder)
    assert {path: headers(path) for path in paths} == before and all(before.values())
    assert asked.total() == 1 + 2 * 6
    (first, second), other = paths[:2], paths[2].with_suffix(".jsonl")
    write_text(first.with_suffix(".jsonl"), "no record")
    write_text(second.with_suffix(".jsonl"), second.with_suffix(".jsonl").read_text() + "{}\n")
    other.unlink()
    asked.clear()
    headers = records.Headers(folder)
    assert [headers(path) for path in paths] == [None, None, None, *(before[path] for path in paths[3:])]
    assert [headers.has_record(path) for path in paths[:3]] == [True, True, False]
    assert asked.total() <= 1 + 3
    assert records.Headers(bucket / "none")(bucket / "none/train-00000.tar") is None


def test_records_come_after_their_tars(listed, bucket, serial, monkeypatch):
    uploads = []
    real = RemotePath.upload

    def upload(path, local):
        if path.suffix == ".tar":
            assert not path.with_suffix(".jsonl").exists()
        uploads.append(path.name)
        real(path, local)

    monkeypatch.setattr(RemotePath, "upload", upload)
    serial("landmarks")
    for change in ((), ("--crop-size", 88, "--replace")):  # a second time over older ones
        uploads.clear()
        serial("shards", *change)
        names = [name for name in uploads if name.startswith(("train", "val", "test"))]
        assert names[1::2] == [name.replace(".tar", ".jsonl") for name in names[::2]]
        assert names and uploads[-4:-1] == ["README.md", "index.npz", "index.json"]


@pytest.mark.cluster
def test_slices_and_their_index(made, lipprep, bucket, serial, flags, start, own_scratch):
    for stage in ("landmarks", "shards"):
        for part in ("1/2", "2/2"):
            serial(stage, "--slice", part)
    assert not (bucket / "shards/index.json").exists()
    lipprep(*flags("index"))
    assert there(bucket, "shards") == tars("shards")
    assert (bucket / "shards/index.json").read_bytes() == Path("shards/index.json").read_bytes()
    looking = start("verify", bucket / "shards", "--deep", "-j", 2)
    said, _ = looking.communicate(timeout=PATIENCE)
    assert looking.returncode == 0 and "6 clips in 6 tars of shards" in said and left(own_scratch) == []


@pytest.mark.cluster
@pytest.mark.parametrize("few", [0, 16])
def test_what_is_unchanged_is_copied(listed, bucket, serial, asked, monkeypatch, few):
    for stage in ("landmarks", "shards"):
        serial(stage)
    path = Path("manifests/m.jsonl")
    path.write_text(path.read_text().replace('"duration":0.2', '"duration":0.3'))
    monkeypatch.setattr(stock, "_FEW", few)
    asked.clear()
    figures = serial("shards")
    assert (figures["clips_made"], figures["clips_computed"]) == (6, 0)
    with TarMembers(bucket / "shards/val-00000.tar") as tar:
        sample = json.loads(tar.read(next(name for name in tar if name.endswith(".json"))))
    assert sample["duration"] == 0.35


@pytest.mark.cluster
def test_a_video_that_is_replaced(made, lipprep, bucket, serial, corpus, videos):
    serial("landmarks")
    video = "ABOUT/train/ABOUT_00001.mp4"
    Path("other.mp4").write_bytes(bytes(100) + (corpus / video).read_bytes()[100:])  # of the same size
    (videos / video).upload(Path("other.mp4"))
    figures = serial("landmarks")
    assert (figures["clips_made"], figures["clips_computed"], figures["failed"]) == (1, 1, {"unreadable": 1})
    (videos / video).upload(corpus / video)
    assert serial("landmarks")["ok"] == 6
    assert there(bucket, "landmarks") == tars("work/m/landmarks")


def test_videos_on_a_web_server(made, lipprep, serve, corpus):
    root = serve(Parts, corpus)
    run = ["landmarks", "--root", root, "-w", "other", "--engine", "serial", "--json"]
    first, second = (json.loads(lipprep(*run).stdout) for _ in range(2))
    assert (first["ok"], second["chunks_made"]) == (6, 0)
    assert tars("other/m/landmarks") == tars("work/m/landmarks")
    lipprep("shards", *run[1:-1], "-o", "elsewhere")
    assert tars("elsewhere") == tars("shards")


@pytest.mark.cluster
@pytest.mark.parametrize("parts", [["1/1"], ["1/2", "2/2"]])
def test_clips_that_move_to_other_chunks(listed, lipprep, bucket, serial, flags, corpus, monkeypatch, parts):
    for stage in ("landmarks", "shards"):
        serial(stage)
    lipprep(*LIST[:-1], 3, "--seed", 5, corpus)
    real, copies = RemotePath.copy_to, []

    def copy_to(path, other):
        copies.append(other)
        if len(copies) > 1:
            raise RemoteError("away")
        real(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "copy_to", copy_to)
        assert "away" in lipprep(*flags("landmarks", "--engine", "serial"), code=1).stderr
    assert copies[0].exists()
    for stage in ("landmarks", "shards"):
        figures = [serial(stage, "--slice", part) for part in parts]
        assert sum(f["ok"] for f in figures) == 6 and any(f["chunks_made"] for f in figures)
        assert [f["clips_computed"] for f in figures] == [0] * len(parts)
    if parts[1:]:
        lipprep(*flags("index"))
    assert not [name for name in bucket.files_below() if ".old" in name]
    lipprep("landmarks", "--engine", "serial")
    assert there(bucket, "landmarks") == tars("work/m/landmarks")
    assert {p.stem for p in folder_of(bucket, "landmarks").glob("*.jsonl")} == {
        Path(name).stem for name in tars("work/m/landmarks")
    }


@pytest.mark.cluster
def test_what_is_damaged_is_made_again(made, lipprep, bucket, serial, flags):
    for stage in ("landmarks", "shards"):
        serial(stage)
    first, second = sorted(folder_of(bucket, "landmarks").glob("train-*.tar"))[:2]
    content = bytearray(first.read_bytes())
    content[600] ^= 1
    Path("damaged").write_bytes(content)
    first.upload(Path("damaged"))
    Path("cut").write_bytes(second.read_bytes()[:-512])
    second.upload(Path("cut"))
    found = json.loads(lipprep("verify", folder_of(bucket, "landmarks"), "--json", code=1).stdout)
    assert found["kinds"].keys() >= {"checksum", "damaged_clip", "size"}
    assert "run `lipprep landmarks` first" in lipprep(*flags("shards", "--engine", "serial"), code=1).stderr
    serial("landmarks")
    message = lipprep(*flags("shards", "--engine", "serial", "--crop-size", 88), code=1).stderr
    assert f"{first} was damaged since it was made: run `lipprep landmarks`" in message
    serial("landmarks")
    serial("shards", "--crop-size", 96)
    assert there(bucket, "landmarks") == tars("work/m/landmarks") and there(bucket, "shards") == tars("shards")


def test_videos_that_are_not_there_are_failed_clips(listed, bucket, serial, videos, flags, lipprep):
    gone = videos / "ABOUT/train/ABOUT_00001.mp4"
    gone.unlink()
    figures = serial("landmarks")
    assert figures["failed"] == {"unreadable": 1}
    assert f"{gone} is no file" in lipprep(*flags("failures")).stdout
    message = lipprep("landmarks", "--root", bucket / "nowhere", "-w", bucket / "work", code=1).stderr
    assert f"none of the manifest's videos is below {bucket}/nowhere" in message


def test_connections_that_break_in_the_middle_of_an_upload(made, bucket, serial, wire, videos, monkeypatch):
    again(bucket, monkeypatch)
    monkeypatch.setattr(store, "_PAUSES", (0.01,) * 8)
    line = wire(cuts=3, after=8000)
    assert serial("landmarks")["ok"] == 6
    assert line.broken == 3 and there(bucket, "landmarks") == tars("work/m/landmarks")


@pytest.mark.parametrize("last", [".jsonl", ".tar"])
@pytest.mark.parametrize("stage", ["landmarks", pytest.param("shards", marks=pytest.mark.cluster)])
def test_a_network_that_goes_away_costs_what_was_in_flight(
    made, lipprep, bucket, serial, flags, wire, videos, monkeypatch, own_scratch, stage, last
):
    if stage == "shards":
        serial("landmarks")
    again(bucket, monkeypatch)
    monkeypatch.setattr(store, "_PAUSES", (0.01,))
    line, real, done = wire(), RemotePath.upload, []

    def upload(path, local):
        real(path, local)
        if path.suffix == last and path.name.startswith(("train", "val", "test")):
            done.append(path.with_suffix(".tar"))
            if len(done) == 3:
                line.cut()

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "upload", upload)
        failed = lipprep(*flags(stage, "--engine", "serial"), code=1)
    assert "no answer from the store" in failed.stderr and "run the same command again to go on" in failed.stderr
    assert "Traceback" not in failed.output and "Error:" in failed.stderr
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.target}")
    again(bucket, monkeypatch)
    kept = {path.name: path.stat() for path in folder_of(bucket, stage).glob("*.tar") if read_header(path) is not None}
    whole = 3 if last == ".jsonl" else 2  # a tar without its record is none
    assert set(kept) == {path.name for path in done[:whole]}
    figures = serial(stage)
    # The clip that was under way is copied from here.
    assert (figures["ok"], figures["chunks_fresh"], figures["clips_computed"]) == (6, whole, 3)
    assert there(bucket, stage) == tars(folder_of(Path(), stage)) and left(own_scratch) == []
    assert {name: (folder_of(bucket, stage) / name).stat() for name in kept} == kept


def test_stores_that_cannot_be_used_are_told_in_a_line(made, lipprep, bucket, flags, monkeypatch):
    run = ["landmarks", "--engine", "serial"]
    for place in (["-w", "s3://lipprep-there-is-none/work"], ["--root", "s3://lipprep-there-is-none/videos"]):
        message = lipprep(*run, *place, code=1).stderr
        assert message.startswith("Error: there is no bucket s3://lipprep-there-is-none: create it")
    message = lipprep("shards", "--engine", "serial", "-o", "s3://lipprep-there-is-none/x", code=1).stderr
    assert message.startswith("Error: there is no bucket")
    assert "there is no folder" in lipprep("verify", bucket / "nothing", code=1).stderr
    assert "ssh:// is not read or written" in lipprep(*run, "-w", "ssh://host/x", code=2).stderr
    again(bucket, monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = lipprep(*run, "-w", bucket / "work", code=1).stderr
    assert "the store wants credentials, and none were found: set AWS_ACCESS_KEY_ID" in message
    assert message.count("\n") == 1


def test_two_runs_on_one_machine_do_not_work_in_one_folder(listed, lipprep, bucket, flags, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.01)
    with alone_in(bucket / "work/m/landmarks"):
        message = lipprep(*flags("landmarks", "--engine", "serial"), code=1).stderr
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        assert f"another run ({holder}) is at work in {bucket}/work/m/landmarks" in message
        assert "is at work in" in lipprep("verify", bucket / "work/m/landmarks", code=1).stderr


def test_the_room_that_is_needed_is_that_of_this_disk(listed, bucket, flags, monkeypatch, lipprep):
    monkeypatch.setattr("lipprep.pipeline.run.free_bytes", lambda _: 100)
    said = lipprep(*flags("landmarks", "--engine", "serial", "--slice", "1/6")).stderr
    assert f"will be written to {scratch(bucket / 'work/m/landmarks')}, where" in said


def test_what_is_fetched_takes_room_here_too(made, bucket):
    manifest, wanted = load_manifest(Path("manifests/m.jsonl")), read_wanted(Path("work/m/plan.yaml"))
    chunks = survey(manifest, Layout(bucket / "work/m", bucket / "shards"), wanted, ("shards",))
    room = lambda wanted, *stored: needed_bytes("shards", manifest, wanted, chunks, chunks, 2, *stored)  # noqa: E731
    landmarks = room(wanted) - room(replace(wanted, profile="fixed"))
    crops = room(wanted, {(c.split, c.number) for c in chunks}) - room(wanted)
    assert 1 < landmarks / (2 * 14 * 68 * 2 * 4) < 1.5 and 1 < crops / (2 * 14 * 96 * 96) < 1.5


def test_headers_of_remote_videos_are_read_many_at_a_time(listed, videos, monkeypatch):
    together, real = threading.Barrier(6), video.probe

    def probe(path):
        together.wait(PATIENCE)
        return real(path)

    monkeypatch.setattr(video, "probe", probe)
    assert check_videos(load_manifest(Path("manifests/m.jsonl"), root=videos), min_frames=1, workers=1) == []


def test_remote_alignments_are_read_many_at_a_time(bucket, monkeypatch):
    together = threading.Barrier(3)
    for name in ("a", "b", "c"):
        write_text(bucket / f"video/s1/{name}.mpg", "")
        write_text(bucket / f"align/s1/{name}.align", "0 6000 sil\n6000 12000 bin\n")

    def read(*path, **how):
        together.wait(PATIENCE)
        return read_text(*path, **how)

    monkeypatch.setattr(sources, "read_text", read)
    rows = list(sources.grid(bucket))
    assert [(row.video, row.word, row.start) for row in rows] == [
        (f"video/s1/{name}.mpg", "bin", -6) for name in ("a", "b", "c")
    ]


@pytest.mark.cluster
@POSIX
def test_a_driver_killed_in_mid_run_costs_only_what_was_in_flight(
    made, lipprep, bucket, flags, start, serial, own_scratch
):
    process = start(*flags("landmarks", "-j", 2))
    folder = folder_of(bucket, "landmarks")
    until(lambda: list(folder.glob("*.jsonl")) or process.poll() is not None)
    workers = process.children(recursive=True) if process.is_running() else []
    process.kill()
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    kept = {path: path.stat() for path in folder.glob("*.tar") if read_header(path) is not None}
    assert kept
    assert serial("landmarks")["ok"] == 6
    assert there(bucket, "landmarks") == tars("work/m/landmarks") and left(own_scratch) == []
    assert {path: path.stat() for path in kept} == kept


@pytest.mark.cluster
@POSIX
def test_a_clip_that_kills_its_worker_is_found(listed, bucket, flags, trapped, own_scratch):
    key = "ABOUT/train/ABOUT_00002"
    trapped(*flags("landmarks", "-j", 2, "--max-failures", "100%"), traps={key: "kill"})
    lines = {e["key"]: e for tar in folder_of(bucket, "landmarks").glob("*.tar") for e in read_entries(tar)}
    assert len(lines) == 6 and [k for k, e in lines.items() if e["status"] != "ok"] == [key]
    assert lines[key]["class"] == "crashed" and left(own_scratch) == []
    assert {path.name for path in folder_of(bucket, "landmarks").iterdir() if path.name.startswith(".")} == set()


@pytest.mark.cluster
@POSIX
def test_a_cluster_makes_the_same(made, bucket, flags, trapped):
    pytest.importorskip("distributed")
    traps = {"ABOUT/train/ABOUT_00002": "once"}
    for stage in ("landmarks", "shards"):
        trapped(*flags(stage, "--engine", "dask", "-j", 2), traps=traps)
        assert there(bucket, stage) == tars(folder_of(Path(), stage))


@pytest.mark.cluster
@POSIX
def test_a_clip_that_kills_workers_on_other_machines_is_found(listed, bucket, flags, trapped, tmp_path):
    """Their journals are out of the driver's sight, and of each other's."""
    pytest.importorskip("distributed")
    with (tmp_path / "traps/sitecustomize.py").open("a") as file:
        file.write("""
import sys
if "lipprep" not in sys.orig_argv and not any("loky" in word for word in sys.orig_argv):
    import os, tempfile
    tempfile.tempdir = os.path.join(os.environ["TMPDIR"], str(os.getpid()))
    os.makedirs(tempfile.tempdir, exist_ok=True)
""")
    key = "ABOUT/train/ABOUT_00002"
    arguments = flags("landmarks", "--engine", "dask", "-j", 2, "--max-failures", "100%")
    said = trapped(*arguments, traps={key: "kill"}).stderr
    lines = {e["key"]: e for tar in folder_of(bucket, "landmarks").glob("*.tar") for e in read_entries(tar)}
    assert len(lines) == 6 and [k for k, e in lines.items() if e["status"] != "ok"] == [key]
    assert "it killed its process, alone as well" in lines[key]["message"]
    assert said.count("workers died at") == 1
