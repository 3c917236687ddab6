"""Features of frames, for systems downstream: what a network makes of mouth crops before its head looks at time.

Only the stem looks at neighbours in time, two frames each way, and finds nothing beyond a clip's ends. A long video can
therefore be read in stretches that overlap by as much, and its features are those of one pass.

Shapes: B clips, T frames, S side of a crop in pixels, C features of a frame.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.stages.crop import Window, crop_stretches
from lipprep.stages.failures import ClipFailure
from lipprep.stages.held import HeldPath
from lipprep.stages.landmarks import track
from lipprep.stages.remote import RemotePath, signature
from lipprep.stages.shard.index import SPLITS, Index, load_index
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import printable
from lipprep.stages.video import read_frames
from lipprep.train.augment import eval_batch
from lipprep.train.cache import open_cache
from lipprep.train.checkpoint import Checkpoint, check_fits, find_checkpoint, load_checkpoint, sha256_of
from lipprep.train.config import config_from
from lipprep.train.device import choose_device, load_model, reading
from lipprep.train.draws import AugmentOptions
from lipprep.train.embed_files import (
    ClipFeatures,
    FeatureFolder,
    FeatureTable,
    check_out,
    digest,
    is_safe,
    open_features,
    write_failures,
)
from lipprep.train.epoch import places
from lipprep.train.errors import explained
from lipprep.train.loader import ShardBatches, default_workers
from lipprep.train.models import LipReader
from lipprep.train.predict import Reader, reader_of

EMBEDDING_VERSION = 1
BATCH_SIZE = 32  # clips of 29 frames: more are not faster
# Of a clip whose name cannot be that of a file: it is too long, has another clip's file for its folder, and so on.
_NAME = {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ}
_REACH = 2  # frames that the stems see each way: both convolve over 5


@dataclass(frozen=True)
class Embedder:
    """A network that gives features of mouth crops, of at most `at_once` frames in one pass."""

    model: LipReader
    options: AugmentOptions
    device: torch.device
    precision: str
    at_once: int

    def read(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, C) float32 of each of the clips (T, S, S) uint8, to rounding what it has alone.

        Clips of one length are read together, so that nothing is padded. Raises ValueError where they are smaller than
        the network's crop, or memory does not suffice.
        """
        features: dict[int, np.ndarray] = {}
        rows_of: dict[int, list[int]] = {}
        for row, clip in enumerate(clips):
            rows_of.setdefault(len(clip), []).append(row)
        for T, rows in rows_of.items():
            if self.at_once < T:
                for row in rows:
                    features[row] = self.read_stretches(lambda clip=clips[row]: _cut(clip, self.at_once))
                continue
            size = self.at_once // T
            for some in (rows[i : i + size] for i in range(0, len(rows), size)):
                video_BTSS = np.stack([clips[row] for row in some])
                features.update(zip(some, self._features(video_BTSS, self.options), strict=True))
        return [features[row] for row in range(len(clips))]

    def read_stretches(self, stretches: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
        """Features (T, C) float32 of one clip that comes in stretches (t, S, S) uint8, to rounding those of one pass.

        All but the last have at least two frames. They are asked for twice where the network sees its clips less their
        mean frame, which is that of the whole clip.
        """
        options, mean_11SS = self.options, None
        if options.subtract_mean_frame:
            sums_SS, count = 0, 0
            for mouth_TSS in stretches():
                sums_SS, count = sums_SS + mouth_TSS.sum(0, dtype=np.int64), count + len(mouth_TSS)
            mean_11SS = torch.from_numpy((sums_SS / count).astype(np.float32))[None, None]
            options = dataclasses.replace(options, subtract_mean_frame=False)
        parts = []
        for mouth_TSS, first, stop in _overlapping(stretches()):
            (features_TC,) = self._features(mouth_TSS[None], options, mean_11SS=mean_11SS)
            parts.append(features_TC[first:stop])
        return np.concatenate(parts)

    def _features(
        self, video_BTSS: np.ndarray, options: AugmentOptions, *, mean_11SS: torch.Tensor | None = None
    ) -> np.ndarray:
        """Features (B, T, C) of clips of one length, less a given mean frame."""
        less = "lower --batch-size, or use --device cpu"
        lengths_B = torch.full((len(video_BTSS),), video_BTSS.shape[1])
        with torch.inference_mode(), reading(self.device, self.precision), explained(less):
            x_B1TSS = eval_batch(torch.from_numpy(video_BTSS).to(self.device), lengths_B, options)
            if mean_11SS is not None:
                # A copy: of floats, this works in place.
                still = eval_batch(mean_11SS.to(self.device, copy=True), torch.tensor([1]), options)
                x_B1TSS = (x_B1TSS - still) * options.mean_frame_gain
            return self.model.extract_features(x_B1TSS, lengths_B.to(self.device)).float().cpu().numpy()


def _cut(clip_TSS: np.ndarray, length: int) -> Iterator[np.ndarray]:
    return (clip_TSS[i : i + length] for i in range(0, len(clip_TSS), length))


def _overlapping(stretches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Each stretch with what a stem sees beyond it, and where in there its own frames begin and end."""
    before_TSS = None
    for mouth_TSS, after_TSS in itertools.pairwise(itertools.chain(stretches, [None])):
        before_TSS = mouth_TSS[:0] if before_TSS is None else before_TSS
        after_TSS = mouth_TSS[:0] if after_TSS is None else after_TSS[:_REACH]
        first = len(before_TSS)
        yield np.concatenate([before_TSS, mouth_TSS, after_TSS]), first, first + len(mouth_TSS)
        before_TSS = mouth_TSS[-_REACH:]


def crops_of_video(
    reader: Reader, video: Path | RemotePath, *, length: int
) -> tuple[int, Callable[[], Iterator[np.ndarray]]]:
    """The frames of a whole video, and a function that gives its mouth crops `length` frames at a time.

    They are aligned to the landmarks of the whole video, and cut anew whenever they are asked for. Raises ClipFailure
    where it cannot be read, and so do the crops, where it shows no face, too; RemoteError as its store does.
    """
    if isinstance(video, RemotePath):
        video = HeldPath(video)  # which is read more than once
    points_TKD = None
    if reader.crop.needs_landmarks:
        points_TKD = track(read_frames(video, fps=reader.fps), reader.detector).points
    count = sum(1 for _ in read_frames(video, fps=reader.fps)) if points_TKD is None else len(points_TKD)
    window = Window(None, count, points_TKD)

    def stretches() -> Iterator[np.ndarray]:
        frames = read_frames(video, fps=reader.fps, color=reader.crop.exact)
        return crop_stretches(frames, window, reader.crop, length=length, face=reader.face)

    return count, stretches


@dataclass
class _Work:
    """What is done, and what came of it so far."""

    embedder: Embedder
    about: dict[str, Any]
    out: FeatureFolder | FeatureTable
    bar: tqdm
    clips: int = 0
    frames: int = 0
    present: int = 0
    failures: list[dict] = field(default_factory=list)

    def add(self, clip: ClipFeatures, **source: Any) -> None:
        """Write a clip's features; one that has no name for a file fails, but a full disk is raised."""
        try:
            self.out.add(clip)
        except OSError as error:
            if error.errno not in _NAME:
                raise
            reason = f"no file of features can have its name ({error.strerror})"
            self.fail(clip.key, "unsafe_member", reason, **source)
            return
        self.clips += 1
        self.frames += len(clip.features_TC)
        self.bar.update()

    def has(self, key: str, made_from: str) -> bool:
        """Whether a clip is there already, which is then done."""
        there = self.out.has(key, made_from)
        self.present += there
        self.bar.update(there)
        return there

    def fail(self, key: str | None, kind: str, error: object, **source: Any) -> None:
        """Note, and say, that a clip has no features."""
        where = " ".join(str(value) for value in source.values())
        tqdm.write(f"{printable(key or where)}: {printable(error)}", file=sys.stderr)
        self.failures.append({"key": key, **source, "class": kind, "message": str(error)})
        self.bar.update()


def embed_videos(
    run: Path,
    videos: Mapping[str, Path | RemotePath],
    *,
    out: Path,
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    replace: bool = False,
) -> dict:
    """Write the features of whole videos, by their keys, to a folder or a table (`lipprep.train.embed_files`).

    Faces are found and mouths cut as the checkpoint's training crops were, all over the video. A network that sees its
    clips less their mean frame sees a video less that of all its frames. `batch_size` times a training clip's frames
    are in memory at once. What exists and fits is kept, unless `replace`.
    Returns what was done, as `lipprep embed --json` prints it; a video that fails is in `failures`, and the others go
    on. Raises ValueError for a checkpoint that is none, and for an `out` that is not fit (`open_features`).
    """
    check_out(out, replace=replace)
    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path)
    reader = reader_of(checkpoint, path, device=device)
    how = (reader.options, reader.device, reader.precision)
    embedder = Embedder(reader.model, *how, batch_size * checkpoint.window)
    detector = reader.detector.identity if reader.crop.needs_landmarks else None
    about = _about(path, checkpoint, embedder, dtype=dtype, detector=detector, labels=None)
    with _working(embedder, about, out, total=len(videos), replace=replace) as work:
        for key, video in videos.items():
            try:
                made_from = digest(about, _signature(video))
                if work.has(key, made_from):
                    continue
                count, stretches = crops_of_video(reader, video, length=embedder.at_once)
                if count <= embedder.at_once:
                    (mouth_TSS,) = stretches()
                    (features_TC,) = embedder.read([mouth_TSS])
                else:
                    features_TC = embedder.read_stretches(stretches)
            except (ClipFailure, OSError, RemoteError) as error:
                work.fail(key, getattr(error, "kind", "unreadable"), error, video=str(video))
                continue
            work.add(ClipFeatures(key, features_TC, made_from), video=str(video))
    return _told(work, path)


def embed_shards(
    run: Path,
    shards: Path | RemotePath,
    *,
    out: Path,
    splits: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    cache: Path | None = None,
    cache_size: int | None = None,
    replace: bool = False,
) -> dict:
    """Write the features of the clips of shards, of all `splits` by default; the rest is as in `embed_videos`.

    The shards must have been made as those of training (`check_fits`), but of any words: features are there before
    there is a word, and serve for others, too. Raises ValueError where they were not, or lack a split, and
    RemoteError where a store does not answer.
    """
    check_out(out, replace=replace)
    index = load_index(shards)
    filled = {shard.split for shard in index.shards if shard.samples}
    splits = list(dict.fromkeys(splits)) or [name for name in SPLITS if name in filled]
    read = [shard for split in splits for shard in index.split(split)]
    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path)
    check_fits(dataclasses.replace(checkpoint, labels=list(index.labels)), index)
    config, where = config_from(checkpoint.config), choose_device(device)
    with explained("use --device cpu"):
        model = load_model(checkpoint, where)
    embedder = Embedder(model, config.augment, where, config.precision, batch_size * checkpoint.window)
    about = _about(path, checkpoint, embedder, dtype=dtype, detector=None, labels=list(index.labels))
    kept = open_cache(shards, read, folder=cache, size=cache_size)
    threads = max(1, default_workers(where) if config.workers is None else config.workers)
    with _working(embedder, about, out, total=sum(s.samples for s in read), replace=replace) as work:
        keys: set[str] = set()
        for split in splits:
            batches = ShardBatches(shards, index, split, cache=kept)
            _embed_split(work, batches, index, split, threads=threads, keys=keys)
    return _told(work, path)


