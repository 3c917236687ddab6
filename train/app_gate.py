"""The gate of `lipprep demo-app`: what a request must be like to reach Gradio's server behind it.

That server answers at dozens of addresses and opens the files that a request names. Here those few addresses pass that
the page asks for, from the page alone; the videos are taken here; and what Gradio is told to read is one of them.
"""

import asyncio
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click
import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lipprep.io.errors import UserError
from lipprep.stages.untrusted import printable

MAX_BYTES = 200 << 20  # of a video
MAX_KEPT = 3 * MAX_BYTES  # of all videos that wait, are read or are on their way
_MAX_FORM = 64 << 10  # bytes of a request beside its video
TO_ASK = 60  # seconds until a video goes that nobody has asked to be read: the page asks at once
TO_READ = 600  # seconds until one goes whose reading has not begun: its page was closed

# A forwarded port has another number on its other side, so that any will do.
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.ASCII)
_FILES = re.compile(r"/|/theme\.css|/favicon\.ico|/(assets|static)/[\w./@+-]+|/gradio_api/startup-events", re.ASCII)
_VIDEO = "/gradio_api/file="
_PASSED = {b"host", b"accept", b"accept-encoding", b"range"}  # headers: Gradio believes others, X-Forwarded-Host too


class _File(msgspec.Struct):
    path: str


class _Asked(msgspec.Struct):
    """What the page sends for a video to be read: `fn_index` is 0 of a file and 1 of a recording."""

    data: tuple[_File]
    fn_index: Literal[0, 1]
    session_hash: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z_-]{1,64}$")]


@dataclass
class _Kept:
    bytes: int
    state: Literal["given", "asked", "reading"] = "given"


