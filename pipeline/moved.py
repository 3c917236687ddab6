"""Clips that a new manifest deals to other chunks: their old tars are set aside until they are copied.

A word more, a clip less or another seed moves clips from chunk to chunk. What was made of them is copied from
the tar that holds it, which may itself be about to be replaced; so it waits in a folder of its own. Stores rename
nothing, but copy by themselves.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.inputs import digest
from lipprep.pipeline.manifest import Manifest, chunk_name
from lipprep.pipeline.plan import WHOLE, Chunk, Slice
from lipprep.pipeline.records import Headers, all_entries, read_header, record_path, uncommit
from lipprep.stages.remote import REQUESTS, RemotePath

_ASIDE = ".old"


class Moved:
    """The old tars of a stage's folder that hold clips of other chunks which are to be made."""

    def __init__(
        self,
        folder: Path | RemotePath,
        chunks: Sequence[Chunk],
        pending: Sequence[Chunk],
        manifest: Manifest,
        *,
        replace: bool = False,
        part: Slice = WHOLE,
        lent: Path | RemotePath | None = None,
    ) -> None:
        """Set them aside. `chunks` are the stage's, `pending` those of them that are to be made. What was lent to the
        stage is in its folder, or in `lent`.

        Where they are a `part` of all, what is set aside is kept, for the other parts. Raises ValueError where the
        folder holds another corpus's clips, none of this one's, and they are not to be replaced.
        """
        self._folder = folder
        self._lent = lent or folder
        self._drops = part.whole
        self._holders: dict[Path, set[Path]] = {}  # an old tar: the chunks that still need it
        self.dropped = 0  # clips that the manifest does not list any more
        # Where the same clips are in the same chunks, as after a change of parameters, nothing moves.
        tars = [*folder.glob("*.tar"), *(folder / _ASIDE).glob("*.tar")]
        if self._lent != folder:
            tars += (self._lent / _ASIDE).glob("*.tar")
        stay = _in_place(folder, manifest, {c.tar: c.header for c in chunks}) if tars else set()
        tars = [tar for tar in sorted(tars) if tar not in stay]
        if not tars:
            return
        keys = {tar: [e["key"] for e in entries] for tar, entries in zip(tars, all_entries(tars), strict=True)}
        where = {key: tar for tar, mine in keys.items() for key in mine}
        stood = {key for tar, mine in keys.items() if tar.parent == folder for key in mine}
        self.dropped = len(stood - {clip.key for clip in manifest.clips})
        if where and not replace and not stay and not any(clip.key in where for clip in manifest.clips):
            raise UserError(
                f"{folder} holds what was made of other clips than those of {manifest.path} "
                f"(e.g. {next(iter(where))}): is there another manifest of the name {manifest.name}? Choose another -w "
                f"for one of the two, or remove {folder} if it is not needed any more"
            )
        for chunk in pending:
            if chunk.tar in stay:
                continue
            own = set(keys.get(chunk.tar, ()))
            for clip in chunk.clips:
                if clip.key not in own and clip.key in where:
                    self._holders.setdefault(where[clip.key], set()).add(chunk.tar)
        replaced = {chunk.tar for chunk in pending}
        theirs = [tar for tar in self._holders if tar.parent == folder]
        if not part.whole:
            theirs = sorted({*theirs, *(replaced & keys.keys())})
        with ThreadPoolExecutor(REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
            asides = list(threads.map(partial(self._set_aside, keep=not part.whole), theirs))
        for tar, aside in zip(theirs, asides, strict=True):
            needed = self._holders.pop(tar, set())
            if part.whole and tar in replaced:
                needed.add(tar)
            self._holders[aside] = needed

    def _set_aside(self, tar: Path, *, keep: bool = False) -> Path:
        header = read_header(tar)
        if header is None:  # another part, or a run on another machine, has just replaced it
            return tar
        sha256 = header["tar"]["sha256"]
        # Two runs that were stopped may have set aside two tars of one name.
        aside = self._folder / _ASIDE / f"{tar.stem}-{sha256[:12]}.tar"
        aside.parent.mkdir(exist_ok=True)
        try:  # with a link or copy each, no kill between two steps costs anything
            for path, other in ((tar, aside), (record_path(tar), record_path(aside))):
                if keep and other.exists():  # another part has done it
                    continue
                if isinstance(path, RemotePath):
                    path.copy_to(other)
                else:
                    other.unlink(missing_ok=True)
                    other.hardlink_to(path)
            if not keep:
                drop(tar)
        except OSError:  # a file system without links, or gone from a store
            if keep:
                return tar
            if not isinstance(tar, RemotePath):
                tar.replace(aside)
                record_path(tar).replace(record_path(aside))
        return aside

    def old(self, chunk: Chunk) -> tuple[Path, ...]:
        """The tars that hold clips of `chunk`."""
        return tuple(tar for tar, needed in self._holders.items() if chunk.tar in needed)

    def done(self, made: Path) -> None:
        """Drop the old tars that nothing needs any more, now that the tar `made` is committed."""
        if not self._drops:
            return
        for tar, needed in list(self._holders.items()):
            needed.discard(made)
            if not needed:
                del self._holders[tar]
                drop(tar)

    def close(self) -> None:
        """Drop what was set aside, where every chunk is made."""
        if self._drops:
            drop_aside(self._folder)
            if self._lent != self._folder:
                drop_aside(self._lent)


def lend(dataset: str, folder: Path | RemotePath, other: Path | RemotePath, *, copy: bool = True) -> int:
    """Put links to the tars of `dataset` in `folder` where the stage folder `other` of another set copies from.

    Copies, where a disk has no links, or none if not `copy`. Returns their number; 0 where one lies on a disk and the
    other in a store.
    """
    if isinstance(folder, RemotePath) != isinstance(other, RemotePath):
        return 0
    aside, read = other / _ASIDE, Headers(folder)
    lent = {}
    for tar in sorted(folder.glob("*.tar")):
        if (header := read(tar)) is not None and header["dataset"] == dataset:
            lent[tar] = aside / f"{tar.stem}-{header['tar']['sha256'][:12]}.tar"
    if lent:
        aside.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
        return sum(threads.map(partial(_link, copy=copy), lent, lent.values()))


def _link(tar: Path | RemotePath, other: Path | RemotePath, *, copy: bool) -> bool:
    """Let a tar and its record stand under another name, too, by copying if it must be and `copy`; whether they do."""
    for path, link in ((tar, other), (record_path(tar), record_path(other))):
        if isinstance(path, RemotePath):
            if copy:
                path.copy_to(link)
            continue
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(path)
        except OSError:
            if not copy:
                return False
            shutil.copyfile(path, link)
    return copy or not isinstance(tar, RemotePath)


def _in_place(
    folder: Path | RemotePath, manifest: Manifest, headers: Mapping[Path | RemotePath, dict | None]
) -> set[Path | RemotePath]:
    """The tars of `folder` that hold just the clips of their chunk; `headers` are those that are known."""
    found, read = set(), Headers(folder)
    for (split, number), clips in manifest.chunks().items():
        tar = folder / f"{chunk_name(split, number)}.tar"
        header = headers[tar] if tar in headers else read(tar)
        if header is not None and header["rows"].get("key") == digest([c.key for c in clips]):
            found.add(tar)
    return found


def drop_aside(folder: Path | RemotePath) -> None:
    """Drop all that was set aside in a stage's folder."""
    aside = folder / _ASIDE
    if not isinstance(aside, RemotePath):
        shutil.rmtree(aside, ignore_errors=True)
    elif names := aside.entries():
        with ThreadPoolExecutor(REQUESTS) as threads:
            list(threads.map(lambda name: (aside / name).unlink(), names))


def drop(tar: Path | RemotePath) -> None:
    """Remove a tar and its record."""
    uncommit(tar)
    tar.unlink(missing_ok=True)
