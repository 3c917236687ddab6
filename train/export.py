"""A trained lip reader as a file that others run: ONNX, a torch program, or its weights alone.

What is traced is checked before it takes its name: to clips of several numbers and lengths, it must answer what the
network answers.

Letters of the shape suffixes: B clips, T frames, S side of a crop in pixels, C words (classes).
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from lipprep.io.errors import UserError
from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.untrusted import printable
from lipprep.train.augment import eval_batch
from lipprep.train.card import described, from_lrw, model_card
from lipprep.train.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from lipprep.train.config import config_from
from lipprep.train.device import load_weights, new_model
from lipprep.train.draws import AugmentOptions
from lipprep.train.errors import explained, is_memory
from lipprep.train.published import configuration_beside, save_mpc001

TOLERANCE = 1e-4  # of logits; of their range where that is over 1
ROUNDING = 4.0  # times what the network's own rounding makes: an export adds up in another order
# The clips' lengths and the frames T of each batch that an export is tried on.
TRIALS = (((29,), 29), ((29, 17, 5), 29), ((1,), 1), ((40,), 40), ((7, 4), 9))
EXAMPLE = (8, 5)  # of the batch that is traced
MAX_ONNX = (1 << 31) - (1 << 20)  # bytes of weights: what holds an ONNX file ends at 2 GiB
PROGRAM_FIELDS = "lipprep.json"  # the extra file of a torch program
# What torch tells its own developers, of which a user of this command can do nothing about.
_CHATTER = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"_check_is_size will be removed",
    r"The tensor attributes? .* assigned during export",  # the parts of a recurrent layer's weights, set to themselves
    r"# The axis name: \w+ will not be used",  # of two inputs that share one
)
_CHATTY = "torch.onnx._internal.exporter._registration"  # it logs that torchvision is not there


def export(run: Path, *, format: str, out: Path, card: Path | None = None, replace: bool = False) -> dict:
    """Write the lip reader of a run (its best.pt) or a checkpoint to the file `out`, and a model card beside it.

    `format` is one of FORMATS; the card is `out` with .md after it unless `card` names another file. Returns what was
    written from what, and under `lrw` whether LRW's licence binds it. Raises ValueError where there is no such run or
    format, a file or its folder is not to be had, a package is missing, or the network cannot be traced or answers
    otherwise as it does.
    """
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}: known are {', '.join(FORMATS)}")
    out, path = Path(out), find_checkpoint(run)
    card = _beside(out, ".md") if card is None else Path(card)
    checkpoint = load_checkpoint(path)
    to_write = [out]
    if format == "safetensors":
        to_write.append(_beside(out, ".json"))
    elif format == "mpc001":
        to_write.append(configuration_beside(checkpoint, out))
    if card.resolve() in [file.resolve() for file in to_write]:
        raise UserError(f"{printable(card)} is a file of the export and cannot be its card: name another with --card")
    for file in (*to_write, card):
        _check_place(file, replace=replace)
    with explained("end what else runs here"):
        files = FORMATS[format](checkpoint, out)
    write_text(card, model_card(checkpoint, path=path, format=format, file=out))
    return {
        "checkpoint": str(path),
        "step": checkpoint.step,
        "format": format,
        "words": len(checkpoint.labels),
        "lrw": from_lrw(checkpoint, path.parent),
        "files": [str(file) for file in (*files, card)],
    }


def to_onnx(checkpoint: Checkpoint, path: Path) -> list[Path]:
    """Write an ONNX file of one piece, its `described` fields as metadata, checked in onnxruntime."""
    onnxruntime, passes, *_ = _extra("onnx", "onnxruntime", "onnx_ir.passes.common", "onnxscript", "onnx")
    network, options = _network(checkpoint)
    size = sum(weight.nbytes for weight in network.state_dict().values())
    if size > MAX_ONNX:
        raise UserError(f"the network has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2: use --format torch")
    with replacing(path) as file:
        program = captured(network, options)
        with _quiet(), _lengths_stay_open(network), _told("ONNX"):
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                output_names=["logits"],
                dynamic_shapes=_dynamic(network),
            )
        passes.ClearMetadataAndDocStringPass()(made.model)  # which names the files of this machine
        fields = {name: value for name, value in described(checkpoint).items() if value is not None}
        made.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()})
        file.write(made.model_proto.SerializeToString())
        file.flush()
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()  # else it asks for cores that a container lacks
        session = onnxruntime.InferenceSession(file.name, session_options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def answer(*inputs: Tensor) -> np.ndarray:
            return session.run(["logits"], dict(zip(names, [tensor.numpy() for tensor in inputs], strict=True)))[0]

        _check_same(answer, network, options, path)
    return [path]


def to_program(checkpoint: Checkpoint, path: Path) -> list[Path]:
    """Write what torch.export.load reads, its `described` fields in an extra file, checked by reading it again."""
    network, options = _network(checkpoint)
    with replacing(path) as file:
        program = captured(network, options)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # which names the files of this machine
        content = io.BytesIO()
        with _quiet():
            torch.export.save(program, content, extra_files={PROGRAM_FIELDS: json.dumps(described(checkpoint))})
            file.write(content.getbuffer())
            file.flush()
            again = torch.export.load(content).module()
            _check_same(lambda *inputs: again(*inputs).numpy(), network, options, path)
    return [path]


def to_safetensors(checkpoint: Checkpoint, path: Path) -> list[Path]:
    """Write the weights as safetensors, and beside them, with .json after the name, the `described` fields.

    They load strictly: what some networks hold under two names is written under both.
    """
    (safetensors,) = _extra("safetensors", "safetensors.torch")
    _network(checkpoint)  # do config and weights agree?
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in checkpoint.weights.items()}
    fields = _beside(path, ".json")
    with replacing(path) as file:
        file.write(safetensors.save(weights, metadata={"format": "pt"}))
    write_text(fields, json.dumps(described(checkpoint), indent=1) + "\n")
    return [path, fields]


# name: what writes a checkpoint to a file, and perhaps others beside it, and returns their paths
FORMATS: dict[str, Callable[[Checkpoint, Path], list[Path]]] = {
    "onnx": to_onnx,
    "torch": to_program,
    "safetensors": to_safetensors,
    "mpc001": save_mpc001,
}


class Signature(nn.Module):
    """A network with the names that its inputs have for those who run it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, video: Tensor, lengths: Tensor, boundary: Tensor | None = None) -> Tensor:
        return self.network(video, lengths, boundary)


