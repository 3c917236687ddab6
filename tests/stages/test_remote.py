import contextlib
import http.server
import io
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from remote import Parts, Quiet

from lipprep.stages import remote, store
from lipprep.stages.atomic import fetched, replacing, temporary_path, temporary_paths, write_text
from lipprep.stages.failures import ClipFailure
from lipprep.stages.held import HeldPath
from lipprep.stages.remote import RemotePath, place, signature
from lipprep.stages.scratch import scratch
from lipprep.stages.shard.reader import TarMembers, read_members
from lipprep.stages.shard.writer import TarWriter
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import check_file, is_file, read_text
from lipprep.stages.video import probe, read_frames


@pytest.fixture(autouse=True)
def own_scratch(tmp_path, monkeypatch):
    """What is left in the scratch folder is this test's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()


def left(path: RemotePath) -> list[str]:
    """What stands in the scratch folder of a path."""
    return [entry.name for entry in scratch(path.parent).iterdir()]


# What a person gives as a place


@pytest.mark.parametrize("text", ["shards", "/data/shards", "a b/c", "C:/x", "word:s"])
def test_other_places_are_local(text):
    assert place(text) == Path(text)


def test_urls_of_files_are_local():
    assert place("file:///data/a%20b") == Path("/data/a b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipe:cat x", "pipe:cat x is a command, and none is run"),
        ("PIPE:curl://x", "is a command"),
        ("file://host/x", "is a file of another machine"),
        ("file:/x", "no URL that lipprep reads"),
        ("s3://bucket/a//b", "has // in its path"),
        ("s3://bucket//a", "has // in its path"),
        ("pipe://curl", "pipe:// is not read or written; what is: s3://"),
        ("ssh://host/x", "ssh:// is not read"),
        ("sftp://host/x", "sftp:// is not read"),
        ("reference://x", "reference:// is not read"),
        ("generic://x", "is not read"),
        ("simplecache::s3://bucket/x", "no URL that lipprep reads"),
        ("s3://bucket/a.zip::simplecache", "no plain URL"),
        ("s3://bucket/../other", "no plain URL"),
        ("s3:///x", "no plain URL"),
        (Path("s3://bucket/x"), "write it as in s3://bucket/folder"),
        ("https://host/a?token=b", r"URLs with \? or #"),
    ],
)
def test_what_is_no_place_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        place(text)


def test_passwords_are_not_told():
    pytest.importorskip("aiohttp")
    url = "https://user:se:cr@t@127.0.0.1:9"
    for path in (place(f"{url}/a"), place(url) / "a", pickle.loads(pickle.dumps(place(url))) / "a"):
        assert str(path) == "https://user:***@127.0.0.1:9/a" and "cr@t" not in repr(path)
    for wrong in (f"{url}/a?b", f"{url}/a//b", f"ftp{url[5:]}", f"x{url}"):
        with pytest.raises(ValueError, match=r"user:\*\*\*@127") as told:
            place(wrong)
        assert "cr@t" not in str(told.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs:// needs a package that is not installed: pip install gcsfs"):
        place("gs://bucket/x")


def test_names_of_remote_paths():
    pytest.importorskip("s3fs")
    path = place("S3://bucket/work/a/train-00001.tar/")
    assert str(path) == "s3://bucket/work/a/train-00001.tar"
    assert (path.name, path.stem, path.suffix) == ("train-00001.tar", "train-00001", ".tar")
    assert path.with_suffix(".jsonl") == path.parent / "train-00001.jsonl" == path.with_name("train-00001.jsonl")
    assert path.relative_to(place("s3://bucket/work")) == PurePosixPath("a/train-00001.tar")
    assert not path.is_relative_to(place("s3://other/work"))
    assert str(place("s3://bucket").parent / "x") == "s3://bucket/x"
    assert pickle.loads(pickle.dumps(path)) == path and len({path, place(str(path))}) == 1
    assert sorted([path, path.parent]) == [path.parent, path]


# Files


def test_files_are_whole_or_not_there(bucket):
    path = bucket / "a" / "b.txt"
    assert not path.exists() and not is_file(path)
    write_text(path, "first\n")
    with replacing(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_text() == "first\n"
    assert path.read_bytes() == b"second"
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"third")
        raise RuntimeError
    assert read_text(path, "text", limit=10) == "second"
    assert left(path) == []


def test_what_a_folder_holds(bucket, monkeypatch):
    for name in ("w/a.tar", "w/b.tar", "w/b.jsonl", "w/x/deep/c.tar", "w/x/d.tar", "v/e.tar", "w.tar"):
        write_text(bucket / name, name)
    folder = bucket / "w"
    assert folder.is_dir() and folder.exists() and not folder.is_file() and not is_file(folder)
    assert list(folder.iterdir()) == [folder / n for n in ("a.tar", "b.jsonl", "b.tar", "x")]
    assert list(folder.glob("*.tar")) == [folder / "a.tar", folder / "b.tar"]
    below = folder.files_below()
    assert sorted(below) == ["a.tar", "b.jsonl", "b.tar", "x/d.tar", "x/deep/c.tar"]
    assert {name: signature(status) for name, status in below.items()} == {
        name: signature((folder / name).stat()) for name in below
    }
    monkeypatch.setattr("lipprep.stages.remote._SUBFOLDERS", 0)
    assert folder.files_below() == below
    assert sorted(bucket.files_below())[:2] == ["v/e.tar", "w.tar"]
    assert folder.sizes(["a.tar", "x", "none"]) == {"a.tar": 7}
    assert list((bucket / "none").iterdir()) == [] and (bucket / "none").files_below() == {}
    (folder / "a.tar").unlink()
    (folder / "a.tar").unlink()
    assert [path.name for path in folder.iterdir()] == ["b.jsonl", "b.tar", "x"]
    with pytest.raises(ValueError, match="is no file but a folder"):
        check_file(folder, "tar")
    with pytest.raises(ValueError, match="there is no tar"):
        check_file(folder / "a.tar", "tar")


def test_a_changed_file_has_another_signature(bucket):
    path = bucket / "a"
    write_text(path, "one")
    first = signature(path.stat())
    assert first == signature(path.stat()) and first["size"] == 3
    write_text(path, "two")
    assert signature(path.stat()) != first


def test_a_generation_tells_more_than_a_tag(monkeypatch):
    """As of Google's store, whose tag is another one when only what is said of an object is."""
    pytest.importorskip("s3fs")
    told = {"type": "file", "size": 3, "etag": "CAE=", "generation": "1"}
    monkeypatch.setattr(remote, "ask", lambda *_, **__: told)
    path = place("s3://bucket/a")
    first = signature(path.stat())
    told["etag"] = "CAI="
    assert signature(path.stat()) == first
    told["generation"] = "2"
    assert signature(path.stat()) != first


