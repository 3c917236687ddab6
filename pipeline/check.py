"""A look at every video's header before hours of work."""

import contextlib
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lipprep.pipeline.ahead import ahead
from lipprep.pipeline.manifest import Manifest
from lipprep.stages.failures import ClipFailure
from lipprep.stages.remote import REQUESTS, RemotePath

_DEPTH = 64  # videos a thread


def check_video(root: Path | RemotePath, video: str, min_frames: int, fps: float) -> dict | None:
    """What is wrong with one video as its header has it: {video, class, message}, or None."""
    from lipprep.stages.crop_files import crops_shape, is_crop_file
    from lipprep.stages.video import probe

    try:
        if is_crop_file(video):
            frames = crops_shape(root / video)[0]
        else:
            info = probe(root / video)
            frames = round(info.duration * fps) if info.duration else info.num_frames
        if frames < min_frames:
            raise ClipFailure("too_short", f"{frames} frames at {fps:g} fps, fewer than {min_frames}")
    except ClipFailure as failure:
        return {"video": video, "class": failure.kind, "message": str(failure)}
    return None


def check_videos(manifest: Manifest, *, min_frames: int, workers: int) -> list[dict]:
    """The problems of all videos of a manifest, in its order."""
    videos = list(dict.fromkeys(c.video for c in manifest.clips))
    # Threads: opening a header waits for the disk more than it computes, and for a store for a hundred times as long.
    threads = max(workers, REQUESTS) if isinstance(manifest.root, RemotePath) else workers
    threads = max(1, min(threads, len(videos)))
    look = partial(check_video, manifest.root, min_frames=min_frames, fps=manifest.fps)
    problems = []
    with contextlib.closing(ahead(videos, look, threads=threads, depth=_DEPTH * threads)) as looked:
        for _, future in tqdm(looked, total=len(videos), desc="check", unit="video"):
            if problem := future.result():
                problems.append(problem)
    return problems
