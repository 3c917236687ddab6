"""Mouth crops that others saved, a file a clip: `NAME.npz` with the array `data`, or `NAME.npy`.

The array is uint8, (T, S, S) or (T, S, S, 1) gray, or (T, S, S, 3) in colour. An array's header may ask for any
memory, and its data may be a pickle: so the header is read first, and the data only if they are crops.
"""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lipprep.stages.align import find_profile
from lipprep.stages.failures import ClipFailure
from lipprep.stages.gray import gray_from_bgr, gray_from_rgb
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.codec import npy_header
from lipprep.stages.untrusted import is_file, printable

SUFFIXES = {".npy", ".npz"}
MAX_BYTES = 64 << 20  # of a file, packed and unpacked: 7,000 gray frames of 96 pixels
_MEMBER = "data.npy"
_SAVE = "save its crops with numpy.savez_compressed(path, data=crops)"
_GRAY = {"RGB": gray_from_rgb, "BGR": gray_from_bgr}
# What zipfile and zlib raise at damaged and at hostile bytes.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError)


def is_crop_file(name: str) -> bool:
    """Whether a path is called like a file of crops."""
    return name.lower().endswith(tuple(SUFFIXES))


def crops_shape(path: Path | RemotePath) -> tuple[int, ...]:
    """The shape (T, S, S) or (T, S, S, 3) of the crops in a file, told by its header. Raises as `read_crops`."""
    with _opened(path) as file:
        return _header(file, path)[0]


def read_crops(path: Path | RemotePath, *, crop_size: int, profile: str) -> np.ndarray:
    """The mouth crops in a file, (T, S, S) uint8 gray, where S is `crop_size` pixels.

    Colour is converted as the scripts convert it that save crops of `profile`, whose order of channels is known.
    Raises ClipFailure: unreadable where the file is missing, empty or no npz; truncated where it is cut short or
    damaged; too_short without a frame; too_long beyond MAX_BYTES; bad_crops where its array is of another name, type,
    shape or size, a pickle, or in colour where the profile does not say in which order.
    """
    with _opened(path) as file:
        shape, order = _header(file, path)
        if shape[1] != crop_size:
            raise ClipFailure(
                "bad_crops",
                f"{printable(path)} has crops of {shape[1]} pixels, and the set's are of {crop_size}: cut it to that "
                f"size, or pack those of {shape[1]} as a set of their own (--crop-size {shape[1]}, another -m and -o)",
            )
        check_colour(shape, profile, path)
        count = math.prod(shape)
        data = file.read(count + 1)  # beyond its end, so that zipfile compares the checksum
    if len(data) != count:
        there = "more" if len(data) > count else f"only {len(data)}"
        raise ClipFailure(
            "truncated", f"{printable(path)} should hold {count} bytes of crops, and there are {there}: copy it again"
        )
    crops = np.frombuffer(data, np.uint8).reshape(shape, order=order)
    if crops.ndim == 3:
        return np.ascontiguousarray(crops)
    T, S = shape[:2]
    # All frames at once, as one tall picture.
    picture = np.ascontiguousarray(crops).reshape(T * S, S, 3)
    return _GRAY[find_profile(profile).channels](picture).reshape(T, S, S)


def check_colour(shape: tuple[int, ...], profile: str, path: Path | RemotePath) -> None:
    """Raise ClipFailure for crops in colour where `profile` does not tell the order of their channels."""
    if len(shape) == 4 and find_profile(profile).channels is None:
        raise ClipFailure(
            "bad_crops",
            f"{printable(path)} is in colour, and crops of profile {profile} have no known order of channels: save "
            "gray ones, (T, S, S); or name the profile that they were made with: lrw2021 (RGB) or lrw2022 (BGR)",
        )


@contextlib.contextmanager
def _opened(path: Path | RemotePath) -> Iterator[BinaryIO]:
    """The .npy file that `path` is, or holds as `data`; what is wrong with it is raised as a ClipFailure."""
    name = printable(path)
    try:
        if not is_file(path):  # a pipe or a device among them, on which reading could wait for ever
            message = f"{name} is no file: it was moved, or the manifest's root is wrong (--root)"
            raise ClipFailure("unreadable", message)
        if not (size := path.stat().st_size):
            raise ClipFailure("unreadable", f"{name} is empty: make it again")
        if size > MAX_BYTES:
            raise _too_long(path, size)
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy":
                yield file
            else:
                with _unpacked(file, path) as member:
                    yield member
    except ClipFailure:
        raise
    except _DAMAGE as error:
        raise ClipFailure("truncated", f"{name} is damaged ({_short(error)}): copy it again") from error
    except (OSError, ValueError) as error:
        message = f"{name} cannot be read ({_short(error)}): see to its disk, or copy it again"
        raise ClipFailure("unreadable", message) from error


@contextlib.contextmanager
def _unpacked(file: BinaryIO, path: Path | RemotePath) -> Iterator[BinaryIO]:
    name = printable(path)
    try:
        archive = zipfile.ZipFile(file)
    except (*_DAMAGE, ValueError) as error:
        message = f"{name} is no npz, or cut short ({_short(error)}): copy it again, or {_SAVE}"
        raise ClipFailure("unreadable", message) from error
    with archive:
        if _MEMBER not in archive.NameToInfo:
            there = ", ".join(archive.namelist()[:5]) or "nothing"
            raise ClipFailure("bad_crops", f"{name} has no array `data`, only {_short(there)}: {_SAVE}")
        info = archive.NameToInfo[_MEMBER]
        # Others are unpacked without a bound by Python's zipfile.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ClipFailure("unreadable", f"{name} is packed as numpy packs no npz: {_SAVE}")
        with archive.open(info) as member:
            yield member


def _header(file: BinaryIO, path: Path | RemotePath) -> tuple[tuple[int, ...], str]:
    """Shape and order of the crops whose .npy file begins here. Raises ClipFailure where they are none."""
    name = printable(path)
    try:
        shape, fortran, dtype = npy_header(file)
    except ValueError as error:
        raise ClipFailure("bad_crops", f"{name} holds no crops ({_short(error)}): {_SAVE}, uint8") from error
    if dtype != np.uint8:
        raise ClipFailure(
            "bad_crops",
            f"{name} holds numbers of type {str(dtype)[:80]}, not uint8: save gray levels from 0 to 255 as uint8 (what "
            "runs from 0 to 1, times 255 and rounded)",
        )
    if shape[:1] == (0,):
        raise ClipFailure("too_short", f"{name} holds no frames: make it again, or remove it")
    if len(shape) not in (3, 4) or shape[1] != shape[2] or shape[3:] not in ((), (1,), (3,)) or min(shape) < 1:
        raise ClipFailure(
            "bad_crops",
            f"{name} holds an array of shape {_short(shape)}, and square crops are wanted: (T, S, S) gray or (T, S, S, "
            "3) in colour",
        )
    if math.prod(shape) > MAX_BYTES:
        raise _too_long(path, math.prod(shape))
    return shape[:3] if shape[3:] == (1,) else shape, "F" if fortran else "C"


def _too_long(path: Path | RemotePath, size: int) -> ClipFailure:
    return ClipFailure(
        "too_long", f"{printable(path)} has {size} bytes, and {MAX_BYTES} are read at most: cut it into shorter clips"
    )


def _short(value: object) -> str:
    text = printable(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
