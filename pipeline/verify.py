"""`lipprep verify`: a folder of tars, their records and their index, held against each other.

All that is wrong is found in one run: where the index is unusable, records are still held against tars, and where a
record is, the tar against the index. Whatever lies in the folder, it ends in findings and never in an exception.
"""

import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.pipeline.ahead import ahead
from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.manifest import chunk_name
from lipprep.pipeline.owned import CHUNK
from lipprep.pipeline.verify_chunk import Chunk, Finding, Findings, read_chunk
from lipprep.pipeline.verify_folder import Folder, list_folder, make_again
from lipprep.stages.lock import LOCK
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.index import Index, Shard, index_text, parse_index, read_offsets
from lipprep.stages.untrusted import is_file, printable

_MOST_CHUNKS = 100_000  # of a split: a name can hold any number
_WRONG_FOLDER = "name the folder that holds the shards (or work/NAME/landmarks)"
_Loaded = tuple[str, Index, str] | ValueError | None  # None where no index belongs


@dataclass(frozen=True)
class Verified:
    """What was read, and all that is wrong with it. `notes` say what is worth knowing and no fault."""

    folder: str
    stage: str
    dataset: str | None
    deep: bool
    shards: int
    clips: int
    bytes: int
    seconds: float
    findings: list[Finding]
    notes: list[str]


def verify(path: Path | RemotePath, *, deep: bool = False, workers: int = 1) -> Verified:
    """Read every tar, record and index in the folder `path` once, on `workers`, and list what does not agree.

    Of a store, the tars that are being read are copied to the local disk, one a worker. Raises ValueError where there
    is no such folder, a run is at work in it, or a process of the deep look was killed; RemoteError where a store
    cannot be reached.
    """
    path = place(path)
    # Without a lock nothing was ever made there; it may be read-only, and none is left behind.
    locked = isinstance(path, RemotePath) or is_file(path / LOCK)
    with alone_in(path, shared=True) if locked else contextlib.nullcontext():
        return _verify(list_folder(path), deep, workers)


def _verify(folder: Folder, deep: bool, workers: int) -> Verified:
    began = time.perf_counter()
    loaded = _load_index(folder)
    # Most records tell the data set: a stray one, or a stray index, may be another's.
    datasets = [*(h["dataset"] for h in folder.headers), *([loaded[1].dataset] if isinstance(loaded, tuple) else [])]
    dataset = next((name for name, _ in Counter(datasets).most_common(1)), None)
    findings = Findings(make_again(folder, dataset))
    index = _check_loaded(folder, loaded, findings)
    shards = {s.name: s for s in index.shards} if index else {}
    chunks = _read_chunks(folder, shards, findings.again, index, deep, workers)
    for chunk in chunks.values():
        findings.listed += chunk.findings.listed
        _check_tar(folder, chunk, shards, index is not None, findings)
    notes = _check_records(folder, chunks, shards, findings)
    if index is None:
        _check_gaps(chunks, findings)
    _check_keys(chunks, shards, findings)
    notes += _check_headers(chunks, index, findings)
    if index is not None:
        _check_index(index, chunks, findings)
    if deep:
        from lipprep.pipeline.verify_deep import find_duplicates, find_leakage

        find_duplicates(chunks.values(), findings)
        find_leakage([(_split(c.name, shards), c) for c in chunks.values()], findings)
    if foreign := [name for name in folder.foreign if name not in chunks]:
        notes.append(f"{len(foreign)} tars are not lipprep's and were not read (e.g. {printable(foreign[0])})")
    read = [c for c in chunks.values() if c.bytes is not None]
    return Verified(
        folder=printable(folder.path),
        stage=folder.stage,
        dataset=dataset,
        deep=deep,
        shards=len(read),
        clips=sum(c.samples for c in read),
        bytes=sum(c.bytes for c in read if c.sha256),
        seconds=time.perf_counter() - began,
        findings=sorted(findings.listed, key=lambda f: (f.file, f.kind)),
        notes=notes,
    )


