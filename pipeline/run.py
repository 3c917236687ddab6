"""A stage from survey to accounts: what is pending is handed to the supervisor, what came of it is counted."""

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.pipeline.accounts import Report, close_accounts
from lipprep.pipeline.engines import HERE, Cluster, Engine, open_cluster
from lipprep.pipeline.from_crops import check_kind
from lipprep.pipeline.inputs import archive_name, looking
from lipprep.pipeline.lock import alone_in
from lipprep.pipeline.make import CLIP_TIMEOUT, Job
from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.moved import Moved, drop, drop_earlier
from lipprep.pipeline.owned import CHUNK, check_chunks, check_index, strays
from lipprep.pipeline.plan import (
    STAGES,
    WHOLE,
    Chunk,
    Layout,
    Slice,
    index_parameters,
    stage_parameters,
    survey,
    upstream,
)
from lipprep.pipeline.records import Headers, all_entries, uncommit
from lipprep.pipeline.space import disk_trouble, free_bytes, needed_bytes, warn_of_space
from lipprep.pipeline.supervise import say, supervise, supervise_here
from lipprep.pipeline.wanted import Wanted, write_wanted
from lipprep.stages.atomic import write_text
from lipprep.stages.remote import RemotePath
from lipprep.stages.scratch import local_scratch
from lipprep.stages.untrusted import is_file

if TYPE_CHECKING:
    from lipprep.stages.shard.index import Index


@dataclass(frozen=True)
class Run:
    """How a stage is run: what its commands' options say beside what is wanted.

    `part` is made of the chunks, the rest by other runs. `retry` names the class of failed clips to try again ("": all
    of them). A clip may take `clip_timeout` seconds. `deep` compares the videos' contents, not their sizes and times
    alone. `replace` lets another corpus's artefacts go. `persons` and `device` are for the detector.
    """

    engine: Engine = HERE
    part: Slice = WHOLE
    retry: str | None = None
    clip_timeout: float = CLIP_TIMEOUT
    deep: bool = False
    replace: bool = False
    persons: Mapping[str, int] | None = None
    device: str = "cpu"


PLAIN = Run()
_SOME = 64  # videos of a web server that are looked for


def make_jobs(
    stage: str,
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    pending: Sequence[Chunk],
    *,
    run: Run = PLAIN,
    stored_crops: Collection[tuple[str, int]] = (),
    moved: Moved | None = None,
) -> Iterator[Job]:
    """What workers need to make the chunks `pending`, one job each.

    `stored_crops` are the places (split, number) whose crops are kept and fresh.
    """
    parameters = stage_parameters(wanted)[stage]
    above = upstream(stage, wanted)
    for chunk in pending:
        place = (chunk.split, chunk.number)
        names = [archive_name(video) for video in {c.video for c in chunk.clips}] if run.persons else ()
        yield Job(
            stage=stage,
            clips=chunk.clips,
            root=manifest.root,
            fps=manifest.fps,
            wanted=wanted,
            parameters=parameters,
            header={"dataset": manifest.name, **chunk.wanted_header(manifest.fps, parameters)},
            tar=chunk.tar,
            scratch=layout.scratch(stage),
            landmarks=layout.tar(above, *place) if above else None,
            crops=layout.tar("crops", *place) if place in stored_crops else None,
            persons=run.persons and {n: run.persons[n] for n in names if n in run.persons},
            device=run.device,
            retry=run.retry,
            old=moved.old(chunk) if moved else (),
            clip_timeout=run.clip_timeout,
            deep=run.deep,
            logs=layout.logs if isinstance(layout.logs, Path) else None,
        )


