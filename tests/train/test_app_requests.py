"""Requests to a running server of `lipprep demo-app` that its own page would never send."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

MIB = 1 << 20
PATIENCE = 120  # seconds
PRIVATE = b"a diary, and none of the page's business"
FILE = {"meta": {"_type": "gradio.FileData"}}
SESSION = "s0"


@dataclass
class Page:
    """A running server. `home` is the folder that it was started in, `temporary` where it keeps what it is given."""

    host: str
    home: Path
    temporary: Path

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """Send one request; the status and the text of its answer."""
        connection = http.client.HTTPConnection(self.host, timeout=PATIENCE)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body if body is None else as_bytes(body), named)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def upload(self, content: bytes, name: str = "clip.mp4", field: str = "files", **headers: str) -> tuple[int, str]:
        body = form((field, name, content))
        return self.ask("POST", "/gradio_api/upload", body, Content_Type=FORM_TYPE, **headers)

    def join(self, body: object, **headers: str) -> tuple[int, str]:
        return self.ask("POST", "/gradio_api/queue/join", body, Content_Type="application/json", **headers)

    def result(self, session: str) -> str:
        """What the page shows once all is read that `session` asked for."""
        status, told = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        events = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line]
        assert status == 200
        (done,) = (event for event in events if event["msg"] == "process_completed")
        return done["output"]["data"][1]

    def kept(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if not path.is_dir()]


FORM_TYPE = "multipart/form-data; boundary=edge"


def form(*parts: tuple[str, str, bytes]) -> bytes:
    """A form of files: of each its field, its name and what is in it."""
    text = b""
    for field, name, content in parts:
        text += f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        text += content + b"\r\n"
    return text + b"--edge--\r\n"


def as_bytes(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def asked(file: object, **more: object) -> dict:
    """What the page sends to have `file` read."""
    return {"data": [file], "fn_index": 0, "trigger_id": 5, "session_hash": SESSION, **more}


@pytest.fixture(scope="module")
def page(serve_page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A server, started beside a private file. No request may make it print an error, or ask beyond this machine."""
    home, temporary = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("temporary")
    (home / "diary.mp4").write_bytes(PRIVATE)
    (home / "link.mp4").symlink_to(home / "diary.mp4")
    with serve_page(temporary, cwd=home) as address:
        yield Page(urlsplit(address).netloc, home, temporary)
        assert (home / "diary.mp4").read_bytes() == PRIVATE
        assert (home / "link.mp4").is_symlink()


def test_a_video_is_read_once_and_deleted(page, spoken_clip):
    status, told = page.upload(spoken_clip.read_bytes(), "PEOPLE_00001.mp4")
    (path,) = json.loads(told)
    assert (status, page.kept()) == (200, [Path(path)])
    file = {"path": path, "url": f"http://{page.host}/gradio_api/file={path}", "orig_name": "a", "size": 1, **FILE}
    assert page.join(asked(file, session_hash="honest"))[0] == 200
    assert page.join(asked(file, session_hash="again"))[0] == 400
    shown = page.result("honest")
    assert "<h2>PEOPLE_00001.mp4</h2>" in shown and "&lt;b&gt;" in shown
    assert page.kept() == []
    assert page.join(asked(file))[0] == 400


def test_what_is_no_video_says_so_and_is_deleted(page):
    _, told = page.upload(b"no video at all")
    assert page.join(asked({"path": json.loads(told)[0], **FILE}, fn_index=1, session_hash="rubbish"))[0] == 200
    shown = page.result("rubbish")
    assert "Your recording" in shown and "it is not a video, or cut short" in shown
    assert str(page.temporary) not in shown and page.kept() == []


PATHS = [
    "{home}/diary.mp4",
    "diary.mp4",
    "./diary.mp4",
    "{kept}/../../diary.mp4",
    "{home}/link.mp4",
    "link.mp4",
    "{uploads}/link.mp4",
    "{uploads}",
    "{uploads}/",
    "/",
    "~/diary.mp4",
    "file://{home}/diary.mp4",
    "file:diary.mp4",
    "http://{host}/favicon.ico",
    "http://videos.invalid/clip.mp4",
    "https://videos.invalid/clip.mp4",
    "//videos.invalid/clip.mp4",
    "\\\\videos.invalid\\clip.mp4",
    "http://169.254.169.254/latest",
    "data:video/mp4;base64,AAAA",
    "pipe:0",
    "{home}/diary.mp4\0",
    "\0",
    "\ud800",
    "",
    "a" * 5000,
]


