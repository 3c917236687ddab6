"""A stage from survey to accounts: what is pending is handed to the supervisor, what came of it is counted."""

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lipprep.pipeline.accounts import Report, close_accounts
from lipprep.pipeline.inputs import archive_name
from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.make import CLIP_TIMEOUT, Job
from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.moved import Moved, drop
from lipprep.pipeline.plan import STAGES, Chunk, Layout, stage_parameters, survey, upstream
from lipprep.pipeline.records import read_entries, read_header, record_path, uncommit
from lipprep.pipeline.space import disk_trouble, free_bytes, needed_bytes, warn_of_space
from lipprep.pipeline.supervise import say, supervise
from lipprep.pipeline.wanted import Wanted, write_wanted
from lipprep.stages.untrusted import is_file

if TYPE_CHECKING:
    from lipprep.stages.shard.index import Index


def make_jobs(
    stage: str,
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    pending: Sequence[Chunk],
    *,
    stored_crops: Collection[tuple[str, int]] = (),
    moved: Moved | None = None,
    persons: dict[str, int] | None = None,
    device: str = "cpu",
    retry: str | None = None,
    clip_timeout: float = CLIP_TIMEOUT,
    deep: bool = False,
) -> Iterator[Job]:
    """What workers need to make the chunks `pending`, one job each.

    `stored_crops` are the places (split, number) whose crops are kept and fresh.
    """
    parameters = stage_parameters(wanted)[stage]
    above = upstream(stage, wanted)
    for chunk in pending:
        place = (chunk.split, chunk.number)
        yield Job(
            stage=stage,
            clips=chunk.clips,
            root=manifest.root,
            fps=manifest.fps,
            wanted=wanted,
            parameters=parameters,
            header={"dataset": manifest.name, **chunk.wanted_header(manifest.fps, parameters)},
            tar=chunk.tar,
            landmarks=layout.tar(above, *place) if above else None,
            crops=layout.tar("crops", *place) if place in stored_crops else None,
            persons=persons
            and {n: persons[n] for n in map(archive_name, {c.video for c in chunk.clips}) if n in persons},
            device=device,
            retry=retry,
            old=moved.old(chunk) if moved else (),
            clip_timeout=clip_timeout,
            deep=deep,
        )


def run_stage(
    stage: str,
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    *,
    workers: int,
    persons: dict[str, int] | None = None,
    device: str = "cpu",
    retry: str | None = None,
    clip_timeout: float = CLIP_TIMEOUT,
    deep: bool = False,
    replace: bool = False,
) -> Report:
    """Make every chunk of `stage` that is missing or stale, on `workers` processes.

    `retry` names the class of failed clips to try again ("": all). `deep` compares the videos' contents, not
    their sizes and times alone. `replace` lets another corpus's artefacts go. Raises ValueError where the stage
    before is not done, its output is damaged, a disk is full, worker processes die again and again, or another
    run is at work in the same folder.
    """
    check_root(manifest)
    began = time.perf_counter()
    with contextlib.ExitStack() as locks:
        locks.enter_context(alone_in(folder := layout.folder(stage)))
        for other in {"landmarks", "crops"} - {stage} if stage != "landmarks" else ():
            locks.enter_context(alone_in(layout.folder(other), shared=True))
        write_wanted(layout.plan, wanted)
        mine, stored = _survey(stage, manifest, layout, wanted, deep)
        pending = [c for c in mine if c.state != "fresh" or _to_retry(c, retry)]
        again = {c.tar for c in pending}
        fresh = {c.tar.name for c in mine if c.tar not in again}
        moved = Moved(folder, fresh, pending, manifest, replace=replace)
        if stage == "shards" and pending:
            # From here to the end the folder holds old and new shards: no index may call them one set.
            (layout.out / "index.json").unlink(missing_ok=True)

        def room() -> int:
            return needed_bytes(stage, manifest, wanted, mine, [c for c in pending if c.tar not in made], workers)

        made: dict[Path, dict] = {}
        if pending and room() > free_bytes(folder):
            warn_of_space(folder, room())
        with tqdm(total=sum(len(c.clips) for c in pending), desc=stage, unit="clip", disable=not pending) as bar:

            def done(tar: Path, header: dict) -> None:
                if made.setdefault(tar, header) is header:
                    bar.update(header["planned"])
                moved.done(tar)

            jobs = make_jobs(
                stage,
                manifest,
                layout,
                wanted,
                pending,
                stored_crops=stored,
                moved=moved,
                persons=persons,
                device=device,
                retry=retry,
                clip_timeout=clip_timeout,
                deep=deep,
            )
            try:
                supervise(list(jobs), workers=workers, done=done)
            except OSError as error:
                if (message := disk_trouble(error, folder, room(), len(pending) - len(made))) is None:
                    raise
                raise ValueError(message) from error
        moved.close()
        if moved.dropped:
            say(f"{moved.dropped} clips that {manifest.path} does not list any more are dropped from {folder}")
        _drop_orphans(folder, {c.tar.name for c in mine})
        if stage == "shards":
            _write_index(manifest, layout, wanted)
        return close_accounts(stage, manifest, mine, list(made.values()), time.perf_counter() - began)


