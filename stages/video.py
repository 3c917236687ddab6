"""Frames of a video, decoded with PyAV: the luma plane alone as gray, or BGR.

Half of the cost of a usual reader is the conversion to colour and back. The luma plane is what the camera
saw as gray; one look-up table brings it to the gray that a conversion through BGR would give.
"""

import contextlib
import io
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lipprep.stages.failures import ClipFailure
from lipprep.stages.gray import gray_from_bgr, gray_from_luma
from lipprep.stages.remote import WHOLE, RemotePath, place
from lipprep.stages.untrusted import printable

# Demuxers for the files that people call videos, and sound files, to be told as such. Playlists (concat, hls,
# dash) are not among them: one that calls itself a video would open other files.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,wav,mp3,aac,flac"
# Formats whose first plane is 8-bit luma. Others take the way through BGR.
_LUMA_FORMATS = {f"yuv{j}{s}p" for j in ("", "j") for s in ("420", "422", "444", "440", "411", "410")} | {
    "nv12",
    "nv21",
    "nv16",
    "gray",
}
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_LATE_FRAMES, _LATE_SHARE = 2, 0.02  # of the told duration: writers round it, or leave the last frame's length out
SEEK_BEYOND = 10.0  # seconds: a window that starts later is sought; decoding up to there costs under 60 ms
_SAME_RATE = 1e-3  # relative difference of frame rates below which frames are taken one for one
_UNSTEADY = 1.0  # frames that one may be early or late by its time and be counted all the same
MAX_PIXELS = 8192 * 4320  # of a frame: 8K of cinema. A header of a few bytes can claim any size
MAX_FRAMES = 100_000  # of a video read whole: over an hour at 25 fps
_AHEAD = 8 << 20  # bytes a request, of a remote file that is too large to be fetched whole
_HEADER = 1 << 20  # the same of one whose header alone is read
_MAX_HELD = 60.0  # seconds that one frame may be shown. It can claim to last for years
_BOUNDED = {"max_pixels": str(MAX_PIXELS)}
# Decoders run while a file is opened, too. Before PyAV 18, options for them crash on mpg and flv.
_PROBING = _BOUNDED if int(av.__version__.partition(".")[0]) >= 18 else {}
# To learn what a header does not tell, FFmpeg decodes frames while it opens a file: a tenth of what a clip of a second
# costs. The headers of these files tell all that is needed of H.264, the order of frames among it.
_TELLING = {".mp4", ".mov", ".m4v"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says: size in pixels as displayed, frames a second, frames, length in seconds.

    Frames and length are 0 where the header has neither. `start` is when the first frame is shown, in seconds from
    where the file begins: with its sound perhaps.
    """

    width: int
    height: int
    fps: float
    num_frames: int
    duration: float
    start: float = 0.0


def open_video(
    path: Path | RemotePath, *, header: bool = False
) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """A video that is open, and its stream of pictures; `header`: no more than its first frame will be read.

    Raises ClipFailure (unreadable, no_video) where there is none.
    """
    path, name = place(path), printable(path)
    try:
        size = _size(path)
        if size is None:  # pipes and devices among them, on which reading could wait for ever
            raise ClipFailure(
                "unreadable", f"{name} is no file: it was moved, or misspelt, or a manifest's root (--root) is wrong"
            )
        if not size:
            raise ClipFailure("unreadable", f"{name} is empty")
        options = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
        if isinstance(path, RemotePath):
            options["protocol_whitelist"] = "none"  # FFmpeg is handed the bytes
            whole, ahead = (_HEADER, _HEADER) if header else (WHOLE, _AHEAD)
            source = io.BytesIO(path.read_range(0, size)) if size <= whole else path.open("rb", buffering=ahead)
        else:
            source = str(path.resolve())
        container = _probed(path.suffix.lower(), source, options)
    except ClipFailure:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise ClipFailure("unreadable", f"{name} is not a video, or cut short: {_reason(error)}") from error
    except OSError as error:
        raise ClipFailure("unreadable", f"{name} cannot be opened: {_reason(error)}") from error
    try:
        stream = container.streams.best("video")  # not the first: that may be a cover picture
        if stream is None:
            raise ClipFailure("no_video", f"{name} has no video stream")
        if stream.codec_context is None:
            raise ClipFailure("unreadable", f"{name} is of a codec that is not known here: convert it to H.264")
        if not stream.width * stream.height:
            raise ClipFailure(
                "unreadable", f"{name} holds no frame that can be decoded, or larger ones than 8192 x 4320 pixels"
            )
        if stream.width * stream.height > MAX_PIXELS:
            raise ClipFailure(
                "unreadable",
                f"{name} has frames of {stream.width} x {stream.height} pixels, at most {MAX_PIXELS} (8192 x 4320) "
                "are read: scale it down",
            )
    except ClipFailure:
        container.close()
        raise
    stream.codec_context.options = _BOUNDED  # frames may grow on the way
    stream.thread_type = "NONE"  # one process a core; threads inside a clip cost
    return container, stream


def _probed(suffix: str, source: str | io.IOBase, options: dict[str, str]) -> av.container.InputContainer:
    """An open container, whose frames were not decoded for it where its header tells enough."""
    if _PROBING and suffix in _TELLING:
        decoder, demuxer = {"skip_frame": "all"}, {"probesize": "32"}  # no frame; a packet at most
        with contextlib.suppress(av.FFmpegError):  # another kind of file that is called so, or a damaged one
            container = av.open(source, format="mp4", options=_PROBING | decoder, container_options=options | demuxer)
            if _tells(container.streams.best("video")):
                return container
            container.close()
        if not isinstance(source, str):
            source.seek(0)
    return av.open(source, options=_PROBING, container_options=options)


def _tells(stream: av.video.stream.VideoStream | None) -> bool:
    """Whether a stream, of which the header alone was read, is H.264 and lacks nothing."""
    if stream is None or stream.codec_context is None or stream.codec_context.name != "h264":
        return False
    return bool(stream.width and stream.height and stream.average_rate and stream.frames)


def _size(path: Path | RemotePath) -> int | None:
    """The bytes of a file that ends; None where there is none. One question: of a store each takes its time."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _rate(stream: av.video.stream.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return rate if rate else Fraction(25)


def probe(path: Path | RemotePath) -> VideoInfo:
    """Read a video's header. Raises ClipFailure (unreadable, no_video) where there is none.

    Of a remote one, RemoteError where its store does not answer, which says nothing of the video.
    """
    container, stream = open_video(path, header=True)
    with container:
        turns = 0
        with contextlib.suppress(av.FFmpegError):  # PyAV tells the display matrix of frames alone
            turns = next((_turns(frame) for frame in container.decode(stream)), 0)
        rate = float(_rate(stream))
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        size = stream.codec_context.width, stream.codec_context.height
        width, height = size[::-1] if turns % 2 else size
        begins = (container.start_time or 0) / av.time_base
        start = begins if stream.start_time is None else float(stream.start_time * stream.time_base)
        return VideoInfo(width, height, rate, stream.frames or round(duration * rate), duration, start - begins)


def _turns(frame: av.VideoFrame) -> int:
    """Quarter turns counter-clockwise that bring a frame upright; a phone held upright films lying frames."""
    return 0 if frame.rotation % 90 else frame.rotation // 90 % 4


def _bgr(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="bgr24"), _turns(frame)))