@pytest.mark.cluster
def test_a_store_copies_by_itself(bucket, wire, tmp_path):
    line = wire()
    (tmp_path / "a").write_bytes(content := np.random.default_rng(0).bytes(2_000_000))
    (bucket / "w" / "a").upload(tmp_path / "a")
    line.sent = line.received = 0
    (bucket / "w" / "a").copy_to(bucket / "w" / ".old" / "a")
    assert line.sent + line.received < 20_000
    assert (bucket / "w" / ".old" / "a").read_bytes() == content == (bucket / "w" / "a").read_bytes()
    with pytest.raises(FileNotFoundError):
        (bucket / "none").copy_to(bucket / "b")
    line.cut()
    with pytest.raises(RemoteError, match="no answer from the store"):
        (bucket / "w" / "a").copy_to(bucket / "b")


def test_two_who_write_one_file_are_told(bucket, tmp_path, monkeypatch):
    real = remote.ask

    def ask(root, path, call, *args, **options):
        answer = real(root, path, call, *args, **options)
        if call == "put_file":
            real(root, path, call, str(tmp_path / "theirs"))
        return answer

    (tmp_path / "mine").write_text("mine")
    (tmp_path / "theirs").write_text("longer")
    monkeypatch.setattr(remote, "ask", ask)
    with pytest.raises(RemoteError, match=r"has 6 bytes after 4 were written: another run writes there.*--slice"):
        (bucket / "a").upload(tmp_path / "mine")


