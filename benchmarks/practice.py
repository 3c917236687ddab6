"""What people do today, as a yardstick: one clip, one frame at a time, every frame warped whole, a file a clip.

The 2021 preprocessing as it is usually run (see stages/align.py for what it computes): OpenCV decodes to BGR, a queue
of 12 frames smooths the landmarks, scikit-image fits a similarity and warps the whole colour frame to 256x256, the
mouth is cut out, turned gray and saved as compressed npz.
"""

from collections import deque
from pathlib import Path

import cv2
import numpy as np
from skimage.transform import estimate_transform, warp

from lipprep.stages.align import FRAME, MOUTH, mean_face, repair

STABLE = [33, 36, 39, 42, 45]
WINDOW = 12
SIDE = 96


def _cut(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    half = SIDE // 2
    x, y = np.clip(points[MOUTH].mean(0), half, FRAME - half)
    left, top = round(x) - half, round(y) - half
    return frame[top : top + SIDE, left : left + SIDE]


def _aligned(frame: np.ndarray, transform) -> np.ndarray:
    whole = warp(frame, inverse_map=transform.inverse, output_shape=(FRAME, FRAME))
    return (whole * 255).astype(np.uint8)


def crop(video: Path, points_TKD: np.ndarray, out: Path) -> np.ndarray:
    """Crop one clip, whose landmarks (T, 68, 2) are in pixels, and save it; its mouth crops (T, 96, 96) uint8."""
    points_TKD = repair(points_TKD)
    face = mean_face()
    reader = cv2.VideoCapture(str(video))
    frames, points, patches = deque(), deque(), []
    transform = None
    for t in range(len(points_TKD)):
        ok, frame = reader.read()
        if not ok:
            break
        frames.append(frame)
        points.append(points_TKD[t])
        if len(frames) < min(WINDOW, len(points_TKD)):
            continue
        transform = estimate_transform("similarity", np.mean(points, axis=0)[STABLE], face[STABLE])
        patches.append(_cut(_aligned(frames.popleft(), transform), transform(points.popleft())))
    while frames:
        patches.append(_cut(_aligned(frames.popleft(), transform), transform(points.popleft())))
    reader.release()
    mouth = np.stack([cv2.cvtColor(patch, cv2.COLOR_BGR2GRAY) for patch in patches])
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, data=mouth)
    return mouth
