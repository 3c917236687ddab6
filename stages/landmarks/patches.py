"""What the detectors on a torch device share: how they run, gray frames there, and square patches cut out of many."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Run networks without gradients, and with the same result each time.

    cudnn would choose convolutions by timing them, another one in every run, and round their input to 10 bits.
    """
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield


def upload(values: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """Put an array on a device. Where that is CUDA the copy waits its turn there, and the host does not wait."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


class DeviceFrames:
    """Gray frames (H, W) uint8, of any sizes, one after the other on a torch device."""

    def __init__(self, frames: Sequence[np.ndarray], device: str) -> None:
        shapes = np.array([frame.shape for frame in frames], np.int64)
        sizes = shapes.prod(axis=1)
        self._pixels = upload(np.concatenate([frame.ravel() for frame in frames]), device)
        # places: (N, 3), a frame's first pixel, its height and its width
        self._places = upload(np.column_stack([np.cumsum(sizes) - sizes, shapes]), device)

    def patches(self, which: slice, to_frame: torch.Tensor, size: int, *, replicate: bool) -> torch.Tensor:
        """Cut a patch out of each frame of `which`: (N, size, size) float32, whole gray levels.

        `to_frame` (N, 2, 3) float32 maps pixels of the patch to pixels of the frame. Bilinear as cv2.warpAffine,
        with its BORDER_REPLICATE or, without `replicate`, zeros round the frame. A map that is not of numbers shows
        one of the frame's pixels.
        """
        first, height, width = self._places[which, :, None, None].unbind(dim=1)
        steps = torch.arange(size, dtype=torch.float32, device=to_frame.device)
        a, b, c = to_frame[:, :, :, None, None].unbind(dim=2)
        # NaN would become an index outside the pixels: on CUDA an error that lasts for the rest of the process.
        x, y = (a * steps + b * steps[:, None] + c).nan_to_num().unbind(dim=1)
        if replicate:
            x, y = x.clamp(min=0).minimum(width - 1), y.clamp(min=0).minimum(height - 1)
        left, top = x.floor(), y.floor()
        patch = torch.zeros_like(x)
        for row, row_share in ((top, top + 1 - y), (top + 1, y - top)):
            for column, column_share in ((left, left + 1 - x), (left + 1, x - left)):
                inside_x, inside_y = column.clamp(min=0).minimum(width - 1), row.clamp(min=0).minimum(height - 1)
                share = row_share * column_share
                if not replicate:
                    share = share * ((inside_x == column) & (inside_y == row))
                patch += share * self._pixels[first + inside_y.long() * width + inside_x.long()]
        return patch.round()
