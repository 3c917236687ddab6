"""Figures of a clip that tell a good one from a bad one, from what each stage has in its hands anyway.

Numbers are for thresholds and distributions. Three texts are for comparing clips with each other: `face` says how a
face is built, `look` what the middle of the crops shows on average, `motion` how it moves. They are small enough to be
kept in a record's line, and large enough to tell two people, and two clips of one person, apart.

Shapes: T frames, K landmarks, S side of a crop in pixels.
"""

import base64
import hashlib
import statistics
from functools import cache, lru_cache

import cv2
import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.align import apply as moved
from lipprep.stages.align import mean_face, similarity

CELLS = 12  # of a thumbnail's side: of 96 pixels, cells of 8
LOOK = 8  # the same of `look`, whose cells show the lips' outline and no noise
LOOK_STEP = 1 / 32  # standard deviations of a thumbnail that a unit of `look` stands for
FACE_STEP = 0.25  # pixels of the mean face's 256x256 frame that a unit of `face` stands for
STILL = 0.02  # of a clip's contrast: frames that change less are frozen (`lipprep verify --deep` says so, too)
BLANK = 10  # gray levels between the darkest and the brightest cell of a frame that shows nothing
MOTION_BITS = 128
_MOTION_TIMES = 12  # moments of a clip that `motion` compares
_EYES, _LIPS = (36, 45), slice(48, 68)  # iBUG-68: outer corners; outer and inner lip
# Brows, nose, eyes and the mouth's corners: what a face keeps while it speaks. The jaw differs by detector.
_BUILD = np.r_[17:48, 48, 54]
FACE = 2 * len(_BUILD)  # numbers of a `face`


def face_quality(points_TKD: np.ndarray) -> dict[str, float | str | None]:
    """Figures of the landmarks (T, 68, 2) of a clip, pixels of the source, NaN in frames without a face.

    One frame at least has a face. `face_size`: mean distance of the outer eye corners, pixels. `jitter`: mean second
    difference of these in time, pixels, where three frames in a row have a face. `rotation`: mean roll of the line
    between them, degrees clockwise. `centre_x`, `centre_y`: mean mouth centre, pixels. `face`: see `face_build`. None:
    not known of so few frames.
    """
    seen_T = np.isfinite(points_TKD).all((1, 2))
    eyes_T22 = points_TKD[:, _EYES].astype(np.float64)
    # bends: (T - 2, 2), then those of frames in a row that have a face; a face that comes back elsewhere is no jitter
    bends = np.linalg.norm(np.diff(eyes_T22, n=2, axis=0), axis=2)
    bends = bends[seen_T[2:] & seen_T[1:-1] & seen_T[:-2]]
    jitter = round(float(bends.mean()), 4) if len(bends) else None
    points_TKD, eyes_T22 = points_TKD[seen_T], eyes_T22[seen_T]
    dx_T, dy_T = (eyes_T22[:, 1] - eyes_T22[:, 0]).T
    x, y = points_TKD[:, _LIPS].mean((0, 1), dtype=np.float64).tolist()
    return {
        "face_size": round(float(np.hypot(dx_T, dy_T).mean()), 3),
        "jitter": jitter,
        "rotation": round(float(np.degrees(np.arctan2(dy_T.mean(), dx_T.mean()))), 2),
        "centre_x": round(x, 2),
        "centre_y": round(y, 2),
        "face": face_build(points_TKD),
    }


def face_build(points_TKD: np.ndarray) -> str | None:
    """How a face is built: 33 points' mean places beside the mean face's, as text for `face_vector`.

    The mean over time of the points brought onto the mean face; position, size and roll are gone. None where no
    similarity fits them.
    """
    face_KD = mean_face()[_BUILD]
    points_1KD = points_TKD[:, _BUILD].mean(0, dtype=np.float64)[None]
    offsets_KD = moved(similarity(points_1KD, face_KD), points_1KD)[0] - face_KD
    return _text(offsets_KD / FACE_STEP) if np.isfinite(offsets_KD).all() else None