@pytest.mark.parametrize("is_stream", [True, False, None])
@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_no_other_file_is_read_or_deleted(page, path, is_stream):
    (uploads,) = page.temporary.glob("lipprep-demo-*")
    (uploads / "link.mp4").symlink_to(page.home / "diary.mp4")
    named = path.format(home=page.home, host=page.host, uploads=uploads, kept=uploads / "tmp")
    file = {"path": named, **FILE} if is_stream is None else {"path": named, "is_stream": is_stream, **FILE}
    try:
        for fn_index in (0, 1):
            for data in ([file], [{"path": named}], [{**file, "url": named}], [[file]], [named]):
                assert page.join({**asked(None), "data": data, "fn_index": fn_index})[0] == 400
        status, _ = page.ask(
            "GET", "/gradio_api/file=" + "".join(f"%{byte:02x}" for byte in json.dumps(named).encode())
        )
        assert status == 404
        assert (page.home / "diary.mp4").read_bytes() == PRIVATE
        assert (uploads / "link.mp4").is_symlink()
    finally:
        (uploads / "link.mp4").unlink()


GIVEN = object()  # stands for the path of a video that was given to the page
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"\xff"',
    b"[" * 50_000,
    b"{" * 5000,
    b'{"data": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    {},
    {"data": [{"path": GIVEN, **FILE}]},
    {"data": [{"path": GIVEN, **FILE}], "fn_index": 0},
    {"data": [{"path": GIVEN, **FILE}], "session_hash": SESSION},
    asked({"path": GIVEN, **FILE}, session_hash=None),
    asked({"path": GIVEN, **FILE}, session_hash=7),
    asked({"path": GIVEN, **FILE}, session_hash=["a"]),
    asked({"path": GIVEN, **FILE}, session_hash="a\0/../b"),
    asked({"path": GIVEN, **FILE}, session_hash=""),
    asked({"path": GIVEN, **FILE}, fn_index=7),
    asked({"path": GIVEN, **FILE}, fn_index=-1),
    asked({"path": GIVEN, **FILE}, fn_index="0"),
    asked({"path": GIVEN, **FILE}, fn_index=None),
    asked({"path": GIVEN, **FILE}, fn_index=1e300),
    {**asked(None), "data": []},
    {**asked(None), "data": None},
    {**asked(None), "data": {"path": GIVEN, **FILE}},
    {**asked(None), "data": [{"path": GIVEN, **FILE}, {"path": GIVEN, **FILE}]},
    asked([{"path": GIVEN, **FILE}]),
    asked({"path": [GIVEN], **FILE}),
    asked({"path": {"path": GIVEN}, **FILE}),
    asked({"path": 3, **FILE}),
    asked({"path": True, **FILE}),
    asked({"path": None, **FILE}),
    asked({"Path": GIVEN, **FILE}),
    asked({**FILE}),
    asked(None),
    asked(0),
    asked(GIVEN),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_request_of_another_form_is_refused_and_its_video_deleted(page, body):
    (path,) = json.loads(page.upload(b"no video at all")[1])
    body = as_bytes(body) if isinstance(body, bytes) else json.dumps(body, default=lambda _: path).encode()
    assert page.join(body)[0] == 400
    if path.encode() not in body:
        assert page.join(asked({"path": [path], **FILE}))[0] == 400
    assert page.kept() == []


def test_a_request_that_is_too_long_is_refused(page):
    assert page.join(b" " * (65 << 10))[0] == 413


