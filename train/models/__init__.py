"""The networks: a stem and a trunk for the images, then a head over time.

A configuration names one of each, so that any trunk goes with any head:

    trunk: resnet18            # resnet18, shufflenetv2 or compact; the stem comes with it
    activation: prelu          # prelu, relu or swish
    width_mult: 1.0            # shufflenetv2: 0.5, 1.0, 1.5 or 2.0; the others: 1.0
    head:
      name: mstcn              # mstcn, tcn or compact
      kernel_sizes: [3, 5, 7]  # tcn and compact: kernel_size: 3
      num_layers: 4            # with dilations 1, 2, 4, ...
      channels: 256            # mstcn: of each kernel size; compact: 128 by default
      dropout: 0.2
    init: published            # how weights are drawn: as the published networks', or torch: as each layer's default

`trunk`, `activation` and `head.name` are required; what else is left out is as above. resnet18 + mstcn,
and shufflenetv2 + tcn, are the networks of mpc001/Lipreading_using_Temporal_Convolutional_Networks, and
have its parameter names: their checkpoints' "model_state_dict" loads as it is.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lipprep.train.models.compact import STEM_CHANNELS, TRUNK_WIDTHS, CompactHead, CompactStem
from lipprep.train.models.layers import ACTIVATIONS, initialise, unpack, valid_positions
from lipprep.train.models.resnet import ResNet
from lipprep.train.models.shufflenet import WIDTHS, ShuffleNetV2
from lipprep.train.models.stem import Stem
from lipprep.train.models.tcn import mstcn, tcn

__all__ = ["LipReader", "build"]

_TRUNKS = {
    "resnet18": lambda width_mult, act: (
        Stem(64, act),
        ResNet(64, (64, 128, 256, 512), blocks=2, activation_name=act),
    ),
    "shufflenetv2": lambda width_mult, act: (Stem(WIDTHS[width_mult][0], act), ShuffleNetV2(width_mult)),
    "compact": lambda width_mult, act: (
        CompactStem(act),
        ResNet(STEM_CHANNELS, TRUNK_WIDTHS, blocks=1, activation_name=act),
    ),
}
_HEADS = {
    "mstcn": (mstcn, {"kernel_sizes": (3, 5, 7), "num_layers": 4, "channels": 256, "dropout": 0.2}),
    "tcn": (tcn, {"kernel_size": 3, "num_layers": 4, "channels": 256, "dropout": 0.2}),
    "compact": (CompactHead, {"kernel_size": 3, "num_layers": 4, "channels": 128, "dropout": 0.2}),
}
_INITS = {"published": initialise, "torch": lambda model: None}
_KEYS = {"trunk", "activation", "width_mult", "head", "init"}


class LipReader(nn.Module):
    """Mouth crops of words -> a score for each word. Made by `build`.

    The stem is called `frontend3D` and the head `tcn`, as in the published checkpoints, whatever they are.
    """

    def __init__(self, frontend3D: nn.Module, trunk: nn.Module, tcn: nn.Module):
        super().__init__()
        # The order of registration is that of the published checkpoints.
        self.trunk = trunk
        self.frontend3D = frontend3D
        self.tcn = tcn

    @property
    def ignores_padding(self) -> bool:
        """Whether a clip's logits are the same whatever it is padded with, and however much."""
        return self.frontend3D.skips_padding and isinstance(self.tcn, CompactHead)

    @property
    def classifier(self) -> str:
        """The name of the layer that has a row for each word."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]

    def extract_features(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """Features of the frames before any temporal convolution but the stem's, (B, T, C) float32.

        Padded frames hold zeros with the `compact` trunk, and what the network makes of their pixels with
        the others.
        """
        batch_size, _, num_frames = x_B1THW.shape[:3]
        feat_NC = self.trunk(self.frontend3D(x_B1THW, lengths_B))
        if self.frontend3D.skips_padding:
            positions_N = valid_positions(lengths_B, num_frames)
            return unpack(feat_NC, positions_N, batch_size, num_frames)
        return feat_NC.unflatten(0, (batch_size, num_frames))

    def forward(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised gray clips.

        `x_B1THW` is float32, zero after each clip's `lengths_B` frames (int64, at least 1, on the same
        device).
        """
        return self.tcn(self.extract_features(x_B1THW, lengths_B), lengths_B)


def _choose(what: str, name: Any, known: Mapping[Any, Any]) -> Any:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: known are {', '.join(map(str, known))}")
    return known[name]


def _refuse_unknown(what: str, keys: set[str], known: set[str]) -> None:
    if unknown := sorted(keys - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown {what} option {', '.join(unknown)}: {hint}known are {', '.join(sorted(known))}")


def build(config: Mapping[str, Any], num_classes: int) -> LipReader:
    """A freshly initialised network (torch's global generator) of the configuration described above.

    Raises ValueError for a name, option or value that is not known, naming those that are.
    """
    _refuse_unknown("model", set(config), _KEYS)
    for key in ("trunk", "activation", "head"):
        if key not in config:
            raise ValueError(f"the model configuration lacks {key!r}")
    trunk_name, act, width_mult = config["trunk"], config["activation"], config.get("width_mult", 1.0)
    make_trunk = _choose("trunk", trunk_name, _TRUNKS)
    _choose("activation", act, ACTIVATIONS)
    _choose(f"width_mult of {trunk_name}", width_mult, WIDTHS if trunk_name == "shufflenetv2" else {1.0: None})

    draw = _choose("init", config.get("init", "published"), _INITS)
    head = dict(config["head"])
    head_name = head.pop("name", None)
    make_head, defaults = _choose("head", head_name, _HEADS)
    _refuse_unknown(f"{head_name} head", set(head), set(defaults))
    options = defaults | head
    for kernel_size in options.get("kernel_sizes", [options.get("kernel_size")]):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel size {kernel_size} of the {head_name} head is even: it must be odd")

    stem, trunk = make_trunk(width_mult, act)
    model = LipReader(stem, trunk, make_head(trunk.channels, num_classes, activation_name=act, **options))
    draw(model)
    return model
