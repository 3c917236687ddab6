import subprocess
import sys

import pytest
import torch

from lipprep.stages.landmarks import load_detector
from lipprep.stages.landmarks.fan import WEIGHTS


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")


@pytest.mark.parametrize("name", ["mesh", "fan"])
@pytest.mark.parametrize("device", ["cuda:99", "xpu:7", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_said_when_loading(weights, name, device):
    with pytest.raises(ValueError, match="use --device cpu") as error:
        load_detector(name, device=device)
    assert repr(device) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_what_torch_lacks_is_said(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match="install a CUDA build of torch"):
        load_detector("mesh", device="cuda:99")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="only cpu, xpu:0, xpu:1: use --device cpu"):
        load_detector("mesh", device="xpu:7")


def test_dlib_runs_on_the_cpu_alone():
    with pytest.raises(ValueError, match="dlib runs on the CPU alone, not on 'cuda'"):
        load_detector("dlib", device="cuda")


def test_other_torch_devices_have_the_torch_mesh(monkeypatch):
    monkeypatch.setattr("lipprep.stages.landmarks._check_device", lambda _: None)
    mesh, other = load_detector("mesh"), load_detector("mesh", device="meta")
    assert type(mesh) is not type(other)
    assert (mesh.name, mesh.identity) == (other.name, other.identity)


def test_torchs_other_name_of_the_cpu_is_the_cpu():
    assert type(load_detector("mesh", device="cpu:0")) is type(load_detector("mesh"))


def test_the_mesh_on_the_cpu_does_without_torch():
    program = (
        "import sys, numpy as np\n"
        "from lipprep.stages.landmarks import load_detector, track_clips\n"
        "track_clips([[np.zeros((64, 64), np.uint8)]], load_detector('mesh'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