def _embed_split(work: _Work, batches: ShardBatches, index: Index, split: str, *, threads: int, keys: set[str]) -> None:
    """Make the features of a split's clips; `keys` are those of the clips before, and get these."""
    waiting: list[tuple[ClipFeatures, dict]] = []  # with crops in place of features, and where it is from
    held = 0  # frames of them

    def flush() -> None:
        crops = [clip.features_TC for clip, _ in waiting]
        for (clip, source), features_TC in zip(waiting, work.embedder.read(crops), strict=True):
            work.add(dataclasses.replace(clip, features_TC=features_TC), **source)
        waiting.clear()

    for (shard, position), clip in _read_ahead(batches, threads=threads):
        source = {"split": split, "shard": batches.paths[shard].name, "position": position}
        if isinstance(clip, UserError):
            work.fail(None, "damaged_clip", clip, **source)
            continue
        (key,), label, mouth_TSS = clip["keys"], int(clip["labels"][0]), clip["video"][0]
        made_from = digest(work.about, {"shard": batches.digests[shard], "position": position})
        if not is_safe(key):
            work.fail(key, "unsafe_member", "its key is no path below a folder", **source)
        elif key in keys:
            work.fail(key, "duplicate_key", "another clip has the same key, and its features are kept", **source)
        elif not work.has(key, made_from):
            clip = ClipFeatures(key, mouth_TSS, made_from, split, index.labels[label], label)
            waiting.append((clip, source))
            held += len(mouth_TSS)
        keys.add(key)
        if held >= work.embedder.at_once:
            flush()
            held = 0
    if waiting:
        flush()


