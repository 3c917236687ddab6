"""A real S3 server on loopback, in a process of its own, a wire to it that can break, and web servers."""

import contextlib
import functools
import http.server
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lipprep.stages.remote import RemotePath, place

_SERVE = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests end, however they do
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of an S3 server; the environment says where it is and gives credentials, to child processes, too."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    command = [sys.executable, "-c", _SERVE]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert select.select([server.stdout], [], [], 60)[0], "the S3 server does not start"
            port = int(server.stdout.readline())
            for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "tester")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                patch.setenv(name, os.devnull)
            yield port
        finally:
            server.stdin.close()
            server.wait(60)


@pytest.fixture
def bucket(s3_server: int) -> RemotePath:
    """An empty bucket. Nobody has asked it for anything: its address and its credentials are still to be read."""
    name = f"lipprep-{secrets.token_hex(8)}"
    request = urllib.request.Request(f"http://127.0.0.1:{s3_server}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=60):
        return place(f"s3://{name}")


@pytest.fixture
def wire(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., "Wire"]]:
    """Makes the wire over which what is asked first from now on reaches the server."""
    with contextlib.ExitStack() as wires:

        def make(**faults: int) -> Wire:
            made = wires.enter_context(Wire(s3_server, **faults))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
            return made

        yield make


@dataclass
class Wire:
    """Hands on what clients and server say. Of connections that send over `after` bytes, the first `cuts` break."""

    target: int
    cuts: int = 0
    after: int = 1 << 20
    sent: int = 0  # bytes to the server
    received: int = 0  # bytes from it
    broken: int = 0

    def __enter__(self) -> "Wire":
        self._lock = threading.Lock()
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(60)

    def cut(self) -> None:
        """Break all connections, and take no new ones."""
        with self._lock:
            for end in (self._listener, *self._clients):
                with contextlib.suppress(OSError):  # closed
                    end.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._clients.append(client)
            self._threads.append(thread := threading.Thread(target=self._serve, args=(client,)))
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        total = 0
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            ends = {client: server, server: client}
            while True:
                for end in select.select(list(ends), [], [], 60)[0]:
                    try:
                        data = end.recv(1 << 16)
                        ends[end].sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    with self._lock:
                        if end is server:
                            self.received += len(data)
                            continue
                        self.sent += len(data)
                        total += len(data)
                        if total > self.after and self.broken < self.cuts:
                            self.broken += 1
                            return


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Parts(Quiet):
    """Sends the parts of files that are asked for, as usual web servers do."""

    def copyfile(self, source, outputfile):
        start, end = self.part or (0, None)
        outputfile.write(source.read()[start:end])

    def send_response(self, code, message=None):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.part = (int(asked[1]), int(asked[2]) + 1) if asked else None
        super().send_response(206 if self.part and code == 200 else code, message)

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.part:
            value = str(min(self.part[1], int(value)) - self.part[0])
        super().send_header(keyword, value)


@pytest.fixture
def serve() -> Iterator[Callable[[type, Path], str]]:
    """Makes a web server of a folder; gives its URL."""
    pytest.importorskip("aiohttp")
    with contextlib.ExitStack() as servers:

        def start(handler: type, folder: Path) -> str:
            handler = functools.partial(handler, directory=str(folder))
            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start
