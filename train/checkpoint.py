"""Checkpoints: tensors and plain containers, so that a file from anywhere can be opened without running code.

Every random draw of a run is a function of (seed, step), so a checkpoint needs no generator's state to go on
to the bit.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.shard.index import Index, check_parameters
from lipprep.train.metrics import warn

CHECKPOINT_VERSION = 1
LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A model and where its training stood.

    `step` steps are done in all, `batch` batches of `epoch` (from 0). `best` is the best validation accuracy
    so far, None before the first. `parameters` are those that the training crops were made with, and
    `dataset` is the fingerprint of the shards.
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

    @property
    def profile(self) -> str:
        """The alignment profile of the training crops."""
        return self.parameters["profile"]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically, and what a person may want to know of it to a .json beside it."""
    state = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    with replacing(path) as file:
        torch.save({"lipprep_checkpoint": CHECKPOINT_VERSION, **state}, file)
    del state["model"], state["optimizer"]
    write_text(Path(path).with_suffix(".json"), json.dumps(state, indent=1) + "\n")


def find_checkpoint(run: Path, name: str = BEST) -> Path:
    """The checkpoint file that RUN means: itself, or NAME in a run folder, or the one that is there.

    Raises ValueError where there is none.
    """
    run = Path(run)
    if run.is_file():
        return run
    for candidate in (run / name, run / LAST):
        if candidate.is_file():
            return candidate
    what = f"holds neither {BEST} nor {LAST}" if run.is_dir() else "does not exist"
    raise ValueError(f"{run} {what}: name a run folder of `lipprep train`, or a checkpoint file")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to CPU tensors; nothing in it is executed.

    Raises ValueError where the file is damaged, holds anything but tensors and plain containers, or is no
    checkpoint of lipprep.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile zip of pickles raises whatever its reader trips over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain containers, which is never executed ({reason})"
        ) from error
    if isinstance(state, dict) and "model_state_dict" in state:
        raise ValueError(
            f"{path} is no checkpoint of lipprep but one of the published form (model_state_dict): importing "
            "published checkpoints is not part of this version"
        )
    if not isinstance(state, dict) or "lipprep_checkpoint" not in state:
        raise ValueError(f"{path} is no checkpoint of lipprep")
    if (version := state.pop("lipprep_checkpoint")) != CHECKPOINT_VERSION:
        raise ValueError(f"{path} is of checkpoint version {version!r}, this lipprep reads {CHECKPOINT_VERSION}")
    fields = {"model": dict, "optimizer": dict, "config": dict, "parameters": dict, "labels": list, "dataset": str}
    fields |= {"step": int, "epoch": int, "batch": int, "fps": float, "best": float | None}
    wrong = [name for name, kind in fields.items() if name not in state or not isinstance(state[name], kind)]
    wrong += sorted(set(state) - set(fields))
    if not wrong and not all(isinstance(label, str) for label in state["labels"]):
        wrong.append("labels")
    if wrong:
        raise ValueError(f"{path} is a damaged checkpoint (fields: {', '.join(wrong)})")
    try:
        check_parameters(state["parameters"], state["fps"])
    except ValueError as error:
        raise ValueError(f"{path} is a damaged checkpoint (parameters: {error})") from error
    return Checkpoint(**state)


def check_fits(checkpoint: Checkpoint, index: Index) -> None:
    """Raise ValueError, saying what differs, where a model cannot be used on these shards.

    Warns where it can, but the crops were made by other means: another detector, or another `exact`.
    """
    if list(index.labels) != checkpoint.labels:
        ours, theirs = set(checkpoint.labels), set(index.labels)
        if ours == theirs:
            what = "the same words in another order"
        else:
            examples = [f"{w!r} is only in the checkpoint's" for w in sorted(ours - theirs)[:2]]
            examples += [f"{w!r} only in the shards'" for w in sorted(theirs - ours)[:2]]
            what = ", ".join(examples)
        raise ValueError(
            f"the checkpoint knows {len(checkpoint.labels)} words and the shards have {len(index.labels)}: {what}. "
            "Make the shards with the label list that the model was trained on (`lipprep manifest ... --labels FILE`)"
        )
    if index.profile != checkpoint.profile:
        raise ValueError(
            f"the checkpoint was trained on crops of profile {checkpoint.profile}, the shards are of {index.profile}: "
            f"make shards with `lipprep shards --profile {checkpoint.profile}`"
        )
    if index.fps != checkpoint.fps:
        raise ValueError(f"the checkpoint was trained on clips of {checkpoint.fps} fps, the shards have {index.fps}")
    ours, theirs = checkpoint.parameters, index.parameters
    for name, flag in (("mean_face", "--mean-face"), ("box", "--box")):
        if _plain(ours.get(name)) != _plain(theirs.get(name)):
            raise ValueError(
                f"the checkpoint was trained on crops of another {name} than the shards have: make shards with "
                f"the same {flag} as those it was trained on"
            )
    for name, default in (("exact", False), ("detector", None), ("identity", None)):
        if ours.get(name, default) != theirs.get(name, default):
            warn(
                f"the checkpoint was trained on crops with {name} {ours.get(name, default)}, those of the shards "
                f"have {theirs.get(name, default)}: accuracy may be lower for it"
            )


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