def _read_ahead(batches: ShardBatches, *, threads: int) -> Iterator[tuple[tuple[int, int], dict | UserError]]:
    """Each place of a split and the batch of its clip alone, or why it cannot be read, in order; read by threads."""

    def read(at: np.ndarray) -> dict | UserError:
        try:
            return batches.read(at[None])
        except UserError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque = collections.deque()
        try:
            for at in places(batches.counts):
                ahead.append((at, pool.submit(read, at)))
                if len(ahead) > 2 * threads:
                    done, future = ahead.popleft()
                    yield tuple(done.tolist()), future.result()
            for done, future in ahead:
                yield tuple(done.tolist()), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _working(embedder: Embedder, about: dict, out: Path, *, total: int, replace: bool) -> Iterator[_Work]:
    """Open what features go to, and a bar; at the end, list what failed."""
    with open_features(out, about, replace=replace) as features:
        with tqdm(total=total, unit="clip", desc="embed", leave=False, disable=None, dynamic_ncols=True) as bar:
            write_failures(features.failures, [])  # those of an earlier run
            work = _Work(embedder, about, features, bar)
            yield work
        write_failures(features.failures, work.failures)


def _about(path: Path, checkpoint: Checkpoint, embedder: Embedder, **more: Any) -> dict[str, Any]:
    """What features are made with: the embedding.json of a folder, and the metadata of a table."""
    sha256 = sha256_of(path)
    about = {
        "lipprep_embedding": EMBEDDING_VERSION,
        "recipe": config_from(checkpoint.config).recipe,
        "profile": checkpoint.profile,
        "step": checkpoint.step,
        "checkpoint_sha256": sha256,
        "fps": checkpoint.fps,
        "channels": embedder.model.features,
    }
    return about | more


def _signature(video: Path | RemotePath) -> dict:
    """What tells that a video is another than it was; nothing of one that is not there, as who reads it will say."""
    try:
        return signature(video.stat())
    except OSError:
        return {}


def _told(work: _Work, path: Path) -> dict:
    files = [*work.out.files, *([work.out.failures] if work.failures else [])]
    counts = {"clips": work.clips, "frames": work.frames, "present": work.present, "failed": len(work.failures)}
    about = {name: value for name, value in work.about.items() if name != "labels"}
    return {**counts, "checkpoint": str(path), **about, "files": [str(file) for file in files]}