class Gate:
    """The ASGI application before `app`, Gradio's, and the keeper of the videos below `folder`, which is no link."""

    def __init__(self, folder: Path) -> None:
        self.app: ASGIApp | None = None
        self._folder = folder
        self._kept: dict[str, _Kept] = {}
        self._coming = 0  # bytes of the requests that bring videos now

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[Path]:
        """Give the video at `path` to be read, and delete it then; any other path is refused and left alone.

        Raises UserError where `path` is no video that was given to this page and asked to be read.
        """
        kept, video = self._kept.get(path), Path(path)
        if kept is None or kept.state != "asked" or video.is_symlink() or video.resolve().parents[1] != self._folder:
            raise UserError("it is not here any more: give it once more")
        kept.state = "reading"
        try:
            yield video
        finally:
            self._drop(path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Whatever comes of it, nothing is raised."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        begun = ended = False

        async def tell(message: Message) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self._answer(scope, receive, tell)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not begun:  # the other answers that Gradio begins, those to who waits for a reading, tell their error
                where, what = scope["path"][:100], f"{type(error).__name__}: {error}"[:200]
                click.echo(f"no answer to a request for {printable(where)} ({printable(what)})", err=True)
                await _refuse(500, "This could not be answered.")(scope, receive, send)
        if begun and not ended:
            await send({"type": "http.response.body", "body": b""})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].lower()):  # another site's name, that it lets point here
            answer: ASGIApp = _refuse(400, "This page is called 127.0.0.1 or localhost.")
        elif headers.getlist("origin") not in ([], [f"http://{hosts[0].lower()}"]):
            answer = _refuse(403, "A page of another site may not ask here.")
        elif method == "POST" and path == "/gradio_api/upload":
            answer = await self._upload(Request(scope, receive))
        elif method == "POST" and path == "/gradio_api/queue/join":
            return await self._join(Request(scope, receive), send)
        elif method == "GET" and path == "/gradio_api/upload_progress":
            # The page asks while it sends; this machine's own network is done before there is anything to tell.
            answer = Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        elif method == "GET" and path == "/gradio_api/queue/data":
            return await self._pass(scope, receive, send, query=scope["query_string"])
        elif method in ("GET", "HEAD") and (_FILES.fullmatch(path) or path.removeprefix(_VIDEO) in self._kept):
            return await self._pass(scope, receive, send)
        else:
            answer = _refuse(404, "There is nothing here.")
        await answer(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, query: bytes = b"", *more: tuple) -> None:
        headers = [header for header in scope["headers"] if header[0] in _PASSED]
        await self.app({**scope, "headers": [*headers, *more], "query_string": query}, receive, send)

    async def _upload(self, request: Request) -> Response:
        """Take the one video of a form, and answer with its path, as Gradio does."""
        length = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return _refuse(411, "How long is it? The request does not tell.")
        size = int(length)
        if size > MAX_BYTES + _MAX_FORM:
            return _refuse(413, f"It is larger than {MAX_BYTES >> 20} MiB.")
        if self._coming + sum(kept.bytes for kept in list(self._kept.values())) + size > MAX_KEPT:
            return _refuse(503, "Too many videos wait to be read. Try again in a while.")
        self._coming += size
        try:
            async with asyncio.timeout(TO_READ), request.form(max_files=1, max_fields=0) as form:
                return await self._keep(form)
        except HTTPException as error:  # it is no form
            return _refuse(error.status_code, error.detail)
        except TimeoutError:
            return _refuse(408, "It took too long to come.")
        except OSError as error:
            return _refuse(507, f"It could not be kept: {error.strerror}.")
        finally:
            self._coming -= size

    async def _keep(self, form: FormData) -> Response:
        given = form.get("files")
        if not isinstance(given, UploadFile) or given.size > MAX_BYTES:
            return _refuse(400, f"Give one video of up to {MAX_BYTES >> 20} MiB.")
        name = re.sub(r"[^\w .,()-]", "_", Path(given.filename or "").name)
        name = name.encode()[-200:].decode(errors="ignore").lstrip(" .") or "video"
        path = Path(tempfile.mkdtemp(dir=self._folder)) / name
        try:
            with path.open("xb") as file:
                await run_in_threadpool(shutil.copyfileobj, given.file, file)
        except BaseException:
            self._drop(str(path))
            raise
        self._kept[str(path)] = _Kept(given.size)
        self._later(TO_ASK, "given", str(path))
        return JSONResponse([str(path)])

    async def _join(self, request: Request, send: Send) -> None:
        """Let Gradio read a video that is kept here, once. What a request names that is refused, is deleted."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM:
                return await _refuse(413, "That is no request of this page.")(request.scope, request.receive, send)
        try:
            asked = msgspec.json.decode(body, type=_Asked)
            kept = self._kept[asked.data[0].path]
            if kept.state != "given":
                raise ValueError("it was asked for before")
        except (ValueError, KeyError, RecursionError):
            for path in list(self._kept):
                if json.dumps(path).encode() in body and self._kept[path].state == "given":
                    self._drop(path)
            return await _refuse(400, "This is no video that waits to be read.")(request.scope, request.receive, send)
        path, kept.state = asked.data[0].path, "asked"
        self._later(TO_READ, "asked", path)
        # Nothing else of the request goes on.
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = msgspec.json.encode({"data": [file], "fn_index": asked.fn_index, "session_hash": asked.session_hash})

        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> Message:
            return next(messages, None) or await request.receive()

        more = (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))
        try:
            await self._pass(request.scope, receive, send, b"", *more)
        except Exception:
            self._drop(path)
            raise

    def _later(self, seconds: float, state: str, path: str) -> None:
        def drop() -> None:
            if (kept := self._kept.get(path)) is not None and kept.state == state:
                self._drop(path)

        asyncio.get_running_loop().call_later(seconds, drop)

    def _drop(self, path: str) -> None:
        shutil.rmtree(Path(path).parent, ignore_errors=True)
        self._kept.pop(path, None)


def _refuse(status: int, why: str) -> Response:
    return PlainTextResponse(why, status)
