"""The page of `lipprep demo-app`, served by a process of its own and used in a browser."""

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser

PATIENCE = 120  # seconds until what must happen has not happened


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server may put files for a while."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def url(serve_page, temporary: Path) -> Iterator[str]:
    """The address of a server, which must leave nothing behind."""
    with serve_page(temporary) as address:
        yield address


def drop(page, path: Path) -> object:
    """Drop a file on the page; what came of it."""
    page.locator("input[type=file]").first.set_input_files(path)
    shown = page.locator("section.reading", has=page.get_by_role("heading", name=path.name, exact=True))
    shown.wait_for()
    return shown


def test_a_clip_shows_its_face_what_the_network_saw_and_the_words(page, url, spoken_clip, untrained, temporary):
    from lipprep.train.app_page import seen_by_network
    from lipprep.train.predict import load_reader

    page.goto(url)
    shown = drop(page, spoken_clip)
    reader = load_reader(untrained, device="cpu")
    (face,) = reader.read_video(spoken_clip)
    (window,) = face.windows
    rows = [row.split() for row in shown.locator("table tbody tr").all_inner_texts()]
    assert rows == [[word, f"{100 * share:.1f}", "%"] for word, share in window.words]
    assert shown.locator(".answer").inner_text() == f"{window.words[0][0]}? Not sure"

    pictures = shown.locator("img")
    assert pictures.count() == 2
    decoded = "all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))"
    assert pictures.evaluate_all(decoded) == [88, 1200]
    source = pictures.first.get_attribute("src")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as played:
        frames = []
        for n in range(played.n_frames):
            played.seek(n)
            frames.append(np.array(played))
    assert np.array_equal(frames, seen_by_network(face.mouth_TSS, reader))
    page.wait_for_function("document.querySelector('.faces video').readyState >= 2")
    assert shown.locator("video").evaluate("video => video.videoWidth") > 200

    facts = dict(zip(shown.locator("dt").all_inner_texts(), shown.locator("dd").all_inner_texts(), strict=True))
    assert facts == {
        "Video": "256 × 256 pixels, 25 frames a second, 1.16 seconds",
        "Frames used": "29, taken at 25 a second",
        "Windows read": "1",
        "Faces found": "1, with landmarks in 29 of 29 frames",
        "Confidence": "calibrated on the validation split, with a temperature of 1.50",
    }
    assert not [path for path in temporary.rglob("*") if path.is_file()]


def test_what_cannot_be_read_says_why_on_the_page(page, url, spoken_clip, make_video, temporary, tmp_path):
    page.goto(url)
    (tmp_path / "rubbish.mp4").write_text("not a video at all")
    (tmp_path / "empty.mp4").touch()
    samples = np.zeros(8000, np.int16).tobytes()
    head = b"RIFF" + (36 + len(samples)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    form = b"\1\0\1\0" + (8000).to_bytes(4, "little") + (16000).to_bytes(4, "little") + b"\2\0\x10\0"
    (tmp_path / "sound.wav").write_bytes(head + form + b"data" + len(samples).to_bytes(4, "little") + samples)
    noise = np.random.default_rng(0).integers(0, 60, (64, 64), np.uint8)
    make_video(tmp_path / "noise.mp4", [noise] * 5)
    make_video(tmp_path / "long.mp4", [noise] * 130, fps=1)
    reasons = {
        "rubbish.mp4": "it is not a video, or cut short",
        "empty.mp4": "it is empty",
        "sound.wav": "it has no video stream",
        "noise.mp4": "no face was found",
        "long.mp4": "it lasts 130 seconds, and this page reads up to 120",
    }
    for name, reason in reasons.items():
        shown = drop(page, tmp_path / name)
        assert shown.get_by_role("paragraph").inner_text().startswith(f"It was not read: {reason}")
        assert str(temporary) not in shown.inner_text()
    drop(page, spoken_clip).locator(".answer").wait_for()  # and the page goes on
    assert not [path for path in temporary.rglob("*") if path.is_file()]


def test_a_recording_of_the_camera_is_read(page, url):
    page.context.grant_permissions(["camera"])
    page.goto(url)
    page.get_by_role("tab", name="Camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_title("start recording").click()
    page.wait_for_function("start => document.querySelector('video').currentTime > start + 4", arg=now(page))
    page.get_by_title("stop recording").click()
    problem = page.locator("section.problem")
    assert problem.get_by_role("heading").inner_text() == "Your recording"
    assert "no face was found" in problem.get_by_role("paragraph").inner_text()  # so it was decoded


def now(page) -> float:
    return page.evaluate("document.querySelector('video').currentTime")


def test_a_phone_shows_the_whole_page(page, url, spoken_clip):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(url)
    drop(page, spoken_clip)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_of_another_site_gives_nothing(page, url, temporary, faults):
    """Not even blindly, as a form or an image of another site asks."""
    page.goto(url.replace("127.0.0.1", "localhost"))  # to a browser, another site
    send = """async (url) => {
        const form = new FormData();
        form.append("files", new File(["evil"], "evil.mp4"));
        await fetch(url + "/gradio_api/upload", { method: "POST", mode: "no-cors", body: form });
        const body = JSON.stringify({ data: [{ path: "/etc/hostname" }], fn_index: 0, session_hash: "evil" });
        await fetch(url + "/gradio_api/queue/join", { method: "POST", mode: "no-cors", body });
    }"""
    page.evaluate(send, url)
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert len(faults) == 2 and all("403" in fault for fault in faults)
    faults.clear()


def test_a_port_in_use_is_told(url, untrained):
    port = url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "lipprep", "demo-app", "--checkpoint", str(untrained), "--port", port],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: port {port} of 127.0.0.1: in use") and "--port 0" in done.stderr
