"""What the page of `lipprep demo-app` shows of a video: what the network saw, and which words it reads in it.

All of it is one piece of HTML with the pictures inside, so that no file is left anywhere.

Shapes: T frames, D the two coordinates, H and W a frame's height and width, S the side of a mouth crop, in pixels.
"""

import base64
import io
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from html import escape
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np

from lipprep.stages.failures import ClipFailure
from lipprep.stages.untrusted import printable
from lipprep.stages.video import SoundFrames, VideoInfo, probe, read_frames
from lipprep.train.predict import FaceReading, Reader
from lipprep.train.timeline import draw_timeline
from lipprep.train.utterances import utterances

MAX_SECONDS = 120  # of a video: a page is for looking, `lipprep predict` reads for hours
SHOWN_SECONDS = 10  # of it that play on the page: its pictures travel inside it
COUNT = 5  # words that are shown of one window
_SIDE = 480  # pixels: the longer side of the picture of the faces
_COLOURS = ("#3987e5", "#d95926", "#199e70", "#c98500", "#9085e9", "#d55181")  # of the faces, one after another


def show(reader: Reader, video: Path, *, name: str) -> str:
    """The HTML of what `reader` reads in `video`, which its owner calls `name`.

    Raises ClipFailure where the video cannot be read, is longer than two minutes or shows no face.
    """
    info = probe(video)
    if info.duration > MAX_SECONDS:
        raise ClipFailure(
            "too_long",
            f"it lasts {info.duration:.0f} seconds, and this page reads up to {MAX_SECONDS}: cut it, or read it with "
            "`lipprep predict`",
        )
    faces = reader.read_video(video, all_faces=True, count=COUNT)
    if not faces:
        raise ClipFailure("no_face", "no face in any frame")
    read = []
    for face in faces:
        heading = f"<h3>{_dot(face)} Face {face.face}</h3>" if len(faces) > 1 else ""
        read.append(f"<div class='face'>{_mouth_figure(reader, face)}<div>{heading}{_words(reader, face)}</div></div>")
    pictures = _faces_figure(reader, video, faces)
    return (
        f"<section class='reading'><h2>{escape(printable(name))}</h2><div>{pictures}</div>"
        f"<div>{''.join(read)}{_facts(reader, info, faces)}</div>{_timeline_figure(reader, faces)}</section>"
    )


def problem(name: str, reason: str) -> str:
    """The HTML of a message: why nothing was read in the video called `name`."""
    message = f"<h2>{escape(printable(name))}</h2><p>It was not read: {escape(printable(reason))}.</p>"
    return f"<section class='reading problem' role='alert'>{message}</section>"


def animation(images_TSS: np.ndarray, fps: float) -> bytes:
    """Gray images (T, S, S) uint8 as one that plays, to the bit: an animated PNG."""
    from PIL import Image

    first, *others = map(Image.fromarray, images_TSS)
    file = io.BytesIO()
    more = {"save_all": True, "append_images": others, "duration": 1000 / fps, "loop": 0} if others else {}
    first.save(file, "PNG", **more)
    return file.getvalue()


def seen_by_network(mouth_TSS: np.ndarray, reader: Reader) -> np.ndarray:
    """The part of mouth crops (T, S, S) uint8 that the network is given: the middle that `eval_batch` cuts."""
    size = reader.options.crop_size
    first = (mouth_TSS.shape[1] - size) // 2
    return mouth_TSS[:, first : first + size, first : first + size]