def run_stage(
    stage: str,
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    run: Run = PLAIN,
    *,
    plan: Wanted | None = None,
) -> Report:
    """Make every chunk of `stage` that is missing or stale, or every one of a part.

    `plan` is what plan.yaml is to say from now on, by default what is `wanted`; it is written once nothing stands in
    the way. Raises UserError where a file that is not lipprep's does, the stage before is not done, its output is
    damaged, a disk is full, worker processes die again and again, a cluster cannot be used, another run is at work in
    the same folder, or the clips are crops where videos are wanted, or the other way round. RemoteError where a store
    cannot be reached; what is done is kept.
    """
    check_kind(stage, manifest, wanted)
    seen = check_root(manifest)
    began = time.perf_counter()
    folder, whole = layout.folder(stage), run.part.whole
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(folder, part=run.part))
        for other in {"landmarks", "crops"} - {stage} if stage != "landmarks" else ():
            stack.enter_context(alone_in(layout.folder(other), shared=True))
        # Before anything is touched: an address may be wrong.
        places = _places(stage, layout, wanted, seen)
        cluster = stack.enter_context(open_cluster(run.engine, *places)) if run.engine.is_cluster else None
        mine, stored = _survey(stage, manifest, layout, wanted, run)
        check_chunks(mine, manifest, replace=run.replace)
        pending = [c for c in mine if c.state != "fresh" or _to_retry(c, run.retry)]
        moved = Moved(layout, stage, mine, pending, manifest, replace=run.replace, part=run.part)
        write_wanted(layout.plan, plan or wanted)
        moved.set_aside()
        if stage == "shards" and pending:
            # From here to the end the folder holds old and new shards: no index may call them one set.
            (layout.out / "index.json").unlink(missing_ok=True)
        jobs = list(make_jobs(stage, manifest, layout, wanted, pending, run=run, stored_crops=stored, moved=moved))
        made: dict[Path, dict] = {}

        def room() -> int:
            left = [c for c in pending if c.tar not in made]
            return needed_bytes(stage, manifest, wanted, mine, left, run.engine.workers, stored)

        disk = local_scratch(folder)
        if pending and room() > free_bytes(disk):
            warn_of_space(disk, room())
        with tqdm(total=sum(len(c.clips) for c in pending), desc=stage, unit="clip", disable=not pending) as bar:

            def done(tar: Path, header: dict) -> None:
                if made.setdefault(tar, header) is header:
                    bar.update(header["planned"])
                moved.done(tar)

            try:
                _make(jobs, run.engine, cluster, done)
            except OSError as error:
                if (message := disk_trouble(error, disk, room(), len(pending) - len(made))) is None:
                    raise
                raise UserError(message) from error
        moved.close()
        if moved.dropped and whole:
            say(f"{moved.dropped} clips that {manifest.path} does not list any more are dropped from {folder}")
        if whole:
            _drop_strays(stage, mine, manifest, layout, replace=run.replace)
        if stage == "shards" and whole:
            _write_index(manifest, layout, wanted)
        return close_accounts(stage, mine, list(made.values()), time.perf_counter() - began)


def _places(stage: str, layout: Layout, wanted: Wanted, video: Path | RemotePath) -> list[Path | RemotePath]:
    """What the workers of a cluster must see: of the root a video, for a mount point is there without its disk."""
    places = [layout.folder(stage), video]
    if (above := upstream(stage, wanted)) and layout.folder(above).is_dir():  # else it is told that it was not made
        places.append(layout.folder(above))
    file = wanted.archive if stage == "landmarks" else wanted.mean_face
    return places if file is None else [*places, Path(file)]


def _make(jobs: Sequence[Job], engine: Engine, cluster: Cluster | None, done: Callable[[Path, dict], None]) -> None:
    if cluster is not None:
        from lipprep.pipeline.cluster import supervise_cluster

        supervise_cluster(jobs, cluster=cluster, done=done)
    elif engine.name == "serial":
        supervise_here(jobs, done=done)
    else:
        supervise(jobs, workers=engine.workers, done=done)


