import json
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.train import camera
from lipprep.train.predict import Reader, WindowReading


def call(*args, code: int = 0):
    result = CliRunner().invoke(main, ["predict", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def model(trained_run):
    return ["--checkpoint", trained_run, "--device", "cpu"]


@pytest.fixture(scope="module")
def video(make_video, portrait, tmp_path_factory):
    """Two faces, 35 frames."""
    frame = np.full((264, 520, 3), 90, np.uint8)
    frame[4:260, 4:260], frame[4:196, 300:492] = portrait, cv2.resize(portrait, (192, 192))
    return make_video(tmp_path_factory.mktemp("v") / "two.mp4", [frame] * 35)


def test_json_has_a_line_for_each_window_of_each_face(model, video):
    lines = [json.loads(line) for line in call(video, *model, "--all-faces", "--json", "-k", 2).stdout.splitlines()]
    assert [(line["face"], line["from"], line["to"]) for line in lines] == [
        (face, start, stop) for face in (0, 1) for start, stop in ((0, 1.16), (0.2, 1.36), (0.24, 1.4))
    ]
    for line in lines:
        assert (line["video"], line["calibrated"], len(line["words"])) == (str(video), True, 2)
        assert line["word"] in (None, line["words"][0]["word"])
    known = call(video, *model, "--json", "--threshold", 0, "--step", 2).stdout.splitlines()
    assert len(known) == 4 and all(json.loads(line)["word"] for line in known)


def test_the_table_has_utterances_and_outputs_are_written(model, video, tmp_path):
    outputs = [f"--{name}={tmp_path / 'new' / file}" for name, file in
               (("video", "o.mp4"), ("timeline", "o.png"), ("subtitles", "o.srt"))]  # fmt: skip
    out = call(video, *model, "--threshold", 1, "-k", 2, *outputs).stdout.splitlines()
    assert "calibrated" in out[0] and "Below 100.0 % a word counts as unknown" in out[0]
    assert out[1] == str(video)
    start, stop, confidence, percent, word, *others = out[2].split()
    assert (start, stop, percent, word, len(out)) == ("0.00", "1.40", "%", "-", 6)
    assert f"({others[0][1:]} {confidence}," == " ".join(others[:2])  # the likeliest is listed all the same
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["o.mp4", "o.png", "o.srt"]
    with av.open(str(tmp_path / "new/o.mp4")) as made:
        assert sum(1 for _ in made.decode(video=0)) == 35
    assert (tmp_path / "new/o.srt").read_text() == ""  # nothing is known


def test_what_does_not_go_together_or_cannot_be_written(model, video, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "mine.srt").write_text("my words")
    for args, message in [
        ([], "Name a video, a folder of them or a URL, or a camera: --camera 0"),
        ([video, "--camera", 0], "not both"),
        ([video, "--seconds", 3], "goes with --camera"),
        (["--camera", 0, "--video", tmp_path / "o.mp4"], "record the camera first"),
        (["--camera", 98], "no camera 98"),
        ([video, video, "--timeline", tmp_path / "o.png"], "is one file, of one video, but there are 2"),
        ([video, "--video", tmp_path / "o.avi"], "should end in .mp4"),
        ([video, "--video", video], "is the video that is read"),
        ([video, "--subtitles", tmp_path / "mine.srt"], "mine.srt exists: add --replace"),
        ([video, "--timeline", tmp_path / "file" / "o.png"], "file"),
        ([video, "--timeline", tmp_path], "is a directory"),
    ]:
        result = CliRunner().invoke(main, ["predict", *map(str, [*args, *model])])
        assert result.exit_code in (1, 2) and message in result.output, result.output
        assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine.srt"]
    assert (tmp_path / "mine.srt").read_text() == "my words"


def test_ctrl_c_promises_nothing_that_is_kept(model, video, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "read_video", pressed)
    assert call(video, *model, code=130).stderr.endswith("\nStopped.\n")


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        heard.sample_rate = 8000
        container.mux(stream.encode(heard))
        container.mux(stream.encode(None))


def test_what_is_no_video_of_a_face_is_told_and_the_others_go_on(model, video, make_video, tmp_path):
    make_video(tmp_path / "dark.mp4", [np.zeros((120, 160), np.uint8)] * 5)
    write_sound(tmp_path / "sound.wav")
    (tmp_path / "empty.mp4").touch()
    bad = {"dark.mp4": "no face was found", "sound.wav": "has no video stream", "empty.mp4": "is empty"}
    bad["no.mp4"] = "is no file: it was moved, or misspelt"
    result = call(*(tmp_path / name for name in bad), video, *model, "--json", "-k", 1, code=1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for line, (name, message) in zip(lines, bad.items(), strict=False):
        assert line["video"] == str(tmp_path / name) and message in line["error"]
        assert f"{name}" in result.stderr and message in result.stderr
    assert [line["video"] for line in lines[4:]] == [str(video)] * 3


@pytest.mark.cluster
def test_a_phone_held_upright_at_a_rate_that_varies_in_4k(model, portrait, tmp_path):
    upright = np.full((3840, 2160), 90, np.uint8)
    upright[600:1400, 400:1200] = cv2.resize(cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY), (800, 800))
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 600)
        lying = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(upright)), format="gray")
        for ticks in (0, 10, 20, 80, 300):
            lying.pts, lying.time_base = ticks, Fraction(1, 600)
            container.mux(stream.encode(lying))
        container.mux(stream.encode(None))
    # The display matrix of a quarter turn, as phones write it.
    content = (tmp_path / "v.mp4").read_bytes()
    plain, turned = (struct.pack(">9i", *(v << 16 for v in m), 1 << 30) for m in (_PLAIN, _TURNED))
    assert content.count(plain) == 2  # of the whole file, and of the track
    (tmp_path / "v.mp4").write_bytes(content[::-1].replace(plain[::-1], turned[::-1], 1)[::-1])
    (line,) = [json.loads(line) for line in call(tmp_path / "v.mp4", *model, "--json").stdout.splitlines()]
    assert line["to"] == pytest.approx(0.6, abs=0.1) and line["words"]


