"""What was read of a video, back onto it: subtitle files, and the video with words, faces and landmarks drawn in."""

import contextlib
import functools
import html
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.failures import ClipFailure
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable
from lipprep.stages.video import SoundFrames, open_video, read_frames
from lipprep.train.metrics import warn
from lipprep.train.predict import LONGEST, FaceReading
from lipprep.train.utterances import Utterance, utterances

_COPIED = {"aac", "ac3", "alac", "eac3", "flac", "mp2", "mp3", "opus"}  # sound that an mp4 takes as it is
_LEAST_RATE = 16_000  # samples a second: an mp4 takes no mp3 of less
_COLOURS = [(80, 220, 80), (60, 170, 255), (255, 180, 60), (220, 120, 255), (80, 230, 230)]  # BGR, of the faces


def write_subtitles(said: Iterable[Utterance], path: Path) -> None:
    """Write the words that are known as SubRip, or as WebVTT where `path` ends so.

    Raises OSError where they cannot be written.
    """
    web = path.suffix.lower() == ".vtt"
    lines = ["WEBVTT", ""] if web else []
    known = [one for one in said if one.word is not None]
    for n, one in enumerate(known, 1):
        start, stop = (_clock(seconds, "." if web else ",") for seconds in (one.start, one.stop))
        lines += [str(n), f"{start} --> {stop}", html.escape(one.word, quote=False) if web else _unmarked(one.word), ""]
    write_text(path, "\n".join(lines))


def _unmarked(word: str) -> str:
    """Return `word` without what SubRip's players take for a time or markup, which nothing escapes there.

    >>> _unmarked("<b>a{x}-->")
    '‹b>a(x}->'
    """
    return word.replace("-->", "->").translate(str.maketrans("<{", "‹("))


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds.

    >>> _clock(3723.5, ",")
    '01:02:03,500'
    """
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def write_video(
    video: Path | RemotePath,
    readings: Sequence[FaceReading],
    path: Path,
    *,
    fps: float,
    watched: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write the video as H.264 at `fps` with its own sound, and on each face its box, its landmarks and its word.

    The frames go through `watched`, as in `Reader.read_video`. Raises OSError where it cannot be written, and
    ClipFailure where the video cannot be read any more.
    """
    marks = [_Marks(reading, fps, _COLOURS[n % len(_COLOURS)]) for n, reading in enumerate(readings)]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(av.open(stack.enter_context(replacing(path)), "w", format="mp4"))
        container, pictures = open_video(video)
        stack.enter_context(container)
        stream, sound = None, None
        whole = read_frames(video, fps=fps, color=True, longest=LONGEST)
        for number, frame in enumerate(watched(SoundFrames(whole))):
            if stream is None:  # players take the first stream for the pictures
                stream, sound = _new_stream(out, frame, fps), _Sound(container, pictures, out)
            sound.copy(number / fps)
            for mark in marks:
                mark.draw(frame, number)
            frame = frame[: stream.height, : stream.width]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="bgr24")
            picture.pts = number
            out.mux(stream.encode(picture))
        if stream is None or sound is None:
            raise ClipFailure("unreadable", f"{printable(video)} has no frames any more")
        out.mux(stream.encode(None))
        sound.copy(None)


