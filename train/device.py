"""Where a model runs, and in which precision."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping

import loky
import torch
from torch import nn

from lipprep.io.errors import UserError
from lipprep.train.checkpoint import Checkpoint
from lipprep.train.models import build


def choose_device(name: str, *, local: int = 0, beside: int = 1) -> torch.device:
    """The device of a name; auto is CUDA, else MPS, else the CPU, with all its cores.

    Of `beside` processes on one machine, number `local` gets GPU `local`, or its part of the cores.
    Raises ValueError where there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if not there.get(device.type):
        raise UserError(f"device {name} is not available here: use --device auto or cpu")
    if device.type == "cuda":
        device = _gpu(device, local=local, beside=beside)
    if device.type == "cpu":
        keep_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # By itself, torch leaves half of a virtual machine's idle.
            torch.set_num_threads(max(1, loky.cpu_count() // beside))
    return device


def _gpu(device: torch.device, *, local: int, beside: int) -> torch.device:
    """A GPU with its number, made this process's own. Raises ValueError where there is none or it is not to be had."""
    if beside > 1 and device.index is not None:
        raise UserError(f"several processes take a GPU each: leave the number out of --device {device}")
    number, count = local if device.index is None else device.index, torch.cuda.device_count()
    if number >= count:
        numbered = f"device cuda:{number} is not available here: {count} can be seen (CUDA_VISIBLE_DEVICES says which)"
        remedy = f"torchrun --nproc-per-node {count}" if beside > 1 else "--device auto"
        raise UserError(f"{numbered}: use {remedy}")
    device = torch.device("cuda", number)
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device {device} cannot be used ({reason}): look at nvidia-smi for another process that holds it, or "
            "use another one, or --device cpu"
        ) from error
    return device


def keep_memory() -> None:
    """Have this process keep the memory that it frees, where its C library is glibc and nobody has tuned that.

    By itself, glibc gives large blocks back at once, and what a step frees is what the next one needs: a third of a
    step on a CPU would go into the kernel's clearing of pages.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def training_precision(device: torch.device, precision: str, model: nn.Module) -> str:
    """What `auto` means for training steps: bf16 on CUDA and on CPUs that have it, else fp32.

    On CPUs, networks with depthwise convolutions, which take several times as long in bf16, get fp32 (benchmarks/
    RESULTS.md). A rule, and no measurement at the start of a run, so that two runs do the same.
    """
    if precision != "auto":
        return precision
    if device.type == "cpu":
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
        return "bf16" if _cpu_has_bf16(device) and not depthwise else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context to run a model in: bf16 or fp16 where `precision` is just that, else fp32."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, kinds[precision]) if precision in kinds else contextlib.nullcontext()


def reading(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """As `autocast`, to read with: fp32 is whole, where CUDA's convolutions would round to 10 bits (TF32)."""
    if device.type == "cuda" and precision not in ("bf16", "fp16"):
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
    return autocast(device, precision)


def _cpu_has_bf16(device: torch.device) -> bool:
    """Whether bf16 convolutions are instructions here: twice as fast then, and slower where they are emulated."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.12 or newer
    return device.type == "cpu" and any(capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def place(model: nn.Module, device: torch.device, *, precision: str) -> nn.Module:
    """Move a model to its device, its 2D convolutions in the order of memory that they run faster in.

    That is channels last, but for the last layer of a ResNet in fp32 on a CPU: of 512 channels on images of 3x3 pixels
    oneDNN takes twice as long for them, forward and back (benchmarks/RESULTS.md).
    """
    plain: set[nn.Module] = set()
    if device.type == "cpu" and precision == "fp32" and hasattr(model.trunk, "layer4"):
        plain = set(model.trunk.layer4.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module not in plain:
            module.to(memory_format=torch.channels_last)
    return model.to(device)


def new_model(config: Mapping, *, num_classes: int) -> nn.Module:
    """Build the model of a config; ValueError where the config is of a form that no model has."""
    try:
        return build(config, num_classes=num_classes)
    except (TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"the settings model.* are of a wrong form: {error}") from error


def load_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The model of a checkpoint, in evaluation mode. Raises ValueError where config and weights disagree."""
    model = new_model(checkpoint.config.get("model", {}), num_classes=len(checkpoint.labels))
    load_weights(model, checkpoint.weights)
    precision = checkpoint.config.get("precision", "auto")
    return place(model, device, precision="fp32" if precision == "auto" else precision).eval()


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's weights into a model of the same form; ValueError where the forms differ."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint's weights do not fit the model of its config: {reason}") from error
