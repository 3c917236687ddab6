"""Face Mesh v2 as a torch module, its weights read from the package's tflite file.

The network is a strided convolution and 34 residual blocks, 256x256 down to 2x2; three convolutions over what is left
give the 478 points, the logit of a face and a third output that is not used here. tflite pads the strided
convolution after the picture only, keeps weights as (out, y, x, in) float16, and depthwise ones as (1, y, x, out).
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class FaceMesh(nn.Module):
    """Gray patches (N, 256, 256) in 0..1 -> points (N, 478, 2) in pixels of the patch, and logits (N,) of a face.

    All is float32, on every device, and agrees with LiteRT to 0.0004 pixels; float16 would put some points off by 0.06.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        first, activation, *blocks, _, logit, points = _layers(path)
        # Its three channels are equal here: one channel with the sum of their weights is the same.
        first.weight = nn.Parameter(first.weight.sum(dim=1, keepdim=True))
        self.trunk = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),
            first,
            activation,
            *(_Block(*blocks[i : i + 5]) for i in range(0, len(blocks), 5)),
        ).to(memory_format=torch.channels_last)
        self.logit, self.points = logit, points
        self.eval().requires_grad_(False)

    def forward(self, gray: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(gray[:, None].contiguous(memory_format=torch.channels_last))
        xyz = self.points(features).view(-1, 478, 3)
        return xyz[..., :2], self.logit(features).view(-1)


class _Block(nn.Module):
    """A residual block; where its first convolution has stride 2, the shortcut is pooled, and given empty channels."""

    def __init__(
        self, narrow: nn.Conv2d, first: nn.PReLU, depthwise: nn.Conv2d, widen: nn.Conv2d, second: nn.PReLU
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(narrow, first, depthwise, widen)
        self.stride = narrow.stride[0]
        self.more = widen.out_channels - narrow.in_channels
        self.activation = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.stride == 1 else F.max_pool2d(x, 2)
        if self.more:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.more))
        return self.activation(shortcut + self.branch(x))


def _layers(path: Path) -> list[nn.Module]:
    """Read the convolutions and activations of a tflite file in their order, with their weights."""
    from ai_edge_litert import schema_py_generated as tflite

    model = tflite.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph = model.subgraphs[0]
    values: dict[int, torch.Tensor] = {}  # of the tensors that the file holds as float16
    layers: list[nn.Module] = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        inputs, options = operator.inputs, operator.builtinOptions
        if code == tflite.BuiltinOperator.DEQUANTIZE:
            tensor = graph.tensors[inputs[0]]
            numbers = np.frombuffer(model.buffers[tensor.buffer].data, np.float16).reshape(tensor.shape)
            values[operator.outputs[0]] = torch.from_numpy(numbers.astype(np.float32))
        elif code == tflite.BuiltinOperator.PRELU:
            slopes = values[inputs[1]].flatten()
            layer = nn.PReLU(len(slopes))
            layer.weight = nn.Parameter(slopes)
            layers.append(layer)
        elif code in (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D):
            depthwise = code == tflite.BuiltinOperator.DEPTHWISE_CONV_2D
            weight = values[inputs[1]].permute((3, 0, 1, 2) if depthwise else (0, 3, 1, 2)).contiguous()
            out, channels, side, _ = weight.shape
            same = options.padding == tflite.Padding.SAME and options.strideW == 1
            layer = nn.Conv2d(
                channels * (out if depthwise else 1),
                out,
                side,
                stride=options.strideW,
                padding=side // 2 if same else 0,
                groups=out if depthwise else 1,
            )
            layer.weight = nn.Parameter(weight)
            layer.bias = nn.Parameter(values[inputs[2]])
            layers.append(layer)
    return layers
