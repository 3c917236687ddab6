"""The same bytes whoever makes them: on clusters, in slices, in one process; and clusters that cannot be used."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from traps import PATIENCE, POSIX, TRAPS, entries, everything, strays, tars, until

from lipprep.pipeline import engine_ray, engines
from lipprep.pipeline.engines import Engine, open_cluster
from lipprep.pipeline.wanted import load_mean_face

DASK = [pytest.param("dask", marks=[POSIX, pytest.mark.dask])]
CLUSTERS = [*DASK, pytest.param("ray", marks=[POSIX, pytest.mark.cluster])]


@pytest.fixture(autouse=True)
def _has(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine")
    if name or "dask" in request.node.name:
        pytest.importorskip("ray" if name == "ray" else "distributed")


@pytest.mark.parametrize("engine", [*CLUSTERS, "serial"])
def test_every_engine_gives_the_same_bytes(whole, trapped, lipprep, engine, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # of another cluster than the one that is made for the run
    for stage in ("landmarks", "crops", "shards"):
        if engine == "serial":
            lipprep(stage, "--engine", engine, "-j", 2)
        else:
            trapped(stage, "--engine", engine, "-j", 2, traps={})
    assert everything() == whole and not strays()


@pytest.mark.parametrize("engine", CLUSTERS)
def test_a_worker_that_dies_costs_nothing(whole, trapped, engine):
    keys = ["ABOUT/train/ABOUT_00002", "BLACK/train/BLACK_00003"]
    done = trapped("landmarks", "--engine", engine, "-j", 2, "--json", traps=dict.fromkeys(keys, "once"))
    figures = json.loads(done.stdout)
    assert figures["ok"] == 12 and figures["failed"] == {}
    assert tars("work/m/landmarks") == whole["work/m/landmarks"] and not strays()


@pytest.mark.cluster
@pytest.mark.parametrize("engine", CLUSTERS)
def test_a_clip_that_kills_its_workers_is_condemned_and_costs_no_other(whole, trapped, lipprep, engine):
    killer, hanging = "ABOUT/train/ABOUT_00002", "BLACK/val/BLACK_00005"
    arguments = ["landmarks", "--engine", engine, "-j", 2, "--json", "--max-failures", "100%", "--clip-timeout", 2]
    done = trapped(*arguments, traps={killer: "kill", hanging: "hang"})
    figures = json.loads(done.stdout)
    assert figures["ok"] == 10 and figures["failed"] == {"crashed": 1, "timeout": 1}
    found = entries("work/m/landmarks")
    assert "3 workers died" in found[killer]["message"] and "no end after 2 s" in found[hanging]["message"]
    lipprep("landmarks", "-j", 1, "--retry-failed")
    assert tars("work/m/landmarks") == whole["work/m/landmarks"] and not strays()


@pytest.fixture
def dask_cluster(tmp_path):
    """The address of a scheduler on loopback with two workers, all processes of their own; and the workers."""
    environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING": "False"}
    file = tmp_path / "scheduler.json"
    log = (tmp_path / "dask.log").open("wb")
    run = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    started = [psutil.Popen([*run, "--scheduler-file", str(file)], stdout=log, stderr=log, env=environment)]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
    started.append(psutil.Popen([*work, "--nworkers", "2", "--no-dashboard"], stdout=log, stderr=log, env=environment))
    try:
        until(lambda: file.exists() and file.read_text().endswith("}"))
        from distributed import Client

        address = json.loads(file.read_text())["address"]
        with Client(address, timeout=PATIENCE) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
            workers = client.run(os.getpid)
        yield address, [psutil.Process(pid) for pid in workers.values()]
    finally:
        for process in started:
            for child in [*process.children(recursive=True), process]:
                child.kill()
            process.wait()
        log.close()


@POSIX
@pytest.mark.cluster
@pytest.mark.dask
def test_a_dask_cluster_at_an_address(whole, trapped, dask_cluster):
    address, _ = dask_cluster
    for stage in ("landmarks", "crops", "shards"):
        trapped(stage, "--engine", "dask", "--address", address, traps={})
    assert everything() == whole and not strays()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@POSIX
@pytest.mark.dask
def test_ctrl_c_ends_a_dask_cluster_of_our_own_without_a_word_of_its_workers(listed):
    command = [sys.executable, "-m", "lipprep", "landmarks", "--engine", "dask", "-j", "2"]
    # As in a terminal, which sends it to all processes of the group.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            until(lambda: list(Path("work").rglob(".*.tar.*.tmp")) or process.poll() is not None)
            workers = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 130 and not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    *progress, _, last = [line for line in said.splitlines() if line]
    assert last.startswith("Stopped. What is done is kept") and all("clip" in line for line in progress), said


@pytest.fixture
def ray_head(tmp_path):
    """The address of a Ray cluster of two nodes on loopback that asks for a token, at which one clip hangs; its head's
    processes, and what to have in the environment."""
    (tmp_path / "traps").mkdir(exist_ok=True)
    (tmp_path / "traps/sitecustomize.py").write_text(TRAPS)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    traps = {
        "PYTHONPATH": str(tmp_path / "traps"),
        "LIPPREP_TRAPS": json.dumps({"BLACK/val/BLACK_00005": "hang"}),
        "LIPPREP_TRAPS_FOLDER": str(tmp_path / "traps"),
    }
    address = f"127.0.0.1:{free_port()}"
    started = []
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # names of sockets are short

        def begin(*arguments: str) -> psutil.Popen:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", *arguments]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(psutil.Popen(command, env={**os.environ, **token, **traps}, **quiet))
            return started[-1]

        try:
            port, host = address.rpartition(":")[2], "--node-ip-address=127.0.0.1"
            head = begin("--head", "--port", port, host, "--include-dashboard=false", "--temp-dir", folder)
            until(lambda: "raylet" in {child.name() for child in head.children()})
            begin("--address", address, host)
            wait = f"import ray, time\nray.init({address!r})\nwhile len(ray.nodes()) < 2: time.sleep(0.1)"
            command = [sys.executable, "-c", wait]
            subprocess.run(command, env={**os.environ, **token}, check=True, capture_output=True, timeout=PATIENCE)
            yield address, head.children(), token
        finally:
            for process in started:
                for child in [*process.children(recursive=True), process]:
                    child.kill()
                process.wait()


@POSIX
@pytest.mark.cluster
def test_a_ray_cluster_that_asks_for_a_token_and_loses_its_head(whole, trapped, lipprep, ray_head, monkeypatch):
    pytest.importorskip("ray")
    address, head, token = ray_head
    run = ["landmarks", "--engine", "ray", "--address", address]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    message = trapped(*run, traps={}, code=1).stderr
    assert f"the Ray cluster at {address} asks for its token: set RAY_AUTH_MODE=token" in message
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(trapped, *run, traps={}, code=1)
        until(lambda: len(list(Path("work").rglob("*.jsonl"))) == 7 or running.done())
        for process in head:
            process.kill()
        message = running.result().stderr
    assert f"the cluster at {address} is gone" in message and "run the same command again to go on" in message
    lipprep("landmarks", "-j", 1)
    assert tars("work/m/landmarks") == whole["work/m/landmarks"] and not strays()


@POSIX
@pytest.mark.cluster
def test_every_node_of_a_ray_cluster_is_asked(ray_head, monkeypatch):
    """Two on one machine, too."""
    pytest.importorskip("ray")
    address, _, token = ray_head
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_ray, "PATIENCE", 0.5)  # less than Python and Ray take to start
    engines.reach(Engine("ray", 1, address))
    script = f"""
