"""Batches from shards, read at the places that a plan names.

A sample is read by itself, at its offset: a window of the plan covers few neighbouring stretches of few
files, so that these small reads come out of the operating system's cache, or of the one for remote shards, and no
worker decodes what another one needs. Which worker reads a batch changes nothing about it.

Shapes: B clips, T frames of the longest of them, S side of a crop in pixels.
"""

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import loky
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lipprep.stages.remote import RemotePath, place, signature
from lipprep.stages.shard.index import Index
from lipprep.stages.shard.reader import read_range, read_samples
from lipprep.stages.store import RemoteError
from lipprep.train.cache import REQUESTS, BlockCache, RemoteShard

_MAX_BATCH = 1 << 32  # bytes of a batch's crops, all as long as its longest


class ShardBatches(Dataset):
    """The batches of one split, indexed by arrays of places, (B, 2) int64.

    A batch is a dictionary of `video` (B, T, S, S) uint8, zero behind a clip's end, `lengths` (B,) int64 in
    frames, `labels` (B,) int64, `durations` (B,) float32 in seconds, NaN where unknown, `keys`, a list, and
    `damaged`, a dictionary of rows: the place of a clip that cannot be read, and why. With `skip_damaged` another clip
    of the batch stands in for such a one.
    """

    def __init__(
        self,
        folder: Path | RemotePath,
        index: Index,
        split: str,
        *,
        cache: BlockCache | None = None,
        skip_damaged: bool = False,
    ) -> None:
        """`cache` is for remote shards. Raises ValueError where the shards have no such split."""
        shards = index.split(split)
        self.cache = cache
        self.skip_damaged = skip_damaged
        self.paths = [place(folder) / shard.name for shard in shards]
        self.digests = [shard.sha256 for shard in shards]
        self.offsets = [index.offsets[shard.name] for shard in shards]
        self.counts = [shard.samples for shard in shards]
        self.crop_size = index.crop_size
        self.num_classes = len(index.labels)
        self._files = [_stamp(path) for path in self.paths]

    def check_unchanged(self) -> None:
        """Raise ValueError where a local shard is not the file it was when this was made; its bytes decide."""
        for number, (path, before) in enumerate(zip(self.paths, self._files, strict=True)):
            if (now := _stamp(path)) == before:
                continue
            if now is None or _sha256(path) != self.digests[number]:
                raise ValueError(
                    f"shard {path} is {'gone' if now is None else 'not the one it was when the run began'}: nothing "
                    "that was trained since the last save is kept. Go on with --resume auto when the shards are as "
                    "they were, or start a new run on the new ones"
                )
            self._files[number] = now

    def __getitem__(self, places: np.ndarray) -> dict | ValueError | RemoteError:
        # An exception that crosses a process boundary arrives as another one, with its traceback as its text.
        try:
            return self.read(places)
        except RemoteError as error:
            return RemoteError(str(error))
        except (ValueError, OSError) as error:
            why = str(error)
            try:
                self.check_unchanged()
            except ValueError as changed:
                why = str(changed)
            return ValueError(why)

    def read(self, places: np.ndarray) -> dict:
        """Raises ValueError, naming clip or shard, where a sample is damaged or does not fit the index or the batch.

        RemoteError where a store does not answer.
        """
        S = self.crop_size

        def one(at: tuple[int, int]) -> dict | ValueError:
            shard, position = at
            try:
                sample = self._sample(shard, position)
            except ValueError as error:
                if not self.skip_damaged:
                    raise
                return error
            if len(places) * (size := sample["mouth"].nbytes) > _MAX_BATCH:
                raise ValueError(
                    f"shard {self.paths[shard]}: clip {sample['key']} has {len(sample['mouth'])} frames, with which a "
                    f"batch of {len(places)} takes {len(places) * size} bytes, at most {_MAX_BATCH} are read: lower "
                    "batch_size, or cut the clip into windows"
                )
            return sample

        wanted = places.tolist()
        on_disk = not isinstance(self.paths[0], RemotePath)
        if self.cache is not None:
            on_disk = self.cache.prefetch((self._remote(shard), position) for shard, position in wanted)
        if on_disk:
            samples = list(map(one, wanted))
        else:  # a request each
            with ThreadPoolExecutor(REQUESTS) as threads:
                samples = list(threads.map(one, wanted))
        damaged = {row: sample for row, sample in enumerate(samples) if isinstance(sample, ValueError)}
        if damaged:
            whole = [sample for sample in samples if not isinstance(sample, ValueError)]
            if not whole:
                raise damaged[0]
            for row in damaged:
                samples[row] = whole[row % len(whole)]
        lengths = [len(sample["mouth"]) for sample in samples]
        video_BTSS = np.zeros((len(samples), max(lengths), S, S), np.uint8)
        for row, sample in zip(video_BTSS, samples, strict=True):
            row[: len(sample["mouth"])] = sample["mouth"]
        durations = [s.get("duration") for s in samples]
        return {
            "video": torch.from_numpy(video_BTSS),
            "lengths": torch.tensor(lengths),
            "labels": torch.tensor([sample["label"] for sample in samples]),
            "durations": torch.tensor([np.nan if d is None else d for d in durations], dtype=torch.float32),
            "keys": [sample["key"] for sample in samples],
            "damaged": {row: (tuple(wanted[row]), str(error)) for row, error in damaged.items()},
        }

    def _remote(self, shard: int) -> RemoteShard:
        return RemoteShard(self.paths[shard], self.digests[shard], self.offsets[shard])

    def _sample(self, shard: int, position: int) -> dict:
        if self.cache is None:
            return self._checked(shard, position, read_range)
        remote = self._remote(shard)
        read = lambda *_: self.cache.read(remote, position)  # noqa: E731
        try:
            return self._checked(shard, position, read)
        except ValueError:
            self.cache.forget(remote, position)
            return self._checked(shard, position, read)

    def _checked(self, shard: int, position: int, read: Callable) -> dict:
        path = self.paths[shard]
        (sample,) = read_samples(path, self.offsets[shard], range(position, position + 1), read=read)
        shape = sample["mouth"].shape
        if shape[0] == 0 or shape[1:] != (self.crop_size, self.crop_size):
            raise ValueError(
                f"shard {path}: clip {sample['key']} has crops of shape {shape}, its index says side {self.crop_size}"
            )
        label = sample.get("label")
        if type(label) is not int or not 0 <= label < self.num_classes:
            raise ValueError(
                f"shard {path}: clip {sample['key']} has label {label!r}, its index has {self.num_classes} labels"
            )
        duration = sample.get("duration")
        known = type(duration) in (int, float) and 0 <= duration <= torch.finfo(torch.float32).max
        if duration is not None and not known:
            raise ValueError(f"shard {path}: clip {sample['key']} has duration {duration!r}, no number of seconds")
        return sample