def faces_video(frames: Iterable[np.ndarray], faces: Sequence[FaceReading], fps: float) -> bytes:
    """Frames (H, W, 3) BGR uint8, cut to where the faces are, with their landmarks drawn: H.264 in MP4."""
    file = io.BytesIO()
    container = stream = box = None
    for t, frame in enumerate(frames):
        if container is None:
            H, W = frame.shape[:2]
            box = _box_round(faces, H, W)
            x0, y0, x1, y1 = box
            zoom = min(4.0, _SIDE / max(x1 - x0, y1 - y0))
            width, height = (max(2, round(zoom * side) // 2 * 2) for side in (x1 - x0, y1 - y0))
            container = av.open(file, "w", format="mp4")
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "23", "preset": "veryfast"}
        picture = cv2.resize(
            frame[y0:y1, x0:x1], (width, height), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
        )
        for face in faces:
            if 0 <= t - face.start < len(face.points_TKD):
                points_KD = (face.points_TKD[t - face.start] - [x0, y0] + 0.5) * [
                    width / (x1 - x0),
                    height / (y1 - y0),
                ] - 0.5
                _draw(picture, points_KD, _bgr(face))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
    assert container is not None, "a video whose faces were found has frames"
    container.mux(stream.encode())
    container.close()
    return file.getvalue()


def _draw(picture: np.ndarray, points_KD: np.ndarray, colour: tuple[int, int, int]) -> None:
    for x, y in points_KD[np.isfinite(points_KD).all(axis=1)]:
        cv2.circle(picture, (round(16 * x), round(16 * y)), 16 * 3, (255, 255, 255), -1, cv2.LINE_AA, shift=4)
        cv2.circle(picture, (round(16 * x), round(16 * y)), 16 * 2, colour, -1, cv2.LINE_AA, shift=4)


def _box_round(faces: Sequence[FaceReading], H: int, W: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the part of the frame with all of the faces, and half a face's size round them."""
    points_ND = np.concatenate([face.points_TKD.reshape(-1, 2) for face in faces])
    points_ND = points_ND[np.isfinite(points_ND).all(axis=1)]
    if not len(points_ND):  # crops of a fixed box need no landmarks
        return 0, 0, W, H
    low, high = points_ND.min(axis=0), points_ND.max(axis=0)
    margin = 0.3 * (high - low).max()
    x0, y0 = np.clip(np.floor(low - margin), 0, [W - 2, H - 2]).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(high + margin), [x0 + 2, y0 + 2], [W, H]).astype(int).tolist()
    return x0, y0, x1, y1


def _colour(face: FaceReading) -> str:
    return _COLOURS[face.face % len(_COLOURS)]


def _bgr(face: FaceReading) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(_colour(face)[1:])
    return blue, green, red


def _dot(face: FaceReading) -> str:
    return f"<span class='dot' style='background:{_colour(face)}'></span>"


def _inside(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _faces_figure(reader: Reader, video: Path, faces: Sequence[FaceReading]) -> str:
    frames = SoundFrames(read_frames(video, fps=reader.fps, color=True))  # up to where those are that were read
    frames = islice(frames, round(SHOWN_SECONDS * reader.fps))
    source = _inside(faces_video(frames, faces, reader.fps), "video/mp4")
    caption = (
        "The faces and their landmarks" if len(faces) > 1 else "The face, and the 68 landmarks found in each frame"
    )
    if not reader.crop.needs_landmarks:
        caption = "The video"
    if max(face.start + len(face.points_TKD) for face in faces) > SHOWN_SECONDS * reader.fps:
        caption += f": the first {SHOWN_SECONDS} seconds"
    return (
        f"<figure class='faces'><video src='{source}' autoplay muted loop playsinline controls "
        f"aria-label='{caption}'></video><figcaption>{caption}.</figcaption></figure>"
    )


def _mouth_figure(reader: Reader, face: FaceReading) -> str:
    mouth_TSS = seen_by_network(face.mouth_TSS[: round(SHOWN_SECONDS * reader.fps)], reader)
    side = mouth_TSS.shape[1]
    plays = _inside(animation(mouth_TSS, reader.fps), "image/png")
    still = _inside(animation(mouth_TSS[len(mouth_TSS) // 2][None], reader.fps), "image/png")
    return (
        "<figure class='mouth'><picture>"
        f"<source media='(prefers-reduced-motion: reduce)' srcset='{still}'>"
        f"<img src='{plays}' width='{side}' height='{side}' alt='The mouth crop, as it plays'></picture>"
        f"<figcaption>All that the network sees: {side} × {side} gray pixels.</figcaption></figure>"
    )


def _timeline_figure(reader: Reader, faces: Sequence[FaceReading]) -> str:
    if not any(face.windows for face in faces):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.png"
        calibrated = reader.temperature is not None
        draw_timeline(faces, path, fps=reader.fps, title="", threshold=reader.threshold, calibrated=calibrated)
        source = _inside(path.read_bytes(), "image/png")
    return (
        f"<figure class='timeline' tabindex='0'><img src='{source}' "
        "alt='The words and their confidence over time, and below them the mouth'></figure>"
    )


def _words(reader: Reader, face: FaceReading) -> str:
    if not face.windows:
        return "<p>It is seen in too few frames to be read.</p>"
    if len(face.windows) == 1:
        (window,) = face.windows
        best = escape(printable(window.words[0][0]))
        answer = best if window.known else f"{best}? <small>Not sure</small>"
        rows = [f"<th scope='row'>{escape(printable(word))}</th>{_bar(share)}" for word, share in window.words]
        table = f"<table class='words'><caption>The likeliest words</caption>{_rows(rows)}</table>"
        return f"<p class='answer'>{answer}</p>{_abstains(reader, window.known)}{table}"
    rows, sure = [], True
    for one in utterances(face.windows, fps=reader.fps):
        best = escape(printable(one.words[0][0]))
        sure &= one.word is not None
        word = best if one.word is not None else f"<span class='unsure'>{best}?</span>"
        rows.append(
            f"<td>{one.start:.2f} to {one.stop:.2f}</td><th scope='row'>{word}</th><td>{_percent(one.confidence)}</td>"
        )
    table = (
        "<table class='words'><thead><tr><th scope='col'>Seconds</th><th scope='col'>Word</th>"
        f"<th scope='col'>Confidence</th></tr></thead>{_rows(rows)}</table>"
    )
    scrolls = f"<div class='scrolls' tabindex='0' role='region' aria-label='The words over time'>{table}</div>"
    return f"{scrolls}{_abstains(reader, sure)}"


def _bar(share: float) -> str:
    return f"<td class='bar'><span style='width:{100 * share:.1f}%'></span></td><td>{_percent(share)}</td>"


def _rows(rows: Sequence[str]) -> str:
    return f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody>"


def _abstains(reader: Reader, sure: bool) -> str:
    if sure:
        return ""
    least = _percent(reader.threshold)
    return f"<p>Below a confidence of {least} the reader abstains: such words have a question mark.</p>"


def _facts(reader: Reader, info: VideoInfo, faces: Sequence[FaceReading]) -> str:
    told = info.num_frames > 0  # recordings of a browser tell neither, and FFmpeg makes up a rate
    rate = f"{info.fps:.4g} frames a second, {info.duration:.2f} seconds" if told else "of an untold frame rate"
    seen = [np.isfinite(face.points_TKD[:, 0, 0]) for face in faces]
    windows = sum(len(face.windows) for face in faces)
    landmarks = f"{sum(int(s.sum()) for s in seen)} of {sum(map(len, seen))} frames"
    rows = {
        "Video": f"{info.width} × {info.height} pixels, {rate}",
        "Frames used": f"{max(face.start + len(face.points_TKD) for face in faces)}, taken at {reader.fps:g} a second",
        "Windows read": f"{windows} of up to {reader.window} frames" if windows > 1 else f"{windows}",
        "Faces found": f"{len(faces)}, with landmarks in {landmarks}",
        "Confidence": (
            "not calibrated: the network's own, which need not be how often it is right"
            if reader.temperature is None
            else f"calibrated on the validation split, with a temperature of {reader.temperature:.2f}"
        ),
    }
    if not reader.crop.needs_landmarks:
        rows["Faces found"] = "not looked for: the crops are of a fixed box"
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{text}</dd>' for term, text in rows.items())}</dl>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
