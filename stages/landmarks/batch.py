"""The landmarks of many clips at once, for detectors that gain by it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from lipprep.stages.landmarks.detector import Detector
from lipprep.stages.landmarks.track import ClipLandmarks, track

CLIPS_AT_ONCE = 64  # nearly two thousand frames of LRW, which keep a GPU busy


@runtime_checkable
class BatchDetector(Detector, Protocol):
    """A detector that works on many clips at once."""

    clips_at_once: int  # as it wants them

    def track_clips(self, clips: Sequence[Sequence[np.ndarray]]) -> list[ClipLandmarks]:
        """Give what `track` gives for each clip."""
        ...


def track_clips(clips: Sequence[Sequence[np.ndarray]], detector: Detector) -> list[ClipLandmarks]:
    """Follow one face through each of `clips`, gray frames (H, W) uint8: `track` of every clip.

    A BatchDetector does them together. It holds no more of them on its device than they take as uint8; sizes and
    lengths may differ.
    """
    if isinstance(detector, BatchDetector):
        return detector.track_clips(clips)
    return [track(clip, detector) for clip in clips]
