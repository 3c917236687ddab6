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
from lipprep.pipeline.owned import CHUNK, is_own_record
from lipprep.pipeline.plan import WHOLE, Chunk, Layout, Slice
from lipprep.pipeline.records import Headers, all_entries, read_header, record_path, uncommit
from lipprep.stages.remote import REQUESTS, RemotePath


class Moved:
    """The old tars of a stage's folder that hold clips of other chunks which are to be made."""

    def __init__(
        self,
        layout: Layout,
        stage: str,
        chunks: Sequence[Chunk],
        pending: Sequence[Chunk],
        manifest: Manifest,
        *,
        replace: bool = False,
        part: Slice = WHOLE,
    ) -> None:
        """Find them, and those that were set aside or lent before; nothing is touched before `set_aside`.

        `chunks` are the stage's, `pending` those of them that are to be made. Where they are a `part` of all, what is
        set aside is kept, for the other parts. Raises UserError where the folder holds another corpus's clips, none of
        this one's, and they are not to be replaced.
        """
        folder = layout.folder(stage)
        self._folder, self._earlier = folder, layout.earlier(stage)
        self._places = list(dict.fromkeys((self._earlier, layout.lent(stage))))
        self._drops = part.whole
        self._holders: dict[Path, set[Path]] = {}  # an old tar: the chunks that still need it
        self._theirs: list[Path | RemotePath] = []  # those of them that make way
        self._pending = {chunk.tar for chunk in pending}
        self.dropped = 0  # clips that the manifest does not list any more
        # Where the same clips are in the same chunks, as after a change of parameters, nothing moves.
        tars = [tar for tar in folder.glob("*.tar") if CHUNK.fullmatch(tar.stem)]
        earlier = [tar for place in self._places for tar in place.glob("*.tar")]
        stay = _in_place(folder, manifest, {c.tar: c.header for c in chunks}) if tars or earlier else set()
        tars = [tar for tar in tars if tar not in stay and is_own_record(tar, manifest, stage, replace=replace)]
        tars = sorted((*tars, *earlier))
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
        self._theirs = [tar for tar in self._holders if tar.parent == folder]
        if not part.whole:
            self._theirs = sorted({*self._theirs, *(self._pending & keys.keys())})

    def set_aside(self) -> None:
        """Move the tars that make way to the folder of earlier ones."""
        with ThreadPoolExecutor(REQUESTS if isinstance(self._folder, RemotePath) else 1) as threads:
            asides = list(threads.map(self._set_aside, self._theirs))
        for tar, aside in zip(self._theirs, asides, strict=True):
            needed = self._holders.pop(tar, set())
            if self._drops and tar in self._pending:
                needed.add(tar)
            self._holders[aside] = needed

    def _set_aside(self, tar: Path | RemotePath) -> Path | RemotePath:
        header = read_header(tar)
        if header is None:  # another part, or a run on another machine, has just replaced it
            return tar
        # Two runs that were stopped may have set aside two tars of one name.
        aside = self._earlier / f"{tar.stem}-{header['tar']['sha256'][:12]}.tar"
        try:  # with a link or copy each, no kill between two steps costs anything
            if self._drops or read_header(aside) is None:
                _link(tar, aside, copy=True)
        except FileNotFoundError:  # another part has replaced it meanwhile
            return tar
        if self._drops:
            drop(tar)
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
        """Drop what was set aside and what was lent, where every chunk is made."""
        if self._drops:
            drop_earlier(self._places)


def lend(dataset: str, folder: Path | RemotePath, other: Path | RemotePath, *, copy: bool = True) -> int:
    """Put links to the tars of `dataset` in `folder` into `other`, where a stage of another set copies from.

    Copies, where a disk has no links, or none if not `copy`. Returns their number; 0 where one lies on a disk and the
    other in a store.
    """
    if isinstance(folder, RemotePath) != isinstance(other, RemotePath):
        return 0
    read, lent = Headers(folder), {}
    for tar in sorted(folder.glob("*.tar")):
        if CHUNK.fullmatch(tar.stem) and (header := read(tar)) is not None and header["dataset"] == dataset:
            lent[tar] = other / f"{tar.stem}-{header['tar']['sha256'][:12]}.tar"
    with ThreadPoolExecutor(REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
        return sum(threads.map(partial(_link, copy=copy), lent, lent.values()))


def _link(tar: Path | RemotePath, other: Path | RemotePath, *, copy: bool) -> bool:
    """Let a tar and its record stand under another name, too, by copying if it must be and `copy`; whether they do."""
    for path, link in ((tar, other), (record_path(tar), record_path(other))):
        if isinstance(path, RemotePath):
            if copy:
                path.copy_to(link)
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
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


def drop_earlier(places: Sequence[Path | RemotePath]) -> None:
    """Remove the tars that were set aside or lent, with their records."""
    for folder in places:
        tars = [tar for tar in folder.glob("*.tar") if CHUNK.match(tar.stem)]
        with ThreadPoolExecutor(REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
            list(threads.map(drop, tars))


def drop(tar: Path | RemotePath) -> None:
    """Remove a tar and its record; the tar first, for what is left then still says whose it is."""
    tar.unlink(missing_ok=True)
    uncommit(tar)
