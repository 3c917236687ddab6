"""What chaos.py breaks things with: commands that can be watched and killed, small disks, failing writes, damage."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

RUN_SECONDS = 180  # no command takes a tenth of it: one that does hangs
FAULT = "LIPPREP_CHAOS_FAULT"
TAG = "LIPPREP_CHAOS_RUN"
_numbers = itertools.count()

# Set in the process that then becomes lipprep: its workers inherit the limit.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""
# Every Python process of a run imports this first; the environment may have a sitecustomize of its own.
CUSTOMIZE = """
import importlib.machinery, importlib.util, os, sys

def load(spec):
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

others = [path for path in sys.path if path != os.path.dirname(__file__)]
if (own := importlib.machinery.PathFinder.find_spec("sitecustomize", others)) is not None:
    load(own)
load(importlib.util.spec_from_file_location("chaos_faults", {faults!r})).inject(os.environ["LIPPREP_CHAOS_FAULT"])
"""


def tagged(tag: str) -> dict[int, str]:
    """The command lines, by process number, of all living processes whose environment has this tag.

    Workers whose driver is dead are found as well: they have another parent then, but the same environment.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get(TAG) == tag:
                found[process.pid] = " ".join(process.cmdline())
    return found


@dataclass(frozen=True)
class Ended:
    """What came of a command. `orphans` are the command lines of processes that outlived it for too long."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    hung: bool
    orphans: tuple[str, ...]

    @property
    def report(self) -> dict | None:
        """The figures that `--json` asked for, where the command got so far."""
        lines = self.stdout.splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None

    @property
    def message(self) -> str:
        """Its error message, or else the last line that is no progress bar."""
        lines = [
            line for line in self.stderr.replace("\r", "\n").splitlines() if line.strip() and "clip/s]" not in line
        ]
        errors = [line for line in lines if line.startswith("Error")]
        return (errors or lines or [""])[-1]


class Command:
    """A lipprep command at work in `folder`, in a session of its own, its output collected."""

    def __init__(
        self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None, limit: int | None = None
    ) -> None:
        self.arguments = arguments
        self.tag = f"{os.getpid()}-{next(_numbers)}"
        command = [sys.executable, "-m", "lipprep", *arguments]
        if limit is not None:
            command = [sys.executable, "-c", LIMITED, str(limit), *command]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            # A limit on the size of files can cut the bytecode that Python keeps, too.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", TAG: self.tag, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # Not to files, which the limit would cut, nor read at the end, which would wait for orphans.
        self._output = [bytearray(), bytearray()]
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(streams, self._output, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream, output: bytearray) -> None:
        with stream:
            for block in iter(lambda: stream.read1(65536), b""):
                output += block

    def workers(self) -> list[int]:
        """Its worker processes."""
        return sorted(n for n, command in tagged(self.tag).items() if "popen_loky" in command)

    def wait_for(self, event: Callable[[], object]) -> bool:
        """Wait until `event` is true; False where the command ended before."""
        deadline = time.monotonic() + RUN_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if event():
                return True
            time.sleep(0.005)
        return False

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command, or to its whole group as a terminal's Ctrl-C does."""
        if self.process.poll() is None:  # or its number may be another process's
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, *, orphan_seconds: float) -> Ended:
        """Wait for its end, and then for that of all that it started; what does not end is killed and told of."""
        hung = False
        try:
            self.process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            hung = True
            self.kill()
            self.process.wait()
        deadline = time.monotonic() + orphan_seconds
        while (left := tagged(self.tag)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        for reader in self._readers:
            reader.join()
        stdout, stderr = (bytes(o).decode(errors="replace") for o in self._output)
        return Ended(self.arguments, self.process.returncode, stdout, stderr, hung, tuple(left.values()))

    def kill(self) -> None:
        """Kill it and all that it started."""
        for number in tagged(self.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def failing(folder: Path, error: str, where: str, after: int) -> dict[str, str]:
    """The environment in which every process's writes fail with `error` (ENOSPC, EIO).

    `where` is `write`, after so many bytes, or `sync`, after so many of them.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(CUSTOMIZE.format(faults=str(Path(__file__).resolve())))
    before = os.environ.get("PYTHONPATH")
    path = str(folder.resolve()) + (os.pathsep + before if before else "")
    return {"PYTHONPATH": path, FAULT: f"{error}:{where}:{after}"}


def inject(fault: str) -> None:
    """Make this process's writes fail from a point on, as a disk's do: what fits before it is written."""
    from lipprep.stages import atomic

    name, where, after = fault.split(":")
    number, left = getattr(errno, name), int(after)
    real_write, real_sync = atomic.Output.write, atomic.sync

    def write(self, data: bytes) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(number, os.strerror(number), str(self.name))
        written = real_write(self, data[:left])
        left -= written
        return written

    def sync(file) -> None:
        nonlocal left
        real_sync(file)
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number), str(file.name))

    if where == "write":
        atomic.Output.write = write
    else:
        atomic.sync = sync


class SmallDisk:
    """A tmpfs in place of an empty folder, as small as one likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], check=True, capture_output=True)

    def used(self) -> int:
        """Bytes in use."""
        stat = os.statvfs(self.folder)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True, capture_output=True)

    def move_away(self) -> None:
        """Leave the folder on the disk below, with all that it holds."""
        aside = self.folder.with_name(f"{self.folder.name}-aside")
        shutil.copytree(self.folder, aside)
        subprocess.run(["umount", self.folder], check=True, capture_output=True)
        self.folder.rmdir()
        aside.rename(self.folder)


@cache
def can_mount(folder: Path) -> bool:
    """Whether we may mount a tmpfs: as root on Linux, but not in every container."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    try:
        SmallDisk(folder).move_away()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[bytearray]:
    """Change a file's bytes and nothing else of it: its times stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    yield content
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage_file(path: Path, how: str, rng: random.Random) -> None:
    """`flip` one bit of a file, `cut` it anywhere, or `remove` it."""
    if how == "remove":
        path.unlink()
        return
    with rewriting(path) as content:
        if how == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]


def damage_video(path: Path, how: str, rng: random.Random) -> None:
    """Make a video `rubbish`, `empty`, `cut` in half or `missing`; `disguised` is rubbish of its size and times."""
    if how == "missing":
        path.unlink()
    elif how == "disguised":
        with rewriting(path) as content:
            content[:] = rng.randbytes(len(content))
    else:
        whole = path.read_bytes()
        path.write_bytes({"rubbish": rng.randbytes(4096), "empty": b"", "cut": whole[: len(whole) // 2]}[how])