def finish(manifest: Manifest, layout: Layout, wanted: Wanted) -> Report:
    """Write the index of shards that were made in slices, and drop what is left of others.

    Raises ValueError where shards are missing or stale, or a run is at work on any stage.
    """
    began = time.perf_counter()
    if not is_file(layout.plan):
        raise UserError(f"nothing was made in {layout.work}: name the folder that the slices wrote to with -w")
    if not any(layout.out.glob("*.tar")):
        raise UserError(f"there are no shards in {layout.out}: name the folder that the slices wrote to with -o")
    with contextlib.ExitStack() as stack:
        for folder in (layout.folder(stage) for stage in STAGES):
            if isinstance(folder, Path) and folder.is_dir():
                stack.enter_context(alone_in(folder))
        chunks = survey(
            manifest, layout, wanted, ("landmarks", "shards") if upstream("shards", wanted) else ("shards",)
        )
        mine = [c for c in chunks if c.stage == "shards"]
        if absent := [c for c in mine if c.state != "fresh"]:
            first = absent[0]
            why = f" ({first.reason})" if first.reason else ""
            raise UserError(
                f"{len(absent)} of {len(mine)} shards are not there, e.g. {first.tar.name} is {first.state}{why}: "
                "run `lipprep shards` for their slices first"
            )
        drop_earlier([place for stage in STAGES for place in (layout.earlier(stage), layout.lent(stage))])
        _drop_strays("shards", mine, manifest, layout, replace=False)
        _write_index(manifest, layout, wanted)
        return close_accounts("shards", mine, [], time.perf_counter() - began)


def _survey(
    stage: str, manifest: Manifest, layout: Layout, wanted: Wanted, run: Run
) -> tuple[list[Chunk], set[tuple[str, int]]]:
    """The chunks of `stage`, and the places whose crops are stored and fresh.

    Raises ValueError where the chunks that it is made from are not all there.
    """
    above = upstream(stage, wanted)
    needed = {stage, above, "crops" if stage == "shards" and not wanted.from_crops else stage}
    stages = tuple(s for s in STAGES if s in needed)
    chunks = survey(manifest, layout, wanted, stages, deep=run.deep, part=run.part)
    if above and (absent := [c for c in chunks if c.stage == above and c.state != "fresh"]):
        why = f" ({absent[0].reason})" if absent[0].reason else ""
        raise UserError(
            f"{len(absent)} chunks of {above} are {absent[0].state}{why}: run `lipprep {above}"
            f"{' --deep' if run.deep else ''}` first"
        )
    stored = {(c.split, c.number) for c in chunks if c.stage == "crops" and c.state == "fresh"}
    return [c for c in chunks if c.stage == stage], stored if stage == "shards" else set()