from pathlib import Path
from lipprep.pipeline.engines import Engine, open_cluster
try:
    with open_cluster(Engine("ray", 1, "{address}"), Path("/absent")):
        pass
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert "does not see /absent" in done.stdout and "(2 of 2 workers cannot work)" in done.stdout, done.stderr


@pytest.mark.parametrize("engine", CLUSTERS)
@pytest.mark.cluster
def test_an_address_that_does_not_answer(engine, lipprep):
    """That is said before a manifest is looked for, which may have a million lines."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}" if engine == "dask" else f"127.0.0.1:{port}"
    began = time.monotonic()
    message = lipprep("landmarks", "--engine", engine, "--address", address, code=1).stderr
    assert f"nobody answers at {address}" in message and "Traceback" not in message
    assert time.monotonic() - began < 10


@pytest.mark.cluster
def test_an_address_where_somebody_else_listens(lipprep):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it takes connections and says nothing
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        message = lipprep("landmarks", "--engine", "dask", "--address", address, code=1).stderr
    assert f"nobody answers at {address}" in message


@pytest.mark.dask
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "--address is empty"),
        ("127.0.0.1", "127.0.0.1 is not to be used as a Dask scheduler (tcp://HOST:8786): missing port number"),
        ("http://127.0.0.1:8787", "unknown address scheme 'http' (known schemes: "),
    ],
)
def test_a_dask_address_of_another_form(trapped, address, why):
    assert why in trapped("landmarks", "--engine", "dask", "--address", address, traps={}, code=1).stderr


def test_workers_that_cannot_work_are_named(tmp_path):
    fit = {"host": "a", "lipprep": engines.lipprep.__version__, "unseen": None}
    engines.check({"w1": fit})
    for wrong, told in (
        ({"lipprep": None}, "the worker w2 on b has no lipprep: install"),
        ({"lipprep": "9.9"}, "the worker w2 on b has lipprep 9.9: this is"),
        ({"unseen": str(tmp_path)}, f"the worker w2 on b does not see {tmp_path}"),
    ):
        with pytest.raises(ValueError, match=told):
            engines.check({"w1": fit, "w2": {**fit, "host": "b", **wrong}})
    places, absent = (str(tmp_path),), str(tmp_path / "absent")
    assert engines.probe(places)["unseen"] is None and engines.probe((*places, absent, "more"))["unseen"] == absent
    told = engines.work("w3", engines.lipprep.__version__, (*places, absent), b"", lambda: True)
    assert told == (None, f"the worker w3 does not see {absent}")


@pytest.fixture
def dask_thread():
    """The address of a scheduler in this process, with one worker here, too."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as made:
        yield made.scheduler_address


