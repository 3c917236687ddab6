"""The field's checkpoints under our names: three families, told apart by their keys.

mpc001 (mpc001/Lipreading_using_Temporal_Convolutional_Networks and its fork swpang/lipreading-snu), whose names are
ours; vipl (learn-an-effective-lip-reading-model-without-pains); euan (euancrabtree/Lipreading-PyTorch and Lippy).
Their configuration files are read, too: mpc001's JSON, the fork's YAML, VIPL's and euan's options.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipprep.io.errors import UserError
from lipprep.stages.atomic import replacing, write_text
from lipprep.train.checkpoint import Checkpoint
from lipprep.train.models import complete

# Where the file holds the weights: beside other things, under one of these, or they are all there is.
CONTAINERS = ("model_state_dict", "video_model", "state_dict")
HIDDEN = 256  # channels of a kernel size in mpc001's TCNs, which its configuration files do not say


@dataclass(frozen=True)
class Published:
    """Weights of a published checkpoint under our names, in the order of the file.

    `names` has what each was called there. `unused` are keys that its own code never reads, by what they are; `notes`
    what else a person should know.
    """

    family: str
    weights: dict[str, Tensor]
    names: dict[str, str] = field(repr=False)
    unused: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_weights(state: object, *, head: str | None = None) -> Published:
    """Find the weights in what a checkpoint holds, and give them our names.

    `head` is the head that is wanted of a file that holds two (euan's). Raises ValueError where there are none, or they
    are of no family that is known.
    """
    where = state
    if isinstance(state, Mapping):
        for container in CONTAINERS:
            if isinstance(state.get(container), Mapping):
                where = state[container]
                break
    if not isinstance(where, Mapping) or not where or not all(isinstance(v, Tensor) for v in where.values()):
        kinds = ", ".join(map(repr, list(state)[:6])) if isinstance(state, Mapping) else type(state).__name__
        raise UserError(
            f"it holds no weights that are known (it has {kinds}): they are looked for under "
            f"{', '.join(map(repr, CONTAINERS))}, or the file is a state_dict"
        )
    if not all(isinstance(key, str) for key in where):
        raise UserError("its weights have keys that are no names")
    if all(key.startswith("module.") for key in where):  # of DataParallel
        where = {key.removeprefix("module."): value for key, value in where.items()}
    for family, prefixes in (
        ("vipl", ("video_cnn.", "gru.", "v_cls.")),
        ("euan", ("frontend.", "resnet.", "lstm.", "backend.", "convbackend.")),
        ("mpc001", ("frontend3D.", "trunk.", "tcn.", "tcn_output.")),
    ):
        if where and any(key.startswith(prefixes[0]) for key in where) and all(k.startswith(prefixes) for k in where):
            return _FAMILIES[family](where, head)
    shown = ", ".join(list(where)[:4])
    raise UserError(
        f"it is of another architecture than those that are known ({len(where)} tensors: {shown}, ...): mpc001's begin "
        "with frontend3D, trunk and tcn, VIPL's with video_cnn, gru and v_cls, euan's with frontend, resnet and lstm"
    )


def _mpc001(where: Mapping[str, Tensor], head: str | None) -> Published:
    names = {}
    for key in where:
        # Before December 2020 the classifier stood beside the head, not in it.
        names["tcn." + key if key.startswith("tcn_output.") else key] = key
    weights = {ours: where[theirs] for ours, theirs in names.items()}
    differing = []
    # Separable convolutions have places alone, more than the others.
    separable = any(re.match(r"tcn\.tcn_trunk\.network\.0\.net\.4\.", key) for key in weights)
    for key in [] if separable else list(weights):
        twin = _twin(key)
        if twin is None:
            continue
        if twin not in weights:
            weights[twin], names[twin] = weights[key], names[key]
        elif not weights[key].equal(weights[twin]):
            differing.append(key)
    if differing:
        raise UserError(
            f"its TCN holds each tensor twice, and the two differ, in {differing[0]} and {len(differing) - 1} others: "
            "it was changed after it was saved"
        )
    return Published("mpc001", weights, names)


_TWINS = {"conv1": "0", "batchnorm1": "1", "relu1": "3", "conv2": "5", "batchnorm2": "6", "relu2": "8"}
_PLACES = {place: name for name, place in _TWINS.items()}


def _twin(key: str) -> str | None:
    """The other key of a tensor that a block of the single-scale TCN registers twice, by name and by place."""
    block = re.match(r"(tcn\.tcn_trunk\.network\.\d+\.)(.+)$", key)
    if not block:
        return None
    start, rest = block.groups()
    if named := re.match(r"(conv1|batchnorm1|relu1|conv2|batchnorm2|relu2)\.(.+)$", rest):
        return f"{start}net.{_TWINS[named[1]]}.{named[2]}"
    placed = re.match(r"net\.(0|1|3|5|6|8)\.(.+)$", rest)
    return f"{start}{_PLACES[placed[1]]}.{placed[2]}" if placed else None


_VIPL = (
    (r"video_cnn\.frontend3D\.", "frontend3D."),
    (r"video_cnn\.resnet18\.bn\.", "neck.norm."),
    (r"video_cnn\.resnet18\.(layer\d\.\d+)\.conv3\.", r"trunk.\1.se.excitation.0."),
    (r"video_cnn\.resnet18\.(layer\d\.\d+)\.conv4\.", r"trunk.\1.se.excitation.2."),
    (r"video_cnn\.resnet18\.", "trunk."),
    (r"gru\.", "tcn.rnn."),
    (r"v_cls\.", "tcn.output."),
)


def _vipl(where: Mapping[str, Tensor], head: str | None) -> Published:
    names = {_renamed(key, _VIPL): key for key in where}
    weights = {}
    for ours, theirs in names.items():
        value = where[theirs]
        # The same layer, as a convolution of one pixel there.
        weights[ours] = value[:, :, 0, 0] if ".se.excitation." in ours and value.ndim == 4 else value
    return Published("vipl", weights, names)


_EUAN = (
    (r"frontend\.conv\.", "frontend3D.0."),
    (r"frontend\.norm\.", "frontend3D.1."),
    (r"resnet\.resnetModel\.fc\.", "neck.project."),
    (r"resnet\.resnetModel\.bn2\.", "neck.norm."),
    (r"resnet\.resnetModel\.(layer\d\.)", r"trunk.\1"),
)
_EUAN_HEADS = {
    "bilstm": ((r"lstm\.Module1\.", "tcn.rnn."), (r"lstm\.fc\.", "tcn.output.")),
    "temporal_conv": ((r"(?:conv)?backend\.linear2\.", "tcn.output."), (r"(?:conv)?backend\.", "tcn.")),
}
_EUAN_STEM = re.compile(r"resnet\.resnetModel\.(conv1|bn1)\.")


def _euan(where: Mapping[str, Tensor], head: str | None) -> Published:
    there = [name for name, rules in _EUAN_HEADS.items() if any(re.match(rules[0][0], key) for key in where)]
    if head is None:
        head = there[0] if there else "bilstm"
    notes = []
    if len(there) > 1:
        notes.append(
            f"it holds two heads, which its code builds whatever it trains. {head} is taken; for the other, --config "
            f"{'euan_resnet34_temporal_conv' if head == 'bilstm' else 'euan_resnet34_bilstm'}"
        )
    names, unused = {}, {}
    others = [rules for name, rules in _EUAN_HEADS.items() if name != head]
    for key in where:
        ours = _renamed(key, (*_EUAN, *_EUAN_HEADS.get(head, ())))
        if _EUAN_STEM.match(key):
            what = "the stem of a ResNet for colour images, which its code builds and never calls"
            unused.setdefault(what, []).append(key)
        elif ours == key and any(_renamed(key, rules) != key for rules in others):
            unused.setdefault("the other head", []).append(key)
        else:
            names[ours] = key
    return Published("euan", {ours: where[key] for ours, key in names.items()}, names, unused, notes)


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        if re.match(pattern, key):
            return re.sub(pattern, ours, key, count=1)
    return key


_FAMILIES: dict[str, Callable[[Mapping[str, Tensor], str | None], Published]] = {
    "mpc001": _mpc001,
    "vipl": _vipl,
    "euan": _euan,
}


def model_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The model configuration that a published configuration file describes.

    Raises ValueError where a key that is needed is missing or has a value that no such network has.
    """
    try:
        if "backbone_type" in options:
            modality = options.get("modality", "video")
            if modality != "video":
                raise UserError(f"it is for {modality}: lipprep reads lips alone")
            return _mpc001_model(options)
        if "border" in options or "n_class" in options:
            return _vipl_model(options)
        if "inputdim" in options or "numlstms" in options:
            return _euan_model(options)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the configuration holds a value that no such network has: {error}") from error
    except KeyError as error:
        raise UserError(f"the configuration lacks {error}") from error
    raise UserError(
        "the configuration is none that is known, which are: a recipe (model: ...), mpc001's JSON (backbone_type, "
        "tcn_... or densetcn_...), its fork's YAML (tcn_options), VIPL's options (border, se), euan's (type, inputdim)"
    )


_TRUNK_NAMES = {
    "resnet": "resnet18",
    "senet": "senet18",
    "shufflenet": "shufflenetv2",
    "efficientnet": "efficientnet_b3",
}


_OF_FORK = ("senet18", "efficientnet_b3")


def _mpc001_model(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["backbone_type"] not in _TRUNK_NAMES:
        known = ", ".join(_TRUNK_NAMES)
        raise UserError(f"backbone_type {options['backbone_type']!r}: known are {known}")
    trunk = _TRUNK_NAMES[options["backbone_type"]]
    model: dict[str, Any] = {"trunk": trunk, "activation": options["relu_type"]}
    if trunk == "shufflenetv2":
        model["width_mult"] = float(options["width_mult"])
    if options.get("use_boundary"):
        model["boundary"] = "mpc001"
    # As in mpc001's code, the TCN's options go before the others where both are there.
    if options.get("densetcn_block_config") and not (options.get("tcn_num_layers") or options.get("tcn_options")):
        model["head"] = {
            "name": "dctcn",
            "block_layers": list(options["densetcn_block_config"]),
            "growth_rates": list(options["densetcn_growth_rate_set"]),
            "kernel_sizes": list(options["densetcn_kernel_size_set"]),
            "dilations": list(options["densetcn_dilation_size_set"]),
            "reduced_channels": options["densetcn_reduced_size"],
            "squeeze_excitation": bool(options.get("densetcn_se", False)),
            "dropout": float(options.get("densetcn_dropout", 0.2)),
        }
        return model
    tcn = options.get("tcn_options") or {k.removeprefix("tcn_"): v for k, v in options.items() if k.startswith("tcn_")}
    sizes = tcn["kernel_size"]
    sizes = list(sizes) if isinstance(sizes, list | tuple) else [sizes]
    if not sizes:
        raise UserError("tcn_kernel_size is empty")
    head: dict[str, Any] = {"num_layers": tcn["num_layers"], "dropout": float(tcn.get("dropout", 0.2))}
    head["channels"] = round(options.get("hidden_dim", HIDDEN) * tcn.get("width_mult", 1))
    name = "tcn" if len(sizes) == 1 else "mstcn"
    head |= {"kernel_size": sizes[0]} if len(sizes) == 1 else {"kernel_sizes": sizes}
    model["head"] = {"name": f"ds{name}" if tcn.get("dwpw") else name, **head}
    return model


_TRUE, _FALSE = ("true", "1", "yes", "y", "t"), ("false", "0", "no", "n", "f", "none")


def _vipl_model(options: Mapping[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = {"trunk": "resnet18", "activation": "relu"}
    if _is_true(options.get("se", False)):
        model |= {"trunk": "senet18", "gate_bias": True}
    if _is_true(options.get("border", False)):
        model["boundary"] = "vipl"
    model["neck"] = {"norm": True, "dropout": 0.5}
    model["head"] = {"name": "bigru", "hidden": 1024, "num_layers": 3, "dropout": 0.2, "output_dropout": 0.5}
    return model


def _euan_model(options: Mapping[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = {"trunk": "resnet34", "stem_bias": True, "activation": "relu"}
    model["neck"] = {"channels": options.get("inputdim", 256), "norm": True}
    if str(options.get("type", "LSTM")).lower().startswith("temp"):
        model["head"] = {"name": "temporal_conv", "kernel_size": 2, "channels": [512, 1024], "hidden": 256}
    else:
        hidden, layers = options.get("hiddendim", 256), options.get("numlstms", 2)
        model["head"] = {"name": "bilstm", "hidden": hidden, "num_layers": layers, "dropout": 0.0}
        model["head"]["consensus"] = "posteriors"
    return model


def _is_true(value: object) -> bool:
    """VIPL's command line has its booleans as text. Raises ValueError for what is none."""
    text = str(value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise UserError(f"{value!r:.40} is neither true nor false")
    return text in _TRUE


def options_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """mpc001's configuration file of a network, or its fork's of trunks that it alone has: the inverse of `model_of`.

    `model` has all options of its head. Raises ValueError, saying which part it is, where neither has such a network.
    """
    head, names = dict(model["head"]), {ours: theirs for theirs, ours in _TRUNK_NAMES.items()}
    if model["trunk"] not in names:
        raise UserError(f"its trunk {model['trunk']} is none that mpc001 has ({', '.join(names)})")
    for part in ("preactivation", "stem_bias", "gate_bias"):
        if model.get(part):
            raise UserError(f"its trunk has {part}, which mpc001's never have")
    neck = model.get("neck") or {}
    if neck.get("channels") is not None or neck.get("norm"):
        raise UserError("it has a neck, of which mpc001's have none")
    options = {"backbone_type": names[model["trunk"]], "relu_type": model["activation"]}
    options["width_mult"] = float(model.get("width_mult", 1.0))
    if model["trunk"] in _OF_FORK and head["name"] not in ("tcn", "mstcn"):
        raise UserError(f"lipreading-snu, which has its trunk {model['trunk']}, has no head {head['name']}")
    if head["name"] == "dctcn":
        keys = {"block_layers": "block_config", "growth_rates": "growth_rate_set", "kernel_sizes": "kernel_size_set"}
        keys |= {"dilations": "dilation_size_set", "reduced_channels": "reduced_size", "squeeze_excitation": "se"}
        for ours, theirs in (keys | {"dropout": "dropout"}).items():
            value = head[ours]
            options[f"densetcn_{theirs}"] = list(value) if isinstance(value, list | tuple) else value
        if model.get("boundary") not in (None, "mpc001"):
            raise UserError(f"its word boundary is by the formula {model['boundary']}, not mpc001's")
        return options | {"use_boundary": model.get("boundary") is not None}
    if head["name"] not in ("tcn", "dstcn", "mstcn", "dsmstcn"):
        raise UserError(f"its head {head['name']} is none that mpc001 has (tcn, dstcn, mstcn, dsmstcn, dctcn)")
    if model.get("boundary") is not None:
        raise UserError("it is told word boundaries, which mpc001's code knows with the head dctcn alone")
    if head["channels"] % HIDDEN:
        raise UserError(f"its head has {head['channels']} channels a kernel size: mpc001 has multiples of {HIDDEN}")
    sizes = [head["kernel_size"]] if "kernel_size" in head else list(head["kernel_sizes"])
    if "kernel_sizes" in head and len(sizes) == 1:
        raise UserError(f"its head {head['name']} has one kernel size, for which mpc001 builds another network")
    tcn = {"kernel_size": sizes, "num_layers": head["num_layers"], "dropout": head["dropout"]}
    tcn |= {"dwpw": head["name"].startswith("ds"), "width_mult": head["channels"] // HIDDEN}
    if model["trunk"] in _OF_FORK:
        return options | {"hidden_dim": HIDDEN, "modality": "video", "extract_feats": False, "tcn_options": tcn}
    return options | {f"tcn_{name}": value for name, value in tcn.items()}


def save_mpc001(checkpoint: Checkpoint, path: Path) -> list[Path]:
    """Write a checkpoint as mpc001's code loads it, and its configuration file (`--config-path`) beside it.

    The weights are those to read with, under "model_state_dict", each TCN's tensors under both of their names. Networks
    with a trunk of lipreading-snu are for that fork, whose configuration is FILE.yaml. Raises ValueError, saying why,
    where neither has such a network.
    """
    model = complete(checkpoint.config["model"])
    try:
        options = options_of(model)
    except UserError as error:
        raise UserError(f"mpc001's code cannot load this network: {error}") from error
    weights = OrderedDict((name, value.contiguous()) for name, value in checkpoint.weights.items())
    with replacing(path) as file:
        torch.save({"model_state_dict": weights}, file)
    if model["trunk"] in _OF_FORK:
        options["num_classes"] = len(checkpoint.labels)
    beside = configuration_beside(checkpoint, path)
    write_text(beside, json.dumps(options, indent=2) + "\n")
    return [path, beside]


def configuration_beside(checkpoint: Checkpoint, path: Path) -> Path:
    """The configuration file that `save_mpc001` writes: FILE.yaml for lipreading-snu, FILE.json for mpc001's code."""
    # What is JSON is YAML, too.
    return path.with_name(f"{path.name}.{'yaml' if checkpoint.config['model'].get('trunk') in _OF_FORK else 'json'}")
