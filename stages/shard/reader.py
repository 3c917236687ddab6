"""Reading tars: single members by name, and training samples at their offsets."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lipprep.stages.shard.codec import decode_mouth


class TarMembers:
    """The members of one tar, by name; their headers are read once, their bytes when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is no tar or is cut short."""
        self.path = Path(path)
        self._file = self.path.open("rb")
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                self._places = {info.name: (info.offset_data, info.size) for info in tar}
        except tarfile.TarError as error:
            self._file.close()
            raise ValueError(f"{self.path} is no readable tar ({error}): make it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> bytes:
        """The bytes of one member; KeyError where there is none of that name."""
        offset, size = self._places[name]
        self._file.seek(offset)
        payload = self._file.read(size)
        if len(payload) != size:
            raise ValueError(f"{self.path} ends inside its member {name}: make it again")
        return payload

    def __enter__(self) -> "TarMembers":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def decode_sample(sample: dict) -> dict:
    """One grouped WebDataset sample to {key, mouth (T, S, S) uint8, and the fields of its json}.

    Raises ValueError, naming the clip, where a member is missing or damaged.
    """
    key = sample["__key__"]
    extension = next((e for e in ("mouth.jpg", "mouth.npy") if e in sample), None)
    if extension is None or "json" not in sample:
        raise ValueError(f"clip {key} lacks its mouth crop or its json")
    try:
        fields = json.loads(sample["json"])
        if not isinstance(fields, dict):
            raise ValueError("its json is no object")
        return {**fields, "key": key, "mouth": decode_mouth(extension, sample[extension])}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"clip {key}: {error}") from error


def read_samples(path: Path, offsets: np.ndarray, positions: range) -> list[dict]:
    """Read the neighbouring samples `positions` of one shard with a single read, in order.

    `offsets` (samples + 1,) int64 are the bytes where samples start and the last one ends, as the index has
    them. webdataset expands and groups the members. Raises ValueError, naming the shard, where what stands
    there is not as many whole samples.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    start, end = int(offsets[positions.start]), int(offsets[positions.stop])
    with Path(path).open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    # The slice of a tar between two samples is a tar without its closing blocks.
    source = {"url": os.fspath(path), "stream": io.BytesIO(data + bytes(1024))}
    try:
        samples = [decode_sample(s) for s in group_by_keys(tar_file_expander([source]))]
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"shard {path} is damaged ({error.args[0]}): run `lipprep shards` again") from error
    if len(samples) != len(positions):
        raise ValueError(
            f"shard {path} holds {len(samples)} samples where its index has {len(positions)}: "
            "run `lipprep shards` again"
        )
    return samples
