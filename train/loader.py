"""Batches from shards, read at the places that a plan names.

A sample is read by itself, at its offset: a window of the plan covers few neighbouring stretches of few
files, so that these small reads come out of the operating system's cache, or of the one for remote shards, and no
worker decodes what another one needs. Which worker reads a batch changes nothing about it.

Shapes: B clips, T frames of the longest of them, S side of a crop in pixels.
"""

import atexit
import contextlib
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path

import loky
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath, place, signature
from lipprep.stages.shard.index import Index
from lipprep.stages.shard.reader import decode_sample, expand, read_range, read_samples, slice_of
from lipprep.stages.store import RemoteError
from lipprep.train.cache import REQUESTS, BlockCache, RemoteShard
from lipprep.train.device import keep_memory

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that terminals and schedulers send to all processes of a run
_MAX_BATCH = 1 << 32  # bytes of a batch's crops, all as long as its longest
_PREFETCH = 2  # batches a worker is ahead
_SAFE_PATH = "PYTHONSAFEPATH"  # see python --help-env
_READERS: weakref.WeakSet = weakref.WeakSet()  # processes that this one has started
_TRIES = 16  # neighbours of a damaged clip
_SECONDS = ("duration", "word_start", "word_end")  # of a sample
_MAX_SECONDS = 1e30


