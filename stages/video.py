"""Frames of a video, decoded with PyAV: the luma plane alone as gray, or BGR.

Half of the cost of a usual reader is the conversion to colour and back. The luma plane is what the camera
saw as gray; one look-up table brings it to the gray that a conversion through BGR would give.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lipprep.stages.failures import ClipFailure
from lipprep.stages.gray import gray_from_bgr, gray_from_luma

# Formats whose first plane is 8-bit luma. Others are converted before their luma is taken.
_LUMA_FORMATS = {f"yuv{j}{s}p" for j in ("", "j") for s in ("420", "422", "444", "440", "411", "410")} | {
    "nv12",
    "nv21",
    "nv16",
    "gray",
}
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_SEEK_BEYOND = 10.0  # seconds: a window that starts later is sought; decoding up to there costs under 60 ms
_SAME_RATE = 1e-3  # relative difference of frame rates below which frames are taken one for one


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says: size in pixels, frames a second, frames (0 if unsaid), length in seconds."""

    width: int
    height: int
    fps: float
    num_frames: int
    duration: float


def _open(path: Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    path = Path(path)
    if not path.is_file():
        raise ClipFailure("unreadable", f"{path} is no file: it was moved, or the manifest's root is wrong (--root)")
    if not path.stat().st_size:
        raise ClipFailure("unreadable", f"{path} is empty")
    try:
        # Only plain files: a playlist that calls itself a video must not open anything else.
        container = av.open(str(path.resolve()), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError) as error:
        raise ClipFailure("unreadable", f"{path} is not a video, or cut short: {_reason(error)}") from error
    stream = next(iter(container.streams.video), None)
    if stream is None:
        container.close()
        raise ClipFailure("no_video", f"{path} has no video stream")
    stream.thread_type = "NONE"  # one process a core; threads inside a clip cost
    return container, stream


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _rate(stream: av.video.stream.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return rate if rate else Fraction(25)


def probe(path: Path) -> VideoInfo:
    """Read a video's header. Raises ClipFailure (unreadable, no_video) where there is none."""
    container, stream = _open(path)
    with container:
        rate = float(_rate(stream))
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        context = stream.codec_context
        return VideoInfo(context.width, context.height, rate, stream.frames or round(duration * rate), duration)


def _bgr(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="bgr24")


class GrayFrame:
    """A gray frame, as good as an array (H, W) uint8, full range, whose pixels are converted when asked for.

    `frame[y0:y1, x0:x1]` converts that part alone, which is most of what a mouth crop saves; `numpy.asarray`
    and `frame[:]` convert all of it.
    """

    __slots__ = ("_full_range", "_luma", "shape")

    def __init__(self, frame: av.VideoFrame) -> None:
        if frame.format.name in _LUMA_FORMATS:
            self._full_range = frame.format.name.startswith("yuvj") or int(frame.color_range) == _FULL_RANGE
        elif frame.format.is_rgb:
            self._luma, self._full_range = gray_from_bgr(_bgr(frame)), True
            self.shape = self._luma.shape
            return
        else:  # deeper than 8 bits, or interleaved
            frame, self._full_range = frame.reformat(format="yuv420p"), int(frame.color_range) == _FULL_RANGE
        plane = frame.planes[0]
        # Planes may be padded; the view keeps the plane, and so the picture, alive.
        self._luma = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        self.shape = self._luma.shape

    def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
        luma = self._luma[part]
        return np.ascontiguousarray(luma) if self._full_range else gray_from_luma(luma)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


def _decoded(path: Path, container, stream, *, whole: bool) -> Iterator[av.VideoFrame]:
    """The frames in order of presentation; raises ClipFailure("truncated") where the file ends too early."""
    packets = frames = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ClipFailure("truncated", f"{path} is damaged at packet {packets}")
            packets += packet.size > 0
            for frame in packet.decode():
                frames += 1
                yield frame
    except av.FFmpegError as error:
        raise ClipFailure("truncated", f"{path} cannot be decoded beyond packet {packets}: {_reason(error)}") from error
    if whole and not frames:
        raise ClipFailure("unreadable", f"{path} holds no frame that can be decoded")
    if whole and packets < stream.frames:
        raise ClipFailure("truncated", f"{path} ends after {packets} of {stream.frames} frames")


def _numbered(path: Path, fps: float, first: int) -> Iterator[tuple[int, av.VideoFrame | None]]:
    """Pairs (frame number at `fps`, frame), from a number <= first on, and at last (number past the end, None).

    At another rate than the video's own, a number may come twice or not at all.
    """
    container, stream = _open(path)
    with container:
        rate, base = float(_rate(stream)), stream.time_base
        origin = stream.start_time or 0
        sought = first / fps > _SEEK_BEYOND
        by_count = abs(rate - fps) <= _SAME_RATE * fps and not sought
        if sought:
            # One second early: with B-frames a seek may land after the frame asked for.
            container.seek(int((first / fps - 1) / base) + origin, stream=stream)
        frames = _decoded(path, container, stream, whole=not sought)
        end = 0.0  # in frames at `fps`
        for count, frame in enumerate(frames):
            if by_count or frame.pts is None:
                position = count * (1.0 if by_count else fps / rate)
            else:
                position = float((frame.pts - origin) * base) * fps
            end = position + fps / rate
            yield math.ceil(position - 0.5), frame  # half a frame late still counts, half a frame early does not
        yield math.ceil(end - 0.5), None


def read_frames(
    path: Path, *, fps: float = 25.0, first: int = 0, last: int | None = None, color: bool = False
) -> Iterator[GrayFrame | np.ndarray]:
    """Yield frames `first` to `last` (exclusive; None: the end) of a video, as many of them as it has.

    Frames are counted at `fps`. A video of another rate is resampled by time: frame k is the one on screen
    at k / fps seconds, to half a frame. A frame is a GrayFrame, or with `color` an array (H, W, 3) BGR uint8
    (bit-identical to cv2.VideoCapture's). Raises ClipFailure: unreadable, no_video, truncated.
    """
    convert = _bgr if color else GrayFrame
    wanted = first
    held: av.VideoFrame | None = None  # the frame before, and its image once it was wanted
    image: GrayFrame | np.ndarray | None = None
    for number, frame in _numbered(path, fps, first):
        stop = number if last is None else min(number, last)
        while wanted < stop and (held or frame):  # no frame came for these numbers: the one before stays
            if held is None:
                held = frame
            if image is None:
                image = convert(held)
            yield image
            wanted += 1
        if frame is None or (last is not None and wanted >= last):
            return
        held, image = frame, None
        if number == wanted:
            image = convert(frame)
            yield image
            wanted += 1