class GrayFrame:
    """A gray frame, as good as an array (H, W) uint8, full range, whose pixels are converted when asked for.

    `frame[y0:y1, x0:x1]` converts that part alone, which is most of what a mouth crop saves; `numpy.asarray`
    and `frame[:]` convert all of it.
    """

    __slots__ = ("_full_range", "_luma", "shape")

    def __init__(self, frame: av.VideoFrame) -> None:
        name = frame.format.name
        if name in _LUMA_FORMATS:
            # Conversions take gray as full range whatever the stream says, and YUV as it says.
            self._full_range = name == "gray" or name.startswith("yuvj") or int(frame.color_range) == _FULL_RANGE
            plane = frame.planes[0]
            # Planes may be padded; the view keeps the plane, and so the picture, alive.
            luma = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            turns = _turns(frame)
            self._luma = np.rot90(luma, turns) if turns else luma
        else:  # RGB, deeper than 8 bits, or interleaved
            self._luma, self._full_range = gray_from_bgr(_bgr(frame)), True
        self.shape = self._luma.shape

    def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
        luma = self._luma[part]
        return np.ascontiguousarray(luma) if self._full_range else gray_from_luma(luma)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


def _decoded(path: Path, container, stream, *, whole: bool) -> Iterator[av.VideoFrame]:
    """The frames in order of presentation; raises ClipFailure where the file ends too early, or they change size."""
    packets = frames = 0
    size = None
    ends = {s.index: 0 for s in container.streams}  # in each stream's own time base
    try:
        for packet in container.demux():  # all streams: a file may end with its sound
            shown = packet.dts if packet.pts is None else packet.pts
            if shown is not None:
                end = shown + (packet.duration or 0)
                if end > ends.get(packet.stream.index, 0):
                    ends[packet.stream.index] = end
            if packet.stream.index != stream.index:  # packet.stream_index is 0 for those that flush
                continue
            if packet.is_corrupt:
                raise ClipFailure("truncated", f"{printable(path)} is damaged at packet {packets}")
            packets += packet.size > 0
            for frame in packet.decode():
                frames += 1
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise ClipFailure(
                        "unreadable",
                        f"{printable(path)} changes from {size[0]} x {size[1]} to {frame.width} x {frame.height} "
                        f"pixels at frame {frames - 1}: convert it to one size",
                    )
                yield frame
    except av.FFmpegError as error:
        raise ClipFailure(
            "truncated", f"{printable(path)} cannot be decoded beyond packet {packets}: {_reason(error)}"
        ) from error
    if whole and not frames:
        raise ClipFailure("unreadable", f"{printable(path)} holds no frame that can be decoded")
    if whole:
        seconds = {s.index: float(ends[s.index] * s.time_base) for s in container.streams if ends[s.index]}
        _check_end(path, container, stream, packets, {stream.index: 0.0, **seconds})