def mouth_quality(mouth_TSS: np.ndarray) -> dict[str, float | str | None]:
    """Figures of mouth crops (T, S, S) uint8.

    `brightness`: mean gray level. `black`: share of frames that show nothing, black or of one gray. `frozen`: share of
    steps between frames in which (nearly) nothing changes. `sharpness`: mean standard deviation of the Laplacian of
    every eighth frame, gray levels. `movement`: mean change of a thumbnail's cells from frame to frame, gray levels.
    `jump`: the largest change between two frames beside the usual one of the clip. `look` and `motion`: texts for
    `look_vector` and `motion_bits`; None where there is nothing to see, or no movement.
    """
    T, S, _ = mouth_TSS.shape
    strip = mouth_TSS.reshape(T * S, S)
    thumbs = _thumbnails(strip, T)  # (T * CELLS, CELLS) uint8
    thumbs_TCC = thumbs.reshape(T, CELLS, CELLS)
    (mean,), (contrast,) = cv2.meanStdDev(strip)
    shown_T = thumbs_TCC.max((1, 2)) - thumbs_TCC.min((1, 2)) >= BLANK
    sharpness = [cv2.meanStdDev(cv2.Laplacian(frame, cv2.CV_16S))[1].item() for frame in mouth_TSS[::8]]
    figures: dict[str, float | str | None] = {
        "brightness": round(mean.item(), 2),
        "black": round(1 - float(shown_T.mean()), 4),
        "frozen": None,
        "sharpness": round(sum(sharpness) / len(sharpness), 3),
        "movement": None,
        "jump": None,
        "look": _look(thumbs_TCC[shown_T]),
        "motion": None,
    }
    if T < 2:
        return figures
    # changes: (T - 1,) gray levels
    difference = cv2.reduce(cv2.absdiff(strip[S:], strip[:-S]), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    changes = difference.reshape(T - 1, S).sum(1) / S**2
    alive = changes[changes > STILL * contrast.item()].tolist()
    usual = statistics.median(alive) if alive else 0.0
    figures["frozen"] = round(1 - len(alive) / (T - 1), 4)
    figures["movement"] = round(cv2.mean(cv2.absdiff(thumbs[CELLS:], thumbs[:-CELLS]))[0], 3)
    figures["jump"] = round(float(changes.max()) / max(usual, 1.0), 2)
    if len(alive) >= 3:
        figures["motion"] = _motion(thumbs)
    return figures


def _thumbnails(strip: np.ndarray, T: int) -> np.ndarray:
    """Frames below each other (T * S, S) uint8, made as small as CELLS: halved as long as that comes out even."""
    side = strip.shape[1]
    while side % (2 * CELLS) == 0:  # which is several times as fast as all at once
        side //= 2
        strip = cv2.resize(strip, (side, T * side), interpolation=cv2.INTER_AREA)
    if side != CELLS:
        strip = cv2.resize(strip, (CELLS, T * CELLS), interpolation=cv2.INTER_AREA)
    return strip


def _look(thumbs_TCC: np.ndarray) -> str | None:
    """The mean thumbnail of the frames that show something, less its mean, in standard deviations."""
    if not len(thumbs_TCC):
        return None
    small = cv2.resize(thumbs_TCC.mean(0, dtype=np.float32), (LOOK, LOOK), interpolation=cv2.INTER_AREA)
    small -= small.mean()
    return _text(small / max(float(small.std()), 1.0) / LOOK_STEP)


def _motion(thumbs: np.ndarray) -> str:
    """A hash of how a clip moves: the signs of random projections of its frames less their mean (Charikar 2002).

    Clips that move alike differ in few bits, two of one recording in another encoding in a handful; any others in half.
    """
    side, T = CELLS // 2, len(thumbs) // CELLS
    cells = cv2.resize(thumbs.astype(np.float32), (side, T * side), interpolation=cv2.INTER_AREA).reshape(T, -1)
    before, share = _moments(T)
    sampled = cells[before] * (1 - share) + cells[before + 1] * share
    sampled -= sampled.mean(0)
    return np.packbits(_planes(sampled.size) @ sampled.ravel() > 0).tobytes().hex()


@lru_cache(maxsize=256)
def _moments(T: int) -> tuple[np.ndarray, np.ndarray]:
    """The moments of T frames that are compared: the frames before them, and how far behind these they are."""
    at = np.linspace(0, T - 1, _MOTION_TIMES)
    before = np.floor(at).astype(int).clip(max=T - 2)
    return before, (at - before)[:, None].astype(np.float32)


@cache
def _planes(size: int) -> np.ndarray:
    """Random planes (MOTION_BITS, size) of 1 and -1, the same for ever."""
    bits = np.frombuffer(hashlib.shake_256(b"lipprep motion").digest(MOTION_BITS * size // 8), np.uint8)
    return np.unpackbits(bits).reshape(MOTION_BITS, size).astype(np.float32) * 2 - 1


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.rint(values).clip(-127, 127).astype(np.int8).tobytes()).decode("ascii")


def face_vector(text: str) -> np.ndarray:
    """The numbers (66,) float32 in a `face`, pixels of the mean face's frame."""
    return _numbers(text, FACE) * np.float32(FACE_STEP)


def look_vector(text: str) -> np.ndarray:
    """The numbers (64,) float32 in a `look`, standard deviations of the mean thumbnail."""
    return _numbers(text, LOOK * LOOK) * np.float32(LOOK_STEP)


def motion_bits(text: str) -> np.ndarray:
    """The bits of a `motion`, (2,) uint64: the fewer differ, the more two clips move alike."""
    bits = np.frombuffer(bytes.fromhex(text), ">u8")
    if bits.shape != (MOTION_BITS // 64,):
        raise UserError(f"{text!r:.40} is no hash of {MOTION_BITS} bits")
    return bits.astype(np.uint64)


def _numbers(text: str, count: int) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(text, validate=True), np.int8).astype(np.float32)
    if numbers.shape != (count,):
        raise UserError(f"{text!r:.40} holds {len(numbers)} numbers, not {count}")
    return numbers
