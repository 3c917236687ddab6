"""Checkpoints: tensors and plain containers, so that a file from anywhere can be opened without running code.

Every random draw of a run is a function of (seed, step), and so is the learning rate: a checkpoint needs no state of
generators or schedule to go on to the bit.
"""

import dataclasses
import hashlib
import json
import pickletools
import platform
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lipprep.io.errors import UserError
from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.shard.index import Index, check_labels, check_parameters
from lipprep.stages.untrusted import check_file, is_file, printable
from lipprep.train.calibrate import LEAST, MOST, Calibration
from lipprep.train.metrics import warn
from lipprep.train.models import build

# 1 had neither ema, scaler nor versions, 2 neither temperature nor threshold, 3 no num_frames
CHECKPOINT_VERSION = 4
LRW_FRAMES = 29  # of a clip: 1.16 seconds
MAX_FRAMES = 1000  # of a window, all of which are held when a video is read
LAST, BEST = "last.pt", "best.pt"
# All that pickles of state dicts name. torch would also read bytearray, Tensor and others, which take memory as asked.
_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch's files began with before they were zips
_MAX_SETTING = 10_000  # of a network: layers, channels, sizes of kernels
_MAX_PICKLE = 1 << 26  # bytes of what is no tensor
_MAX_STEPS = 1 << 53  # beyond it, floats skip whole numbers
_MAX_ITEMS, _MAX_DEPTH = 10**6, 32  # of the containers: lists that hold one list twice, and so on, have no end


@dataclass(frozen=True)
class Checkpoint:
    """A model and where its training stood.

    `step` steps are done in all, `batch` batches of `epoch` (from 0). `best` is the best validation accuracy
    so far, None before the first. `parameters` are those that the training crops were made with, and
    `dataset` is the fingerprint of the shards. `ema` is the moving average of the weights, None without one, and
    `scaler` the state of fp16's gradient scaler. `versions` are of what it was trained with. Logits are divided by
    `temperature` before the softmax, and below the confidence `threshold` after it a reader abstains
    (`lipprep.train.calibrate`); both are None where the weights are not calibrated. `num_frames` is the usual length of
    a training clip, None where it is not known.
    """

    model: dict[str, Any] = field(repr=False)
    optimizer: dict[str, Any] = field(repr=False)
    step: int
    epoch: int
    batch: int
    best: float | None
    config: dict[str, Any]
    labels: list[str]
    parameters: dict[str, Any]
    fps: float
    dataset: str
    ema: dict[str, Any] | None = field(default=None, repr=False)
    scaler: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    temperature: float | None = None
    threshold: float | None = None
    num_frames: int | None = None

    @property
    def window(self) -> int:
        """The frames that are read of a video at a time: a training clip's or, where that is not known, LRW's."""
        return LRW_FRAMES if self.num_frames is None else self.num_frames

    @property
    def calibration(self) -> Calibration | None:
        """Temperature and threshold in one, None where there are none."""
        return None if self.temperature is None else Calibration(self.temperature, self.threshold)

    @property
    def weights(self) -> dict[str, Any]:
        """The weights to read with: the moving average where there is one."""
        return self.model if self.ema is None else self.ema

    @property
    def profile(self) -> str:
        """The alignment profile of the training crops."""
        return self.parameters["profile"]