def _split(name: str, shards: dict[str, Shard]) -> str:
    """The split that a tar's name says, or else the index."""
    if match := CHUNK.fullmatch(name.removesuffix(".tar")):
        return match[1]
    return shards[name].split if name in shards else ""


def _load_index(folder: Folder) -> _Loaded:
    """The index's text, what it says, and the sha256 of its offsets; or why it is not usable."""
    if folder.stage != "shards" and (folder.tars or folder.records):
        return None
    try:
        text = index_text(folder.path)
        return text, *parse_index(text, folder.path)
    except UserError as error:
        return error


def _check_loaded(folder: Folder, loaded: _Loaded, findings: Findings) -> Index | None:
    """The index, as far as it is usable; what is not is listed."""
    if loaded is None:
        return None
    path, again = folder.path / "index.json", f": run `lipprep shards -o {printable(folder.path)}` again"
    if isinstance(loaded, ValueError):
        wrong = None if folder.tars or folder.records else _WRONG_FOLDER
        if folder.size(path.name) is not None:
            cause = printable(loaded).removesuffix(again)
            findings.add("bad_index", path.name, cause, remove=[path.name], remedy=wrong)
        elif wrong:
            message = f"{folder.path} holds neither shards nor records nor an index"
            findings.add("empty", ".", message, remedy=wrong)
        else:
            findings.add("no_index", path.name, "the shards have no index: a run was stopped, or it was removed")
        return None
    text, index, sha256 = loaded
    if _packed(text) != json.dumps(json.loads(text), separators=(",", ":")):
        findings.add("bad_index", path.name, "it is not spelt as lipprep spells it", remove=[path.name])
    try:
        offsets = read_offsets(folder.path, index.shards, sha256)
    except UserError as error:
        findings.add("bad_offsets", "index.npz", printable(error).removesuffix(again), remove=["index.npz"])
        offsets = {}
    return replace(index, offsets=offsets)


