"""Features on the disk: a folder with a file a clip, or one table of all.

What a folder's features are made with stands in its embedding.json, written first. A clip's file says what it was made
from, so that a later run finds what it need not make again.

Shapes: T frames, C features of a frame.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.atomic import Output, check_own, replacing, temporary_path, temporary_paths, write_text
from lipprep.stages.lock import LOCK, hold, holder_of
from lipprep.stages.untrusted import printable, read_text
from lipprep.train.metrics import warn

EMBEDDING, FAILURES = "embedding.json", "failures.jsonl"
TABLE = ".parquet"
_ROW_GROUP = 64 << 20  # bytes of features that are held until they are written together
_UNFINISHED = "clip.npz"
_MAX_ABOUT = 1 << 26  # bytes of an embedding.json, which has the labels in it


@dataclass(frozen=True)
class ClipFeatures:
    """A clip's features (T, C) and what is known of it. `made_from` is the digest that `digest` gives."""

    key: str
    features_TC: np.ndarray
    made_from: str
    split: str | None = None
    word: str | None = None
    label: int | None = None


def digest(about: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """What a clip's features depend on in one text: what they are made with, and the clip's source."""
    made_with = {name: value for name, value in about.items() if name != "labels"}
    return hashlib.sha256(json.dumps([made_with, source], sort_keys=True).encode()).hexdigest()


def check_out(out: Path, *, replace: bool) -> None:
    """Raise ValueError, with the remedy, where `out` can be neither a folder of features nor a table of them."""
    shown = printable(out)
    if out.suffix == TABLE:
        if out.is_dir():
            raise UserError(f"{shown} is a folder: name a file that ends in {TABLE}, or a folder of another name")
        if out.exists() and not replace:
            raise UserError(f"{shown} exists: add --replace to make it anew, or name another file")
        _, parquet = _pyarrow()
        if out.exists() and not _is_own_table(out, parquet):
            raise UserError(f"{shown} is not lipprep's, and is never replaced: name another file, or move it")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{shown} is a file: name a folder, for a file a clip, or one FILE{TABLE}")
    elif out.suffix and not out.exists():
        raise UserError(f"{shown} is neither a folder (a name without an ending) nor a FILE{TABLE}: name either")


@contextlib.contextmanager
def open_features(out: Path, about: Mapping[str, Any], *, replace: bool) -> "Iterator[FeatureFolder | FeatureTable]":
    """Where features go: the table or the folder `out`, made with what `about` says (`embedding.json`).

    With `replace` features that are there already go. Raises ValueError as `check_out` does, where a folder holds those
    of another checkpoint or made otherwise, or where another process writes there.
    """
    check_out(out, replace=replace)
    if out.suffix == TABLE:
        for left in temporary_paths(out):
            warn(f"{left} was left by a run that was killed, unless one is at work: remove it")
        with contextlib.ExitStack() as files:
            table = FeatureTable(out, about, files)
            yield table
            table.flush()
            if not table.files:
                out.unlink(missing_ok=True)  # an older one, which `replace` is to remove
        return
    out.mkdir(parents=True, exist_ok=True)

    def refusal() -> str:
        holder = holder_of(out / LOCK) or "it has not said which"
        return f"another process writes to {out} ({holder}): wait for it, or name another folder"

    with hold(out / LOCK, refusal):
        _settle(out, about, replace=replace)
        yield FeatureFolder(out, about)


def _settle(folder: Path, about: Mapping[str, Any], *, replace: bool) -> None:
    """Make a folder one of features that are made as `about` says, or raise ValueError where it is another."""
    path, failures = folder / EMBEDDING, folder / FAILURES
    check_own(path, b'"lipprep_embedding"')
    others = [failures] if failures.exists() else folder.rglob("*.npz")
    if not path.exists() and (stranger := next(iter(others), None)) is not None:
        raise UserError(f"{folder} holds files of another kind, as {stranger.name}: name another folder")
    if path.exists() and replace:
        for clip in folder.rglob("*.npz"):
            if "made_from" in _arrays(clip):
                clip.unlink()
    elif path.exists():
        try:
            there = json.loads(read_text(path, "description of features", limit=_MAX_ABOUT))
            differing = sorted(name for name in {**there, **about} if there.get(name) != about.get(name))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): name another folder, or add --replace") from error
        if differing:
            raise UserError(
                f"{folder} holds features that were made otherwise (see {', '.join(differing)} in {path.name} there): "
                "name another folder, or make them anew with --replace"
            )
    for left in folder.rglob(f".{_UNFINISHED}.*.tmp"):  # of a run that was killed: the lock is ours
        left.unlink()
    write_text(path, json.dumps(about, indent=1) + "\n")


