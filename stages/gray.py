"""Grayscale, as the field's reference crops have it."""

import cv2
import numpy as np

# ITU-R BT.601: limited-range luma runs from 16 to 235. Conversions by way of 8-bit BGR (FFmpeg's, and so
# cv2.VideoCapture's) truncate each channel, and skin loses one level more to its chroma: over faces of real
# and of drawn videos, the mean gray of every luma value lies 0.1 to 0.2 above this table.
LIMITED = np.clip((np.arange(256) - 16) * 255 // 219 - 1, 0, 255).astype(np.uint8)
# The same by a line that is rounded, which takes half as long as looking up: its values are 1/73 apart, so that half of
# that puts each clear of a tie.
_SLOPE = 255 / 219
_OFFSET = -16 * _SLOPE - 1 - 0.5 + 0.5 / 73


def gray_from_luma(luma: np.ndarray) -> np.ndarray:
    """Limited-range luma (H, W) uint8 to the full-range gray that a conversion through BGR would give: `LIMITED`."""
    return cv2.addWeighted(luma, _SLOPE, luma, 0, _OFFSET)


def gray_from_bgr(bgr: np.ndarray) -> np.ndarray:
    """BGR (H, W, 3) uint8 to gray (H, W) uint8: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), rounded."""
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)


def gray_from_rgb(rgb: np.ndarray) -> np.ndarray:
    """The same of RGB (H, W, 3) uint8."""
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