def captured(network: nn.Module, options: AugmentOptions) -> torch.export.ExportedProgram:
    """Trace a network in evaluation, for any number of clips and frames.

    Raises ValueError, saying where, if what it does depends on more than the shapes of its inputs.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a transformer's layer, which nothing can read
    try:
        with torch.no_grad(), _quiet(), _lengths_stay_open(network), _told("a traced graph", network):
            return torch.export.export(
                Signature(network), _clips(network, options, EXAMPLE, max(EXAMPLE)), dynamic_shapes=_dynamic(network)
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _network(checkpoint: Checkpoint) -> tuple[nn.Module, AugmentOptions]:
    """Return the network of a checkpoint in evaluation, and how its crops are normalised.

    Its weights lie in plain order, not as `place` would have them, so that they do in the file.
    """
    network = new_model(checkpoint.config["model"], num_classes=len(checkpoint.labels))
    load_weights(network, checkpoint.weights)
    return network.eval().requires_grad_(False), config_from(checkpoint.config).augment


def _dynamic(network: nn.Module) -> dict[str, dict[int, torch.export.Dim]]:
    batch, frames = torch.export.Dim("batch", min=1), torch.export.Dim("frames", min=1)
    shapes = {"video": {0: batch, 2: frames}, "lengths": {0: batch}}
    return shapes if network.boundary is None else {**shapes, "boundary": {0: batch, 1: frames}}


def _mouths(clips: int, frames: int, side: int, random: np.random.Generator) -> np.ndarray:
    """Draw mouths that open and close, (B, T, S, S) uint8: dark lips on shaded skin, with a camera's noise.

    What a network answers to noise says little of it: some answer so steeply there that rounding alone shows.
    """
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    video_BTSS = np.empty((clips, frames, side, side), np.uint8)
    for clip in video_BTSS:
        width, thick, speed, phase, light = random.uniform((0.5, 0.12, 0.2, 0, -20), (0.7, 0.2, 0.9, 6.3, 20))
        dx, dy = random.uniform(-0.1, 0.1, 2)
        skin = 140 + light + 25 * x - 15 * y
        for t, picture in enumerate(clip):
            opening = 0.16 * (1 + np.sin(speed * t + phase))
            lips = ((x - dx) / width) ** 2 + ((y - dy) / (opening + thick)) ** 2 < 1
            inside = ((x - dx) / (0.8 * width)) ** 2 + ((y - dy) / (opening + 0.02)) ** 2 < 1
            shown = np.where(inside, 35, np.where(lips, 95, skin)) + random.normal(0, 2, skin.shape)
            picture[:] = shown.clip(0, 255)
    return video_BTSS


def _clips(network: nn.Module, options: AugmentOptions, lengths: tuple[int, ...], frames: int) -> tuple[Tensor, ...]:
    """Draw a batch of mouths, padded to `frames`: all that the network takes, half of its boundaries unknown."""
    random = np.random.default_rng(sum(lengths))
    lengths_B = torch.tensor(lengths)
    mouths_BTSS = torch.from_numpy(_mouths(len(lengths), frames, options.crop_size, random))
    inputs = (eval_batch(mouths_BTSS, lengths_B, options), lengths_B)
    if network.boundary is None:
        return inputs
    boundary_BT1 = torch.from_numpy((random.random((len(lengths), frames, 1)) < 0.5).astype(np.float32))
    boundary_BT1[1::2] = 0
    return *inputs, boundary_BT1


def _check_same(answer: Callable[..., np.ndarray], network: nn.Module, options: AugmentOptions, path: Path) -> None:
    """Raise UserError, with figures, unless an export answers every trial as the network does.

    Beside TOLERANCE it may differ by a few times what the network's own rounding makes: how far its answers in float32
    are from those in float64.
    """
    exact = copy.deepcopy(network).double()
    for lengths, frames in TRIALS:
        inputs = _clips(network, options, lengths, frames)
        with torch.inference_mode():
            logits_BC, given_BC = network(*inputs).numpy(), answer(*inputs)
            exact_BC = exact(*(x.double() if x.is_floating_point() else x for x in inputs)).numpy()
        if not np.isfinite(logits_BC).all():
            raise UserError("the network answers what is no number: its training went wrong; export another checkpoint")
        span, rounding = float(np.ptp(logits_BC)), float(np.abs(logits_BC - exact_BC).max())
        allowed = TOLERANCE * max(1.0, span) + ROUNDING * rounding
        off = np.abs(given_BC - logits_BC).max() if given_BC.shape == logits_BC.shape else np.inf
        if not off <= allowed:
            raise UserError(
                f"{printable(path)} is not kept: for clips of {', '.join(map(str, lengths))} frames it differs from "
                f"the network by {off:.3g} in logits that span {span:.3g}, where {allowed:.1g} is allowed. This is a "
                "fault of the export, not of the training: use --format safetensors"
            )


def _check_place(file: Path, *, replace: bool) -> None:
    shown = printable(file)
    if file.is_dir():
        raise UserError(f"{shown} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {printable(file.parent)}: make it first")
    if file.exists() and not replace:
        raise UserError(f"{shown} is there already: name another file, or add --replace")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _extra(extra: str, *names: str) -> list[ModuleType]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(
            f'this format needs packages that are missing ({error}): pip install "lipprep[{extra}]"'
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from users what torch's exporters say of themselves, and of a graph that failed all of its lines."""
    logger, said = logging.getLogger(_CHATTY), io.StringIO()

    def not_torchvision(record: logging.LogRecord) -> bool:
        return "torchvision" not in record.getMessage()

    logger.addFilter(not_torchvision)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            for message in _CHATTER:
                warnings.filterwarnings("ignore", message=message)
            yield
        sys.stderr.write(said.getvalue())
    finally:
        logger.removeFilter(not_torchvision)


