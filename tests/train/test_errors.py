"""Errors of torch, told as what to do about them."""

import pytest
import torch

from lipprep.train import evaluate as evaluating
from lipprep.train.config import load_recipe
from lipprep.train.errors import explained, less_memory, of_reader
from lipprep.train.evaluate import evaluate

GPU_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("error", GPU_MEMORY)
def test_too_little_memory_has_a_remedy(error, tiny):
    config = load_recipe("compact", [*tiny, "batch_size=12", "accumulate=2"])
    with (
        pytest.raises(ValueError, match=r"lower batch_size \(it is 12\), .* accumulate=4"),
        explained(less_memory(config)),
    ):
        raise error
    assert "lower batch_size or workers" in of_reader(RuntimeError(str(error)))


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="illegal memory access"), explained(""):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_an_evaluation_says_what_to_lower(shards, trained_run, tmp_path, monkeypatch):
    def scarce(*_, **__):
        raise GPU_MEMORY[0]

    monkeypatch.setattr(evaluating, "classify", scarce)
    with pytest.raises(ValueError, match=r"out of memory: lower --batch-size \(it is 5\), or use --device cpu"):
        evaluate(trained_run, shards=shards, out=tmp_path, device="cpu", batch_size=5)


def test_a_reader_that_ended_may_be_for_want_of_a_guard_in_ones_own_script(monkeypatch):
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    monkeypatch.setattr("__main__.__file__", "/home/me/mine.py", raising=False)
    assert of_reader(error).endswith("; mine.py must train below `if __name__ == '__main__':`")
    monkeypatch.setattr("__main__.__file__", "/usr/bin/lipprep")
    assert of_reader(error).endswith("(docker: --shm-size)")