def test_files_are_read_in_any_order(bucket):
    content = np.random.default_rng(0).bytes(300_000)
    path = bucket / "random"
    with replacing(path) as file:
        file.write(content)
    with path.open("rb", buffering=1000) as file:
        assert file.read(10) == content[:10]
        assert file.seek(-5, io.SEEK_END) == len(content) - 5 and file.read() == content[-5:]
        file.seek(70_000)
        assert file.read(50_000) == content[70_000:120_000]
        file.seek(len(content) + 10)
        assert file.read(4) == b""
    assert (
        path.read_range(100, 100) == path.read_range(300_000, 300_005) == b""
        and path.read_range(299_990, 300_010) == content[-10:]
    )
    with fetched(path) as local:
        assert local.read_bytes() == content
    assert left(path) == []
    with pytest.raises(FileNotFoundError):
        (bucket / "none").read_bytes()


def test_a_file_that_changes_while_it_is_read_is_told(bucket, monkeypatch):
    path, told = bucket / "a", "a changed while it was read: run the same command again"
    write_text(path, "0" * 3000)
    for other in ("1" * 3000, "2" * 1500):
        with path.open("rb", buffering=1000) as file:
            assert len(file.read(10)) == 10
            write_text(path, other)
            with pytest.raises(RemoteError, match=told):
                file.read(2000)
    original = RemotePath.read_range

    def replaced(path, start, end):
        data = original(path, start, end)
        write_text(path, f"{start:02000}")
        return data

    monkeypatch.setattr(RemotePath, "read_range", replaced)
    monkeypatch.setattr("lipprep.stages.atomic._FETCH", 1000)
    with pytest.raises(RemoteError, match=told), fetched(path):
        pass
    assert left(path) == []


def test_a_held_file_is_asked_for_once(bucket, monkeypatch):
    path = bucket / "a"
    write_text(path, "0123456789")
    for whole, requests in ((10, 2), (9, 3)):  # status and content; or status and two parts
        monkeypatch.setattr("lipprep.stages.held.WHOLE", whole)
        waits = []

        @contextlib.contextmanager
        def waiting(waits=waits):
            waits.append(True)
            yield

        held = HeldPath(path)
        held.waiting = waiting
        held.fetch()
        assert held.held == (10 if whole == 10 else 0)
        assert held == path and str(held) == str(path) and held.stat().st_size == 10
        assert held.read_range(2, 4) == b"23" and held.read_range(8, 12) == b"89"
        assert len(waits) == requests
        assert type(pickle.loads(pickle.dumps(held))) is RemotePath
    with pytest.raises(FileNotFoundError):
        HeldPath(bucket / "none").fetch()


def test_the_copy_of_another_container_s_process_stays(bucket):
    """Whether a process of another container lives cannot be seen from this one."""
    write_text(bucket / "w" / "a", "xyz")
    theirs = scratch(bucket / "w") / "copy-99999999-x"
    theirs.mkdir()
    with fetched(bucket / "w" / "a") as local:
        assert local.read_text() == "xyz" and local.parent.parent == theirs.parent
    assert left(bucket / "w" / "a") == [theirs.name]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners")
def test_a_scratch_folder_that_others_may_write_to_is_refused(bucket):
    scratch(bucket).parent.chmod(0o777)
    with pytest.raises(ValueError, match=r"others may write to .*: remove it, or set TMPDIR"):
        scratch(bucket)


def test_what_nobody_came_back_for_goes(bucket, tmp_path, monkeypatch):
    new, old, there = temporary_path(bucket / "a", "new"), temporary_path(bucket / "w" / "a", "old"), scratch(bucket)
    (there / "copy-1-x").mkdir()
    for path in (new, old, there / "copy-1-x" / "a", there / ".lock"):
        path.write_text("x")
    for path in (old, there / "copy-1-x", there / ".lock"):
        os.utime(path, (0, 0))
    (tmp_path / "scratch").rename(tmp_path / "later")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "later"))  # which was not looked at by this process
    assert left(bucket / "w" / "a") == [] and sorted(left(bucket / "a")) == [new.name, ".lock"]


