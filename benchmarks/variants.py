"""What landmarks.py compares: other ways to track, and other forms of the mesh network (batches, one channel, int8)."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import flatbuffers
import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as tflite

from lipprep.stages.align import repair
from lipprep.stages.landmarks import Face, track
from lipprep.stages.landmarks.detector import Region
from lipprep.stages.landmarks.mesh import IBUG_68, MESH_SIZE, Mesh, network_file

NETWORK = network_file("face_landmarks_detector")
tracking = importlib.import_module("lipprep.stages.landmarks.track")  # the package's `track` is the function
Frames = Sequence[np.ndarray]
Way = Callable[[Frames], np.ndarray]  # gray frames -> points (T, 68, 2)


# Other ways to track


class OnePass(Mesh):
    """The network runs once on the first frame, too."""

    def fit(self, frame: np.ndarray, face: Face) -> tuple[np.ndarray | None, Face | None]:
        return super().fit(frame, replace(face, tracked=True))


@contextlib.contextmanager
def interpreters(**changed: object) -> Iterator[None]:
    """Interpreters started here get other arguments than Mesh gives them."""
    plain = litert.Interpreter
    with mock.patch.object(litert, "Interpreter", lambda **given: plain(**given | changed)):
        yield


def ways() -> dict[str, Way]:
    """The present way first."""
    mesh, one_pass, threads = Mesh(), OnePass(), Mesh()
    with interpreters(num_threads=2):
        threads.faces(np.zeros((256, 256), np.uint8))
        threads.fit(np.zeros((256, 256), np.uint8), Face((0, 0, 9, 9), 1, Region(128, 128, 200, 0), True))

    def counting(every: int, frames: Frames) -> np.ndarray:
        with mock.patch.object(tracking, "COUNT_EVERY", every):
            return track(frames, mesh).points

    def every(step: int, frames: Frames) -> np.ndarray:
        known = sorted({*range(0, len(frames), step), len(frames) - 1})
        points = np.full((len(frames), 68, 2), np.nan, np.float32)
        points[known] = counting(tracking.COUNT_EVERY // step, [frames[t] for t in known])
        filled = repair(points)
        filled[known] = points[known]  # a face that was missed stays missed
        return filled

    def nearest(frames: Frames) -> np.ndarray:
        with mock.patch.object(cv2, "INTER_LINEAR", cv2.INTER_NEAREST):
            return track(frames, mesh).points

    def other_pixel(frames: Frames) -> np.ndarray:
        first = frames[0].copy()
        first[128, 128] ^= 1
        return track([first, *frames[1:]], mesh).points

    return {
        "present": lambda frames: track(frames, mesh).points,
        "one pixel of the first frame off by one": other_pixel,
        "no detector after the first frame": partial(counting, sys.maxsize),
        "one pass on the first frame": lambda frames: track(frames, one_pass).points,
        "nearest pixel in the patch": nearest,
        "2 threads in the interpreter": lambda frames: track(frames, threads).points,
        "every 2nd frame, interpolated": partial(every, 2),
        "every 3rd frame, interpolated": partial(every, 3),
    }


# Other forms of the network


def patches_seen(clips: list[Sequence[np.ndarray]], count: int) -> np.ndarray:
    """`count` pictures (N, 256, 256, 1), evenly spread, that the network sees while it tracks, float32 in 0..1."""
    seen, mesh = [], Mesh()
    network = mesh._mesh

    def spy(gray: np.ndarray) -> list[np.ndarray]:
        seen.append(gray.astype(np.float32) / 255)
        return network(gray)

    with mock.patch.object(mesh, "_mesh", spy):
        for clip in clips:
            track(clip, mesh)
    return np.stack([seen[n] for n in np.linspace(0, len(seen) - 1, count).astype(int)])[..., None]


class Alone:
    """An interpreter fed with gray pictures (N, 256, 256, 1), a batch at a time; gives their points (N, 68, 2)."""

    def __init__(self, *, batch: int = 1, channels: int = 3, **source: object) -> None:
        self.interpreter = litert.Interpreter(num_threads=1, **source)
        details = self.interpreter.get_input_details()[0]
        self.batch, self.channels = batch, channels
        if batch > 1:
            self.interpreter.resize_tensor_input(details["index"], [batch, MESH_SIZE, MESH_SIZE, channels])
        self.interpreter.allocate_tensors()
        self._in = self.interpreter.get_input_details()[0]
        self._out = self.interpreter.get_output_details()[0]

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        points = []
        for start in range(0, len(pictures), self.batch):
            values = np.repeat(pictures[start : start + self.batch], self.channels, axis=3)
            if self._in["dtype"] != np.float32:
                scale, zero = self._in["quantization"]
                values = np.clip(np.rint(values / scale) + zero, -128, 127).astype(self._in["dtype"])
            self.interpreter.set_tensor(self._in["index"], values)
            self.interpreter.invoke()
            xyz = self.interpreter.get_tensor(self._out["index"]).reshape(-1, 478, 3).astype(np.float32)
            if self._out["dtype"] != np.float32:
                scale, zero = self._out["quantization"]
                xyz = (xyz - zero) * scale
            points.append(xyz[:, IBUG_68, :2])
        return np.concatenate(points)


def float_model(*, channels: int = 3) -> bytes:
    """The shipped network with float32 weights, as quantisers want it; of one channel by adding up its three."""
    model = tflite.ModelT.InitFromPackedBuf(NETWORK.read_bytes(), 0)
    graph = model.subgraphs[0]
    operators = []
    for operator in graph.operators:
        if model.operatorCodes[operator.opcodeIndex].builtinCode != tflite.BuiltinOperator.DEQUANTIZE:
            operators.append(operator)
            continue
        half, full = (graph.tensors[i] for i in (operator.inputs[0], operator.outputs[0]))
        values = np.frombuffer(bytes(model.buffers[half.buffer].data), np.float16).astype(np.float32)
        if channels == 1 and list(half.shape[1:]) == [3, 3, 3]:
            values, full.shape = values.reshape(-1, 3).sum(axis=1), [*half.shape[:3], 1]
        buffer = tflite.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        full.buffer = len(model.buffers)
        model.buffers.append(buffer)
        model.buffers[half.buffer].data = None
    graph.operators = operators
    graph.tensors[graph.inputs[0]].shape = [1, MESH_SIZE, MESH_SIZE, channels]
    # Tensors that nothing uses stop the calibration, and so does a network without a signature.
    used = sorted({int(i) for o in operators for i in (*o.inputs, *o.outputs)} | {*graph.inputs, *graph.outputs})
    place = {old: new for new, old in enumerate(used)}
    for part in (graph, *operators):
        part.inputs, part.outputs = ([place[int(i)] for i in side] for side in (part.inputs, part.outputs))
    graph.tensors = [graph.tensors[i] for i in used]
    signature = tflite.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs, signature.outputs = (
        [named(f"{name}{n}", i) for n, i in enumerate(side)]
        for name, side in (("x", graph.inputs), ("y", graph.outputs))
    )
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(1 << 23)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def named(name: str, index: int) -> tflite.TensorMapT:
    tensor = tflite.TensorMapT()
    tensor.name, tensor.tensorIndex = name, index
    return tensor


def quantised(pictures: np.ndarray) -> dict[str, bytes]:
    """The network in int8 by ai-edge-quantizer: weights alone, and activations too, calibrated on `pictures`."""
    if importlib.util.find_spec("ai_edge_quantizer") is None:
        return {}
    from ai_edge_quantizer import quantizer, recipe

    with contextlib.ExitStack() as stack:
        quiet = stack.enter_context(Path(os.devnull).open("w"))  # it prints its progress
        stack.enter_context(contextlib.redirect_stdout(quiet))
        stack.enter_context(contextlib.redirect_stderr(quiet))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "float.tflite"
        path.write_bytes(float_model())
        dynamic = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32()).quantize()
        static = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        seen = [{"x0": np.repeat(picture[None], 3, axis=3)} for picture in pictures]
        both = static.quantize(static.calibrate({"serving_default": seen}))
        return {
            "int8 weights (dynamic range)": bytes(dynamic.quantized_model),
            "int8 throughout": bytes(both.quantized_model),
        }


def smaller_input() -> str:
    """What LiteRT says to half the side."""
    interpreter = litert.Interpreter(model_path=str(NETWORK), num_threads=1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], [1, 128, 128, 3])
    try:
        interpreter.allocate_tensors()
        interpreter.invoke()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "it runs"
