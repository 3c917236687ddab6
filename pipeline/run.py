"""The supervisor: pending = planned - committed. It hands chunks to workers and counts what came back."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.plan import STAGES, Chunk, Layout, archive_name, stage_parameters, survey, upstream
from lipprep.pipeline.records import add_counts, read_entries, read_header, record_path, root_class
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.failures import FAILURES

if TYPE_CHECKING:
    from lipprep.pipeline.chunk import Job


@dataclass(frozen=True)
class Report:
    """What a stage has after a run, in clips: `planned` = `ok` + `failed` by class; and what this run did.

    `example` names a clip of each class of failures; `mixed` says that chunks were made on several kinds of CPU
    or with several versions of packages, so that their bytes need not be those of any single machine.
    """

    stage: str
    planned: int
    ok: int
    failed: dict[str, int]
    chunks_made: int
    chunks_fresh: int
    clips_made: int
    seconds: float
    example: dict[str, str]
    mixed: bool

    @property
    def failures(self) -> int:
        """Clips that are in no tar."""
        return sum(self.failed.values())


def make_jobs(
    stage: str,
    manifest: Manifest,
    layout: Layout,
    wanted: Wanted,
    pending: Sequence[Chunk],
    *,
    stored_crops: Collection[tuple[str, int]] = (),
    persons: dict[str, int] | None = None,
    device: str = "cpu",
    retry: str | None = None,
) -> Iterator["Job"]:
    """What workers need to make the chunks `pending`, one job each, made as it is asked for.

    `stored_crops` are the places (split, number) whose crops are kept and fresh.
    """
    from lipprep.pipeline.chunk import Job

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
) -> Report:
    """Make every chunk of `stage` that is missing or stale, on `workers` processes.

    Raises ValueError where the stage before is not done, or a worker process was killed.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    from lipprep.pipeline.chunk import run_job

    began = time.perf_counter()
    check_root(manifest)
    above = upstream(stage, wanted)
    needed = {stage, above, "crops" if stage == "shards" else stage}
    chunks = survey(manifest, layout, wanted, tuple(s for s in STAGES if s in needed))
    mine = [c for c in chunks if c.stage == stage]
    if above and (absent := [c for c in chunks if c.stage == above and c.state != "fresh"]):
        raise ValueError(
            f"{len(absent)} of {len(mine)} chunks of {above} are {absent[0].state}"
            f"{f' ({absent[0].reason})' if absent[0].reason else ''}: run `lipprep {above}` first"
        )
    stored = set()
    if stage == "shards":
        stored = {(c.split, c.number) for c in chunks if c.stage == "crops" and c.state == "fresh"}
    pending = [c for c in mine if c.state != "fresh" or _to_retry(c, retry)]
    jobs = make_jobs(
        stage, manifest, layout, wanted, pending, stored_crops=stored, persons=persons, device=device, retry=retry
    )
    if stage == "shards" and pending:
        # From here to the end the folder holds old and new shards: no index may call them one set.
        (layout.out / "index.json").unlink(missing_ok=True)
    made = 0
    # One task a chunk, results as they come: nothing waits for a slow chunk, and no list of results grows.
    pool = Parallel(n_jobs=min(workers, max(1, len(pending))), return_as="generator_unordered", batch_size=1)
    with tqdm(total=sum(len(c.clips) for c in pending), desc=stage, unit="clip", disable=not pending) as bar:
        try:
            for header in pool(delayed(run_job)(job) for job in jobs):
                made += header["planned"]
                bar.update(header["planned"])
        except TerminatedWorkerError as error:
            raise ValueError(
                f"a worker process was killed (out of memory, or a fault in a codec): run `lipprep {stage}` "
                f"again to go on, with fewer --workers if memory was short ({str(error).splitlines()[0]})"
            ) from error
    if stage != "shards":
        _drop_orphans(layout.folder(stage), {c.tar.name for c in mine})
    headers = [read_header(c.tar) for c in mine]
    assert all(headers), "a chunk was not committed"
    counts = add_counts(headers)
    planned = sum(counts.values())
    assert planned == len(manifest.clips), "clips were lost or counted twice"
    ok = counts.pop("ok", 0)
    kinds = {json.dumps([h["cpu"], h["packages"]], sort_keys=True) for h in headers}
    return Report(
        stage=stage,
        planned=planned,
        ok=ok,
        failed=dict(counts.most_common()),
        chunks_made=len(pending),
        chunks_fresh=len(mine) - len(pending),
        clips_made=made,
        seconds=time.perf_counter() - began,
        example=_examples(mine, headers, counts),
        mixed=len(kinds) > 1,
    )


def check_root(manifest: Manifest) -> None:
    """Raise ValueError where not one video is where the manifest says: a disk is missing, or the root has moved."""
    if not any((manifest.root / clip.video).is_file() for clip in manifest.clips):
        raise ValueError(
            f"none of the manifest's videos is below {manifest.root} (e.g. {manifest.clips[0].video}): is a disk not "
            "mounted? If they have moved, say where with --root"
        )


