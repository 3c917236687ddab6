"""The accounts of a stage: planned = ok + failed by class, told to people, to machines, and kept."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.plan import Chunk
from lipprep.pipeline.records import Headers, add_counts, read_entries, root_class
from lipprep.stages.atomic import write_text
from lipprep.stages.failures import FAILURES
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import printable

REPORT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What a stage has after a run, in clips: `planned` = `ok` + `failed` by class; and what this run did.

    Of the clips of the chunks that were made, `clips_computed` were computed and the others copied. `example`
    names a clip of each class of failures; `mixed` says that chunks were made on several kinds of CPU or with
    several versions of packages, so that their bytes need not be those of any single machine.
    """

    stage: str
    planned: int
    ok: int
    failed: dict[str, int]
    chunks_made: int
    chunks_fresh: int
    clips_made: int
    clips_computed: int
    seconds: float
    example: dict[str, str]
    mixed: bool

    @property
    def failures(self) -> int:
        """Clips that are in no tar."""
        return sum(self.failed.values())


def close_accounts(stage: str, chunks: Sequence[Chunk], made: Sequence[dict], seconds: float) -> Report:
    """Count what `chunks`, all of which are committed, hold; `made` are the headers of those that this run made."""
    read = Headers(chunks[0].tar.parent) if chunks else None
    headers = [read(c.tar) for c in chunks]
    assert all(headers), "a chunk was not committed"
    counts = add_counts(headers)
    planned = sum(counts.values())
    assert planned == sum(len(c.clips) for c in chunks), "clips were lost or counted twice"
    ok = counts.pop("ok", 0)
    makers = {maker for h in headers for maker in h["makers"]}
    return Report(
        stage=stage,
        planned=planned,
        ok=ok,
        failed=dict(counts.most_common()),
        chunks_made=len(made),
        chunks_fresh=len(chunks) - len(made),
        clips_made=sum(h["planned"] for h in made),
        clips_computed=sum(h["computed"] for h in made),
        seconds=seconds,
        example=_examples([c.tar for c in chunks], headers, len(counts)),
        mixed=len(makers) > 1,
    )


def _examples(tars: Sequence[Path | RemotePath], headers: Sequence[dict], classes: int) -> dict[str, str]:
    """One clip and its message for each class of failures."""
    example: dict[str, str] = {}
    for tar, header in zip(tars, headers, strict=True):
        if set(header["counts"]) - {"ok"} - set(example):
            for entry in read_entries(tar):
                if entry["status"] != "ok":
                    example.setdefault(root_class(entry), printable(f"{entry['key']}: {entry['message']}", 2000))
        if len(example) == classes:
            break
    return example


def summary(report: Report) -> str:
    """What a stage has after a run, in lines for people."""
    lines = [f"{report.stage}: {report.planned} clips planned = {report.ok} ok + {report.failures} failed"]
    lines += failed_classes(report)
    rate = f", {report.clips_made / report.seconds:.1f} clips/s" if report.clips_made else ""
    copied = report.clips_made - report.clips_computed
    lines.append(
        f"  {report.chunks_made} chunks made ({report.clips_computed} clips computed, {copied} copied), "
        f"{report.chunks_fresh} were fresh{rate}"
    )
    if report.mixed:
        lines.append(
            "  warning: chunks were made on different CPUs, devices or package versions; bytes may differ between those"
        )
    return "\n".join(lines)


def failed_classes(report: Report) -> list[str]:
    """A line a class of failures, the commonest first, with an example of each."""
    return [
        f"  {kind}: {count} ({FAILURES[kind]}), e.g. {report.example.get(kind, '')}"
        for kind, count in report.failed.items()
    ]


def as_json(report: Report) -> dict:
    """The report in plain containers."""
    return {**dataclasses.asdict(report), "clips_per_second": report.clips_made / report.seconds}


def keep_report(path: Path | RemotePath, manifest: Manifest, report: Report) -> None:
    """Write the accounts of a stage into the report of all data sets and stages (WORK/report.json)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError):  # a folder, or no text
        text = "foreign"
    if text and '"lipprep_report"' not in text[:100]:  # what it would say stands in the records, too
        tqdm.write(f"warning: {printable(path)} is not lipprep's: no report is kept there", file=sys.stderr)
        return
    try:
        kept = json.loads(text)
        datasets = dict(kept["datasets"]) if kept.get("lipprep_report") == REPORT_VERSION else {}
        stages = dict(datasets.get(manifest.name, {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        datasets, stages = {}, {}  # it only repeats what the records say
    stages[report.stage] = as_json(report)
    plain = {"lipprep_report": REPORT_VERSION, "datasets": {**datasets, manifest.name: stages}}
    write_text(path, json.dumps(plain, indent=1) + "\n")


def list_failures(chunks: Sequence[Chunk], kind: str | None = None) -> Iterator[dict]:
    """The clips that are in no tar of `chunks`, those of one stage: all, or those that failed by class `kind`."""
    for chunk in chunks:
        if chunk.header is None or not set(chunk.header["counts"]) - {"ok"} or chunk.state == "missing":
            continue
        videos = {c.key: c.video for c in chunk.clips}
        for entry in read_entries(chunk.tar):
            if entry["status"] == "ok" or entry["key"] not in videos or kind not in (None, root_class(entry)):
                continue
            stage = entry["upstream"]["stage"] if entry["class"] == "upstream" else chunk.stage
            yield {
                "key": entry["key"],
                "stage": stage,
                "class": root_class(entry),
                "video": videos[entry["key"]],
                "message": entry["message"],
                "chunk": chunk.tar.stem,
            }


def count_classes(failures: Sequence[dict]) -> dict[str, int]:
    """How many clips failed by each class, the commonest first."""
    return dict(Counter(f["class"] for f in failures).most_common())