class ShardBatches:
    """The batches of one split, by arrays of places, (B, 2) int64.

    A batch is a dictionary of `video` (B, T, S, S) uint8, zero behind a clip's end, `lengths` (B,) int64 in
    frames, `labels` (B,) int64, `durations` (B,) and `times` (B, 2), the word's start and end from the clip's first
    frame, float64 in seconds, NaN where unknown, `keys`, a list, and `damaged`, a dictionary of rows: the place of a
    clip that cannot be read, and why. With `skip_damaged` the next clip of its shard that can be read stands in for
    such a one, which is the same whoever reads it.
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
                raise UserError(
                    f"shard {path} is {'gone' if now is None else 'not the one it was when the run began'}: nothing "
                    "that was trained since the last save is kept. Go on with --resume auto when the shards are as "
                    "they were, or start a new run on the new ones"
                )
            self._files[number] = now

    def read(self, places: np.ndarray, *, room: Callable[[tuple[int, ...]], np.ndarray] | None = None) -> dict:
        """The batch of the samples at `places` (B, 2) int64; `room` gives an array uint8 of a shape to put it into.

        Raises ValueError, naming clip or shard, where a sample is damaged or does not fit the index or the batch, and
        RemoteError where a store does not answer.
        """
        room = room or (lambda shape: np.empty(shape, np.uint8))
        wanted = [tuple(at) for at in places.tolist()]
        on_disk = not isinstance(self.paths[0], RemotePath)
        if self.cache is not None:
            on_disk = self.cache.prefetch((self._remote(shard), position) for shard, position in wanted)
        with contextlib.ExitStack() as stack:
            # From a store, each sample is a request.
            each = map if on_disk else stack.enter_context(ThreadPoolExecutor(REQUESTS)).map
            if len(set(wanted)) == len(wanted):
                # In one pass, which is faster.
                with contextlib.suppress(UserError):
                    found = zip(wanted, expand(each(self._bytes, wanted)), strict=True)
                    samples = (self._fitting(at[0], decode_sample(sample)) for at, sample in found)
                    return self._batch(samples, len(wanted), room)
            # One by one, to find which it is.
            samples = list(each(self._sample_or_error, wanted))
        damaged = {row: sample for row, sample in enumerate(samples) if isinstance(sample, UserError)}
        if damaged:
            if not self.skip_damaged:
                raise damaged[min(damaged)]
            for row in damaged:
                samples[row] = self._instead_of(*wanted[row])
        damaged = {row: (wanted[row], str(error)) for row, error in damaged.items()}
        return {**self._batch(samples, len(samples), room), "damaged": damaged}

    def _batch(self, samples: Iterable[dict], count: int, room: Callable[[tuple[int, ...]], np.ndarray]) -> dict:
        """Put `count` samples into a batch, each into its place as soon as it is there."""
        S, lengths, found = self.crop_size, [], []
        video_BTSS = np.empty((count, 0, S, S), np.uint8)
        for row, sample in enumerate(samples):
            mouth_TSS = sample["mouth"]
            if len(mouth_TSS) > video_BTSS.shape[1]:
                if count * mouth_TSS.nbytes > _MAX_BATCH:
                    raise UserError(
                        f"shard {sample['shard']}: clip {sample['key']} has {len(mouth_TSS)} frames, with which a "
                        f"batch of {count} takes {count * mouth_TSS.nbytes} bytes, at most {_MAX_BATCH} are read: "
                        "lower batch_size, or cut the clip into windows"
                    )
                larger = room((count, len(mouth_TSS), S, S))
                larger[:row, : video_BTSS.shape[1]] = video_BTSS[:row]
                video_BTSS = larger
            video_BTSS[row, : len(mouth_TSS)] = mouth_TSS
            lengths.append(len(mouth_TSS))
            found.append({name: sample.get(name) for name in ("label", "key", *_SECONDS)})
        if len(found) != count:
            raise UserError(f"{len(found)} samples were found of {count}")
        for row, length in zip(video_BTSS, lengths, strict=True):
            row[length:] = 0
        seconds = np.array([[sample[name] for name in _SECONDS] for sample in found], np.float64)  # None becomes NaN
        return {
            "video": video_BTSS,
            "lengths": np.array(lengths, np.int64),
            "labels": np.array([sample["label"] for sample in found], np.int64),
            "durations": seconds[:, 0],
            "times": seconds[:, 1:],
            "keys": [sample["key"] for sample in found],
            "damaged": {},
        }

    def _bytes(self, at: tuple[int, int]) -> bytes:
        shard, position = at
        read = read_range if self.cache is None else lambda *_: self.cache.read(self._remote(shard), position)
        return slice_of(self.paths[shard], self.offsets[shard], range(position, position + 1), read=read)

    def _instead_of(self, shard: int, position: int) -> dict:
        """The next clip of a shard that can be read. Raises ValueError where there is none for a while."""
        for step in range(1, min(_TRIES, self.counts[shard])):
            sample = self._sample_or_error((shard, (position + step) % self.counts[shard]))
            if isinstance(sample, dict):
                return sample
        raise UserError(f"shard {self.paths[shard]} is damaged from its clip {position} on: run `lipprep shards` again")

    def _sample_or_error(self, at: tuple[int, int]) -> dict | UserError:
        try:
            return self._sample(*at)
        except UserError as error:
            return error

    def _remote(self, shard: int) -> RemoteShard:
        return RemoteShard(self.paths[shard], self.digests[shard], self.offsets[shard])

    def _sample(self, shard: int, position: int) -> dict:
        def read() -> dict:
            data = lambda *_: self._bytes((shard, position))  # noqa: E731
            (sample,) = read_samples(self.paths[shard], self.offsets[shard], range(position, position + 1), read=data)
            return self._fitting(shard, sample)

        try:
            return read()
        except UserError:
            if self.cache is None:
                raise
            self.cache.forget(self._remote(shard), position)
            return read()

    def _fitting(self, shard: int, sample: dict) -> dict:
        """The sample; ValueError where it does not fit the index."""
        path = self.paths[shard]
        shape = sample["mouth"].shape
        if shape[0] == 0 or shape[1:] != (self.crop_size, self.crop_size):
            raise UserError(
                f"shard {path}: clip {sample['key']} has crops of shape {shape}, its index says side {self.crop_size}"
            )
        label = sample.get("label")
        if type(label) is not int or not 0 <= label < self.num_classes:
            raise UserError(
                f"shard {path}: clip {sample['key']} has label {label!r}, its index has {self.num_classes} labels"
            )
        for name in _SECONDS:
            seconds = sample.get(name)
            least = 0 if name == "duration" else -_MAX_SECONDS  # a window may begin within its word
            known = type(seconds) in (int, float) and least <= seconds <= _MAX_SECONDS
            if seconds is not None and not known:
                raise UserError(f"shard {path}: clip {sample['key']} has {name} {seconds!r}, no number of seconds")
        return {**sample, "shard": path}


class BatchLoader:
    """Reads planned batches ahead of their use, in `workers` processes (0: one batch ahead, in a thread).

    The batches are those of `ShardBatches`, as tensors. The memory of a batch's `video` is written to again two batches
    later: who wants it for longer clones it.
    """

    def __init__(self, batches: ShardBatches, plan: Iterable[np.ndarray], *, workers: int, pin_memory: bool) -> None:
        self._loader = DataLoader(
            _Reader(batches),
            batch_size=None,
            collate_fn=_as_it_is,  # torch would make tensors of the small arrays, in shared memory
            sampler=plan,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            multiprocessing_context=_processes() if workers else None,
            worker_init_fn=_begin,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Without its own, making an iterator would draw from the generator that dropout draws from.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict]:
        """Raises the ValueError or RemoteError of a batch that could not be read, in its turn."""
        before = set(multiprocessing.active_children())
        reading = iter(self._loader)
        _READERS.update(set(multiprocessing.active_children()) - before)
        for batch in reading if self._loader.num_workers else _ahead(reading):
            if isinstance(batch, UserError | RemoteError):
                try:
                    raise batch
                finally:
                    del batch  # else it would hold itself by its traceback, and the workers with it
            arrays = ("lengths", "labels", "durations", "times")
            yield {**batch, **{name: torch.from_numpy(batch[name]) for name in arrays}}


class _Reader(Dataset):
    """What a worker does: reads batches into memory that it uses again and again, shared where it is a process.

    Clearing new pages costs more than writing to them.
    """

    def __init__(self, batches: ShardBatches) -> None:
        self._batches = batches
        # A batch is used while the next ones are read, and might be looked at until the one after it has come.
        self._rooms: list[torch.UntypedStorage | None] = [None] * (_PREFETCH + 2)
        self._turn = 0

    def __getitem__(self, places: np.ndarray) -> dict | UserError | RemoteError:
        # An exception that crosses a process boundary arrives as another one, with its traceback as its text.
        self._turn = (self._turn + 1) % len(self._rooms)
        try:
            batch = self._batches.read(places, room=self._room)
        except RemoteError as error:
            return RemoteError(str(error))
        except (UserError, OSError) as error:
            why = str(error)
            try:
                self._batches.check_unchanged()
            except UserError as changed:
                why = str(changed)
            return UserError(why)
        # As a tensor it is sent by its name; small arrays are sent faster as they are.
        return {**batch, "video": self._tensor(batch["video"].shape)}

    def _room(self, shape: tuple[int, ...]) -> np.ndarray:
        size, kept = math.prod(shape), self._rooms[self._turn]
        if kept is None or kept.nbytes() < size:
            shared = get_worker_info() is not None
            self._rooms[self._turn] = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
        return self._tensor(shape).numpy()

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self._rooms[self._turn], 0, shape)


def _processes() -> BaseContext:
    """How workers are started: by a server that has no threads and so may fork, where the system has such.

    It imports this module once (`lipprep.train.served`): else each worker would, for seconds, while the device waits
    for the first batches. What it finds must be what the workers would: nothing of the folder that the run was started
    in, which Python looks in first. A server that runs already, for somebody else, is used as it is.

    Raises ValueError where it cannot be started.
    """
    # Apple's libraries do not outlive a fork.
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lipprep.train.served"])
    from multiprocessing import forkserver, resource_tracker  # not on Windows

    resource_tracker.ensure_running()  # which would let signals through as it starts
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise UserError(
            f"the processes that read cannot be started ({error}): set TMPDIR to a folder with a shorter name than "
            f"{tempfile.gettempdir()}, where they meet, or workers=0"
        ) from error
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # last: a Ctrl-C that has waited is raised here
    return context


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


def _as_it_is(batch: dict) -> dict:
    return batch


def _begin(worker: int) -> None:
    # Terminals and schedulers signal all processes of a run, but it is for the main one to end the others. It does that
    # with SIGTERM, too, so that a second one counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    keep_memory()


@atexit.register
def _end_readers() -> None:
    # As Python ends, it sends SIGTERM to what still runs, once, and waits: to `_begin` that is a signal to all.
    for process in list(_READERS):
        process.kill()


def _end_with_the_run() -> None:
    # torch asks whether the worker's parent is still the one it was; here that is the server, which lives on with it.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def default_workers(device: torch.device, *, beside: int = 1) -> int:
    """How many processes should read: none where training itself takes all cores, else up to eight.

    `beside` processes train on this machine, and each has readers of its own.
    """
    return 0 if device.type == "cpu" else max(1, min(8, loky.cpu_count() // beside - 1))
