"""Landmarks of many videos at once, as a GPU has them: by the torch port of the embedded network, here on the CPU."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lipprep.pipeline import make
from lipprep.pipeline.records import read_entries
from lipprep.stages.landmarks.torch_mesh import TorchMesh
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers


def landmarks(work: str) -> dict[str, np.ndarray]:
    found = {}
    for tar in Path(work, "m/landmarks").glob("*.tar"):
        with TarMembers(tar) as members:
            for entry in read_entries(tar):
                if entry["status"] == "ok":
                    found[entry["key"]] = npy_array(members.read(f"{entry['key']}.landmarks.npy"))
    return found


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(1 << 27, id="together", marks=pytest.mark.cluster),
        pytest.param(2_000_000, id="two by two"),
        pytest.param(100_000, id="frame by frame"),
    ],
)
def test_videos_that_are_tracked_together_come_out_as_they_do_alone(lipprep, corpus, tmp_path, monkeypatch, held):
    own = tmp_path / "own"
    shutil.copytree(corpus / "ABOUT", own / "ABOUT")
    broken = own / "ABOUT/train/ABOUT_00002.mp4"
    broken.write_bytes(broken.read_bytes()[:2000])
    lipprep("manifest", "lrw", own, "-o", "manifests/m.jsonl")
    flags = ["--engine", "serial", "--max-failures", "100%", "--json"]
    alone = json.loads(lipprep("landmarks", "-w", "alone", *flags).stdout)
    together = TorchMesh(device="cpu")
    calls = []
    monkeypatch.setattr(make, "_detector", lambda name, device: together)
    monkeypatch.setattr(make, "_HELD", held)
    track_clips = make.track_clips
    monkeypatch.setattr(make, "track_clips", lambda clips, d: (calls.append(len(clips)), track_clips(clips, d))[1])
    figures = json.loads(lipprep("landmarks", "-w", "together", *flags).stdout)
    assert figures["failed"] == alone["failed"]
    here, there = landmarks("alone"), landmarks("together")
    assert here.keys() == there.keys() and len(here) == 5
    assert max(float(np.abs(here[key] - there[key]).max()) for key in here) < 0.5
    assert max(calls, default=0) <= max(1, held // 1_000_000)


def test_a_device_without_room_is_no_clips_fault(lipprep, corpus, monkeypatch):
    import torch

    def full(clips, detector):
        raise torch.OutOfMemoryError("out of memory")

    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    together = TorchMesh(device="cpu")
    monkeypatch.setattr(make, "_detector", lambda name, device: together)
    monkeypatch.setattr(make, "track_clips", full)
    message = lipprep("landmarks", "--engine", "serial", code=1).stderr
    assert "too little memory" in message and "-j" in message