_PLAIN, _TURNED = (1, 0, 0, 0, 1, 0, 0, 0), (0, 1, 0, -1, 0, 0, 0, 0)


class Filmed:
    """A camera that shows one picture 40 times."""

    def __init__(self, picture):
        self.picture, self.shown, self.released = picture, 0, False

    def read(self):
        self.shown += 1
        return self.shown <= 40, self.picture

    def release(self):
        self.released = True


@pytest.fixture
def filmed(portrait, monkeypatch):
    filmed, frames = Filmed(portrait), camera.camera_frames
    monkeypatch.setattr(camera, "open_camera", lambda number: filmed)
    clock = {"clock": lambda: filmed.shown / 25}
    monkeypatch.setattr(camera, "camera_frames", lambda *args, **more: frames(*args, **more, **clock))
    return filmed


def test_a_camera_prints_words_as_they_come(model, filmed):
    lines = [json.loads(line) for line in call("--camera", 2, *model, "--json").stdout.splitlines()]
    assert [(line["video"], line["from"]) for line in lines] == [("camera 2", start) for start in (0, 0.2, 0.4)]
    assert filmed.released


def test_ctrl_c_ends_a_camera(model, filmed, monkeypatch):
    def pressed(reader, frames, **how):
        next(frames)
        yield 0, WindowReading(0, 29, (("up", 0.9), ("down", 0.1)), True)
        yield 0, WindowReading(5, 34, (("up", 0.8), ("down", 0.2)), True)
        yield 1, WindowReading(5, 34, (("down", 0.3),), False)
        raise KeyboardInterrupt

    monkeypatch.setattr(camera, "read_camera", pressed)
    assert call("--camera", 0, *model).stdout.splitlines()[1:] == [
        "      0.00     1.16   90.0 %  up        (down 10.0)",  # and again, which is not told
        "  face 1     0.20     1.36   30.0 %  -         (down 30.0)",
    ]
    assert filmed.released


def test_a_camera_that_shows_no_face_is_told(model, filmed, monkeypatch):
    monkeypatch.setattr(camera, "read_camera", lambda *_, **__: iter(()))
    assert "camera 0: nothing was read, as no face was seen" in call("--camera", 0, *model).stderr