ADDRESSES = [
    ("GET", "/gradio_api/file={home}/diary.mp4"),
    ("GET", "/gradio_api/file=diary.mp4"),
    ("GET", "/gradio_api/file=http://videos.invalid/a"),
    ("GET", "/gradio_api/file=http:/videos.invalid/a"),
    ("GET", "/gradio_api/file/{home}/diary.mp4"),
    ("GET", "/gradio_api/proxy=http://videos.invalid/a"),
    ("GET", "/file={home}/diary.mp4"),
    ("GET", "/static/../../../../..{home}/diary.mp4"),
    ("GET", "/assets/..%2f..%2f..%2f..{home}/diary.mp4"),
    ("GET", "/static/%00"),
    ("GET", "/svelte/..{home}/diary.mp4"),
    ("GET", "//videos.invalid/"),
    ("GET", "http://videos.invalid/"),
    ("GET", "/config"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/monitoring"),
    ("GET", "/gradio_api/heartbeat/s0"),
    ("GET", "/gradio_api/deep_link?session_hash=s0"),
    ("GET", "/gradio_api/custom_component/0/client/a/b"),
    ("GET", "/gradio_api/upload"),
    ("POST", "/"),
    ("POST", "/login"),
    ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/api/read"),
    ("POST", "/gradio_api/call/read"),
    ("POST", "/gradio_api/call/v2/read"),
    ("POST", "/gradio_api/queue/join/"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/stream/0"),
    ("POST", "/gradio_api/vibe-edit"),
    ("PUT", "/gradio_api/upload"),
    ("DELETE", "/"),
    ("OPTIONS", "/gradio_api/upload"),
]


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_the_page_has_no_other_addresses(page, method, path):
    file = {"path": str(page.home / "diary.mp4"), **FILE}
    status, told = page.ask(
        method, path.format(home=page.home), None if method == "GET" else asked(file), Content_Type="application/json"
    )
    assert status in (400, 403, 404) and "diary" not in told


@pytest.mark.parametrize("path", ["/?deep_link=../a", "/?__theme=dark", "/?view=api", "/theme.css", "/favicon.ico"])
def test_the_page_is_there_whatever_follows_its_address(page, path):
    assert page.ask("GET", path, X_Forwarded_Host="videos.invalid", Cookie="a=b")[0] == 200


def test_a_session_that_is_none_gets_no_reading(page):
    for session in ("", "nobody", "%00", "%ff"):
        _, told = page.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        assert "process_completed" not in told
    assert page.ask("GET", "/gradio_api/queue/data")[0] == 422


ORIGINS = [
    "http://evil.example",
    "https://{host}",
    "http://127.0.0.1:1",
    "http://localhost:{port}",
    "null",
    "",
    "{host}",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_another_site_is_refused(page, origin):
    port = page.host.rpartition(":")[2]
    origin = origin.format(host=page.host, port=port)
    assert page.upload(b"evil", Origin=origin)[0] == 403
    (path,) = json.loads(page.upload(b"no video at all")[1])
    assert page.join(asked({"path": path, **FILE}), Origin=origin)[0] == 403
    assert page.ask("GET", "/", Origin=origin)[0] == 403
    assert page.kept() == [Path(path)]
    assert page.join(asked([path]))[0] == 400  # deletes it
    assert page.kept() == []


HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "localhost.:{port}",
    "127.1",
    "",
    "[::1]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_another_site_lets_point_here_is_refused(page, host):
    host = host.format(port=page.host.rpartition(":")[2])
    for origin in ({}, {"Origin": f"http://{host}"}):
        assert page.ask("GET", "/", Host=host, **origin)[0] == 400
        assert page.upload(b"evil", Host=host, **origin)[0] == 400
        assert page.join(asked({"path": "diary.mp4", **FILE}), Host=host, **origin)[0] == 400
    assert page.kept() == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "localhost:{port}", "LOCALHOST:{port}"])
def test_the_page_itself_is_answered_under_its_names_and_through_a_forwarded_port(page, host):
    host = host.format(port=page.host.rpartition(":")[2])
    (path,) = json.loads(page.upload(b"no video at all", Host=host, Origin=f"http://{host.lower()}")[1])
    assert page.join(asked([path]))[0] == 400  # deletes it


def raw(page: Page, request: bytes) -> bytes:
    """Send bytes as they are; what comes back until the server hangs up."""
    with socket.create_connection(tuple(page.host.split(":")), timeout=PATIENCE) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(4096), b""))