def check_root(manifest: Manifest) -> Path | RemotePath:
    """A video that is where the manifest says. Raises ValueError where none is: a disk is missing, or they moved."""
    # Mostly the first one is there, and a store need not list all.
    if is_file(first := manifest.root / manifest.clips[0].video):
        return first
    look = looking(manifest.root)
    clips = manifest.clips
    if isinstance(manifest.root, RemotePath) and not manifest.root.lists:
        clips = clips[:: -(-len(clips) // _SOME)]  # each must be asked for
    for clip in clips:
        if look(clip.video):
            return manifest.root / clip.video
    raise UserError(
        f"none of the manifest's videos is below {manifest.root} (e.g. {manifest.clips[0].video}): is a disk not "
        "mounted? If they have moved, say where with --root"
    )


def _to_retry(chunk: Chunk, retry: str | None) -> bool:
    if retry is None:
        return False
    return any(kind != "ok" and retry in ("", kind) for kind in chunk.header["counts"])


def _drop_strays(stage: str, chunks: Sequence[Chunk], manifest: Manifest, layout: Layout, *, replace: bool) -> None:
    """Remove tars that no chunk of the manifest has any more, which would be read as if, and unfinished files."""
    folder = layout.folder(stage)
    for tar in strays(folder, {c.tar.name for c in chunks}, manifest, stage, replace=replace):
        drop(tar)
    for unfinished in (layout.scratch(stage) or local_scratch(folder)).glob(".*.tmp"):  # of runs that were killed
        unfinished.unlink(missing_ok=True)


def check_out(manifest: Manifest, out: Path | RemotePath, *, replace: bool = False) -> None:
    """Refuse a folder whose files shards of `manifest` would replace. Raises UserError, which names what is in the way.

    Those of another data set do not stand in the way with `replace`.
    """
    read = Headers(out)
    headers = [h for tar in out.glob("*.tar") if CHUNK.fullmatch(tar.stem) and (h := read(tar)) is not None]
    if any(h["stage"] != "shards" for h in headers):
        raise UserError(f"{out} holds the artefacts of another stage: choose another -o")
    check_index(out, manifest, replace=replace)
    names = {h["dataset"] for h in headers}
    if names - {manifest.name} and not replace:
        raise UserError(
            f"{out} holds shards of data set {', '.join(sorted(names))}, not of {manifest.name}: choose another -o, "
            "or --replace them"
        )


def _write_index(manifest: Manifest, layout: Layout, wanted: Wanted) -> None:
    """Write the card and the index of the shards of `manifest`, all of which are committed, where they are not so yet.

    Raises ValueError where a record was damaged: its shard must be made again.
    """
    from lipprep.pipeline.card import CARD, Tally, card_in, card_mark, card_text, usual_length
    from lipprep.stages.shard.index import load_index, save_index

    index, indexed = _describe(manifest, layout, wanted), False
    with contextlib.suppress(UserError):
        # What is there is told by headers alone; offsets and lengths are in the records' lines.
        there = load_index(layout.out)
        index = dataclasses.replace(index, num_frames=there.num_frames)
        told = index.num_frames is not None or not any(shard.samples for shard in index.shards)
        indexed = told and dataclasses.replace(there, offsets={}) == index
    card = card_in(layout.out)
    if indexed and card in ("", card_mark(index, manifest, wanted.licence)):
        return
    offsets, read, tally = {}, Headers(layout.out), Tally()
    tars = [layout.out / shard.name for shard in index.shards]
    chunks = manifest.chunks().values()
    for shard, tar, clips, entries in zip(index.shards, tars, chunks, all_entries(tars), strict=True):
        starts = [e["offset"] for e in entries if e["status"] == "ok"]
        if len(starts) != shard.samples or len(entries) != len(clips):
            uncommit(tar)
            raise UserError(f"the record of {tar} was damaged since it was made: run `lipprep shards` again")
        offsets[shard.name] = [*starts, read(tar)["end"]]
        tally.add(clips, entries)
    index = dataclasses.replace(index, num_frames=usual_length(tally))
    scratch = layout.scratch("shards")
    if card != "":
        write_text(layout.out / CARD, card_text(index, manifest, tally, licence=wanted.licence), scratch)
    if not indexed:
        save_index(layout.out, dataclasses.replace(index, offsets=offsets), scratch)


def _describe(manifest: Manifest, layout: Layout, wanted: Wanted) -> "Index":
    """The index without its offsets."""
    from lipprep.stages.shard.index import Index, Shard

    shards, failures, read = [], {}, Headers(layout.out)
    for split, number in manifest.chunks():
        tar = layout.tar("shards", split, number)
        header = read(tar)
        assert header is not None, tar
        counts = Counter(header["counts"])
        shards.append(Shard(tar.name, split, counts.pop("ok", 0), header["tar"]["bytes"], header["tar"]["sha256"]))
        failures.setdefault(split, Counter()).update(counts)
    landmarks = stage_parameters(wanted)["landmarks"] if upstream("shards", wanted) else {}
    return Index(
        dataset=manifest.name,
        fingerprint=hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
        labels=manifest.labels,
        fps=manifest.fps,
        parameters={**landmarks, **index_parameters(wanted)},
        failures={split: dict(sorted(kinds.items())) for split, kinds in failures.items()},
        shards=tuple(shards),
        offsets={},
    )
