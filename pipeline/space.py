"""The room that a stage needs on its disk: estimated before it starts, and told when a disk is full."""

import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tqdm import tqdm

from lipprep.pipeline.manifest import Manifest
from lipprep.pipeline.plan import Chunk, upstream
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.atomic import disk_remedy
from lipprep.stages.failures import ClipFailure
from lipprep.stages.remote import RemotePath

_MEMBER = 1024  # bytes of a tar's header and padding, on average
_RECORD = 800  # bytes of a clip's line in a record
_JSON = 256
_LANDMARKS = 68 * 2 * 4  # bytes a frame
_JPEG = 0.25  # bytes a pixel at quality 95, measured on faces; less at any other
_LOOKS = 8  # files whose headers are asked for their length


def clip_bytes(stage: str, frames: float, wanted: Wanted) -> float:
    """What a clip of so many frames takes in a stage's tar and record, about, in bytes."""
    pixels = wanted.crop_size**2 * frames
    if stage == "landmarks":
        return _LANDMARKS * frames + _MEMBER + _RECORD
    if stage == "crops":
        return pixels + _MEMBER + _RECORD
    return pixels * (_JPEG if wanted.codec == "jpeg" else 1) + 2 * _MEMBER + _JSON + _RECORD


def mean_frames(manifest: Manifest, wanted: Wanted) -> float:
    """How many frames a clip has, about: of windows as the manifest says, else as some files' headers say."""
    from lipprep.stages.crop_files import crops_shape
    from lipprep.stages.video import probe

    windows = [clip.num_frames for clip in manifest.clips if clip.num_frames is not None]
    if windows:
        return sum(windows) / len(windows)
    lengths = []
    for clip in manifest.clips[:: max(1, len(manifest.clips) // _LOOKS)][:_LOOKS]:
        path = manifest.root / clip.video
        try:
            lengths.append(crops_shape(path)[0] if wanted.from_crops else probe(path).duration * manifest.fps)
        except ClipFailure:
            continue
    return sum(lengths) / len(lengths) if lengths else 0.0


def needed_bytes(
    stage: str,
    manifest: Manifest,
    wanted: Wanted,
    chunks: Sequence[Chunk],
    pending: Sequence[Chunk],
    workers: int,
    stored_crops: Collection[tuple[str, int]] = (),
) -> int:
    """The room, in bytes, that making `pending` takes beyond what is there. `chunks` are all of the stage's.

    What goes to a store takes room here while it is made, one tar a worker, and so do the tars that it is made from:
    those of the landmarks and, at the places (split, number) of `stored_crops`, of the crops.
    """
    there = [c for c in chunks if c.state == "fresh" and c.header["counts"].get("ok")]
    remote = any(isinstance(c.tar, RemotePath) for c in pending)
    frames = mean_frames(manifest, wanted) if not there or (remote and stage != "landmarks") else 0.0
    if there:
        clip = sum(c.header["tar"]["bytes"] for c in there) / sum(c.header["counts"]["ok"] for c in there) + _RECORD
    else:
        clip = clip_bytes(stage, frames, wanted)
    sizes = [clip * len(c.clips) for c in pending]
    if remote:
        landmarks = clip_bytes("landmarks", frames, wanted) if upstream(stage, wanted) else 0.0
        crops = clip_bytes("crops", frames, wanted)
        read = [landmarks + (crops if (c.split, c.number) in stored_crops else 0.0) for c in pending]
        sizes = [size + clip * len(c.clips) for c, size, clip in zip(pending, sizes, read, strict=True)]
    at_once = sum(sorted(sizes)[-workers:])
    if remote:
        return round(at_once)
    # A tar that was set aside goes at the end only.
    replaced = sum(c.header["tar"]["bytes"] for c in pending if c.header is not None and c.tar.is_file())
    # An old tar goes when the new one is whole: for a while there are both, one a worker.
    return round(max(sum(sizes) - replaced, at_once))


def free_bytes(folder: Path) -> int:
    """The free room of the disk that `folder` is, or will be, on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def warn_of_space(folder: Path, needed: int) -> None:
    """Say that `needed` bytes will not fit; the run may be meant to fill what there is."""
    tqdm.write(
        f"warning: about {size(needed)} will be written to {folder}, where {size(free_bytes(folder))} are free: when "
        "the disk is full the run stops, and goes on when it is run again",
        file=sys.stderr,
    )


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(34_000_000)
    '34 MB'
    """
    for unit, worth in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= worth:
            return f"{count / worth:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def disk_trouble(error: OSError, folder: Path, needed: int, chunks: int) -> str | None:
    """What to tell of a disk that does not take what is written; None for another error."""
    if (remedy := disk_remedy(error)) is None:
        return None
    return (
        f"{folder}: {error.strerror}. {chunks} chunks are still to be made, which takes about "
        f"{size(needed)}; {size(free_bytes(folder))} are free. What is done is kept: {remedy}, then run "
        "the same command again to go on"
    )