def _to_retry(chunk: Chunk, retry: str | None) -> bool:
    if retry is None:
        return False
    return any(kind != "ok" and retry in ("", kind) for kind in chunk.header["counts"])


def _examples(chunks: Sequence[Chunk], headers: Sequence[dict], counts: Counter) -> dict[str, str]:
    """One clip and its message for each class of failures."""
    example: dict[str, str] = {}
    for chunk, header in zip(chunks, headers, strict=True):
        if set(header["counts"]) - {"ok"} - set(example):
            for entry in read_entries(chunk.tar):
                if entry["status"] != "ok":
                    example.setdefault(root_class(entry), f"{entry['key']}: {entry['message']}")
        if len(example) == len(counts):
            break
    return example


def _drop_orphans(folder: Path, wanted: set[str]) -> None:
    """Remove committed tars that no chunk of the manifest has any more: they would be read as if they had."""
    for tar in folder.glob("*.tar"):
        if tar.name not in wanted and record_path(tar).exists():
            record_path(tar).unlink()
            tar.unlink()


def check_out(manifest: Manifest, out: Path) -> None:
    """Refuse a folder that holds the shards of another data set. Raises ValueError, which names both."""
    from lipprep.stages.shard.index import load_index

    headers = [h for tar in out.glob("*.tar") if (h := read_header(tar)) is not None]
    if any(h["stage"] != "shards" for h in headers):
        raise ValueError(f"{out} holds the artefacts of another stage: choose another -o")
    names = {h["dataset"] for h in headers}
    labels = manifest.labels
    if (out / "index.json").is_file():
        with contextlib.suppress(ValueError):  # unusable, as after a stop in mid-run: it will be written again
            index = load_index(out)
            names.add(index.dataset)
            labels = index.labels
    if names - {manifest.name} or labels != manifest.labels:
        raise ValueError(
            f"{out} holds shards of data set {', '.join(sorted(names))} ({len(labels)} labels), not of "
            f"{manifest.name} ({len(manifest.labels)} labels): choose another -o, or --replace them"
        )


def write_index(manifest: Manifest, layout: Layout, wanted: Wanted) -> None:
    """Write the index of the shards of `manifest`, all of which are committed; remove shards that are no longer its."""
    from lipprep.pipeline.wanted import load_mean_face
    from lipprep.stages.shard.index import Index, Shard, save_index

    shards, offsets, failures = [], {}, {}
    for split, number in manifest.chunks():
        tar = layout.tar("shards", split, number)
        header, entries = read_header(tar), read_entries(tar)
        assert header is not None and len(entries) == header["planned"], tar
        ok = [e for e in entries if e["status"] == "ok"]
        shards.append(Shard(tar.name, split, len(ok), header["tar"]["bytes"], header["tar"]["sha256"]))
        offsets[tar.name] = [*(e["offset"] for e in ok), header["end"]]
        kinds = failures.setdefault(split, Counter())
        kinds.update(root_class(e) for e in entries if e["status"] != "ok")
    _drop_orphans(layout.out, {s.name for s in shards})
    parameters = stage_parameters(wanted)
    landmarks = {k: v for k, v in parameters["landmarks"].items() if k != "archive"}
    if not upstream("shards", wanted):
        landmarks = {}
    elif wanted.mean_face is not None:
        # The points themselves: whoever has weights trained on these crops must be able to cut others like them.
        parameters["shards"]["mean_face"] = load_mean_face(Path(wanted.mean_face)).tolist()
    save_index(
        layout.out,
        Index(
            dataset=manifest.name,
            fingerprint=hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
            labels=manifest.labels,
            fps=manifest.fps,
            parameters={**landmarks, **parameters["shards"]},
            failures={split: dict(sorted(kinds.items())) for split, kinds in failures.items()},
            shards=tuple(shards),
            offsets=offsets,
        ),
    )


def summary(report: Report) -> str:
    """What a stage has after a run, in lines for people."""
    lines = [f"{report.stage}: {report.planned} clips planned = {report.ok} ok + {report.failures} failed"]
    for kind, count in report.failed.items():
        lines.append(f"  {kind}: {count} ({FAILURES[kind]}), e.g. {report.example.get(kind, '')}")
    rate = f", {report.clips_made / report.seconds:.1f} clips/s" if report.clips_made else ""
    lines.append(f"  {report.chunks_made} chunks made, {report.chunks_fresh} were fresh{rate}")
    if report.mixed:
        lines.append(
            "  warning: chunks were made on different CPUs or package versions; bytes may differ between those"
        )
    return "\n".join(lines)


def as_json(report: Report) -> dict:
    """The report in plain containers."""
    return {**dataclasses.asdict(report), "clips_per_second": report.clips_made / report.seconds}
