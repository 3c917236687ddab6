import cv2
import numpy as np
import pytest
import torch

from lipprep.stages.landmarks.patches import DeviceFrames


@pytest.mark.parametrize("replicate", [True, False])
def test_patches_are_those_of_opencv(portrait, replicate):
    gray = cv2.GaussianBlur(cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY), (0, 0), 2)
    frames = [gray, gray[:150, 20:], np.ascontiguousarray(gray[::2]), gray[100:101, :1], gray[:, 40:41]]
    rng = np.random.default_rng(0)
    maps = []
    for frame in frames:
        turn, scale = rng.uniform(-1, 1), rng.uniform(0.3, 2)
        rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        centre = np.array(frame.shape[::-1]) / 2 + rng.uniform(-20, 20, 2)
        maps.append(np.column_stack([rotation, centre - rotation @ (32, 32)]))
    to_frame = torch.from_numpy(np.array(maps, np.float32))
    which = slice(1, 5)
    patches = DeviceFrames(frames, "cpu").patches(which, to_frame[which], 64, replicate=replicate).numpy()
    assert patches.shape == (4, 64, 64) and patches.dtype == np.float32
    np.testing.assert_array_equal(patches, patches.round())
    border = cv2.BORDER_REPLICATE if replicate else cv2.BORDER_CONSTANT
    for patch, frame, matrix in zip(patches, frames[which], maps[which], strict=True):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        expected = cv2.warpAffine(frame, matrix, (64, 64), flags=flags, borderMode=border)
        # OpenCV before 5 rounds coordinates to 1/32 pixel; at a border of zeros that is 8 levels.
        assert np.abs(patch - expected).mean() < 0.5 and np.abs(patch - expected).max() <= (2 if replicate else 8)