class FeatureFolder:
    """A folder with KEY.npz for each clip."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self._about = folder, about
        self.failures = folder / FAILURES

    @property
    def files(self) -> list[Path]:
        """What there is but the clips' own files."""
        return [self.folder / EMBEDDING]

    def has(self, key: str, made_from: str) -> bool:
        """Return whether a clip's whole features, made from the same, are there already.

        Raises UserError where another file has their name.
        """
        path = self.folder / f"{key}.npz"
        there = _arrays(path)
        if there and "made_from" not in there:
            raise UserError(f"{printable(path)} is not lipprep's, and is never replaced: name another folder")
        data = there.get("data", np.empty(0))
        fits = data.shape[1:] == (self._about["channels"],) and data.dtype == self._about["dtype"]
        return fits and str(there.get("made_from")) == made_from

    def add(self, clip: ClipFeatures) -> None:
        """Write a clip's file, whole or not at all. Raises ValueError where float16 cannot hold the features."""
        known = {name: getattr(clip, name) for name in ("split", "word", "label")}
        known = {name: np.array(value) for name, value in known.items() if value is not None}
        features_TC = _as_type(clip, self._about["dtype"])
        path = self.folder / f"{clip.key}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the clip's own name, which may be as long as a name can be: one process alone writes here.
        temporary = temporary_path(path.with_name(_UNFINISHED), os.getpid())
        try:
            with io.BufferedWriter(Output(temporary)) as file:
                np.savez(file, data=features_TC, fps=self._about["fps"], made_from=clip.made_from, **known)
            # Not synced, which would take longer than the features: `has` sees what a power cut has damaged.
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class FeatureTable:
    """A Parquet file with a row for each clip, written row group by row group; it is there when all are written.

    The file is opened, on the stack `files`, with the first of them.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], files: contextlib.ExitStack) -> None:
        self.path, self._about, self._open = path, about, files
        self.failures = path.with_suffix(f".{FAILURES}")
        self._rows: list[ClipFeatures] = []
        self._bytes = 0
        self._writer = None

    @property
    def files(self) -> list[Path]:
        """The file, if there was a clip to write."""
        return [self.path] if self._writer is not None else []

    def has(self, key: str, made_from: str) -> bool:
        """False: a table is made as a whole."""
        return False

    def add(self, clip: ClipFeatures) -> None:
        """Take a clip as the next row. Raises ValueError where float16 cannot hold the features."""
        features_TC = _as_type(clip, self._about["dtype"])
        self._rows.append(ClipFeatures(**{**vars(clip), "features_TC": features_TC}))
        self._bytes += features_TC.nbytes
        if self._bytes >= _ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are held."""
        if not self._rows:
            return
        pa, parquet = _pyarrow()
        channels, rows = self._about["channels"], self._rows
        features = pa.list_(pa.list_(pa.from_numpy_dtype(self._about["dtype"]), channels))
        columns = {"key": pa.string(), "split": pa.string(), "word": pa.string(), "label": pa.int32()}
        schema = pa.schema({**columns, "num_frames": pa.int32(), "features": features}, _metadata(self._about))
        lengths = [len(row.features_TC) for row in rows]
        values = pa.array(np.concatenate([row.features_TC.reshape(-1) for row in rows]))
        # offsets: (rows + 1,), the frames before each row
        offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
        nested = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values, channels))
        arrays = [pa.array([getattr(row, name) for row in rows], kind) for name, kind in columns.items()]
        table = pa.Table.from_arrays([*arrays, pa.array(lengths, pa.int32()), nested], schema=schema)
        if self._writer is None:
            file = self._open.enter_context(replacing(self.path))
            # Features do not repeat: a dictionary of them would be made in vain.
            how = {"compression": "zstd", "use_dictionary": ["split", "word"]}
            self._writer = self._open.enter_context(parquet.ParquetWriter(file, schema, **how))
        self._writer.write_table(table, row_group_size=len(rows))
        self._rows, self._bytes = [], 0


def is_safe(key: str) -> bool:
    """Whether a clip's key is a path that stays below the folder that it is written to."""
    return "\0" not in key and not any(part in ("", ".", "..") for part in key.split("/"))


def write_failures(path: Path, failures: list[dict]) -> None:
    """List what failed, a line of JSON each. Where nothing did, there is no list, and that of an earlier run goes."""
    if failures:
        write_text(path, "".join(json.dumps(failure) + "\n" for failure in failures))
    else:
        path.unlink(missing_ok=True)


def _metadata(about: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def _as_type(clip: ClipFeatures, dtype: str) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return clip.features_TC.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise UserError(
            f"the features of {printable(clip.key)} are too large for {dtype}: use --dtype float32"
        ) from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All that a clip's file holds; nothing where there is none, or it is damaged."""
    try:
        # Opened here: numpy leaves a file open in which it finds no zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except Exception:  # at a damaged one, its reader trips in any way
        return {}


def _is_own_table(path: Path, parquet: Any) -> bool:
    try:
        return b"lipprep_embedding" in (parquet.read_schema(path).metadata or {})
    except Exception:  # at what is no table, its reader trips in any way
        return False


def _pyarrow() -> tuple[Any, Any]:
    """pyarrow and its part that writes Parquet. Raises ValueError, saying what to install, where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"a {TABLE} file needs a package that is missing ({error}): "
            'pip install "lipprep[parquet]", or name a folder'
        ) from error
    return pyarrow, pyarrow.parquet
