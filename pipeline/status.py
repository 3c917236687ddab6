"""`lipprep status`: the states of all chunks, told to people and to machines."""

from collections import Counter
from collections.abc import Sequence

from lipprep.pipeline.plan import Chunk
from lipprep.pipeline.records import add_counts
from lipprep.stages.untrusted import MAX_ECHO, printable

STATES = ("fresh", "stale", "missing")


def as_json(chunks: Sequence[Chunk], *, timing: bool = False) -> list[dict]:
    """A row a stage: its chunks and clips by state, why chunks are not fresh, and the fresh ones' clips by class.

    With `timing`, what the workers' time went to, as the records of all committed chunks have it.
    """
    rows = []
    for stage in dict.fromkeys(c.stage for c in chunks):
        mine = [c for c in chunks if c.stage == stage]
        states = Counter(c.state for c in mine)
        clips = Counter()
        for chunk in mine:
            clips[chunk.state] += len(chunk.clips)
        row = {
            "stage": stage,
            "chunks": len(mine),
            **{state: states[state] for state in STATES},
            "reasons": dict(Counter(c.reason for c in mine if c.state == "stale").most_common()),
            "damaged": sum(1 for c in mine if c.state == "missing" and c.reason),
            "planned": sum(len(c.clips) for c in mine),
            "clips_by_state": {state: clips[state] for state in STATES},
            "clips": dict(sorted(add_counts(c.header for c in mine if c.state == "fresh").items())),
        }
        if timing:
            row["timing"] = _timing([c for c in mine if c.header is not None])
        rows.append(row)
    return rows


def _timing(chunks: Sequence[Chunk]) -> dict:
    """The work of making clips, in seconds of one worker; copies keep the time that they once took."""
    parts = Counter()
    for chunk in chunks:
        parts.update(chunk.header["parts"])
    seconds = sum(parts.values())
    clips = sum(c.header["planned"] for c in chunks)
    slowest = max(chunks, key=_seconds_a_clip, default=None)
    return {
        "clips": clips,
        "parts": {part: round(spent, 3) for part, spent in parts.most_common()},
        "worker_seconds": round(seconds, 3),
        "ms_a_clip": round(1e3 * seconds / clips, 3) if clips else None,
        "clips_a_second_a_worker": round(clips / seconds, 2) if seconds else None,
        "slowest_chunk": slowest and slowest.tar.stem,
        "slowest_ms_a_clip": slowest and round(1e3 * _seconds_a_clip(slowest), 3),
    }


def _seconds_a_clip(chunk: Chunk) -> float:
    return sum(chunk.header["parts"].values()) / chunk.header["planned"]


def table(rows: Sequence[dict]) -> str:
    """The same as a table, with a line for each reason: chunks, and their clips in brackets."""
    lines = [f"{'stage':10} {'fresh':>16} {'stale':>16} {'missing':>16} {'ok':>9} {'failed':>9}"]
    for row in rows:
        cells = [f"{row[state]} ({row['clips_by_state'][state]})" for state in STATES]
        states = " ".join(f"{cell:>16}" for cell in cells)
        ok = row["clips"].get("ok", 0)
        failed = sum(row["clips"].values()) - ok
        lines.append(f"{row['stage']:10} {states} {ok:9} {failed:9}")
        lines += [
            f"    stale: {printable(reason, MAX_ECHO)} ({count} chunks)" for reason, count in row["reasons"].items()
        ]
        if row["damaged"]:
            lines.append(
                f"    missing: tar or record cut, damaged, or of another version of lipprep ({row['damaged']} chunks)"
            )
        lines += [f"    failed: {kind} ({count} clips)" for kind, count in row["clips"].items() if kind != "ok"]
        if timing := row.get("timing"):
            lines += _timing_lines(timing)
    return "\n".join(lines)


def _timing_lines(timing: dict) -> list[str]:
    if not timing["clips"] or not timing["worker_seconds"]:
        return ["    time: nothing was made yet"]
    spent = ", ".join(
        f"{printable(part, MAX_ECHO)} {100 * seconds / timing['worker_seconds']:.1f} %"
        for part, seconds in timing["parts"].items()
    )
    return [
        f"    time: {timing['worker_seconds']:.1f} s of one worker, {timing['ms_a_clip']:.1f} ms a clip, "
        f"{timing['clips_a_second_a_worker']:.1f} clips/s a worker; slowest chunk {timing['slowest_chunk']} with "
        f"{timing['slowest_ms_a_clip']:.1f} ms a clip",
        f"          {spent}",
    ]
