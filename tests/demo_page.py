"""The page of `lipprep demo-app`, served by a process of its own, as its users have it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

PATIENCE = 120  # seconds until what must happen has not happened

# lipprep, and a line on stderr for each address beyond this machine that the process asks for.
WATCHED = """
import socket, sys

def watch(event, arguments):
    if event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "localhost", "::1", None):
        print("beyond this machine:", host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from lipprep.cli import program
program()
"""
# What would break the page or open it to others, were it heard.
HOSTILE = {
    "HTTP_PROXY": "http://proxy.invalid:1",
    "GRADIO_SHARE": "True",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_ROOT_PATH": "/elsewhere",
}


@pytest.fixture(scope="session")
def spoken_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of the sample corpus, with a face in it."""
    from lipprep.pipeline.sample import write_clip

    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder, 0, "PEOPLE", "test", 1)
    return folder / "PEOPLE/test/PEOPLE_00001.mp4"


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained reader of four words, of which a browser could take one for a tag; sure of none of them."""
    import torch

    from lipprep.train.checkpoint import Checkpoint, save_checkpoint
    from lipprep.train.config import as_plain, load_recipe
    from lipprep.train.models import build

    config = load_recipe("compact", ["model.head.channels=32", "model.head.num_layers=2"])
    words = ["<b>", "PEOPLE", "WATER", "YOUNG"]
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    made = Checkpoint(
        model=build(config.model, len(words)).state_dict(),
        optimizer={},
        step=1,
        epoch=1,
        batch=0,
        best=0.5,
        config=as_plain(config),
        labels=words,
        parameters={"profile": "lrw2021", "crop_size": 96},
        fps=25.0,
        dataset="0123abcd",
        temperature=1.5,
        threshold=0.99,
    )
    save_checkpoint(path, made)
    return path


@pytest.fixture(scope="session")
def serve_page(untrained: Path) -> Callable[..., AbstractContextManager[str]]:
    """Serve the page, with its temporary files in a folder; gives its address.

    It must end by Ctrl-C, leave nothing behind, and have said nothing of errors and of addresses beyond this machine.
    """

    @contextlib.contextmanager
    def serve(temporary: Path, cwd: Path | None = None) -> Iterator[str]:
        command = [sys.executable, "-c", WATCHED, "demo-app", "--checkpoint", str(untrained), "--port", "0"]
        server = subprocess.Popen(
            [*command, "--device", "cpu"],
            cwd=cwd,
            env={**os.environ, **HOSTILE, "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = re.match(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            if said is None:
                server.kill()
            assert said is not None, server.communicate(timeout=PATIENCE)
            yield said.group()
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=PATIENCE)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
            server.stderr.close()
        assert server.returncode == 0, errors
        for word in ("beyond", "Traceback", "Exception", "Error", "ERROR", "no answer"):
            assert word not in errors, errors
        assert not [*temporary.glob("lipprep-*")]

    return serve
