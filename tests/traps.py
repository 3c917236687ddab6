"""Processes that die and hang at given clips, and what is asked of the folders that they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lipprep.pipeline.records import read_entries

PATIENCE = 60  # seconds until what must happen has not happened
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

# What a worker's process does at a clip, by its key: put in its way by a sitecustomize, which every process reads.
TRAPS = """
import os, sys, time
if (traps := os.environ.get("LIPPREP_TRAPS")) and "lipprep" not in sys.orig_argv:  # the driver is python -m lipprep
    import importlib.abc, importlib.machinery, json
    traps = json.loads(traps)

    def trap_making(module):
        plain = dict(module.GROUP)

        def trapped(stage):
            def group(job, video, clips, inputs):
                for clip in clips:
                    kind = traps.get(clip.key)
                    once = os.path.join(os.environ["LIPPREP_TRAPS_FOLDER"], clip.key.replace("/", "-"))
                    if kind == "once" and not os.path.exists(once):
                        open(once, "w").close()
                        os.kill(os.getpid(), 9)
                    if kind == "segfault":
                        import ctypes
                        ctypes.string_at(0)
                    if kind == "kill":
                        os.kill(os.getpid(), 9)
                    if kind == "hang":
                        time.sleep(1000)
                return plain[stage](job, video, clips, inputs)
            return group

        module.GROUP.update({stage: trapped(stage) for stage in plain})

    def trap_reading(module):
        plain = module.source_content

        def source_content(root, video, *more):
            if any(kind == "mute" and key in str(video) for key, kind in traps.items()):
                time.sleep(1000)
            return plain(root, video, *more)

        module.source_content = source_content

    laid = {"lipprep.pipeline.make": trap_making, "lipprep.pipeline.inputs": trap_reading}

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name not in laid:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            real = spec.loader.exec_module

            def exec_module(module):
                real(module)
                laid[name](module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""


def tars(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.tar"))}


def entries(folder: str) -> dict[str, dict]:
    return {e["key"]: e for tar in Path(folder).glob("*.tar") for e in read_entries(tar)}


def everything() -> dict[str, dict[str, bytes]]:
    """All artefacts, the index and the card, by folder."""
    found = {folder: tars(folder) for folder in ("work/m/landmarks", "work/m/crops", "shards")}
    return {**found, "index": {n: Path("shards", n).read_bytes() for n in ("index.json", "README.md")}}


def strays(folder: str = ".") -> list[Path]:
    """Scratch that is left over: unfinished files, and earlier tars."""
    scratch = [p for p in Path(folder).rglob("*") if p.is_file() and {"scratch", ".lipprep-earlier"} & {*p.parts}]
    return scratch + [p for p in Path(folder).rglob(".*.tmp") if p not in scratch]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """Run a command in a process of its own, whose workers meet `traps`: {key: kind}."""
    folder = tmp_path / "traps"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TRAPS)

    def run(*arguments: object, traps: dict[str, str], code: int = 0) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "LIPPREP_TRAPS": json.dumps(traps),
            "LIPPREP_TRAPS_FOLDER": str(folder),
        }
        command = [sys.executable, "-m", "lipprep", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        return done

    return run


@pytest.fixture
def start():
    """Start a command in a process of its own, and end what is left of it."""
    started = []

    def begin(*arguments: object) -> psutil.Popen:
        command = [sys.executable, "-m", "lipprep", *map(str, arguments)]
        started.append(psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