@POSIX
@pytest.mark.dask
def test_workers_see_all_that_a_chunk_is_made_from(chain, lipprep, corpus, dask_thread, monkeypatch):
    chain(stages=("landmarks",))
    np.save("face.npy", load_mean_face(None))
    Path("archive").mkdir()
    there, hidden = os.path.exists, []
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) not in hidden and there(path))  # as workers look

    def refused(place: Path, *command: object) -> None:
        hidden[:] = [str(place)]
        message = lipprep(*command, "--engine", "dask", "--address", dask_thread, code=1).stderr
        assert f"does not see {place}: manifest, videos, work and shards" in message

    video = corpus / json.loads(Path("manifests/m.jsonl").read_text().splitlines()[1])["video"]
    refused(video, "landmarks")
    refused(Path("work/m/landmarks").absolute(), "landmarks")
    refused(Path("work/m/landmarks").absolute(), "crops")
    refused(Path("archive").absolute(), "landmarks", "--archive", "archive")
    refused(Path("face.npy").absolute(), "crops", "--mean-face", "face.npy")
    refused(video, "shards")


@POSIX
@pytest.mark.dask
def test_that_no_worker_is_left_is_told_once(dask_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "AWAY", 0)
    address, workers = dask_cluster
    said = []
    # Told by a thread: what is written while capsys is read is lost to it.
    monkeypatch.setattr(engines.tqdm, "write", lambda line, **_: said.append(line))

    def told() -> int:
        return "".join(said).count(f"no worker is left at {address}: waiting for new ones (Ctrl-C ends")

    with open_cluster(Engine("dask", 1, address), tmp_path):
        assert not told()
        for process in (workers[0].parent(), *workers):
            process.kill()
        until(told)
    absence = engines.Absence(address, 0)
    for count in (0, 2, 0, 0, 0, 1, 0, 0):
        absence.look(count)
    assert told() == 3


@POSIX
@pytest.mark.dask
def test_dask_workers_with_several_threads_are_refused(tmp_path):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as made,
        pytest.raises(ValueError, match="one thread each"),
        open_cluster(Engine("dask", 1, made.scheduler_address), tmp_path),
    ):
        pass


def test_a_missing_package_is_named(corpus, lipprep, monkeypatch):
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    for package, extra in (("distributed", "dask"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        message = lipprep("landmarks", "--engine", extra, code=1).stderr
        assert f'pip install "lipprep[{extra}]"' in message
    assert "--address is for" in lipprep("landmarks", "--address", "x:1", code=1).stderr


def test_what_an_engine_cannot_heed_is_said(listed, lipprep):
    told = lipprep("landmarks", "--engine", "serial", "--clip-timeout", 5, "-j", 2).stderr
    assert "-j does nothing with --engine serial" in told and "--clip-timeout does nothing" in told
    assert "nothing" not in lipprep("landmarks", "--engine", "serial").stderr
