import subprocess
import sys

import pytest

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


def test_other_torch_devices_have_the_torch_mesh():
    mesh, other = load_detector("mesh"), load_detector("mesh", device="cpu:0")
    assert type(mesh) is not type(other)
    assert (mesh.name, mesh.identity) == (other.name, other.identity)


def test_the_mesh_on_the_cpu_does_without_torch():
    program = (
        "import sys, numpy as np\n"
        "from lipprep.stages.landmarks import load_detector, track_clips\n"
        "track_clips([[np.zeros((64, 64), np.uint8)]], load_detector('mesh'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
