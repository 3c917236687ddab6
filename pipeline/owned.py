"""Which files of a folder are lipprep's own: no other is ever deleted or replaced.

A file is lipprep's where its name is one that lipprep gives and its content says so: a record by its header, a tar by
the record beside it or by its members, an index by its fields. All others are left alone, and a command that would
have to replace one refuses.
"""

import json
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from lipprep.io.errors import UserError
from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.plan import Chunk
from lipprep.pipeline.records import first_line, record_path
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import MAX_INDEX, SPLITS
from lipprep.stages.untrusted import check_file, printable

CHUNK = re.compile(rf"({'|'.join(SPLITS)})-(\d{{5,}})")  # the stem of a chunk's files
_MEMBERS = {"landmarks": ("landmarks.npy",), "crops": ("mouth.npy",), "shards": ("mouth.npy", "mouth.jpg")}
_HEAD = 1 << 16  # bytes
_BLOCK = tarfile.BLOCKSIZE
_EMPTY_TAR = tarfile.RECORDSIZE  # bytes, all of them zero


class Owner(NamedTuple):
    """The data set and stage that a record says it is of; None where that was damaged."""

    dataset: str | None
    stage: str | None


def record_owner(record: Path | RemotePath) -> Owner | None:
    """Return what a record, sound or damaged, was made for; None where there is none, or it is not lipprep's."""
    try:
        line = first_line(record)
    except OSError:
        return None
    try:
        header = json.loads(line)
        if isinstance(header, dict) and "lipprep_record" in header:
            told = (header.get(name) for name in ("dataset", "stage"))
            return Owner(*(value if isinstance(value, str) else None for value in told))
    except (ValueError, RecursionError):
        # One damaged byte does not hide both.
        if b'"lipprep_record": ' in line[:64] or b'"fingerprint": ' in line:
            return Owner(None, None)
    return None


def is_own_record(tar: Path | RemotePath, manifest: Manifest, stage: str, *, replace: bool) -> bool:
    """Return whether a tar's record says that it is of this data set (with `replace`: of any) and stage."""
    owner = record_owner(record_path(tar))
    return owner is not None and owner.stage == stage and (replace or owner.dataset == manifest.name)


def is_own_tar(tar: Path | RemotePath, stage: str, keys: Collection[str] | None) -> bool:
    """Return whether a tar without a record is one that lipprep made of clips with `keys` (None: of any clips).

    Runs that were killed between the removal of the old record and the new one's arrival leave such tars. The first
    member tells.
    """
    try:
        with tar.open("rb") as file:
            head = file.read(_HEAD)
        if not any(head):  # that of a chunk all of whose clips failed
            return 0 < len(head) <= _EMPTY_TAR
        member = tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
        if member.type == tarfile.GNUTYPE_LONGNAME and member.size < _HEAD - 2 * _BLOCK:
            content = _BLOCK + -(-member.size // _BLOCK) * _BLOCK
            name = head[_BLOCK : _BLOCK + member.size].rstrip(b"\0").decode("utf-8", "surrogateescape")
            member = tarfile.TarInfo.frombuf(head[content : content + _BLOCK], "utf-8", "surrogateescape")
            member.name = name
    except (OSError, tarfile.TarError):
        return False
    key, _, extension = member.name.partition(".")
    plain = member.isreg() and not (member.mtime or member.uid or member.gid)
    return plain and extension in _MEMBERS[stage] and (keys is None or key in keys)


def strays(
    folder: Path | RemotePath, wanted: Collection[str], manifest: Manifest, stage: str, *, replace: bool
) -> list:
    """List lipprep's own tars of a stage, and those of which a record is left, that `wanted` does not name.

    They are those of the manifest's data set or, with `replace`, of any.
    """
    names = {f"{path.stem}.tar" for pattern in ("*.tar", "*.jsonl") for path in folder.glob(pattern)}
    found = []
    for name in sorted(names.difference(wanted)):
        tar = folder / name
        if CHUNK.fullmatch(tar.stem) and is_own_record(tar, manifest, stage, replace=replace):
            found.append(tar)
    return found


def check_chunks(chunks: Iterable[Chunk], manifest: Manifest, *, replace: bool) -> None:
    """Raise UserError, naming the file, where what is to be written would replace what lipprep did not make for it.

    That is never allowed for files of others; for those of another data set with `replace`.
    """
    keys = None if replace else {clip.key for clip in manifest.clips}
    for chunk in chunks:
        tar, record = chunk.tar, record_path(chunk.tar)
        if chunk.header is not None:
            owner: Owner | None = Owner(chunk.header["dataset"], chunk.header["stage"])
        elif _is_there(record):
            owner = record_owner(record)
            if owner is None:
                raise _foreign(record)
        elif _is_there(tar):
            if not is_own_tar(tar, chunk.stage, keys):
                raise _foreign(tar)
            continue
        else:
            continue
        _check_owner(owner, tar.parent, manifest, chunk.stage, replace=replace)


def _check_owner(
    owner: Owner, folder: Path | RemotePath, manifest: Manifest, stage: str, *, replace: bool = False
) -> None:
    if owner.stage not in (None, stage):
        raise UserError(f"{printable(folder)} holds the artefacts of another stage: choose another -o")
    if owner.dataset not in (None, manifest.name) and not replace:
        raise UserError(
            f"{printable(folder)} holds {'shards' if stage == 'shards' else stage} of data set "
            f"{printable(owner.dataset)}, not of {manifest.name}: choose another {'-o' if stage == 'shards' else '-w'}"
            f"{', or --replace them' if stage == 'shards' else ''}"
        )


def check_index(folder: Path | RemotePath, manifest: Manifest, *, replace: bool) -> None:
    """Raise UserError, as `check_chunks` does, where the index of shards would replace another file."""
    path, offsets = folder / "index.json", folder / "index.npz"
    if _is_there(path):
        dataset = index_owner(path)
        if dataset is None:
            raise _foreign(path)
        _check_owner(Owner(dataset or None, "shards"), folder, manifest, "shards", replace=replace)
    elif _is_there(offsets) and not _is_offsets(offsets):
        raise _foreign(offsets)


def index_owner(path: Path | RemotePath) -> str | None:
    """Return the data set that an index.json names, "" where that was damaged, None where lipprep did not make it."""
    try:
        text = check_file(path, "index", limit=MAX_INDEX).read_bytes()
    except (OSError, UserError):
        return None
    if b'"lipprep_index": ' not in text[:64] and b'"offsets_sha256": ' not in text[-256:]:
        return None
    named = re.search(rb'"dataset": ("(?:[^"\\]|\\.)*")', text)
    try:
        return json.loads(named[1]) if named else ""
    except ValueError:
        return ""


def _is_offsets(path: Path | RemotePath) -> bool:
    """Return whether a file is an index.npz whose index.json is not written yet."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return all(CHUNK.fullmatch(name.removesuffix(".tar.npy")) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def _is_there(path: Path | RemotePath) -> bool:
    return path.exists() or path.is_symlink()


def _foreign(path: Path | RemotePath) -> UserError:
    option = "-o" if "index" in path.name else "-o (or -w)"
    return UserError(
        f"{printable(path)} is not lipprep's, and is never replaced: choose another {option}, or move it elsewhere"
    )