def test_a_tar_comes_back(bucket, tmp_path):
    members = {f"clip{i}.npy": np.random.default_rng(i).bytes(3000 * i) for i in range(5)}
    paths = [bucket / "w" / "a.tar", tmp_path / "a.tar"]
    offsets = []
    for path in paths:
        with TarWriter(path, "mine") as tar:
            for name, payload in members.items():
                offsets.append(tar.offset)
                tar.add(name, payload)
            tar.close()
            assert not path.exists() and temporary_paths(path) == [temporary_path(path, "mine")]
            tar.publish()
        assert path.stat().st_size == tar.bytes and temporary_paths(path) == []
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with TarMembers(paths[0]) as back:
        assert {name: back.read(name) for name in back} == members
    assert read_members(paths[0], offsets[2], ["clip2.npy", "clip3.npy"]) == [
        members["clip2.npy"],
        members["clip3.npy"],
    ]
    with pytest.raises(ValueError, match="does not hold clip1"):
        read_members(paths[0], offsets[2], ["clip1.npy"])


def _first_byte(path, queue):
    queue.put(path.read_range(0, 1))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_reads_by_itself(bucket):
    write_text(bucket / "a", "xyz")
    assert (bucket / "a").read_range(0, 1) == b"x"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_first_byte, args=(bucket / "a", queue))
    process.start()
    assert queue.get(timeout=60) == b"x"
    process.join(60)
    assert process.exitcode == 0
    assert (bucket / "a").read_range(1, 2) == b"y"
    queue.close()
    queue.join_thread()


# Videos


def test_videos_are_read_as_local_ones(bucket, make_video, face_frames, tmp_path, monkeypatch):
    local, path = make_video(tmp_path / "a.mp4", face_frames), bucket / "a.mp4"
    path.upload(local)
    frames = [frame[:] for frame in read_frames(local)]
    assert probe(path) == probe(local)
    assert np.array_equal([frame[:] for frame in read_frames(path)], frames)
    monkeypatch.setattr("lipprep.stages.video.WHOLE", 1000)
    monkeypatch.setattr("lipprep.stages.video._AHEAD", 5000)
    assert np.array_equal([frame[:] for frame in read_frames(path, first=3, last=9)], frames[3:9])


def test_videos_that_are_none_fail_as_local_ones(bucket, make_video, face_frames, tmp_path):
    whole = make_video(tmp_path / "a.mp4", face_frames).read_bytes()
    target = make_video(tmp_path / "b.ts", face_frames, options={"f": "mpegts"})
    playlists = {
        "list.mp4": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "list.m3u8": f"#EXTM3U\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n".encode(),
    }
    for name, content in {
        "cut.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "text.mp4": b"no",
        **playlists,
    }.items():
        local = tmp_path / name
        local.write_bytes(content)
        (bucket / name).upload(local)
        kinds = []
        for path in (local, bucket / name):
            with pytest.raises(ClipFailure) as failure:
                list(read_frames(path))
            kinds.append((failure.value.kind, str(failure.value).replace(str(path), "")))
        assert kinds[0] == kinds[1]
    with pytest.raises(ClipFailure, match="is no file"):
        list(read_frames(bucket / "none.mp4"))