class BatchLoader:
    """Reads planned batches ahead of their use, in `workers` processes (0: one batch ahead, in a thread)."""

    def __init__(self, batches: ShardBatches, plan: Iterable[np.ndarray], *, workers: int, pin_memory: bool) -> None:
        methods = multiprocessing.get_all_start_methods()
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=plan,
            num_workers=workers,
            # A process with threads must not fork; a server that has none may.
            multiprocessing_context=("forkserver" if "forkserver" in methods else "spawn") if workers else None,
            worker_init_fn=_ignore_ctrl_c,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Without its own, making an iterator would draw from the generator that dropout draws from.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict]:
        """Raises the ValueError or RemoteError of a batch that could not be read, in its turn."""
        for batch in self._loader if self._loader.num_workers else _ahead(iter(self._loader)):
            if isinstance(batch, ValueError | RemoteError):
                raise batch
            yield batch


def _stamp(path: Path | RemotePath) -> dict | None:
    """What tells that a local file has changed, None where it is gone; a remote one is not asked for."""
    try:
        return {} if isinstance(path, RemotePath) else signature(path.stat())
    except FileNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ahead(batches: Iterator) -> Iterator:
    """The batches in their order; a thread reads the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = thread.submit(next, batches, None)
            yield batch


def _ignore_ctrl_c(worker: int) -> None:
    """The terminal sends Ctrl-C to workers too, but it is for the main process to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_workers(device: torch.device, *, beside: int = 1) -> int:
    """How many processes should read: none where training itself takes all cores, else up to eight.

    `beside` processes train on this machine, and each has readers of its own.
    """
    return 0 if device.type == "cpu" else max(1, min(8, loky.cpu_count() // beside - 1))