def versions() -> dict[str, str]:
    """What a run is trained with, as far as its figures may depend on it; torch's names its build, such as +cpu."""
    return {
        "lipprep": metadata.version("lipprep"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically, and what a person may want to know of it to a .json beside it."""
    state = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    with replacing(path) as file:
        torch.save({"lipprep_checkpoint": CHECKPOINT_VERSION, **state}, file)
    del state["model"], state["optimizer"], state["ema"], state["scaler"]
    write_text(Path(path).with_suffix(".json"), json.dumps(state, indent=1) + "\n")


def find_checkpoint(run: Path, name: str = BEST) -> Path:
    """The checkpoint file that RUN means: itself, or NAME in a run folder, or the one that is there.

    Raises ValueError where there is none.
    """
    run = Path(run)
    if is_file(run):
        return run
    for candidate in (run / name, run / LAST, run / BEST):
        if is_file(candidate):
            return candidate
    shown = printable(run)
    if run.is_dir():
        what = f"holds neither {BEST} nor {LAST}"
    else:
        what = "is a pipe or a device" if run.exists() else "does not exist"
    raise UserError(f"{shown} {what}: name a run folder of `lipprep train`, or a checkpoint file")


def sha256_of(path: Path) -> str:
    """The digest by which a checkpoint's file is known to what is made from it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_archive(path: Path) -> None:
    """Raise ValueError unless a file is as torch.save writes it, no larger unpacked, and names tensors alone.

    torch's own check, weights_only, keeps code from running. It does not keep a small file from filling the memory.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(4)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            whole = all(m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members)
            if not whole or sum(m.file_size for m in members) > path.stat().st_size:
                raise UserError("it would be larger unpacked than it is, as no checkpoint that torch saves")
            # What is checked must be what torch reads. Its reader takes names without their case, up to a NUL, and
            # offsets as they stand; Python's cuts names and forgives bytes before the first member.
            pickles = [m for m in members if m.filename.lower().endswith(".pkl")]
            if len(pickles) != 1 or not pickles[0].filename.endswith("/data.pkl"):
                raise UserError("it does not hold one pickle, data.pkl, as what torch saves")
            if any(m.orig_filename != m.filename for m in members):
                raise UserError("it has members of two names")
            if min(m.header_offset for m in members) != 0 or begins != b"PK\3\4":
                raise UserError("it does not begin with its first member")
            if pickles[0].file_size > _MAX_PICKLE:
                raise UserError(f"its pickle has {pickles[0].file_size} bytes, at most {_MAX_PICKLE} are read")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(f"no zip that torch saved: {error}") from error
    _check_names(content)


def _check_containers(state: object) -> None:
    """Raise ValueError for containers within containers without end."""
    waiting, count = [(state, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, dict | list | tuple):
            continue
        count += len(value)
        if count > _MAX_ITEMS or depth > _MAX_DEPTH:
            raise UserError("its containers hold each other without end")
        inside = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        waiting += [(item, depth + 1) for item in inside]


def _check_model(config: object, weights: dict, *, num_classes: int) -> None:
    """Raise ValueError where a config describes a larger network than there are weights: it would be built first."""
    waiting, there = [config], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not abs(value) <= _MAX_SETTING:
            raise UserError(f"the settings model.* hold the number {value!r:.40}")
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise UserError(f"a weight is called {name!r:.40}, which is no name")
        if not isinstance(tensor, torch.Tensor) or tensor.numel() > tensor.untyped_storage().nbytes():
            raise UserError("its weights are no tensors, or hold more numbers than bytes")
        there += tensor.numel()
    try:
        with torch.device("meta"):  # shapes alone
            wanted = sum(t.numel() for t in build(config, num_classes=num_classes).state_dict().values())
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"the settings model.* are of a wrong form: {error}") from error
    if wanted > there:
        raise UserError(f"its config describes a network of {wanted} weights, but it holds {there}")


def _check_names(content: bytes | BinaryIO) -> None:
    """Raise ValueError where a pickle names anything but what tensors are made of."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise UserError(f"its pickle names things by {opcode.name}")
        if opcode.name == "GLOBAL" and argument not in _NAMES:
            module, _, name = argument.partition(" ")
            if module != "torch" or not name.endswith("Storage"):
                raise UserError(f"its pickle wants {argument[:200]}")


def _check_old(path: Path) -> None:
    """As `_check_archive`, of a file as torch saved it before version 1.6: five pickles, then the numbers."""
    with path.open("rb") as file:
        for _ in range(5):
            _check_names(file)
            if file.tell() > _MAX_PICKLE:
                raise UserError(f"its pickles have over {_MAX_PICKLE} bytes")


def read_state(path: Path, *, what: str = "checkpoint") -> object:
    """What torch saved in a file, on the CPU: tensors and plain containers; nothing in it is executed.

    Raises ValueError where the file is damaged, holds anything else, or takes more memory than it has bytes.
    """
    path = check_file(Path(path), what)
    try:
        with path.open("rb") as file:
            old = file.read(len(_OLD)) == _OLD
        (_check_old if old else _check_archive)(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_containers(state)
    except Exception as error:  # a damaged or hostile zip of pickles raises whatever its reader trips over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{printable(path)} is damaged, or holds more than tensors and plain containers, which is never executed "
            f"({printable(reason)})"
        ) from error
    return state


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to CPU tensors; nothing in it is executed.

    Raises ValueError where the file is damaged, holds anything but tensors and plain containers, takes more memory
    than it has bytes, or is no checkpoint of lipprep.
    """
    name, state = printable(path), read_state(path)
    if not isinstance(state, dict) or "lipprep_checkpoint" not in state:
        raise UserError(
            f"{name} is no checkpoint of lipprep: one of mpc001, VIPL or euan becomes one by "
            f"`lipprep import-checkpoint {name} -o RUN`"
        )
    version = state.pop("lipprep_checkpoint")
    if type(version) is not int or not 1 <= version <= CHECKPOINT_VERSION:
        raise UserError(f"{name} is of checkpoint version {version!r}, this lipprep reads 1 to {CHECKPOINT_VERSION}")
    if version == 1:
        state = {**state, "ema": None, "scaler": {}, "versions": {}}
    if version < 3:
        state = {**state, "temperature": None, "threshold": None}
    if version < 4:
        state = {**state, "num_frames": None}
    fields = {"model": dict, "optimizer": dict, "config": dict, "parameters": dict, "labels": list, "dataset": str}
    fields |= {"step": int, "epoch": int, "batch": int, "fps": float, "best": float | None}
    fields |= {"ema": dict | None, "scaler": dict, "versions": dict}
    fields |= {"temperature": float | None, "threshold": float | None, "num_frames": int | None}
    wrong = [field for field, kind in fields.items() if field not in state or not isinstance(state[field], kind)]
    wrong += sorted(set(state) - set(fields))
    wrong = wrong or [field for field in ("step", "epoch", "batch") if not 0 <= state[field] < _MAX_STEPS]
    limits = {"temperature": (LEAST, MOST), "threshold": (0, 1), "num_frames": (1, MAX_FRAMES)}
    wrong = wrong or [n for n, (a, b) in limits.items() if state[n] is not None and not a <= state[n] <= b]
    limits = ("temperature", "threshold")
    wrong = wrong or [n for n in limits if state[n] is None and any(state[other] is not None for other in limits)]
    if wrong:
        raise UserError(f"{name} is a damaged checkpoint (fields: {', '.join(wrong)})")
    try:
        check_labels(state["labels"])
        check_parameters(state["parameters"], state["fps"])
    except UserError as error:
        raise UserError(f"{name} is a damaged checkpoint (parameters: {printable(error)})") from error
    try:
        for weights in (state["model"], state["ema"]):
            if weights is not None:
                _check_model(state["config"].get("model", {}), weights, num_classes=len(state["labels"]))
    except UserError as error:
        raise UserError(f"{name} is a damaged checkpoint ({printable(error)})") from error
    return Checkpoint(**state)


def check_fits(checkpoint: Checkpoint, index: Index) -> None:
    """Raise ValueError, saying what differs, where a model cannot be used on these shards.

    Warns where it can, but the crops were made by other means: another detector, or another `exact`; or where one of
    the two does not know the box that its crops were cut with. Of crops from files it is not known by what means.
    """
    if list(index.labels) != checkpoint.labels:
        ours, theirs = set(checkpoint.labels), set(index.labels)
        if ours == theirs:
            what = "the same words in another order"
        else:
            examples = [f"{w!r} is only in the checkpoint's" for w in sorted(ours - theirs)[:2]]
            examples += [f"{w!r} only in the shards'" for w in sorted(theirs - ours)[:2]]
            what = ", ".join(examples)
        raise UserError(
            f"the checkpoint knows {len(checkpoint.labels)} words and the shards have {len(index.labels)}: {what}. "
            "Make the shards with the label list that the model was trained on (`lipprep manifest ... --labels FILE`)"
        )
    if index.profile != checkpoint.profile:
        raise UserError(
            f"the checkpoint was trained on crops of profile {checkpoint.profile}, the shards are of {index.profile}: "
            f"make shards with `lipprep shards --profile {checkpoint.profile}`"
        )
    if index.fps != checkpoint.fps:
        raise UserError(f"the checkpoint was trained on clips of {checkpoint.fps} fps, the shards have {index.fps}")
    ours, theirs = checkpoint.parameters, index.parameters
    for name, flag in (("mean_face", "--mean-face"), ("box", "--box")):
        values = [_plain(parameters.get(name)) for parameters in (ours, theirs)]
        if values[0] == values[1]:
            continue
        if name == "mean_face" or None not in values:
            raise UserError(
                f"the checkpoint was trained on crops of another {name} than the shards have: make shards with "
                f"the same {flag} as those it was trained on"
            )
        # Crops in files may have been cut anywhere, and a mean face of None is the published one.
        mute, known = ("checkpoint does", "shards'") if values[0] is None else ("shards do", "checkpoint's")
        warn(
            f"the {mute} not say which box their crops were cut with, and the {known} were cut with "
            f"{values[0] or values[1]}: accuracy may be lower if it was another "
            "(`lipprep shards --from-crops DIR --box X,Y,W,H --replace` says it)"
        )
    if "files" in (ours.get("crops_from"), theirs.get("crops_from")):
        return
    for name, default in (("exact", False), ("detector", None), ("identity", None)):
        if ours.get(name, default) != theirs.get(name, default):
            warn(
                f"the checkpoint was trained on crops with {name} {ours.get(name, default)}, those of the shards "
                f"have {theirs.get(name, default)}: accuracy may be lower for it"
            )


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