def _survey(
    stage: str, manifest: Manifest, layout: Layout, wanted: Wanted, deep: bool
) -> tuple[list[Chunk], set[tuple[str, int]]]:
    """The chunks of `stage`, and the places whose crops are stored and fresh.

    Raises ValueError where the chunks that it is made from are not all there.
    """
    above = upstream(stage, wanted)
    needed = {stage, above, "crops" if stage == "shards" else stage}
    chunks = survey(manifest, layout, wanted, tuple(s for s in STAGES if s in needed), deep=deep)
    if above and (absent := [c for c in chunks if c.stage == above and c.state != "fresh"]):
        why = f" ({absent[0].reason})" if absent[0].reason else ""
        raise ValueError(
            f"{len(absent)} chunks of {above} are {absent[0].state}{why}: run `lipprep {above}"
            f"{' --deep' if deep else ''}` first"
        )
    stored = {(c.split, c.number) for c in chunks if c.stage == "crops" and c.state == "fresh"}
    return [c for c in chunks if c.stage == stage], stored if stage == "shards" else set()


def check_root(manifest: Manifest) -> None:
    """Raise ValueError where not one video is where the manifest says: a disk is missing, or the root has moved."""
    if not any(is_file(manifest.root / clip.video) for clip in manifest.clips):
        raise ValueError(
            f"none of the manifest's videos is below {manifest.root} (e.g. {manifest.clips[0].video}): is a disk not "
            "mounted? If they have moved, say where with --root"
        )


def _to_retry(chunk: Chunk, retry: str | None) -> bool:
    if retry is None:
        return False
    return any(kind != "ok" and retry in ("", kind) for kind in chunk.header["counts"])


def _drop_orphans(folder: Path, wanted: set[str]) -> None:
    """Remove tars that no chunk of the manifest has any more: they would be read as if they had."""
    for tar in folder.glob("*.tar"):
        if tar.name not in wanted and record_path(tar).exists():
            drop(tar)
    for record in folder.glob("*.jsonl"):
        if record.with_suffix(".tar").name not in wanted and not record.with_suffix(".tar").exists():
            record.unlink()  # of a tar that was being set aside
    for unfinished in folder.glob(".*.tmp"):  # of runs that were killed; everything of this one is committed
        unfinished.unlink(missing_ok=True)


def check_out(manifest: Manifest, out: Path) -> None:
    """Refuse a folder that holds the shards of another data set. Raises ValueError, which names both."""
    from lipprep.stages.shard.index import load_index

    headers = [h for tar in out.glob("*.tar") if (h := read_header(tar)) is not None]
    if any(h["stage"] != "shards" for h in headers):
        raise ValueError(f"{out} holds the artefacts of another stage: choose another -o")
    names = {h["dataset"] for h in headers}
    with contextlib.suppress(ValueError):  # unusable, as after a stop in mid-run: it will be written again
        names.add(load_index(out).dataset)
    if names - {manifest.name}:
        raise ValueError(
            f"{out} holds shards of data set {', '.join(sorted(names))}, not of {manifest.name}: choose another -o, "
            "or --replace them"
        )


def _write_index(manifest: Manifest, layout: Layout, wanted: Wanted) -> None:
    """Write the index of the shards of `manifest`, all of which are committed.

    Raises ValueError where a record was damaged: its shard must be made again.
    """
    from lipprep.stages.shard.index import load_index, save_index

    index = _describe(manifest, layout, wanted)
    with contextlib.suppress(ValueError):
        if dataclasses.replace(load_index(layout.out), offsets={}) == index:
            return  # what is there is told by headers alone; offsets are in the records' lines
    offsets = {}
    for shard in index.shards:
        tar = layout.out / shard.name
        starts = [e["offset"] for e in read_entries(tar) if e["status"] == "ok"]
        if len(starts) != shard.samples:
            uncommit(tar)
            raise ValueError(f"the record of {tar} was damaged since it was made: run `lipprep shards` again")
        offsets[shard.name] = [*starts, read_header(tar)["end"]]
    save_index(layout.out, dataclasses.replace(index, offsets=offsets))


def _describe(manifest: Manifest, layout: Layout, wanted: Wanted) -> "Index":
    """The index without its offsets."""
    from lipprep.pipeline.wanted import load_mean_face
    from lipprep.stages.shard.index import Index, Shard

    shards, failures = [], {}
    for split, number in manifest.chunks():
        tar = layout.tar("shards", split, number)
        header = read_header(tar)
        assert header is not None, tar
        counts = Counter(header["counts"])
        shards.append(Shard(tar.name, split, counts.pop("ok", 0), header["tar"]["bytes"], header["tar"]["sha256"]))
        failures.setdefault(split, Counter()).update(counts)
    parameters = stage_parameters(wanted)
    landmarks = {k: v for k, v in parameters["landmarks"].items() if k != "archive"}
    if not upstream("shards", wanted):
        landmarks = {}
    elif wanted.mean_face is not None and "mean_face" in parameters["shards"]:
        # The points themselves: whoever has weights trained on these crops must be able to cut others like them.
        parameters["shards"]["mean_face"] = load_mean_face(Path(wanted.mean_face)).tolist()
    return Index(
        dataset=manifest.name,
        fingerprint=hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
        labels=manifest.labels,
        fps=manifest.fps,
        parameters={**landmarks, **parameters["shards"]},
        failures={split: dict(sorted(kinds.items())) for split, kinds in failures.items()},
        shards=tuple(shards),
        offsets={},
    )