def _new_stream(out: av.container.OutputContainer, frame: np.ndarray, fps: float) -> av.video.stream.VideoStream:
    rate = Fraction(fps).limit_denominator(1001)
    stream = out.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
    stream.height, stream.width = (side // 2 * 2 for side in frame.shape[:2])  # 4:2:0 has no odd sides
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = 1 / rate
    return stream


class _Sound:
    """The sound of a video, copied into another packet by packet, as its pictures are written; else encoded as AAC."""

    def __init__(
        self,
        source: av.container.InputContainer,
        pictures: av.video.stream.VideoStream,
        out: av.container.OutputContainer,
    ) -> None:
        self._out, self._encoded = out, None
        self._packets: Iterator[av.Packet] = iter(())
        stream = source.streams.best("audio")
        if stream is None or stream.codec_context is None:
            return
        self._shift = (pictures.start_time or 0) * pictures.time_base  # seconds: pictures are written from 0 on
        name, rate = stream.codec_context.codec.canonical_name, stream.codec_context.sample_rate
        if name in _COPIED and rate >= _LEAST_RATE:
            self._stream = out.add_stream_from_template(stream)
        else:
            self._stream = self._encoded = out.add_stream("aac", rate=rate)
        self._packets = source.demux(stream)

    def copy(self, seconds: float | None) -> None:
        """Write what is heard up to a time; None: all that is left."""
        try:
            for packet in self._packets:
                self._write(packet)
                if seconds is not None and packet.pts is not None and packet.pts * packet.time_base >= seconds:
                    return
            if self._encoded is not None and seconds is None:
                self._out.mux(self._encoded.encode(None))
        except av.FFmpegError as error:
            warn(f"the sound is written up to a part of it that cannot be copied ({error.strerror})")
            self._packets = iter(())

    def _write(self, packet: av.Packet) -> None:
        if self._encoded is not None:
            for heard in packet.decode():
                if heard.pts is not None:  # in samples: packets of AVI are counted, which is too coarse for parts
                    heard.pts = round((heard.pts * heard.time_base - self._shift) * heard.sample_rate)
                    heard.time_base = Fraction(1, heard.sample_rate)
                self._out.mux(self._encoded.encode(heard))
        elif packet.size:
            shift = round(self._shift / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = self._stream
            self._out.mux(packet)


class _Marks:
    """What is drawn of one face."""

    def __init__(self, reading: FaceReading, fps: float, colour: tuple[int, int, int]) -> None:
        self._reading, self._fps, self._colour = reading, fps, colour
        self._said = deque(utterances(reading.windows, fps=fps))

    def draw(self, frame_HWC: np.ndarray, number: int) -> None:
        """Draw onto a frame, in place; frames come in order."""
        while self._said and self._said[0].stop * self._fps <= number:
            self._said.popleft()
        t = number - self._reading.start
        if not 0 <= t < len(self._reading.points_TKD):
            return
        points = self._reading.points_TKD[t]
        height, width = frame_HWC.shape[:2]
        unit = max(1, round(max(height, width) / 700))  # pixels of a line
        if np.isfinite(points).all():
            (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
            margin = 0.12 * (x1 - x0)
            corners = [(round(x0 - margin), round(y0 - margin)), (round(x1 + margin), round(y1 + margin))]
            cv2.rectangle(frame_HWC, *corners, self._colour, unit, cv2.LINE_AA)
            for x, y in points.tolist():
                cv2.circle(frame_HWC, (round(x), round(y)), unit, self._colour, -1, cv2.LINE_AA)
            below, middle = corners[1][1] + 2 * unit, (x0 + x1) / 2
        else:
            below, middle = height, width / 2
        if not self._said or self._said[0].start * self._fps > number:
            return
        one = self._said[0]
        text = "-" if one.word is None else f"{one.word}  {100 * one.confidence:.0f} %"
        label_HW = _label(text, max(14, round(height / 22)))
        h, w = (min(a, b) for a, b in zip(label_HW.shape, (height, width), strict=True))
        x, y = (int(np.clip(a, 0, b)) for a, b in ((middle - w / 2, width - w), (below, height - h)))
        part = frame_HWC[y : y + h, x : x + w]
        part[:] = np.maximum(part // 3, label_HW[:h, :w, None])


@functools.lru_cache(maxsize=64)
def _label(text: str, size: int) -> np.ndarray:
    """White letters on black, (H, W) uint8: OpenCV's own have no accents, and matplotlib's font has most alphabets."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf", size)
    left, _, right, _ = font.getbbox(text)
    margin = size // 3
    image = Image.new("L", (round(right - left) + 2 * margin, round(1.2 * size) + margin))
    ImageDraw.Draw(image).text((margin - left, margin // 2), text, font=font, fill=255)
    return np.asarray(image)
