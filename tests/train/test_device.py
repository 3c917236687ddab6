"""Where a model runs, with GPUs that are not there: what is asked of torch, and what is told where they are not had."""

import pytest
import torch

from lipprep.train.device import choose_device, reading


@pytest.fixture
def two_gpus(monkeypatch):
    """The numbers of the GPUs that were made a process's own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    return chosen


@pytest.mark.parametrize(
    ("name", "place", "number"),
    [("auto", {}, 0), ("cuda", {}, 0), ("cuda:1", {}, 1), ("cuda", {"local": 1, "beside": 2}, 1)],
)
def test_a_gpu_has_a_number_always(name, place, number, two_gpus):
    """torch.cuda.set_device takes none without."""
    assert choose_device(name, **place) == torch.device("cuda", number)
    assert two_gpus == [number]


@pytest.mark.parametrize(
    ("name", "place", "told"),
    [
        ("cuda:2", {}, "cuda:2 is not available here: 2 can be seen .*: use --device auto"),
        ("auto", {"local": 2, "beside": 4}, "cuda:2 is not available here: .* use torchrun --nproc-per-node 2"),
        ("cuda:1", {"local": 0, "beside": 2}, "leave the number out of --device cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_told_of(name, place, told, two_gpus):
    with pytest.raises(ValueError, match=told):
        choose_device(name, **place)
    assert two_gpus == []


def test_a_gpu_that_is_not_to_be_had_is_told_of(two_gpus, monkeypatch):
    def busy(_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(
        ValueError, match=r"cuda:0 cannot be used \(CUDA error: all .* unavailable\): look at nvidia-smi"
    ):
        choose_device("auto")


def test_reading_in_fp32_rounds_nothing_on_a_gpu():
    before = torch.backends.cudnn.allow_tf32
    for precision, allowed in (("auto", False), ("fp32", False)):
        with reading(torch.device("cuda"), precision):
            assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is before
    with reading(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")