@contextlib.contextmanager
def _lengths_stay_open(network: nn.Module) -> Iterator[None]:
    """Trace recurrent layers as loops; else the number of frames of the example becomes that of every clip."""
    if not any(isinstance(module, nn.RNNBase) for module in network.modules()):
        yield
        return
    try:
        from torch.export import _patches

        loops = _patches.register_gru_while_loop_decomposition(), _patches.register_lstm_while_loop_decomposition()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"torch {torch.__version__} cannot trace recurrent layers for clips of any length: install torch 2.13, or "
            "use --format safetensors"
        ) from error
    with loops[0], loops[1]:
        yield


@contextlib.contextmanager
def _told(form: str, network: nn.Module | None = None) -> Iterator[None]:
    """Raise ValueError with cause and remedy where a network cannot be brought into a form."""
    try:
        yield
    except Exception as error:  # a tracer raises whatever it trips over
        if is_memory(error):
            raise UserError(f"out of memory: end what else runs here ({str(error).partition(chr(10))[0]})") from error
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = next((line for line in str(root).splitlines() if line.strip()), type(root).__name__)
        reason = printable(reason.partition(" For more information")[0].strip().rstrip(".!"))
        line = "" if network is None else _line(error, network)
        weights = "--format safetensors, which holds the weights alone, needs no graph"
        if "data-dependent" in str(error):
            raise UserError(
                f"its network takes a branch that depends on its input{line}, which {form} cannot hold: compute both "
                "sides and choose with torch.where, or make the choice where torch.compiler.is_exporting() is false; "
                f"{weights}"
            ) from error
        raise UserError(
            f"its network cannot be brought into {form} for any number of clips and frames{line}: {reason}; {weights}"
        ) from error


def _line(error: BaseException | None, network: nn.Module) -> str:
    """Where in the network's own code an error arose, as ` (FILE, line N: code)`; nothing where it is not known."""
    torchs = Path(torch.__file__).parent
    kinds = {type(module) for module in network.modules()}
    files = {file for kind in kinds if not Path(file := inspect.getfile(kind)).is_relative_to(torchs)}
    while error is not None:
        steps = [step for step in traceback.extract_tb(error.__traceback__) if step.filename in files]
        if steps:
            return f" ({Path(steps[-1].filename).name}, line {steps[-1].lineno}: {steps[-1].line})"
        error = error.__cause__ or error.__context__
    return ""