def test_a_network_at_fault_is_not_the_videos(bucket, wire, make_video, face_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PAUSES", (0.01,))
    monkeypatch.setattr("lipprep.stages.video.WHOLE", 1000)
    monkeypatch.setattr("lipprep.stages.video._AHEAD", 5000)
    line = wire()
    (bucket / "a.mp4").upload(make_video(tmp_path / "a.mp4", face_frames))
    frames = read_frames(bucket / "a.mp4")
    next(frames)
    line.cut()
    with pytest.raises(RemoteError, match="no answer from the store"):
        list(frames)


# Stores that refuse, and networks at fault


def test_a_missing_bucket_is_no_missing_file(s3_server):
    path = place("s3://lipprep-there-is-none/a/b.tar")
    for ask in (path.exists, path.is_file, path.stat, path.parent.entries, path.parent.files_below):
        with pytest.raises(RemoteError, match="there is no bucket s3://lipprep-there-is-none: create it"):
            ask()
    with pytest.raises(RemoteError, match="there is no bucket"):
        write_text(path, "x")


def test_missing_credentials_are_named(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match=r"credentials.*AWS_ACCESS_KEY_ID"):
        (bucket / "a").exists()


def test_a_login_that_has_ended_is_told_in_a_line(bucket, tmp_path):
    (tmp_path / "config").write_text("""[profile work]
sso_start_url = https://example.awsapps.com/start
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = reader
""")
    code = f"""
from lipprep.stages.remote import place
from lipprep.stages.store import RemoteError
try:
    place("{bucket}/a").exists()
except RemoteError as error:
    print(error)
"""
    unset = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(tmp_path), "AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "work"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{bucket}/a: your login has ended (")
    assert done.stdout.endswith("): run `aws sso login`, then run the same command again to go on\n")
    assert done.stderr == ""


def test_an_address_where_nobody_listens(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store, "_PAUSES", (0.01,))
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"no answer from the store .*http://127.0.0.1:9"):
        (bucket / "a").exists()
    assert time.monotonic() - began < 10


def test_a_server_that_says_nothing(bucket, monkeypatch):
    monkeypatch.setattr(store, "_FIRST", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for ask in ((bucket / "a").exists, bucket.entries):
            with pytest.raises(RemoteError, match="no answer from the store"):
                ask()


def test_the_first_question_is_asked_again_too(bucket, wire):
    line = wire(cuts=4, after=0)
    assert not (bucket / "a").exists() and line.broken == 4


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("AWS_PROFILE", "none", r"profile \(none\) could not be found: see to AWS_PROFILE"),
        ("AWS_DEFAULT_REGION", "no region!", "see to AWS_DEFAULT_REGION"),
        ("AWS_ENDPOINT_URL", "localhost:9000", "Invalid endpoint: localhost:9000: see to AWS_ENDPOINT_URL"),
    ],
)
def test_settings_at_fault_are_named(bucket, monkeypatch, setting, value, message):
    monkeypatch.setenv(setting, value)
    with pytest.raises(RemoteError, match=message):
        (bucket / "a").exists()


