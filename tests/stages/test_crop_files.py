import io
import os
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from traps import POSIX

from lipprep.stages.crop_files import MAX_BYTES, crops_shape, read_crops
from lipprep.stages.failures import ClipFailure

SIZE = 16
GRAY = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: tuple, *, kind: str = "|u1") -> bytes:
    """An .npy file that promises an array and has none."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def packed(content: bytes, how: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("data.npy", content)
    return file.getvalue()


def read(path: Path, content: bytes, profile: str = "lrw2021") -> np.ndarray:
    path.write_bytes(content)
    return read_crops(path, crop_size=SIZE, profile=profile)


@pytest.mark.parametrize("profile", ["lrw2021", "lrw2022", "unaligned", "fixed"])
def test_gray_crops_are_read_as_they_are(tmp_path, profile):
    assert np.array_equal(read(tmp_path / "a.npz", npz(data=GRAY), profile), GRAY)
    assert np.array_equal(read(tmp_path / "a.npy", npy(GRAY), profile), GRAY)
    assert np.array_equal(read(tmp_path / "b.npz", npz(data=np.asfortranarray(GRAY)), profile), GRAY)
    for name, array in (("c.npz", GRAY[..., None]), ("d.npz", np.asfortranarray(GRAY[..., None]))):
        assert np.array_equal(read(tmp_path / name, npz(data=array), profile), GRAY)
    assert {crops_shape(path) for path in tmp_path.iterdir()} == {GRAY.shape}


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_later_versions_of_npy_are_read(tmp_path, version):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # numpy warns that old readers do not read them
        np.lib.format.write_array(file, GRAY, version)
    assert np.array_equal(read(tmp_path / "a.npy", file.getvalue()), GRAY)
    assert np.array_equal(read(tmp_path / "a.npz", packed(file.getvalue())), GRAY)


def test_colour_becomes_the_gray_that_the_reference_would_have_saved(tmp_path):
    gray = np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in COLOUR])
    assert np.array_equal(read(tmp_path / "new.npz", npz(data=COLOUR), "lrw2022"), gray)
    assert np.array_equal(read(tmp_path / "old.npz", npz(data=COLOUR[..., ::-1]), "lrw2021"), gray)
    assert np.array_equal(read(tmp_path / "f.npy", npy(np.asfortranarray(COLOUR)), "lrw2022"), gray)
    assert not np.array_equal(read(tmp_path / "new.npz", npz(data=COLOUR), "lrw2021"), gray)
    with pytest.raises(ClipFailure, match=r"no known order of channels: save gray.*lrw2021 \(RGB\)"):
        read(tmp_path / "a.npz", npz(data=COLOUR), "unaligned")


BAD = {
    "floats": (npz(data=GRAY / np.float32(255)), "bad_crops", "float32, not uint8: save gray levels from 0 to 255"),
    "integers": (npz(data=GRAY.astype(np.int64)), "bad_crops", "int64, not uint8"),
    "truths": (npz(data=GRAY > 9), "bad_crops", "bool, not uint8"),
    "one frame": (npz(data=GRAY[0]), "bad_crops", r"shape \(16, 16\), and square crops are wanted: \(T, S, S\)"),
    "five axes": (npz(data=GRAY[None, ..., None]), "bad_crops", "shape"),
    "four channels": (npz(data=np.zeros((2, SIZE, SIZE, 4), np.uint8)), "bad_crops", "shape"),
    "two channels": (npz(data=np.zeros((2, SIZE, SIZE, 2), np.uint8)), "bad_crops", "shape"),
    "channels first": (npz(data=np.zeros((2, 3, SIZE, SIZE), np.uint8)), "bad_crops", "shape"),
    "frames last": (npz(data=np.moveaxis(GRAY, 0, 2)), "bad_crops", "shape"),
    "not square": (npz(data=GRAY[:, 1:]), "bad_crops", "shape"),
    "no pixels": (npz(data=GRAY[:, :0, :0]), "bad_crops", "shape"),
    "a number": (npz(data=np.uint8(3)), "bad_crops", "shape"),
    "another size": (npz(data=GRAY[:, 2:, 2:]), "bad_crops", r"crops of 14 pixels, and the set's are of 16: .*size 14"),
    "no frames": (npz(data=GRAY[:0]), "too_short", "no frames"),
    "another key": (npz(crops=GRAY), "bad_crops", "no array `data`, only crops.npy: save its crops with"),
    "no arrays": (npz(), "bad_crops", "only nothing"),
    "objects": (npz(data=np.array([{"facial_landmarks": 1}] * 5, object)), "bad_crops", "pickles.*save its crops"),
    "objects with axes": (npz(data=GRAY.astype(object)), "bad_crops", "pickles"),
    "named fields": (npz(data=np.zeros((2, 4, 4), [("a", "u1")])), "bad_crops", "not uint8"),
    "nothing": (b"", "unreadable", "is empty"),
    "a text": (b"Duration: 0.4 seconds", "unreadable", "is no npz, or cut short"),
    "no end": (npz(data=GRAY)[:-40], "unreadable", "cut short"),
    "half": (npz(data=GRAY)[:500], "unreadable", "cut short"),
    "beginning missing": (npz(data=GRAY)[7:], "unreadable", "cannot be read .*copy it again"),
    "other bytes": (npz(data=GRAY)[:600] + b"\0" * 9 + npz(data=GRAY)[609:], "truncated", "is damaged"),
    "too few": (packed(header(GRAY.shape) + b"1234"), "truncated", "1280 bytes of crops, and there are only 4"),
    "too many": (packed(npy(GRAY) + b"1"), "truncated", "1280 bytes of crops, and there are more"),
    "half a header": (packed(npy(GRAY)[:50]), "bad_crops", "holds no crops"),
    "no header": (packed(b"x" * 2000), "bad_crops", "holds no crops"),
    "less than none": (packed(header((-1, SIZE, SIZE))), "bad_crops", "shape"),
    "a bomb": (packed(header((10**9, SIZE, SIZE)) + bytes(9999)), "too_long", "cut it into shorter clips"),
    "a bomb behind a sound header": (packed(header(GRAY.shape) + bytes(1 << 22)), "truncated", "there are more"),
    "bzip2": (packed(npy(GRAY), zipfile.ZIP_BZIP2), "unreadable", "packed as numpy packs no npz"),
    "lzma": (packed(npy(GRAY), zipfile.ZIP_LZMA), "unreadable", "packed as numpy packs no npz"),
    "npy: cut": (npy(GRAY)[:-9], "truncated", "1280 bytes of crops, and there are only 1271"),
    "npy: objects": (header((3,), kind="|O") + b"cposix\nsystem\n(S'true'\ntR.", "bad_crops", "pickles"),
    "npy: version 4": (npy(GRAY).replace(b"Y\1", b"Y\4", 1), "bad_crops", r"another version of npy than 1\.0, 2\.0"),
    "npy: an npz": (npz(data=GRAY), "bad_crops", "holds no crops"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_file_of_crops_is_said(tmp_path, what):
    content, kind, message = BAD[what]
    with pytest.raises(ClipFailure, match=message) as failure:
        read(tmp_path / ("clip.npy" if what.startswith("npy") else "clip.npz"), content)
    assert failure.value.kind == kind and "clip.np" in str(failure.value) and len(str(failure.value)) < 1000


@POSIX
def test_what_is_no_file_is_not_waited_for(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("absent.npz", "folder.npz", "pipe.npz"):
        with pytest.raises(ClipFailure, match="is no file") as failure:
            crops_shape(tmp_path / name)
        assert failure.value.kind == "unreadable"
    with (tmp_path / "large.npz").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ClipFailure, match="cut it into shorter clips"):
        crops_shape(tmp_path / "large.npz")


def test_a_flipped_byte_costs_its_clip_alone(tmp_path):
    rng, content = np.random.default_rng(0), npz(data=GRAY)
    for position in rng.integers(0, len(content), 300):
        flipped = bytearray(content)
        flipped[position] ^= rng.integers(1, 256)
        try:
            crops = read(tmp_path / "clip.npz", bytes(flipped))
        except ClipFailure:
            continue
        # What no checksum covers: names, times, and a header that still fits.
        assert crops.shape == GRAY.shape and np.array_equal(np.sort(crops.ravel()), np.sort(GRAY.ravel()))
