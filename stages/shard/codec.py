"""Mouth crops to bytes and back: one tall JPEG strip a clip, or a raw npy array.

A strip is S wide and S x T tall, its frames from top to bottom. S is a multiple of 8, the side of a JPEG
block, so no block straddles two frames.
"""

import io
import math

import cv2
import numpy as np

CODECS = ("jpeg", "npy")
MAX_STRIP = 65500  # libjpeg refuses a taller or wider picture: 682 frames of 96 pixels


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def npy_array(payload: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file.

    Object arrays (pickles), and a header that promises more or less than there is, raise ValueError.
    """
    buffer = io.BytesIO(payload)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("the array is of another version of npy than 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
    there = len(payload) - buffer.tell()
    # Looked at before reading: memory is taken for what the header says.
    if not dtype.hasobject and (min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there):
        raise ValueError(f"the header of the array says shape {shape} and type {dtype}, but {there} bytes follow")
    buffer.seek(0)
    return np.lib.format.read_array(buffer, allow_pickle=False)


def check_codec(codec: str, crop_size: int) -> None:
    """Raise ValueError where no clip of `crop_size` (pixels) can be stored with `codec`."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}: choose one of {', '.join(CODECS)}")
    if codec == "jpeg" and crop_size % 8:
        raise ValueError(
            f"crop size {crop_size} is no multiple of 8, so frames would bleed into each other in a JPEG strip: "
            "use --codec npy or another --crop-size"
        )


def encode_mouth(mouth_TSS: np.ndarray, *, codec: str = "jpeg", quality: int = 95) -> tuple[str, bytes]:
    """Encode mouth crops (T, S, S) uint8; return the member's extension and its bytes.

    Raises ValueError where the strip would be taller than a JPEG can be (T x S > 65,500 pixels), or S is no
    multiple of 8: frames would share blocks.
    """
    T, S, _ = mouth_TSS.shape
    check_codec(codec, S)
    if codec == "npy":
        return "mouth.npy", npy_bytes(mouth_TSS)
    if T * S > MAX_STRIP:
        raise ValueError(f"{T} frames are too many for one JPEG strip ({MAX_STRIP // S} at most): use --codec npy")
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
            raise ValueError(f"mouth crops of shape {mouth.shape} and type {mouth.dtype}, expected (T, S, S) uint8")
        return mouth
    try:
        strip = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error as error:  # nothing to decode, or a picture of absurd size
        raise ValueError(f"the mouth strip cannot be decoded: {error.err}") from error
    if strip is None or strip.shape[0] % strip.shape[1]:
        raise ValueError("the mouth strip is no JPEG of whole square frames")
    S = strip.shape[1]
    return strip.reshape(-1, S, S)
