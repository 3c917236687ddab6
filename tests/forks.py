"""Python processes that need torch: forked from one that has imported it, as its import takes each of them seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

# A fork leaves the loop, runs its program and ends as any Python process does.
_SERVE = """
import gc, json, os, sys
import matplotlib.backends.backend_agg, matplotlib.figure, torch._dynamo, torch.utils.tensorboard
import lipprep.train.cli, lipprep.train.loop
gc.freeze()  # what is never collected is never copied
for line in sys.stdin:
    job = json.loads(line)
    if "ended" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["ended"], 0)[1]), flush=True)
    elif process := os.fork():
        print(process, flush=True)
    else:
        break
else:
    sys.exit()
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["env"])
sys.argv = ["-c", *job["arguments"]]
sys.stdin = open(0)
exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


class Fork:
    """As much of the face of a `subprocess.Popen` as is asked for."""

    def __init__(self, server: subprocess.Popen, job: dict) -> None:
        self._server, self._job = server, job
        self.returncode: int | None = None
        self.pid = int(self._ask(job))

    def _ask(self, question: dict) -> str:
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end, and give what it has said; one that does not end in time is killed."""
        late = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        late.start()
        self.returncode = int(self._ask({"ended": self.pid}))
        late.cancel()
        return Path(self._job["out"]).read_text(), Path(self._job["err"]).read_text()


@pytest.fixture(scope="session")
def _server() -> Iterator[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _SERVE], **pipes) as server:
        yield server
        server.stdin.close()


@pytest.fixture
def python(request, tmp_path_factory) -> Iterator[Callable[..., Fork | subprocess.Popen]]:
    """Start `python -c CODE ARGUMENTS`, in the environment `env`."""
    started: list[Fork | subprocess.Popen] = []
    if sys.platform == "linux":  # elsewhere libraries mind a fork
        server, folder = request.getfixturevalue("_server"), tmp_path_factory.mktemp("said")

    def begin(code: str, arguments: Sequence[object], *, env: dict[str, str]) -> Fork | subprocess.Popen:
        words = [*map(str, arguments)]
        if sys.platform == "linux":
            said = {name: str(folder / f"{len(started)}.{name}") for name in ("out", "err")}
            job = {"code": code, "arguments": words, "env": dict(env), "folder": str(Path.cwd()), **said}
            started.append(Fork(server, job))
        else:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([sys.executable, "-c", code, *words], env=env, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