UPLOAD = b"POST /gradio_api/upload HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
RAW = {
    "no host": (b"POST /gradio_api/upload HTTP/1.0\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: HERE\r\n\r\n", 400),
    "two origins": (b"GET / HTTP/1.1\r\nHost: HERE\r\nOrigin: http://HERE\r\nOrigin: http://evil.example\r\n\r\n", 403),
    "length untold": (UPLOAD + b"Host: HERE\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 411),
    "two lengths": (UPLOAD + b"Host: HERE\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    "no length": (UPLOAD + b"Host: HERE\r\n\r\n", 411),
    "too long": (UPLOAD + b"Host: HERE\r\nContent-Length: %d\r\n\r\n" % (201 * MIB), 413),
    "beyond numbers": (UPLOAD + b"Host: HERE\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
    "a socket": (
        b"GET /gradio_api/queue/data HTTP/1.1\r\nHost: HERE\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        None,
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_request_that_no_browser_sends_is_refused(page, kind):
    request, status = RAW[kind]
    told = raw(page, request.replace(b"HERE", page.host.encode()))
    assert status is None or told.startswith(b"HTTP/1.1 %d " % status)
    assert page.kept() == []


FORMS = {
    "two videos": form(("files", "a.mp4", b"a"), ("files", "b.mp4", b"b")),
    "another field": form(("video", "a.mp4", b"a")),
    "a field and a video": b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    + form(("files", "a", b"a")),
    "no file": b'--edge\r\nContent-Disposition: form-data; name="files"\r\n\r\nb\r\n--edge--\r\n',
    "nothing": b"--edge--\r\n",
    "no form": b"abc",
    "an empty body": b"",
    "no name of a field": b'--edge\r\nContent-Disposition: form-data; filename="a"\r\n\r\nb\r\n--edge--\r\n',
    "no header": b"--edge\r\n\r\nb\r\n--edge--\r\n",
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_without_one_video_is_refused_and_leaves_nothing(page, kind):
    assert page.ask("POST", "/gradio_api/upload", FORMS[kind], Content_Type=FORM_TYPE)[0] == 400
    assert page.kept() == []


@pytest.mark.parametrize(
    "form_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "application/x-www-form-urlencoded",
        "text/plain",
        "",
        "\xff",
    ],
)
def test_another_type_of_form_is_refused(page, form_type):
    body = form(("files", "a.mp4", b"a"))
    assert page.ask("POST", "/gradio_api/upload", body, Content_Type=form_type)[0] == 400
    assert page.kept() == []


NAMES = [
    "../../a.mp4",
    "/etc/a.mp4",
    "..",
    ".",
    "",
    ".bashrc",
    "a\0b.mp4",
    "é" * 300 + ".mp4",
    "-i.mp4",
    "<b>.html",
    "a\\b",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_video_of_any_name_lies_in_a_folder_of_its_own(page, name):
    status, told = page.upload(b"no video at all", name)
    (path,) = map(Path, json.loads(told))
    assert status == 200 and page.kept() == [path]
    assert path.resolve().parents[2] == page.temporary.resolve()
    assert page.join(asked([str(path)]))[0] == 400  # deletes it
    assert page.kept() == []


def test_a_video_whose_sending_stops_leaves_nothing(page):
    head = UPLOAD + b"Host: " + page.host.encode() + b"\r\nContent-Length: 5000000\r\n\r\n"
    raw(page, head + form(("files", "a.mp4", b"a" * 2_000_000)))
    assert page.kept() == []


def test_many_videos_at_once_do_not_fill_the_disk(page):
    """Of videos that are on their way, too, no more are taken than there is room for."""
    head = UPLOAD + b"Host: " + page.host.encode() + b"\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    with contextlib.ExitStack() as sending:
        answers = []
        for _ in range(4):
            connection = socket.create_connection(tuple(page.host.split(":")), timeout=PATIENCE)
            sending.enter_context(connection)
            connection.sendall(head % (190 * MIB))
            answers.append(connection.recv(100).split()[1])
        assert answers == [b"100", b"100", b"100", b"503"]
    while (answer := page.upload(b"no video at all"))[0] == 503:  # until it knows that the senders have gone
        pass
    assert page.join(asked([json.loads(answer[1])[0]]))[0] == 400  # deletes it
    assert page.kept() == []


def test_requests_at_the_same_time_read_a_video_once(page):
    (path,) = json.loads(page.upload(b"no video at all")[1])
    statuses = []
    asking = [
        threading.Thread(
            target=lambda n=n: statuses.append(page.join(asked({"path": path, **FILE}, session_hash=f"t{n}"))[0])
        )
        for n in range(8)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(statuses) == [200] + [400] * 7