def _check_end(path: Path, container, stream, packets: int, ends: dict[int, float]) -> None:
    """Raise ClipFailure("truncated") where a file read to its end has less than its header tells, by count or time.

    Containers that count no frames, Matroska aside, tell nothing, or what was guessed from the size of the file.
    A transport stream is made of packets of one length, though, and a cut seldom falls between two.
    """
    if container.format.name == "mpegts" and _ends_inside_packet(path):
        raise ClipFailure("truncated", f"{printable(path)} ends inside a packet, after {packets} frames")
    frame, end = 1 / float(_rate(stream)), ends[stream.index]
    fewer = packets < stream.frames
    # The count alone is not enough. In mp4 it includes the frames that an edit list leaves out, as the duration does
    # not; in avi, whose duration shrinks with the file, those that were skipped when it was recorded.
    told = stream.frames * frame
    if "mp4" in container.format.name and stream.duration is not None:
        told = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    elif "matroska" in container.format.name and stream.duration is None:
        # Where the header is silent, a duration guessed from the bit rate is noted for the streams, too.
        fewer, told, end = True, (container.duration or 0) / av.time_base, max(ends.values())
    if fewer and end < told - _LATE_FRAMES * frame - _LATE_SHARE * told:
        raise ClipFailure(
            "truncated", f"{printable(path)} ends after {packets} frames, {end:.2f} s, before its header says"
        )


def _ends_inside_packet(path: Path | RemotePath) -> bool:
    """Whether a transport stream that begins with whole packets does not end with one."""
    with path.open("rb") as file:
        head = file.read(1024)
    for length, sync in ((188, 0), (192, 4), (204, 0)):  # plain; with times, of Blu-ray; with Reed-Solomon codes
        if head[sync::length] == b"\x47" * len(head[sync::length]):
            return path.stat().st_size % length > 0
    return False  # a recording that began in mid-packet may end in one


