"""The networks: a stem and a trunk for the images, then a head over time.

A configuration names one of each, so that any trunk goes with any head:

    trunk: resnet18            # one of TRUNKS below; the stem comes with it
    activation: prelu          # prelu, relu or swish
    head:
      name: mstcn              # one of HEADS below
      kernel_sizes: [3, 5, 7]  # and its options
    boundary: mpc001           # the head also sees where the word stands, by that formula (lipprep.train.boundary)
    neck: {channels: 256}      # between trunk and head: a linear layer, `norm: true`, `dropout: 0.5`
    init: published            # how weights are drawn: as the published networks', or torch: as each layer's default

`trunk`, `activation` and `head.name` are required. TRUNKS and HEADS have the options of each, and their defaults; those
of a trunk stand beside its name. Parameters have the names of mpc001/Lipreading_using_Temporal_Convolutional_Networks
and swpang/lipreading-snu, where these have such networks: their checkpoints' "model_state_dict" loads as it is.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipprep.io.errors import UserError
from lipprep.train.boundary import FORMULAS
from lipprep.train.models.compact import STEM_CHANNELS, TRUNK_WIDTHS, CompactHead, CompactStem
from lipprep.train.models.densetcn import dctcn
from lipprep.train.models.efficientnet import EfficientNetB3, InvertedBottleneck
from lipprep.train.models.layers import ACTIVATIONS, Packing, initialise
from lipprep.train.models.neck import Neck
from lipprep.train.models.recurrent import Recurrent
from lipprep.train.models.resnet import WIDTHS as RESNET_WIDTHS
from lipprep.train.models.resnet import ResNet
from lipprep.train.models.shufflenet import WIDTHS, ShuffleNetV2
from lipprep.train.models.stem import Stem
from lipprep.train.models.tcn import mstcn, tcn
from lipprep.train.models.temporal_conv import TemporalConvHead
from lipprep.train.models.transformer import TransformerHead

__all__ = ["HEADS", "TRUNKS", "LipReader", "build", "complete"]


def _resnet(act: str, *, blocks: tuple[int, ...], stem_bias: bool, **how: bool) -> tuple[nn.Module, nn.Module]:
    trunk = ResNet(64, RESNET_WIDTHS, blocks=blocks, activation_name=act, **how)
    return Stem(64, act, bias=stem_bias), trunk


def _senet(act: str, *, gate_bias: bool) -> tuple[nn.Module, nn.Module]:
    trunk = ResNet(64, RESNET_WIDTHS, blocks=(2, 2, 2, 2), activation_name=act, gated=True, gate_bias=gate_bias)
    return Stem(64, act), trunk


def _shufflenet(act: str, *, width_mult: float) -> tuple[nn.Module, nn.Module]:
    _choose("width_mult of shufflenetv2", width_mult, WIDTHS)
    return Stem(WIDTHS[width_mult][0], act), ShuffleNetV2(width_mult)


def _compact(act: str) -> tuple[nn.Module, nn.Module]:
    return CompactStem(act), ResNet(STEM_CHANNELS, TRUNK_WIDTHS, blocks=(1, 1, 1), activation_name=act)


# name: (how it is made, its options with their defaults)
TRUNKS: dict[str, tuple[Callable[..., tuple[nn.Module, nn.Module]], dict[str, Any]]] = {
    "resnet18": (partial(_resnet, blocks=(2, 2, 2, 2)), {"preactivation": False, "stem_bias": False}),
    "resnet34": (partial(_resnet, blocks=(3, 4, 6, 3)), {"preactivation": False, "stem_bias": False}),
    "senet18": (_senet, {"gate_bias": False}),
    "shufflenetv2": (_shufflenet, {"width_mult": 1.0}),
    "efficientnet_b3": (lambda act: (Stem(3, act), EfficientNetB3()), {}),
    "compact": (_compact, {}),
}
_TCN = {"kernel_size": 3, "num_layers": 4, "channels": 256, "dropout": 0.2}
_MSTCN = {"kernel_sizes": (3, 5, 7), "num_layers": 4, "channels": 256, "dropout": 0.2}  # channels of each kernel size
_RECURRENT = {"dropout": 0.2, "output_dropout": 0.0, "independent": False, "consensus": "scores"}
HEADS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "tcn": (tcn, _TCN),
    "dstcn": (partial(tcn, separable=True), _TCN),
    "mstcn": (mstcn, _MSTCN),
    "dsmstcn": (partial(mstcn, separable=True), _MSTCN),
    "dctcn": (
        dctcn,
        {
            "block_layers": (3, 3, 3, 3),
            "growth_rates": (384, 384, 384, 384),
            "kernel_sizes": (3, 5, 7),
            "dilations": (1, 2, 5),
            "reduced_channels": 512,
            "squeeze_excitation": True,
            "dropout": 0.2,
        },
    ),
    "bigru": (partial(Recurrent, cell="bigru"), {"hidden": 1024, "num_layers": 3, **_RECURRENT}),
    "bilstm": (partial(Recurrent, cell="bilstm"), {"hidden": 256, "num_layers": 2, **_RECURRENT}),
    "temporal_conv": (TemporalConvHead, {"kernel_size": 5, "channels": (512, 1024), "hidden": 256, "dropout": 0.0}),
    "transformer": (TransformerHead, {"channels": 512, "num_layers": 6, "num_heads": 8, "dropout": 0.1}),
    "compact": (CompactHead, {"kernel_size": 3, "num_layers": 4, "channels": 128, "dropout": 0.2}),
}
_ANY_KERNEL = {"temporal_conv"}  # the others keep the number of frames, for which a kernel has a middle
_NECK = {"channels": None, "norm": False, "dropout": 0.0}
_INITS = {"published": initialise, "torch": lambda model: None}
_KEYS = {"trunk", "activation", "head", "boundary", "neck", "init"}


class LipReader(nn.Module):
    """Mouth crops of words -> a score for each word. Made by `build`.

    The stem is called `frontend3D` and the head `tcn`, as in the published checkpoints, whatever they are. `boundary`
    is the formula of the word boundary that the head sees, None where it sees none.
    """

    def __init__(
        self, frontend3D: nn.Module, trunk: nn.Module, neck: nn.Module, tcn: nn.Module, *, boundary: str | None = None
    ):
        super().__init__()
        # The order of registration is that of the published checkpoints.
        self.trunk = trunk
        self.frontend3D = frontend3D
        self.neck = neck
        self.tcn = tcn
        self.boundary = boundary

    @property
    def ignores_padding(self) -> bool:
        """Whether a clip's logits are the same whatever it is padded with, and however much."""
        return self.frontend3D.skips_padding and getattr(self.tcn, "ignores_padding", False)

    @property
    def normalised(self) -> bool:
        """Whether what comes out are means of log posteriors already, not scores to be normalised."""
        return getattr(self.tcn, "normalised", False)

    @property
    def classifier(self) -> str:
        """The name of the layer that has a row for each word."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]

    @property
    def smallest(self) -> int:
        """The side of the smallest crop that it reads, in pixels: the trunks halve it four times and more."""
        return getattr(self.trunk, "smallest", 32)

    @property
    def features(self) -> int:
        """The number of features of a frame."""
        return self.neck.channels

    def extract_features(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """Features of the frames before any temporal convolution but the stem's, (B, T, C) float32.

        Padded frames hold zeros with the `compact` trunk, and what the network makes of their pixels with
        the others.
        """
        batch_size, _, num_frames = x_B1THW.shape[:3]
        feat_NC = self.neck(self.trunk(self.frontend3D(x_B1THW, lengths_B)))
        if self.frontend3D.skips_padding:
            return Packing(lengths_B, num_frames).unpack(feat_NC)
        return feat_NC.unflatten(0, (batch_size, num_frames))

    def read_features(self, feat_BTC: Tensor, lengths_B: Tensor, boundary_BT1: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of features as `extract_features` gives them."""
        if self.boundary is not None:
            if boundary_BT1 is None:  # unknown, as in the wild
                boundary_BT1 = feat_BTC.new_zeros(*feat_BTC.shape[:2], 1)
            feat_BTC = torch.cat([feat_BTC, boundary_BT1.to(feat_BTC.dtype)], dim=2)
        return self.tcn(feat_BTC, lengths_B)

    def forward(self, x_B1THW: Tensor, lengths_B: Tensor, boundary_BT1: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of normalised gray clips.

        `x_B1THW` is float32, zero after each clip's `lengths_B` frames (int64, at least 1, on the same
        device). `boundary_BT1` is 1 in the frames of the word, 0 in the others, and all 0 where that is not known; a
        network without `boundary` does not look at it.
        """
        return self.read_features(self.extract_features(x_B1THW, lengths_B), lengths_B, boundary_BT1)


def _choose(what: str, name: Any, known: Mapping[Any, Any]) -> Any:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}: known are {', '.join(map(str, known))}")
    return known[name]


def _refuse_unknown(what: str, keys: set[str], known: set[str]) -> None:
    if unknown := sorted(keys - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown {what} option {', '.join(unknown)}: {hint}known are {', '.join(sorted(known))}")


def _check(what: str, value: Any, like: Any) -> None:
    """Raise ValueError unless a value is of the kind of a default: a number from 1, a part, true or false, a name."""
    if isinstance(like, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(like, int):
        fits, wanted = type(value) is int and value >= 1, "a whole number from 1 on"
    elif isinstance(like, float):
        fits, wanted = type(value) in (int, float) and 0 <= value <= 2, "a number"
    elif isinstance(like, tuple | list):
        listed = isinstance(value, list | tuple) and len(value) > 0
        fits, wanted = listed and all(type(v) is int and v >= 1 for v in value), "a list of whole numbers from 1 on"
    else:
        fits, wanted = isinstance(value, str), "a name"
    if not fits:
        raise UserError(f"{what} is {value!r:.80}: it must be {wanted}")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every option of its trunk, neck and head spelt out, in plain containers.

    Raises ValueError for a name or option that is not known, naming those that are, and for combinations that are none.
    """
    for key in ("trunk", "activation", "head"):
        if key not in config:
            raise UserError(f"the model configuration lacks {key!r}")
    trunk = config["trunk"]
    _, options = _choose("trunk", trunk, TRUNKS)
    others = set().union(*(of_trunk for _, of_trunk in TRUNKS.values())) - set(options)
    if foreign := sorted(others & set(config)):
        able = [name for name, (_, of_trunk) in TRUNKS.items() if foreign[0] in of_trunk]
        raise UserError(f"the trunk {trunk} has no {foreign[0]}: that is of {', '.join(able)}")
    _refuse_unknown("model", set(config), _KEYS | set(options))
    _choose("activation", config["activation"], ACTIVATIONS)
    _choose("init", config.get("init", "published"), _INITS)
    if config.get("boundary") is not None:
        _choose("boundary", config["boundary"], FORMULAS)
    neck = dict(config.get("neck") or {})
    _refuse_unknown("neck", set(neck), set(_NECK))
    head = dict(config["head"])
    name = head.pop("name", None)
    _, of_head = _choose("head", name, HEADS)
    _refuse_unknown(f"{name} head", set(head), set(of_head))
    head = {key: list(value) if isinstance(value, list | tuple) else value for key, value in (of_head | head).items()}
    for key, value in head.items():
        _check(f"{key} of the {name} head", value, of_head[key])
    for key, value in neck.items():
        if value is not None or _NECK[key] is not None:
            _check(f"{key} of the neck", value, 1 if key == "channels" else _NECK[key])
    for key in set(options) & set(config):
        _check(key, config[key], options[key])
    if name not in _ANY_KERNEL:
        for kernel_size in head.get("kernel_sizes", [head.get("kernel_size", 1)]):
            if kernel_size % 2 == 0:
                raise UserError(f"kernel size {kernel_size} of the {name} head is even: it must be odd")
    return {
        "trunk": trunk,
        **options,
        "boundary": None,
        "init": "published",
        **config,
        "neck": _NECK | neck,
        "head": {"name": name, **head},
    }


def switch_off_dropout(model: nn.Module) -> None:
    """Switch off all that a network does by chance: dropout, also in recurrent layers and attention, and blocks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, InvertedBottleneck):
            module.drop = 0.0


def build(config: Mapping[str, Any], num_classes: int) -> LipReader:
    """A freshly initialised network (torch's global generator) of the configuration described above.

    Raises ValueError as `complete` does, and for values that make no network.
    """
    config = complete(config)
    act, boundary, head = config["activation"], config["boundary"], config["head"]
    make_trunk, trunk_options = TRUNKS[config["trunk"]]
    make_head, _ = HEADS[head.pop("name")]
    stem, trunk = make_trunk(act, **{name: config[name] for name in trunk_options})
    neck = Neck(trunk.channels, **config["neck"])
    channels = neck.channels + (boundary is not None)
    tcn = make_head(channels, num_classes, activation_name=act, **head)
    model = LipReader(stem, trunk, neck, tcn, boundary=boundary)
    _INITS[config["init"]](model)
    return model
