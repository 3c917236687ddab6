"""Mouth crops to bytes and back: one tall JPEG strip a clip, or a raw npy array.

A strip is S wide and S x T tall, its frames from top to bottom. S is a multiple of 8, the side of a JPEG
block, so no block straddles two frames.
"""

import io
import math
import re
from functools import lru_cache
from typing import BinaryIO

import cv2
import numpy as np

from lipprep.io.errors import UserError

CODECS = ("jpeg", "npy")
MAX_STRIP = 65500  # libjpeg refuses a taller or wider picture: 682 frames of 96 pixels
MAX_CROPS = 1 << 28  # bytes of one clip's raw crops: 29,000 frames of 96 pixels, which take a few times that to read
_MAX_PIXELS = MAX_STRIP * 256  # crops are cut out of frames of 256 pixels

_NPY_BEGINNING = 12  # bytes of an .npy file that hold the length of its header
_LONGEST_NPY_HEADER = 1 << 14
# By version: numpy writes the least that has room. 3.0 is 2.0 with any letters in the names of fields.
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,
}

_SEGMENT = re.compile(rb"\xff+([\x01-\xfe])(..)", re.DOTALL)
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the other three are tables and an extension
_LENGTHLESS = {0x01, *range(0xD0, 0xDA)}


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the bytes of an .npy file."""
    if array.dtype.hasobject:
        raise UserError("an array of objects would be stored as a pickle")
    return b"".join((_npy_head(array.shape, array.dtype), np.ascontiguousarray(array).data))


@lru_cache(maxsize=64)
def _npy_head(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def npy_array(payload: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file.

    Object arrays (pickles), and a header that promises more or less than there is, raise ValueError.
    """
    start = _npy_start(payload[:_NPY_BEGINNING])
    shape, fortran, dtype = _npy_header(payload[: min(start, _LONGEST_NPY_HEADER)])
    there = len(payload) - start
    # Looked at before reading: memory is taken for what the header says.
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise UserError(
            f"the header of the array says shape {shape} and type {str(dtype)[:80]}, but {there} bytes follow"
        )
    array = np.frombuffer(payload, dtype, math.prod(shape), offset=start)
    return array.reshape(shape, order="F" if fortran else "C")


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (whether Fortran's) and type of the array in an .npy file, which is read up to its data.

    Object arrays (pickles), and a header that is none, raise ValueError.
    """
    beginning = file.read(_NPY_BEGINNING)
    rest = min(_npy_start(beginning), _LONGEST_NPY_HEADER) - _NPY_BEGINNING
    return _npy_header(beginning + file.read(max(0, rest)))


def _npy_start(beginning: bytes) -> int:
    """Where the data of an .npy file begins: versions from 2.0 on have longer headers, and their length in 4 bytes."""
    length = 10 if beginning[6:7] == b"\1" else 12
    return length + int.from_bytes(beginning[8:length], "little")


@lru_cache(maxsize=64)  # the clips of a corpus are of few lengths, and Python's parser reads headers slowly
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type in the bytes of an .npy file before its data."""
    buffer = io.BytesIO(head)
    if (read := _NPY_HEADERS.get(np.lib.format.read_magic(buffer))) is None:
        raise UserError("the array is of another version of npy than 1.0, 2.0 and 3.0")
    try:
        shape, fortran, dtype = read(buffer)
    except Exception as error:  # Python's tokenizer and parser raise errors of many kinds at nonsense
        raise UserError(f"the header of the array cannot be read: {str(error)[:200]}") from error
    if any(type(length) is not int for length in shape):  # numpy takes True for a number
        raise UserError(f"the header of the array says shape {shape}, which is none")
    if dtype.hasobject or not dtype.itemsize:
        raise UserError(f"object arrays, which are pickles, and empty types are not read: {str(dtype)[:80]}")
    return shape, fortran, dtype


def check_codec(codec: str, crop_size: int) -> None:
    """Raise ValueError where no clip of `crop_size` (pixels) can be stored with `codec`."""
    if codec not in CODECS:
        raise UserError(f"unknown codec {codec!r}: choose one of {', '.join(CODECS)}")
    if codec == "jpeg" and crop_size % 8:
        raise UserError(
            f"crop size {crop_size} is no multiple of 8, so frames would bleed into each other in a JPEG strip: "
            "use --codec npy or another --crop-size"
        )


def most_frames(codec: str, crop_size: int) -> int:
    """Return how many frames of `crop_size` (pixels) a clip may have with `codec`."""
    most = MAX_CROPS // crop_size**2
    return min(most, MAX_STRIP // crop_size) if codec == "jpeg" else most


def check_frames(num_frames: int, codec: str, crop_size: int) -> None:
    """Raise ValueError for a clip of `num_frames` frames of `crop_size` (pixels) that `codec` cannot store."""
    if num_frames > (most := most_frames("npy", crop_size)):
        raise UserError(f"{num_frames} frames are too many for one clip ({most} at most): cut it into windows")
    if num_frames > (most := most_frames(codec, crop_size)):
        raise UserError(f"{num_frames} frames are too many for one JPEG strip ({most} at most): use --codec npy")


def encode_mouth(mouth_TSS: np.ndarray, *, codec: str = "jpeg", quality: int = 95) -> tuple[str, bytes]:
    """Encode mouth crops (T, S, S) uint8; return the member's extension and its bytes.

    Raises ValueError where the strip would be taller than a JPEG can be (T x S > 65,500 pixels), or S is no
    multiple of 8: frames would share blocks; or where a raw array would have over 256 MiB.
    """
    T, S, _ = mouth_TSS.shape
    check_codec(codec, S)
    check_frames(T, codec, S)
    if codec == "npy":
        return "mouth.npy", npy_bytes(mouth_TSS)
    ok, data = cv2.imencode(".jpg", mouth_TSS.reshape(T * S, S), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return "mouth.jpg", data.tobytes()


def decode_mouth(extension: str, payload: bytes) -> np.ndarray:
    """Decode one member (`mouth.jpg` or `mouth.npy`) to mouth crops (T, S, S) uint8.

    Raises ValueError where the bytes are no such picture or array: the shard is damaged.
    """
    if extension == "mouth.npy":
        mouth = npy_array(payload)
        if mouth.ndim != 3 or mouth.dtype != np.uint8 or mouth.shape[1] != mouth.shape[2]:
            raise UserError(f"mouth crops of shape {mouth.shape} and type {mouth.dtype}, expected (T, S, S) uint8")
        return mouth
    height, width = _strip_size(payload)
    try:
        strip = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error as error:
        raise UserError(f"the mouth strip cannot be decoded: {error.err}") from error
    if strip is None or strip.shape != (height, width):
        raise UserError("the mouth strip is damaged: it cannot be decoded as its header says")
    return strip.reshape(-1, width, width)


def _strip_size(payload: bytes) -> tuple[int, int]:
    """Height and width of a JPEG strip, from its frame header (ITU-T T.81, B.2.2): decoders take memory for it.

    Raises ValueError where `payload` is another kind of picture, or no strip of whole square frames.
    """
    if payload[:2] != b"\xff\xd8":
        raise UserError("the mouth strip is no JPEG")
    at = 2
    # Each segment is FF (any number of them), a kind, and a length that counts itself. Kinds without a length have no
    # place before the frame header, and a decoder would take what follows them for other segments than this does.
    while match := _SEGMENT.match(payload, at):
        kind, length = match[1][0], int.from_bytes(match[2], "big")
        if kind in _LENGTHLESS or length < 2:
            break
        if kind in _FRAME_HEADERS and match.end() + 5 <= len(payload):
            height, width = (int.from_bytes(payload[n : n + 2], "big") for n in (match.end() + 1, match.end() + 3))
            if not width or not height or height % width or height * width > _MAX_PIXELS:
                raise UserError(f"the mouth strip is of {width} x {height} pixels, no strip of whole square frames")
            return height, width
        at = match.end() - 2 + length
    raise UserError("the mouth strip is no whole JPEG")