def _numbered(path: Path, fps: float, first: int) -> Iterator[tuple[int, av.VideoFrame | None]]:
    """Pairs (frame number at `fps`, frame), from a number <= first on, and at last (number past the end, None).

    At another rate than the video's own, or where frames come at other times than that tells, a number may come twice
    or not at all.
    """
    container, stream = open_video(path)
    with container:
        rate, base = float(_rate(stream)), stream.time_base
        origin = stream.start_time or 0
        sought = first / fps > SEEK_BEYOND
        by_count = abs(rate - fps) <= _SAME_RATE * fps and not sought
        if sought:
            # One second early: with B-frames a seek may land after the frame asked for.
            try:
                container.seek(int((first / fps - 1) / base) + origin, stream=stream)
            except (av.FFmpegError, OverflowError) as error:
                raise ClipFailure(
                    "truncated", f"{printable(path)} cannot be read from {first / fps:.0f} s on: {_reason(error)}"
                ) from error
        frames = _decoded(path, container, stream, whole=not sought)
        end = 0.0  # in frames at `fps`
        # AVI has no times: FFmpeg counts its packets, which may be in another order than the frames.
        avi, ticks, per_second = container.format.name == "avi" and not sought, base.numerator, base.denominator
        for count, frame in enumerate(frames):
            steady, position, pts = count * fps / rate, None, frame.pts
            if pts is not None and not (avi and stream.codec_context.has_b_frames):
                position = (pts - origin) * ticks / per_second * fps  # rounded once; fractions would take longer
                # A header's rate may be that of a recorder which has not kept to it: its frames go by their times.
                by_count = by_count and abs(position - steady) <= _UNSTEADY
            if by_count or position is None:
                position = float(count) if by_count else steady
            end = position + fps / rate
            yield math.ceil(position - 0.5), frame  # half a frame late still counts, half a frame early does not
        yield math.ceil(end - 0.5), None


def _check_length(path: Path, total: int, held: int, fps: float, longest: int) -> None:
    """Raise ClipFailure("too_long") for `total` frames of a video read whole, or `held` that repeat one frame."""
    if total > longest:
        what = f"has more than {longest} frames at {fps:g} fps"
    elif held > _MAX_HELD * fps:
        what = f"shows one frame for {held / fps:.0f} s"
    else:
        return
    remedy = "list what is wanted of it in windows (start, num_frames), or cut it into parts"
    raise ClipFailure("too_long", f"{printable(path)} {what}: {remedy}")


def read_frames(
    path: Path | RemotePath,
    *,
    fps: float = 25.0,
    first: int = 0,
    last: int | None = None,
    color: bool = False,
    longest: int = MAX_FRAMES,
) -> Iterator[GrayFrame | np.ndarray]:
    """Yield frames `first` to `last` (exclusive; None: the end) of a video, as many of them as it has.

    Frames are counted at `fps`. A video of another rate, or of one that varies, is resampled by time: frame k is the
    one on screen at k / fps seconds, to half a frame. A frame is a GrayFrame, or with `color` an array (H, W, 3) BGR
    uint8 (of 8-bit video bit-identical to cv2.VideoCapture's), turned upright by the file's display matrix.

    Raises ClipFailure: unreadable, no_video, truncated; and too_long where `last` is None and the video has more than
    `longest` frames, or shows one of them for over a minute.
    """
    convert = _bgr if color else GrayFrame
    wanted = first
    held: av.VideoFrame | None = None  # the frame before, and its image once it was wanted
    image: GrayFrame | np.ndarray | None = None
    for number, frame in _numbered(path, fps, first):
        if last is None:
            _check_length(path, number - first, number - wanted, fps, longest)
        stop = number if last is None else min(number, last)
        while wanted < stop and (held or frame):  # no frame came for these numbers: the one before stays
            if held is None:
                held = frame
            if image is None:
                image = convert(held)
            yield image
            wanted += 1
        if frame is None:
            return
        held, image = frame, None
        if number == wanted and (last is None or wanted < last):
            image = convert(frame)
            yield image
            wanted += 1
        if last is not None and wanted >= last:  # before the next frame is asked for: it may be damaged
            return


class SoundFrames:
    """Frames of `read_frames` up to where the video fails: those before are as good as in a whole one.

    Once they are consumed, `end` is the number of the frame that would have been next, and `failure` says why it is
    not there; None where video or window ended as they should.
    """

    def __init__(self, frames: Iterable[GrayFrame | np.ndarray], *, first: int = 0) -> None:
        self._frames = frames
        self.end = first
        self.failure: ClipFailure | None = None

    def __iter__(self) -> Iterator[GrayFrame | np.ndarray]:
        try:
            for frame in self._frames:
                self.end += 1
                yield frame
        except ClipFailure as failure:
            self.failure = failure

    def lacks(self, start: int | None, num_frames: int | None) -> ClipFailure | None:
        """The failure, if it took frames from a window of `num_frames` from `start` on (None: the whole video)."""
        whole = start is None or num_frames is None
        return self.failure if whole or start + num_frames > self.end else None
