import av
import cv2
import numpy as np
import pytest

from lipprep.train import timeline
from lipprep.train.predict import FaceReading, WindowReading
from lipprep.train.subtitles import write_video
from lipprep.train.timeline import draw_timeline

FPS = 10


def reading(face, start, T, *, words, known=True):
    """A face whose points form a box of 20 pixels, a window every 10 frames."""
    points = np.full((T, 68, 2), (40 + 60 * face, 30), np.float32)
    points[:, 0] -= 10
    points[:, 1] += 10
    points[3] = np.nan
    windows = [
        WindowReading(start + 10 * n, start + 10 * n + 20, ((word, 0.6), ("other", 0.4)), known)
        for n, word in enumerate(words)
    ]
    return FaceReading(face, start, points, np.full((-(-T // 5), 96, 96), 200, np.uint8), tuple(windows), 5)


@pytest.mark.parametrize(
    ("T", "rows", "count"), [(30, 1, 2), (150, 2, 2), pytest.param(1500, 12, 1, marks=pytest.mark.cluster)]
)
def test_a_timeline_has_rows_of_ten_seconds_or_more(T, rows, count, tmp_path):
    words = ["wörter", "<b>$_^{", "x"]
    faces = [reading(0, 0, T, words=words), reading(1, 5, T - 5, words=words, known=False)][:count]
    draw_timeline(faces, tmp_path / "t.png", fps=FPS, title="v$_.mp4", threshold=0.5, calibrated=False)
    picture = cv2.imread(str(tmp_path / "t.png"))
    assert picture.shape[:2] == (round(100 * (0.8 + 2.3 * rows * count)), 1200)
    blue, gray, mouths = ((picture == colour).all(axis=2).sum() > 500 for colour in ((180, 119, 31), 176, 200))
    assert (blue, gray, mouths) == (True, count == 2, True)


def test_a_timeline_of_many_faces_has_the_largest_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "_PANELS", 3)
    faces = [reading(0, 0, 150, words=["a"]), reading(1, 100, 50, words=["b"]), reading(2, 0, 50, words=["c"])]
    draw_timeline(faces, tmp_path / "t.png", fps=FPS, title="", threshold=None, calibrated=True)
    assert cv2.imread(str(tmp_path / "t.png")).shape[0] == round(100 * (0.8 + 2.3 * 3))  # two rows, and one


def boxes(frame):
    """Whether the box of each face is drawn: green, then orange."""
    b, g, r = (frame[:56, :, channel].astype(int) for channel in range(3))
    return bool(((g - r > 60) & (g - b > 60)).any()), bool(((r - b > 60) & (r - g > 40)).any())


@pytest.mark.parametrize(
    ("name", "codec", "rate", "kept"),
    [("v.mkv", "aac", 8000, "aac"), ("v.mkv", "pcm_s16le", 8000, "aac"), ("v.avi", "mp3", 48000, "mp3")],
)
def test_a_video_gets_words_and_keeps_its_sound(name, codec, rate, kept, tmp_path):
    source = tmp_path / name
    with av.open(str(source), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=FPS), container.add_stream(codec, rate=rate)
        pictures.width, pictures.height, pictures.pix_fmt = 161, 120, "yuv444p"
        for t in range(30):
            picture = av.VideoFrame.from_ndarray(np.full((120, 161, 3), 90, np.uint8), format="bgr24")
            container.mux(pictures.encode(picture))
            samples = np.full((1, rate // FPS), 100 * t, np.int16)
            heard = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            heard.sample_rate, heard.pts = rate, samples.size * t
            container.mux(sound.encode(heard))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    faces = [reading(0, 0, 30, words=["one"]), reading(1, 10, 20, words=["two"])]
    write_video(source, faces, tmp_path / "o.mp4", fps=FPS)
    with av.open(str(tmp_path / "o.mp4")) as made:
        assert [stream.type for stream in made.streams] == ["video", "audio"]
        assert made.streams.audio[0].codec_context.codec.canonical_name == kept
        assert float(made.streams.audio[0].duration * made.streams.audio[0].time_base) == pytest.approx(3, abs=0.3)
        frames = [frame.to_ndarray(format="bgr24") for frame in made.decode(video=0)]
    assert len(frames) == 30 and frames[0].shape == (120, 160, 3)
    assert [boxes(frames[t]) for t in (0, 3, 12, 13)] == [(True, False), (False, False), (True, True), (True, False)]
    # The word of the first face is there until second 2, of the other from 1 to 3.
    lettered = [bool((frame[46:].min(axis=2) > 150).any()) for frame in (frames[5], frames[25])]
    assert lettered == [True, True] and not (frames[25][46:, :60].min(axis=2) > 150).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.mp4", name]
