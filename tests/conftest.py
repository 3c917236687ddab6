"""What several rooms test with: the golden files, and small real videos."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"

# torch reads it when it is loaded. Batches this small gain nothing from threads, and lose much where tests share their
# cores: threads that wait for each other turn in circles.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.append(str(Path(__file__).parent))
pytest_plugins = ["demo_page", "forks", "remote", "traps"]


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def encode_video(
    path: Path, frames: Sequence[np.ndarray], *, fps: float = 25, codec: str = "libx264", options: dict | None = None
) -> Path:
    """Write gray (H, W) or BGR (H, W, 3) frames as a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "10", "x264-params": "threads=1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="gray" if frame.ndim == 2 else "bgr24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    return encode_video


@pytest.fixture(scope="session")
def portrait() -> np.ndarray:
    """A real face, (256, 256, 3) BGR uint8, its eyes about 50 pixels apart."""
    from skimage import data

    return np.ascontiguousarray(cv2.resize(data.astronaut()[0:230, 110:340], (256, 256))[..., ::-1])


@pytest.fixture(scope="session")
def face_frames(portrait: np.ndarray) -> list[np.ndarray]:
    """29 frames of the portrait, moving: BGR (256, 256, 3) uint8."""
    return [
        cv2.warpAffine(
            portrait, np.array([[1, 0, 0.4 * t], [0, 1, 0.2 * t]]), (256, 256), borderMode=cv2.BORDER_REPLICATE
        )
        for t in range(29)
    ]


@pytest.fixture(scope="session")
def change_index() -> Callable[..., None]:
    """Write other fields into a folder's index.json, with digests that fit: as one who means harm would."""
    from lipprep.stages.shard.index import plain_digest

    def change(folder: Path, **fields: object) -> None:
        path = folder / "index.json"
        plain = json.loads(path.read_text()) | fields
        plain["offsets_sha256"] = hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest()
        del plain["sha256"]
        path.write_text(json.dumps(plain | {"sha256": plain_digest(plain)}))

    return change
