"""`lipprep status`: the states of all chunks, told to people and to machines."""

from collections import Counter
from collections.abc import Sequence

from lipprep.pipeline.plan import Chunk
from lipprep.pipeline.records import add_counts


def as_json(chunks: Sequence[Chunk]) -> list[dict]:
    """A row a stage: its chunks by state, the reasons of the stale ones, and the clips of committed chunks by class."""
    rows = []
    for stage in dict.fromkeys(c.stage for c in chunks):
        mine = [c for c in chunks if c.stage == stage]
        states = Counter(c.state for c in mine)
        rows.append(
            {
                "stage": stage,
                "chunks": len(mine),
                **{state: states[state] for state in ("fresh", "stale", "missing")},
                "reasons": dict(Counter(c.reason for c in mine if c.state == "stale").most_common()),
                "planned": sum(len(c.clips) for c in mine),
                "clips": dict(sorted(add_counts(c.header for c in mine if c.state == "fresh").items())),
            }
        )
    return rows


def table(chunks: Sequence[Chunk]) -> str:
    """The same as a table, with a line for each reason."""
    lines = [
        f"{'stage':10} {'chunks':>7} {'fresh':>7} {'stale':>7} {'missing':>8} {'clips':>9} {'ok':>9} {'failed':>7}"
    ]
    for row in as_json(chunks):
        ok = row["clips"].pop("ok", 0)
        failed = sum(row["clips"].values())
        lines.append(
            f"{row['stage']:10} {row['chunks']:7} {row['fresh']:7} {row['stale']:7} {row['missing']:8} "
            f"{row['planned']:9} {ok:9} {failed:7}"
        )
        lines += [f"    stale: {reason} ({count} chunks)" for reason, count in row["reasons"].items()]
        lines += [f"    failed: {kind} ({count} clips)" for kind, count in row["clips"].items()]
    return "\n".join(lines)
