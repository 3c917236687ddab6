"""Landmark files that others published: npz and pkl archives of 68 iBUG points a frame.

`NAME.npz` holds `data`, pickled objects: (T, persons) or (T,) lists of dicts with `facial_landmarks`; or plain
numbers, (T, 68, 2) or (T, 136). `NAME.pkl` is a list of T entries, each (68, 2) or None. Both are read
without running the pickle inside.
"""

import csv
import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks.track import ClipLandmarks
from lipprep.stages.landmarks.unpickle import MAX_BYTES, PickleRefusedError, load_pickle
from lipprep.stages.untrusted import check_file, is_file, printable

SUFFIXES = (".npz", ".pkl")
# Bounds on what a small file can claim to hold by naming one entry often, or by sides of no length.
_MAX_FRAMES = 100_000  # over an hour at 25 fps
_MAX_FACES = 1000  # in a frame
_FAR = 1e6  # pixels from the corner: no face is there
_MAX_TABLE = 1 << 30  # bytes of a table of persons; LRW's has 22 MB


def read_persons(path: Path) -> dict[str, int]:
    """Read which person of an archive each clip is about: lines `WORD/split/NAME,INDEX`, header or not.

    Raises ValueError for a line of another form.
    """
    persons = {}
    check_file(path, "table of persons", limit=_MAX_TABLE)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                if not row:
                    continue
                index = row[1].strip() if len(row) > 1 else ""
                if not index.isdecimal() or len(index) > 9:
                    if number == 1 and len(row) > 1 and "/" not in row[0]:  # a header
                        continue
                    raise UserError(
                        f"{printable(path)}, line {number}: expected `NAME,PERSON` with a person index from 0, got "
                        f"{','.join(row)[:80]!r}"
                    )
                name = PurePosixPath(row[0].strip().replace("\\", "/"))
                persons[name.with_suffix("").as_posix() if name.name else ""] = int(index)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"the table of persons {printable(path)} is no CSV in UTF-8: {error}") from error
    return persons


def archive_file(folder: Path, name: str) -> Path | None:
    """Find the landmark file of a clip, `folder`/`name` with .npz or .pkl, or None."""
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if is_file(path)), None)


def read_archive(folder: Path, name: str, *, person: int = 0) -> ClipLandmarks:
    """Read the landmarks of one clip, e.g. `name` ABOUT/test/ABOUT_00001.

    `person` is the index among the faces of each frame; a frame with fewer has no face of this clip (NaN).
    Files of one face a frame ignore it. Raises ClipFailure: landmarks_missing without a file,
    bad_landmarks for a file of another kind or with other than 68 points.
    """
    path = archive_file(folder, name)
    if path is None:
        tried = " or ".join(printable(folder / f"{name}{suffix}") for suffix in SUFFIXES)
        raise ClipFailure("landmarks_missing", f"no landmark file: looked for {tried}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"it has {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        entries = _read_npz(path) if path.suffix == ".npz" else load_pickle(path.read_bytes())
        if not _is_sequence(entries):
            raise UserError(f"it holds a {type(entries).__name__}, not an entry a frame")
        return _clip(entries, person)
    except PickleRefusedError as error:
        raise ClipFailure("bad_landmarks", f"{printable(path)} was refused: {_short(error)}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ClipFailure("bad_landmarks", f"{printable(path)} is not a landmark file: {_short(error)}") from error


def _short(error: Exception) -> str:
    """What went wrong, of a length to be read: names inside an archive are its maker's choice."""
    text = printable(error)
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _read_npz(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if "data.npy" not in members:
                raise UserError(f"it has no array `data`, only {', '.join(members[:5]) or 'nothing'}")
            with archive.open("data.npy") as member:
                content = member.read(MAX_BYTES + 1)
    except (RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        raise UserError(f"`data` cannot be unpacked ({error})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"`data` unpacks to more than {MAX_BYTES} bytes")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise UserError(f"`data` has the unknown npy version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype == np.dtype(object):
        return load_pickle(content[stream.tell() :])
    if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize > len(content) - stream.tell():
        raise UserError(f"`data` has type {dtype} and shape {shape}, which its bytes do not hold")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _clip(entries: Sequence[Any], person: int) -> ClipLandmarks:
    if len(entries) > _MAX_FRAMES:
        raise UserError(f"it has {len(entries)} frames, at most {_MAX_FRAMES} are read")
    points = np.full((len(entries), 68, 2), np.nan, np.float32)
    max_faces = 0
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and so no face
        for frame, entry in enumerate(entries):
            faces, chosen = _faces(entry, person)
            max_faces = max(max_faces, sum(face is not None for face in faces))
            if chosen < len(faces) and faces[chosen] is not None:
                points[frame] = _points(faces[chosen], frame)
    # A face of which a part is unknown is no face: repair works on whole frames.
    points[~(np.abs(points) < _FAR).all(axis=(1, 2))] = np.nan
    return ClipLandmarks(points, max_faces)


def _faces(entry: Any, person: int) -> tuple[list[Any], int]:
    """Give the faces of one frame's entry, and which of them is wanted."""
    if entry is None:
        return [], 0
    if isinstance(entry, dict) or (isinstance(entry, np.ndarray) and entry.dtype != object and entry.ndim < 3):
        return [entry], 0
    if _is_sequence(entry):
        if len(entry) > _MAX_FACES:
            raise UserError(f"a frame has {len(entry)} faces, at most {_MAX_FACES} are read")
        return list(entry), person
    raise UserError(f"a frame holds a {type(entry).__name__}, not landmarks")


def _is_flat(face: Any) -> bool:
    """Whether `face` is a list of at most 1000 numbers, or of as many short lists of them."""
    if not _is_sequence(face) or len(face) > 1000:
        return False
    rows = (row if _is_sequence(row) and len(row) <= 3 else [row] for row in face)
    return all(isinstance(number, int | float | np.number) for row in rows for number in row)


def _points(face: Any, frame: int) -> np.ndarray:
    if isinstance(face, dict):
        if "facial_landmarks" not in face:
            raise UserError(f"frame {frame} has no facial_landmarks, only {', '.join(map(str, face))}")
        face = face["facial_landmarks"]
    # Lists that hold each other would grow without end on their way into an array.
    points = np.asarray(face if isinstance(face, np.ndarray) or _is_flat(face) else None)
    if points.dtype.kind not in "fiu":
        raise UserError(f"the points of frame {frame} are not numbers")
    if points.shape == (136,):
        points = points.reshape(68, 2)
    if points.shape != (68, 2):
        count = f"{points.shape[0]} points" if points.ndim == 2 else f"an array of shape {points.shape}"
        raise UserError(
            f"frame {frame} has {count} (shape {points.shape}); the 68 iBUG points as (x, y) are needed, which "
            "detectors of 4 or 5 points do not give: use `--detector mesh` or another archive"
        )
    return points
