"""Reading from a camera, as it films: frames by the clock, every face tracked, a window read every few frames."""

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.gray import gray_from_bgr
from lipprep.stages.landmarks.faces import FaceTracker
from lipprep.train.predict import STEP, Reader, WindowReading

_HELD = 0.5  # seconds that a frame is repeated for want of another; after a longer gap reading begins anew
_NOWHERE = np.full((68, 2), np.nan, np.float32)
_BEHIND = 60  # frames that wait for the reader, two seconds of most cameras; then they are let go


class Capture(Protocol):
    """What gives frames, as cv2.VideoCapture does: (H, W, 3) BGR uint8, one after another, waiting for the next."""

    def read(self) -> tuple[bool, np.ndarray | None]: ...
    def release(self) -> None: ...


def open_camera(number: int) -> Capture:
    """The system's camera of that number, from 0. Raises ValueError where there is none, or it gives no pictures.

    OpenCV knows the cameras of Linux (V4L2), macOS (AVFoundation) and Windows by number; PyAV would ask for their names
    in each system's own way.
    """
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # it says in its own words, too, that there is none
    try:
        capture = cv2.VideoCapture(number)
        if capture.isOpened() and capture.read()[0]:
            return capture
        capture.release()
    finally:
        cv2.utils.logging.setLogLevel(before)
    raise UserError(
        f"there is no camera {number}, or it gives no pictures: see that it is plugged in, that no other program uses "
        "it and that this one may, or try --camera with another number (the first is 0)"
    )


def camera_frames(
    capture: Capture, *, fps: float, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames of a camera and their numbers at `fps`, by the clock: repeated or left out where it films at another rate.

    A thread takes them as they come. Where the reader is too slow, those that wait are let go, and numbers skipped.
    Ends after `seconds`, or with the camera, which is released in any case.
    """
    came: queue.Queue = queue.Queue(_BEHIND)
    over = threading.Event()

    def take() -> None:
        began = None
        while not over.is_set():
            good, frame = capture.read()
            now = clock()
            began = now if began is None else began
            if not good or (seconds is not None and now - began >= seconds):
                break
            if came.full():
                with contextlib.suppress(queue.Empty):
                    while True:
                        came.get_nowait()
            came.put((now - began, frame))
        came.put(None)

    thread = threading.Thread(target=take, daemon=True, name="camera")
    thread.start()
    try:
        yield from by_clock(iter(came.get, None), fps=fps)
    finally:
        over.set()
        with contextlib.suppress(queue.Empty):  # room for its last word
            came.get_nowait()
        thread.join(timeout=5)  # of a camera that hangs
        capture.release()


def by_clock(stamped: Iterable[tuple[float, np.ndarray]], *, fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """Frames that come at given seconds, and their numbers at `fps`; gaps of up to half a second are filled.

    Frame k is the one on screen at k / fps seconds, to half a frame, as of videos; after a longer gap numbers are
    skipped.
    """
    wanted, held = 0, None
    for seconds, frame in stamped:
        number = math.ceil(seconds * fps - 0.5)
        if number - wanted > _HELD * fps:
            wanted = number
        for missing in range(wanted, number):
            yield missing, held
        held, wanted = frame, max(wanted, number)
        if number == wanted:
            yield number, frame
            wanted += 1


def read_camera(
    reader: Reader,
    frames: Iterable[tuple[int, np.ndarray]],
    *,
    all_faces: bool = False,
    count: int = 5,
    step: int = STEP,
) -> Iterator[tuple[int, WindowReading]]:
    """Faces by number, and what is read from their lips, every `step` frames, as soon as a window is over.

    `frames` are those of `camera_frames`, at the reader's rate. Without `all_faces` it is the face that is the largest
    then. The other parameters are those of `Reader.read_video`.
    """
    tracker = FaceTracker(reader.detector)
    held: deque = deque(maxlen=reader.window)  # frames as they are cropped
    rows: deque = deque(maxlen=reader.window)  # the points of the faces in each
    before, due = None, 0
    for number, frame in frames:
        if before is not None and number != before + 1:
            held.clear(), rows.clear()
            tracker = FaceTracker(reader.detector)
        before = number
        gray = gray_from_bgr(frame)
        held.append(frame if reader.crop.exact else gray)
        rows.append(tracker.step(gray) if reader.crop.needs_landmarks else {0: _NOWHERE})
        if len(held) < reader.window or number < due:
            continue
        due = number + step
        faces = [face for face in rows[-1] if 2 * sum(face in row for row in rows) >= reader.window]
        if not all_faces:
            faces = sorted(faces, key=lambda face: -float(np.ptp(rows[-1][face], axis=0).max()))[:1]
        points = {face: np.stack([row.get(face, _NOWHERE) for row in rows]) for face in faces}
        mouths = [reader.crop_window(list(held), points[face]) for face in faces]
        for face, words in zip(faces, reader.words_of(mouths, count=count), strict=True):
            yield face, WindowReading(number + 1 - reader.window, number + 1, words, reader.knows(words))
