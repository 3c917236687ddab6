import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from lipprep.stages import video
from lipprep.stages.failures import ClipFailure
from lipprep.stages.video import SoundFrames, probe, read_frames


def numbered(count: int, size: int = 64) -> list[np.ndarray]:
    """Frames that tell their number by their brightness."""
    return [np.full((size, size), 20 + 5 * n, np.uint8) for n in range(count)]


def numbers(frames) -> list[int]:
    return [round((float(np.asarray(f).mean()) - 20) / 5) for f in frames]


def test_color_frames_are_those_of_opencv(golden):
    path = next((golden / "crops/videos").rglob("*.mp4"))
    capture, expected = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        expected.append(read[1])
    assert np.array_equal(list(read_frames(path, color=True)), expected)


def test_luma_is_close_to_opencvs_gray(golden):
    for path in (golden / "crops/videos").rglob("*.mp4"):
        exact = np.stack([cv2.cvtColor(f, cv2.COLOR_BGR2GRAY) for f in read_frames(path, color=True)])
        luma = np.stack(list(read_frames(path)))
        assert luma.shape == exact.shape == (29, 256, 256)
        assert np.abs(luma.astype(int) - exact)[:, 60:200, 60:200].mean() < 0.7


def test_a_window_is_a_part_of_the_whole(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", numbered(30))
    assert numbers(read_frames(path)) == list(range(30))
    assert numbers(read_frames(path, first=7, last=12)) == [7, 8, 9, 10, 11]
    assert numbers(read_frames(path, first=25, last=99)) == [25, 26, 27, 28, 29]
    assert numbers(read_frames(path, first=40, last=50)) == []


def test_a_window_deep_in_a_long_video_is_sought(make_video, tmp_path):
    frames = [np.full((32, 32), 20 + 10 * (n // 25 % 20), np.uint8) for n in range(20 * 25)]
    path = make_video(tmp_path / "long.mp4", frames)
    whole = list(read_frames(path))
    part = list(read_frames(path, first=370, last=405))
    assert len(part) == 35
    assert np.array_equal(np.stack(part), np.stack(whole[370:405]))


@pytest.mark.parametrize("fps", [10, 24, 30, 50, 60])
def test_other_frame_rates_are_resampled_by_time(make_video, tmp_path, fps):
    path = make_video(tmp_path / "v.mp4", numbered(40), fps=fps)
    shown = numbers(read_frames(path, fps=25))
    assert abs(len(shown) - 40 * 25 / fps) <= 1
    # Frame k is the one on screen at k / 25 s, to half a frame of either rate.
    late = [k / 25 - n / fps for k, n in enumerate(shown)]  # seconds since frame n came on screen
    assert min(late) >= -0.5 / 25 - 1e-6 and max(late) <= 1 / fps + 0.5 / 25 + 1e-6


def test_times_count_where_a_video_does_not_keep_to_its_rate(tmp_path):
    frames = numbered(30, 32)
    shown = [n for n in range(15) for _ in range(2)] + list(range(15, 30))  # at 50, then at 25 a second
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)  # which the header repeats
        stream.width, stream.height, stream.pix_fmt = 32, 32, "gray"
        stream.codec_context.time_base = Fraction(1, 1000)
        for tick, number in zip([*range(0, 600, 20), *range(600, 1200, 40)], shown, strict=True):
            frame = av.VideoFrame.from_ndarray(frames[number], format="gray")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(tmp_path / "v.mkv").fps == 25
    read = numbers(read_frames(tmp_path / "v.mkv"))
    assert len(read) == 30
    assert max(abs(number - k) for k, number in enumerate(read)) <= 1


@pytest.mark.parametrize("fps", [25, 50])
def test_frames_of_avi_are_counted(make_video, tmp_path, fps):
    path = make_video(tmp_path / "v.avi", numbered(30), fps=fps)  # H.264, in another order than it is shown
    shown = range(0, 30, fps // 25)
    assert np.abs(np.subtract(numbers(read_frames(path)), shown)).max() <= 1


def test_padded_planes_and_odd_sizes(make_video, tmp_path):
    frames = [np.full((50, 70), 90, np.uint8)] * 3
    assert [f.shape for f in read_frames(make_video(tmp_path / "v.mp4", frames))] == [(50, 70)] * 3


def test_a_part_of_a_gray_frame_is_that_part_of_the_whole(golden):
    frame = next(read_frames(next((golden / "crops/videos").rglob("*.mp4"))))
    assert np.array_equal(frame[30:90, 200:], np.asarray(frame)[30:90, 200:])


def test_probe(make_video, tmp_path):
    info = probe(make_video(tmp_path / "v.mp4", numbered(10, 48), fps=30))
    assert (info.width, info.height, info.num_frames, round(info.fps)) == (48, 48, 10, 30)


def failure(path) -> str:
    with pytest.raises(ClipFailure) as error:
        list(read_frames(path))
    assert path.name in str(error.value)
    return error.value.kind


def test_rubbish_is_named(make_video, tmp_path):
    whole = make_video(tmp_path / "whole.mp4", [np.random.default_rng(0).integers(0, 255, (128, 128), np.uint8)] * 25)
    assert failure(tmp_path / "absent.mp4") == "unreadable"
    (tmp_path / "empty.mp4").touch()
    assert failure(tmp_path / "empty.mp4") == "unreadable"
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(20000))
    assert failure(tmp_path / "noise.mp4") == "unreadable"
    (tmp_path / "text.mp4").write_text("no video at all")
    assert failure(tmp_path / "text.mp4") == "unreadable"
    (tmp_path / "headless.mp4").write_bytes(whole.read_bytes()[:2000])
    assert failure(tmp_path / "headless.mp4") == "unreadable"


def test_a_cut_file_whose_header_survived_is_truncated(make_video, tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (128, 128), np.uint8) for _ in range(25)]
    moved = make_video(tmp_path / "faststart.mp4", frames, options={"movflags": "faststart"})
    data = moved.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    assert len(list(read_frames(moved))) == 25
    assert failure(tmp_path / "cut.mp4") == "truncated"


def test_sound_alone_is_no_video(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(32000))
    assert failure(tmp_path / "a.wav") == "no_video"


@pytest.mark.parametrize("folder", ["", "absolute"])
def test_a_playlist_opens_nothing_else(make_video, tmp_path, folder):
    where = f"{tmp_path}/" if folder else ""
    make_video(tmp_path / "v.mp4", numbered(5))
    make_video(tmp_path / "v.ts", numbered(5))
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{where}v.mp4'\n")
    assert failure(tmp_path / "concat.mp4") == "unreadable"
    segment = f"#EXTINF:1,\n{where}v.ts\n"
    for name in ("hls.mp4", "hls.m3u8"):
        (tmp_path / name).write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{segment}#EXT-X-ENDLIST\n")
        assert failure(tmp_path / name) == "unreadable"


KINDS = {
    "mp4": "libx264",
    "mov": "libx264",
    "m4v": "libx264",
    "mkv": "libx264",
    "webm": "libvpx",
    "avi": "mpeg4",
    "mpg": "mpeg1video",
    "ts": "libx264",
    "flv": "flv",
    "wmv": "msmpeg4v3",
}


@pytest.mark.parametrize("suffix", KINDS)
def test_every_usual_container_is_read_whole(make_video, tmp_path, suffix):
    path = make_video(tmp_path / f"v.{suffix}", numbered(30), codec=KINDS[suffix])
    assert np.abs(np.subtract(numbers(read_frames(path)), range(30))).max() <= 1  # the cheap codecs blur


def opencv_frame(path) -> np.ndarray:
    capture = cv2.VideoCapture(str(path))
    found, frame = capture.read()
    assert found
    return frame


def mux(path, streams, *, sound: str | None = None) -> None:
    """Write (codec, pixel format, times in ms, {option: value}) as the video streams of a file, of noise.

    `sound` is the codec of 20 s of silence, if wanted; it is the first stream.
    """
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        opened = []
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000 * 20), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 48000
            voice = container.add_stream(sound, rate=48000, layout="mono")
        for codec, pixels, _, options in streams:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            if codec not in ("mpeg1video", "mpeg4"):  # which know few rates
                stream.codec_context.time_base = Fraction(1, 1000)
            opened.append(stream)
        for stream, (_, pixels, times, _) in zip(opened, streams, strict=True):
            for time in times:
                noise = rng.integers(0, 256, (48, 64), np.uint8)
                noise[:, :32] = np.arange(0, 256, 8)
                frame = av.VideoFrame.from_ndarray(noise, format="gray").reformat(format=pixels)
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                container.mux(stream.encode(frame))
        for stream in opened:
            container.mux(stream.encode())
        if sound:
            container.mux(voice.encode(silence))
            container.mux(voice.encode())


def steady(count):
    return [40 * n for n in range(count)]


MATRICES = {  # (a, b, c, d) of x' = ax + cy, y' = bx + dy
    0: (1, 0, 0, 1),
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


@pytest.mark.parametrize("degrees", MATRICES)
def test_a_phones_video_is_turned_upright(make_video, tmp_path, degrees):
    lying = np.full((48, 64, 3), 40, np.uint8)
    lying[:16, :20] = 220
    content = bytearray(make_video(tmp_path / "v.mp4", [lying] * 3).read_bytes())
    a, b, c, d = (value * 0x10000 for value in MATRICES[degrees])
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content)
    expected = opencv_frame(path)
    assert expected.shape == ((64, 48, 3) if degrees % 180 else (48, 64, 3))
    assert np.array_equal(next(read_frames(path, color=True)), expected)
    gray = next(read_frames(path))
    assert gray.shape == expected.shape[:2]
    assert np.abs(np.asarray(gray).astype(int) - cv2.cvtColor(expected, cv2.COLOR_BGR2GRAY)).max() <= 3
    assert np.array_equal(gray[10:30, 5:], np.asarray(gray)[10:30, 5:])
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize(
    ("codec", "pixels", "options"),
    [
        ("ffv1", "gray", {}),
        ("ffv1", "gray", {"color_range": "tv"}),
        ("ffv1", "gray10le", {}),
        ("libx264", "yuv420p10le", {}),
        ("ffv1", "yuv420p10le", {}),
        ("ffv1", "yuv420p", {"color_range": "pc"}),
        ("libx264", "yuv420p", {"color_range": "pc"}),
        ("mjpeg", "yuvj420p", {"color_range": "pc"}),
        ("ffv1", "yuv420p", {}),
        ("ffv1", "bgr0", {}),
    ],
)
def test_gray_is_opencvs_for_every_range_and_depth(tmp_path, codec, pixels, options):
    mux(tmp_path / "v.mkv", [(codec, pixels, steady(3), options)])
    gray = np.asarray(next(read_frames(tmp_path / "v.mkv"))).astype(int)
    assert np.abs(gray - cv2.cvtColor(opencv_frame(tmp_path / "v.mkv"), cv2.COLOR_BGR2GRAY)).max() <= 3


def test_a_cover_picture_is_not_the_video(tmp_path):
    mux(tmp_path / "v.mkv", [("mjpeg", "yuvj420p", [0], {}), ("libx264", "yuv420p", steady(12), {})])
    assert len(list(read_frames(tmp_path / "v.mkv"))) == 12


def edited(path, *, start: float, length: float):
    """Shorten an mp4 by its edit list, to `length` seconds from `start`."""
    content = bytearray(path.read_bytes())
    ticks = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    at = content.index(b"elst") + 12
    before = struct.unpack_from(">i", content, at + 4)[0]
    struct.pack_into(">Ii", content, at, round(1000 * length), before + round(ticks * start))
    (path.parent / "edited.mp4").write_bytes(content)
    return path.parent / "edited.mp4"


@pytest.mark.parametrize(("start", "length", "count"), [(0, 0.4, 10), (0.4, 0.8, 20), (1.2, 0.4, 10), (0, 1.6, 40)])
def test_an_edit_list_does_not_truncate(tmp_path, start, length, count):
    mux(tmp_path / "v.mp4", [("libx264", "yuv420p", steady(40), {"g": "10"})])
    path = edited(tmp_path / "v.mp4", start=start, length=length)
    capture = cv2.VideoCapture(str(path))
    assert sum(1 for _ in iter(lambda: capture.read()[0], False)) == count
    assert len(list(read_frames(path))) == count


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "flv"])
def test_a_cut_file_without_an_index_is_truncated(tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    mux(path, [(KINDS[suffix], "yuv420p", steady(40), {})])
    content = path.read_bytes()
    assert len(list(read_frames(path))) == 40
    path.write_bytes(content[: len(content) // 2])
    assert failure(path) == "truncated"


@pytest.mark.parametrize("sound", [None, "pcm_s16le", "aac"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_uneven_times_and_longer_sound_do_not_truncate(tmp_path, suffix, sound):
    path = tmp_path / f"v.{suffix}"
    times = np.random.default_rng(0).integers(20, 400, 30).cumsum().tolist()
    mux(path, [(KINDS[suffix], "yuv420p", times, {})], sound=sound)
    assert len(list(read_frames(path))) >= 30


def test_frames_skipped_by_the_recorder_do_not_truncate(tmp_path):
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in (*range(10), *range(20, 30)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64), 5 * number, np.uint8), format="gray")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(tmp_path / "v.avi").num_frames == 30
    assert len(list(read_frames(tmp_path / "v.avi"))) == 30  # the tenth stays until the next one that is there


def damaged(path, packet: int):
    """The same file with noise in one packet of its video."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        at, size = packets[packet].pos, packets[packet].size
    content = bytearray(path.read_bytes())
    content[at : at + size] = b"\xff" * size
    (path.parent / f"damaged{path.suffix}").write_bytes(content)
    return path.parent / f"damaged{path.suffix}"


def test_frames_before_the_damage_are_sound(make_video, tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64), np.uint8) for _ in range(30)]
    whole = make_video(tmp_path / "v.avi", noise, codec="ffv1")
    path = damaged(whole, 20)
    with pytest.raises(ClipFailure, match="packet"):
        list(read_frames(path))
    frames = SoundFrames(read_frames(path, first=5, last=29), first=5)
    read = [np.asarray(f) for f in frames]
    assert frames.end == 20 and np.array_equal(read, [np.asarray(f) for f in read_frames(whole, first=5, last=20)])
    assert frames.failure.kind == "truncated"
    assert frames.lacks(5, 15) is None and frames.lacks(-3, 9) is None
    assert frames.lacks(6, 15) is frames.lacks(25, 4) is frames.lacks(None, None) is frames.failure
    frames = SoundFrames(read_frames(path, last=20))
    assert len(list(frames)) == 20 and frames.failure is None and frames.lacks(0, 29) is None


def test_a_cut_transport_stream_is_truncated(make_video, tmp_path):
    rng = np.random.default_rng(0)
    path = make_video(tmp_path / "v.ts", [rng.integers(0, 255, (64, 64), np.uint8) for _ in range(30)])
    content = path.read_bytes()
    assert len(list(read_frames(path))) == 30
    path.write_bytes(content[: len(content) // 2 // 188 * 188 + 100])
    assert failure(path) == "truncated"
    path.write_bytes(content[100:])  # one that begins in mid-packet is as good as it gets
    assert len(list(read_frames(path))) >= 29


def test_frames_that_change_size_are_named(make_video, tmp_path):
    for name, size in (("a.mpg", 64), ("b.mpg", 96)):
        make_video(tmp_path / name, numbered(9, size), codec="mpeg1video")
    path = tmp_path / "both.mpg"
    path.write_bytes((tmp_path / "a.mpg").read_bytes() + (tmp_path / "b.mpg").read_bytes())
    frames = SoundFrames(read_frames(path))
    assert {f.shape for f in frames} == {(64, 64)} and frames.end >= 8
    assert frames.failure.kind == "unreadable" and "from 64 x 64 to 96 x 96 pixels" in str(frames.failure)


def test_an_unknown_codec_is_named(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", numbered(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert failure(path) == "unreadable"
    with pytest.raises(ClipFailure, match="codec"):
        probe(path)


@pytest.mark.parametrize("fps", [0.001, 0.01])
def test_a_frame_that_lasts_for_ever_is_too_long(make_video, tmp_path, fps):
    path = make_video(tmp_path / "v.mkv", numbered(4), fps=fps)
    frames = SoundFrames(read_frames(path))
    assert len(list(frames)) <= 1 and frames.failure.kind == "too_long"
    assert len(list(read_frames(path, first=40, last=50))) == 10


@pytest.mark.parametrize(
    ("codec", "options", "shape"),
    [
        ("libx264", {"bf": "0"}, {}),
        ("libx264", {"bf": "3", "b_strategy": "0"}, {}),
        ("libx264", {"x264-params": "bframes=16:b-adapt=0"}, {}),
        ("libx264", {"x264-params": "bframes=8:b-adapt=0:b-pyramid=strict:open-gop=1:keyint=12"}, {}),
        ("libx264", {"x264-params": "intra-refresh=1:bframes=0:keyint=10"}, {}),
        ("libx264", {"bf": "3"}, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        ("libx264", {"bf": "3"}, {"movflags": "negative_cts_offsets"}),
        ("mpeg4", {"bf": "2"}, {}),
    ],
)
def test_frames_do_not_depend_on_what_is_decoded_while_a_file_is_opened(tmp_path, monkeypatch, codec, options, shape):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options=shape) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64), np.uint8), "gray")))
        container.mux(stream.encode())
    frames, told = [np.asarray(f) for f in read_frames(path)], probe(path)
    monkeypatch.setattr(video, "_TELLING", set())
    assert len(frames) == 40
    np.testing.assert_array_equal(frames, [np.asarray(f) for f in read_frames(path)])
    assert told == probe(path)
