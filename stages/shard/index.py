"""The index of a folder of shards: all that a trainer needs to know before it opens one.

`index.json` describes the data set and each shard, `index.npz` holds the sample offsets. Both are written
last, the json after the npz, so that a folder with an index is complete.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lipprep.stages.atomic import replacing, write_text

INDEX_VERSION = 1
SPLITS = ("train", "val", "test", "unseen")


@dataclass(frozen=True)
class Shard:
    """One tar: its name in the folder, its split, and what it holds."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What stands in a folder of shards.

    `dataset` names the manifest that the shards were made from, `fingerprint` is a sha256 over all shards.
    `parameters` are those of every stage (detector, profile, crop_size, exact, codec, quality, ...).
    `failures` counts, by split, the clips that are in no shard, by class. `offsets` holds for each shard's
    name the bytes (samples + 1,) int64 where its samples start and the last one ends.
    """

    dataset: str
    fingerprint: str
    labels: tuple[str, ...]
    fps: float
    parameters: Mapping
    failures: Mapping[str, Mapping[str, int]]
    shards: tuple[Shard, ...]
    offsets: Mapping[str, np.ndarray] = field(repr=False)
    version: int = INDEX_VERSION

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, in order. Raises ValueError, naming those there are, where it has none."""
        shards = tuple(s for s in self.shards if s.split == name and s.samples)
        if not shards:
            there = ", ".join(sorted({s.split for s in self.shards})) or "none"
            raise ValueError(f"the shards hold no clips of split {name!r} (they hold: {there})")
        return shards

    @property
    def profile(self) -> str:
        """The alignment profile that the crops were cut with; weights are tied to it."""
        return self.parameters["profile"]

    @property
    def crop_size(self) -> int:
        """Side of a stored mouth crop, pixels."""
        return self.parameters["crop_size"]


def save_index(folder: Path, index: Index) -> None:
    """Write index.npz and then index.json, each atomically."""
    folder = Path(folder)
    with replacing(folder / "index.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: np.asarray(o, np.int64) for name, o in index.offsets.items()})
    plain = {f.name: getattr(index, f.name) for f in dataclasses.fields(index) if f.name != "offsets"}
    plain["labels"] = list(index.labels)
    plain["shards"] = [dataclasses.asdict(s) for s in index.shards]
    version = {"lipprep_index": plain.pop("version")}
    write_text(folder / "index.json", json.dumps({**version, **plain}, indent=1) + "\n")


def load_index(folder: Path) -> Index:
    """Read the index of a folder of shards and check each shard's presence and size.

    Raises ValueError where there is no index, it is of an unknown version or damaged, or a shard is missing
    or of another size than the index says.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no index.json: `lipprep shards -o {folder}` makes the shards and their index")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version = plain.pop("lipprep_index", None)
        if version != INDEX_VERSION:
            raise ValueError(f"its version is {version!r}, this lipprep reads {INDEX_VERSION}")
        shards = tuple(Shard(**s) for s in plain.pop("shards"))
        with np.load(folder / "index.npz", allow_pickle=False) as arrays:
            offsets = {s.name: arrays[s.name] for s in shards}
        index = Index(**{**plain, "labels": tuple(plain["labels"])}, shards=shards, offsets=offsets)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is no usable index ({error}): run `lipprep shards -o {folder}` again") from error
    for shard in shards:
        tar = folder / shard.name
        if not tar.is_file():
            raise ValueError(f"shard {tar} is missing: run `lipprep shards -o {folder}` again")
        if (size := tar.stat().st_size) != shard.bytes:
            raise ValueError(
                f"shard {tar} has {size} bytes where the index has {shard.bytes} (cut short, or of another "
                f"run): run `lipprep shards -o {folder}` again"
            )
        if len(offsets[shard.name]) != shard.samples + 1:
            raise ValueError(f"{folder / 'index.npz'} does not fit index.json: run `lipprep shards -o {folder}` again")
    return index