def test_a_way_that_is_not_secure_is_told_at_once(bucket, s3_server, monkeypatch):
    assert not (bucket / "a").exists()  # from here on, what passes is tried again
    monkeypatch.setattr(store, "_filesystems", {})
    monkeypatch.setattr(store, "_PAUSES", (300.0,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{s3_server}")
    for path in (bucket / "a", place(f"https://127.0.0.1:{s3_server}/a")):
        with pytest.raises(RemoteError, match=r"no secure way to the store.*AWS_CA_BUNDLE"):
            path.exists()


@pytest.fixture
def refusing(monkeypatch):
    """Makes a server that answers every request with an error of S3."""
    servers = []

    def make(status: int, code: str) -> list[str]:
        asked = []

        class Refuse(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.command)
                body = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_PUT = do_GET

            def log_message(self, *_):
                pass

        servers.append(server := http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        return asked

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied: ask for the right to list, read and write there"),
        (403, "SignatureDoesNotMatch", r"does not take these credentials .*because.: set AWS_ACCESS"),
        (400, "MalformedXML", "the store refuses .*because"),
    ],
)
def test_refusals_are_told_at_once(bucket, refusing, status, code, message):
    asked = refusing(status, code)
    with pytest.raises(RemoteError, match=message):
        (bucket / "a").read_range(0, 5)
    assert asked == ["GET"]
    with pytest.raises(RemoteError):
        (bucket / "a").exists()  # whose answer has no text


def test_a_web_server_that_refuses_is_told_without_the_password(bucket, refusing):
    pytest.importorskip("aiohttp")
    refusing(403, "AccessDenied")
    path = place(os.environ["AWS_ENDPOINT_URL"].replace("//", "//user:secret@")) / "a"
    with pytest.raises(RemoteError, match=r"access denied: .* right to read there") as told:
        path.read_range(0, 5)
    assert "user:***@" in str(told.value) and "secret" not in str(told.value)


def test_a_busy_store_is_asked_again(bucket, refusing, monkeypatch):
    monkeypatch.setattr(store, "_PAUSES", (0.01, 0.01))
    assert not (bucket / "a").exists()
    other = place(f"{bucket}-2")
    asked = refusing(503, "SlowDown")
    with pytest.raises(RemoteError, match="no answer from the store"):
        other.exists()
    assert len(asked) > 1


def test_errors_pass_from_process_to_process():
    error = pickle.loads(pickle.dumps(RemoteError("why")))
    assert str(error) == "why" and not isinstance(error, ValueError | OSError)


@pytest.mark.parametrize("size", [3_000_000, 40_000_000], ids=["one request", "parts"])
def test_cut_uploads_are_made_again(bucket, wire, tmp_path, monkeypatch, size):
    monkeypatch.setattr(store, "_PAUSES", (0.01,) * 4)
    content = np.random.default_rng(0).bytes(size)
    line = wire(cuts=5)
    assert not (bucket / "a").exists()
    with replacing(bucket / "a") as file:
        file.write(content)
    assert line.broken == 5
    assert (bucket / "a").read_bytes() == content
    assert left(bucket / "a") == []


@pytest.mark.parametrize("size", [3_000_000, 40_000_000], ids=["one request", "parts"])
def test_uploads_that_are_always_cut_leave_nothing(bucket, wire, tmp_path, monkeypatch, size):
    monkeypatch.setattr(store, "_PAUSES", (0.01,))
    line = wire(cuts=1000)
    write_text(bucket / "a", "before")
    with (
        pytest.raises(RemoteError, match=r"no answer from the store.*run the same command again"),
        replacing(bucket / "a") as file,
    ):
        file.write(bytes(size))
    assert line.broken > 1
    assert (bucket / "a").read_text() == "before"
    assert left(bucket / "a") == []


def test_only_what_is_wanted_is_fetched(bucket, wire):
    line = wire()
    with replacing(bucket / "a") as file:
        file.write(bytes(2_000_000))
    line.received = 0
    assert (bucket / "a").read_range(1_000_000, 1_000_100) == bytes(100)
    assert line.received < 5_000


def test_web_servers_are_read(serve, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    write_text(tmp_path / "w" / "a", "0123456789")
    folder = place(serve(Parts, tmp_path)) / "w"
    assert (folder / "a").read_text() == "0123456789" and (folder / "a").read_range(2, 4) == b"23"
    assert signature((folder / "a").stat())["size"] == 10 and not (folder / "b").is_file()
    assert folder.sizes(["a", "b"]) == {"a": 10}
    with pytest.raises(RemoteError, match=r"can be read only: write to a local folder or to a bucket \(s3://, "):
        write_text(folder / "a", "x")
    with pytest.raises(RemoteError, match="can be read only"):
        TarWriter(folder / "a.tar")
    with pytest.raises(RemoteError, match="can be read only"):
        (folder / "a").unlink()
    monkeypatch.setattr(store, "_FIRST", 0.1)
    with pytest.raises(RemoteError, match="no answer from the store"):
        place("http://127.0.0.1:9/x").exists()


def test_web_servers_that_send_no_parts_are_named(serve, tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "a").write_bytes(bytes(1000))
    path = place(serve(Quiet, tmp_path)) / "a"
    assert path.read_bytes() == bytes(1000)
    with pytest.raises(RemoteError, match="sends no parts of files"):
        path.read_range(2, 4)


def test_a_program_that_ends_says_nothing_of_sockets(bucket):
    code = f"""
from lipprep.stages.atomic import write_text
from lipprep.stages.remote import place
path = place("{bucket}/a")
write_text(path, "read")
print(path.read_text())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("read\n", "")