def _packed(text: str) -> str:
    """JSON without the white space between its tokens: spelling `e` as `E` in a number changes no value."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda match: match[1] or "", text)


def _read_chunks(
    folder: Folder, shards: dict[str, Shard], again: str, index: Index | None, deep: bool, workers: int
) -> dict[str, Chunk]:
    """Every tar that is there, or should be, with its record: read by threads, or decoded by processes."""
    names = sorted({*folder.tars, *folder.records, *shards})
    sizes = {n: folder.size(n) or 0 for n in names}
    # Absolute: worker processes stay in the folder that they were started in.
    tasks = [(folder.path.absolute() / n, again, shards[n].bytes if n in shards else 0) for n in names]
    workers = max(1, min(workers, len(names)))
    if deep:
        labels = index.labels if index else None
        found = _look([(*task, folder.stage, _split(task[0].name, shards), labels) for task in tasks], workers)
    else:
        found = _read(tasks, workers)
    chunks = {}
    with tqdm(total=sum(sizes.values()), desc="verify", unit="B", unit_scale=True, disable=not names) as bar:
        for chunk in found:
            bar.update(sizes[chunk.name])
            chunks[chunk.name] = chunk
    return dict(sorted(chunks.items()))


def _read(tasks: list[tuple], workers: int) -> Iterator[Chunk]:
    # Threads: hashing holds no lock of Python's.
    with contextlib.closing(ahead(tasks, lambda task: read_chunk(*task), threads=workers, depth=len(tasks))) as read:
        for _, future in read:
            yield future.result()


def _look(tasks: list[tuple], workers: int) -> Iterator[Chunk]:
    from lipprep.pipeline.pool import WorkerDied, pool, run_all
    from lipprep.pipeline.verify_deep import Look, look

    try:
        with pool(workers) as executor:
            for _, future in run_all(executor, look, [Look(*task) for task in tasks], ahead=lambda: 2 * workers):
                yield future.result()
    except WorkerDied as error:
        raise UserError(
            f"a worker process was killed ({error}: out of memory, or a fault in a codec): run it again with fewer "
            "--workers, or without --deep, which decodes nothing"
        ) from error


def _check_tar(folder: Folder, chunk: Chunk, shards: dict[str, Shard], indexed: bool, findings: Findings) -> None:
    """Whether a tar is there, belongs there, and is the one that its record and the index were written for."""
    name, shard = chunk.name, shards.get(chunk.name)
    if chunk.bytes is None:
        if folder.size(name) is None:
            stray = [chunk.record] if shard is None else []
            findings.add("missing_tar", name, "the tar is missing", remove=stray)
        return
    if indexed and shard is None:
        committed = "it has a record" if chunk.header else "it has no sound record either"
        there = [n for n in (name, chunk.record) if folder.size(n) is not None]
        findings.add("unknown_tar", name, f"the index does not know the tar ({committed})", remove=there)
    tar, record = (chunk.bytes, chunk.sha256), None
    if chunk.header is not None:
        record = (chunk.header["tar"]["bytes"], chunk.header["tar"]["sha256"])
    known = shard and (shard.bytes, shard.sha256)
    if record is not None and tar == known != record:
        findings.add("other_record", chunk.record, f"the record is another tar's than {name}", remove=[chunk.record])
    elif record is not None and tar == record and known not in (None, record):
        message = "tar and record are others than the index was written for: of an older run, or of another"
        findings.add("swapped", name, message, remove=[name])
    elif (meant := record or known) is not None and tar != meant:
        of = "its record" if record else "the index"
        if tar[0] != meant[0]:
            message = f"it has {tar[0]} bytes where {of} has {meant[0]}: cut short, or of another run"
            findings.add("size", name, message, remove=[name])
        else:
            findings.add("checksum", name, f"its bytes are not those that {of} was written for", remove=[name])
        if record and known not in (None, record):
            message = f"the record is of another tar than the index has under the name {name}"
            findings.add("other_record", chunk.record, message, remove=[chunk.record])


def _check_records(folder: Folder, chunks: dict[str, Chunk], shards: dict[str, Shard], findings: Findings) -> list[str]:
    """List tars without a record; note them where all are, and are as the index says: copies that a trainer reads."""
    bare = [c for c in chunks.values() if c.bytes is not None and folder.size(c.record) is None]
    copied = [s for c in bare if (s := shards.get(c.name)) and (c.bytes, c.sha256) == (s.bytes, s.sha256)]
    only_copied = not folder.records and bool(copied)
    for chunk in bare:
        if not (only_copied and chunk.name in shards):
            findings.add("missing_record", chunk.record, f"{chunk.name} has no record, so it counts as not made")
    if not only_copied:
        return []
    return [
        f"{len(copied)} tars have no record: they are as the index says, and `lipprep shards` would make them again"
    ]


def _check_gaps(chunks: dict[str, Chunk], findings: Findings) -> None:
    """List what is missing between chunks without an index to tell: they are numbered without gaps."""
    last: dict[str, int] = {}
    for chunk in chunks.values():
        match = CHUNK.fullmatch(chunk.name.removesuffix(".tar"))
        if match and chunk.header is not None:
            last[match[1]] = max(int(match[2]), last.get(match[1], 0))
    for split, number in last.items():
        names = (f"{chunk_name(split, n)}.tar" for n in range(min(number, _MOST_CHUNKS)))
        for name in names:
            if name not in chunks:
                findings.add("missing_tar", name, "the tar and its record are missing: numbers have no gaps")


def _check_keys(chunks: dict[str, Chunk], shards: dict[str, Shard], findings: Findings) -> None:
    """List clips that are in two tars, or twice in a record."""

    def as_indexed(name: str) -> bool:
        return name in shards and shards[name].sha256 == chunks[name].sha256

    first: dict[str, str] = {}
    for chunk in chunks.values():
        for key in chunk.keys:
            other = first.setdefault(key, chunk.name)
            if other != chunk.name:
                both = [other, chunk.name]
                remove = [name for name in both if not as_indexed(name)] or both
                findings.add("duplicate_key", chunk.name, f"the clip is in {other} too", key=key, remove=remove)
        for key in [key for key, count in Counter(chunk.keys).items() if count > 1] if chunk.header else []:
            findings.add("duplicate_key", chunk.record, "the record has the clip twice", key=key, remove=[chunk.record])


def _settings(header: dict) -> dict:
    """What must be the same for all chunks of a folder."""
    parameters = dict(header["parameters"])
    if "mean_face" in parameters:  # a digest here, its points in the index
        parameters["another mean face"] = parameters.pop("mean_face") is not None
    return {
        "dataset": header["dataset"],
        "stage": header["stage"],
        "stage version": header.get("version"),
        "fps": header.get("fps"),
        **parameters,
    }


def _difference(here: dict, there: dict) -> str:
    names = [n for n in {**there, **here} if here.get(n) != there.get(n)]
    return ", ".join(f"{n} {here.get(n)} instead of {there.get(n)}" for n in names)


def _check_headers(chunks: dict[str, Chunk], index: Index | None, findings: Findings) -> list[str]:
    """List chunks that were made otherwise than the rest, or than the index says; note differing machines."""
    headers = {c.name: c.header for c in chunks.values() if c.header is not None}
    if not headers:
        return []
    settings = {name: _settings(header) for name, header in headers.items()}
    counts = Counter(json.dumps(s, sort_keys=True) for s in settings.values())

    def by_index(setting: dict) -> dict:
        told = {"dataset": index.dataset, "stage": "shards", "fps": index.fps}
        told["another mean face"] = index.parameters.get("mean_face") is not None
        return {**setting, **{n: told.get(n, index.parameters.get(n)) for n in setting if n != "stage version"}}

    common = [json.loads(text) for text, _ in counts.most_common()]
    usual = next((s for s in common if index is not None and not _difference(s, by_index(s))), common[0])
    for name, setting in settings.items():
        if difference := _difference(setting, usual):
            kind = "other_dataset" if setting["dataset"] != usual["dataset"] else "parameters"
            message = f"made with other parameters than the rest: {difference}"
            findings.add(kind, chunks[name].record, message, remove=[chunks[name].record])
    if index is not None and (difference := _difference(by_index(usual), usual)):
        kind = "other_dataset" if index.dataset != usual["dataset"] else "parameters"
        message = f"the index has other parameters than the records: {difference}"
        findings.add(kind, "index.json", message, remove=["index.json"])
    machines = {json.dumps([h.get("cpu"), h.get("packages")], sort_keys=True) for h in headers.values()}
    if len(machines) < 2:
        return []
    return [f"made on {len(machines)} kinds of CPU or sets of package versions: bytes may differ between those"]


def _check_index(index: Index, chunks: dict[str, Chunk], findings: Findings) -> None:
    """Hold what the index says of its shards against their records."""

    def add(kind: str, message: str, file: str = "index.json") -> None:
        findings.add(kind, file, message, remove=[file])

    if index.fingerprint != hashlib.sha256("".join(s.sha256 for s in index.shards).encode()).hexdigest():
        add("fingerprint", "its fingerprint is not that of its shards")
    failures: dict[str, Counter] = {}
    whole = True
    for shard in index.shards:
        split, chunk = _split(shard.name, {}), chunks[shard.name]
        if split != shard.split:
            add("wrong_split", f"it has {shard.name} in split {shard.split!r}")
        failures.setdefault(shard.split, Counter()).update(chunk.failures)
        own = chunk.header is not None and chunk.header["tar"]["sha256"] == shard.sha256
        whole = whole and own
        if not own:  # said already, and what follows from it need not be
            continue
        if shard.samples != chunk.samples:
            add("counts", f"it has {shard.samples} clips in {shard.name}, the record {chunk.samples}")
        elif index.offsets and not np.array_equal(index.offsets[shard.name], chunk.offsets):
            add("offsets", f"its offsets of {shard.name} are not those of the record", "index.npz")
    told = {split: dict(kinds) for split, kinds in index.failures.items() if kinds}
    if whole and told != {split: dict(kinds) for split, kinds in failures.items() if kinds}:
        add("failures", "its failed clips are not those of the records")
