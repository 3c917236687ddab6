"""How long the gate of `lipprep demo-app` keeps a video whose page was closed."""

import asyncio
import json
from pathlib import Path

import pytest

from lipprep.io.errors import UserError
from lipprep.train import app_gate

FORM = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\na\r\n--edge--\r\n'


async def post(gate: app_gate.Gate, path: str, body: bytes) -> tuple[int, bytes]:
    """Send the gate a request, as a server does; the status and the body of its answer."""
    told = []
    headers = {"host": "localhost", "content-type": "multipart/form-data; boundary=edge", "content-length": len(body)}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
    }

    async def receive() -> dict:
        return {"type": "http.request", "body": body}

    async def send(message: dict) -> None:
        told.append(message)

    await gate(scope, receive, send)
    return told[0]["status"], b"".join(message.get("body", b"") for message in told)


async def upload(gate: app_gate.Gate) -> Path:
    status, told = await post(gate, "/gradio_api/upload", FORM)
    assert status == 200
    return Path(json.loads(told)[0])


async def ask(gate: app_gate.Gate, video: Path) -> int:
    body = {"data": [{"path": str(video)}], "fn_index": 0, "session_hash": "s0"}
    return (await post(gate, "/gradio_api/queue/join", json.dumps(body).encode()))[0]


async def let_pass() -> None:
    """Let everything happen that is due."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.fixture
def gate(tmp_path: Path) -> app_gate.Gate:
    """A gate before a server that takes what it is told to read, and never reads it."""

    async def takes(scope: dict, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    made = app_gate.Gate(tmp_path.resolve())
    made.app = takes
    return made


def test_a_video_that_nobody_asks_for_is_deleted(gate, tmp_path, monkeypatch):
    async def use() -> None:
        monkeypatch.setattr(app_gate, "TO_ASK", 0)
        video = await upload(gate)
        await let_pass()
        assert not [*tmp_path.iterdir()]
        assert await ask(gate, video) == 400

    asyncio.run(use())


def test_a_video_whose_reading_never_begins_is_deleted(gate, tmp_path, monkeypatch):
    async def use() -> None:
        video = await upload(gate)
        monkeypatch.setattr(app_gate, "TO_READ", 0)
        with pytest.raises(UserError), gate.reading(str(video)):
            pass  # nobody has asked for it
        assert video.read_bytes() == b"a"
        assert await ask(gate, video) == 200
        await let_pass()
        with pytest.raises(UserError, match="give it once more"), gate.reading(str(video)):
            pass
        assert not [*tmp_path.iterdir()]

    asyncio.run(use())


def test_a_video_that_is_being_read_stays_until_it_is_read(gate, tmp_path, monkeypatch):
    async def use() -> None:
        video = await upload(gate)
        monkeypatch.setattr(app_gate, "TO_READ", 0)
        assert await ask(gate, video) == 200
        with gate.reading(str(video)) as read:
            await let_pass()
            assert read.read_bytes() == b"a"
            assert await ask(gate, video) == 400
        assert not [*tmp_path.iterdir()]

    asyncio.run(use())


def test_a_link_in_the_place_of_a_video_is_not_read(gate, tmp_path):
    async def use() -> None:
        video = await upload(gate)
        assert await ask(gate, video) == 200
        other = tmp_path / "diary.mp4"
        other.write_bytes(b"mine")
        video.unlink()
        video.symlink_to(other)
        with pytest.raises(UserError), gate.reading(str(video)):
            pass
        assert other.read_bytes() == b"mine"

    asyncio.run(use())


def test_a_request_that_the_server_fails_at_is_answered_in_a_line(gate, capfd):
    async def fails(scope: dict, receive: object, send: object) -> None:
        raise KeyError("a\x1bb")

    async def use() -> None:
        video = await upload(gate)
        gate.app = fails
        assert await ask(gate, video) == 500
        assert not video.exists()

    asyncio.run(use())
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "KeyError" in said and "Traceback" not in said and "\x1b" not in said
