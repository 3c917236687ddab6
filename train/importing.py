"""A published checkpoint becomes a run: its weights under our names, its network found, its words and crops named.

The network follows from the tensors' shapes, as far as it leaves traces there: activations and dilations do not, and
are those of the recipe whose network has these shapes.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipprep.io.errors import UserError
from lipprep.stages.align import PROFILES, find_profile
from lipprep.stages.crop import CropParameters
from lipprep.stages.shard.index import check_labels
from lipprep.stages.untrusted import check_file, printable, read_text
from lipprep.train.checkpoint import BEST, Checkpoint, read_state, save_checkpoint, sha256_of
from lipprep.train.config import Config, as_plain, config_from, load_recipe, read_settings, recipes, save_config
from lipprep.train.device import new_model
from lipprep.train.models import complete
from lipprep.train.published import Published, model_of, read_weights
from lipprep.train.run import CONFIG, holds_something

LRW_WORDS = 500
FPS = 25.0  # of LRW, and of all that was published
_COUNTER = ".num_batches_tracked"  # which old versions of torch did not have
_CLASSIFIERS = ("tcn.tcn_output.weight", "tcn.output.weight")
_SHOWN = 20  # keys that are listed of those that do not fit
# Before others that have the same network.
_FIRST = ("lrw_resnet18_mstcn_prelu", "lrw_resnet18_dctcn_boundary", "lrw_resnet18_dctcn", "lrw_resnet18_mstcn")


@dataclass(frozen=True)
class Imported:
    """What an import came to; `unused` are keys of the file that its own code never reads, by what they are."""

    run: Path
    family: str
    recipe: str
    profile: str
    words: int
    parameters: int
    tensors: int
    unused: dict[str, list[str]]
    notes: list[str]
    files: list[Path]


def import_checkpoint(
    path: Path, run: Path, *, config: str | None = None, labels: Path | None = None, profile: str | None = None
) -> Imported:
    """Read a published checkpoint and write the run folder `run` with it.

    `config` is a recipe's name, a recipe file or a configuration file of the published code; without it the recipe is
    found that has a network of these shapes. `labels` is a file with a word a line, by default LRW's 500 words;
    `profile` the alignment of the crops it was trained on, by default the recipe's.

    Raises ValueError where the file is none, weights and network do not fit (key by key), or something is asked for
    that nothing says.
    """
    if holds_something(run):
        raise UserError(f"{printable(run)} is not empty: name another folder with -o")
    chosen = None if config is None else _read_config(config)
    state = read_state(path)
    try:
        found = read_weights(state, head=None if chosen is None else chosen.model["head"].get("name"))
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    if chosen is None:
        chosen = _recipe_of(found, path)
    weights = _fitted(found, chosen, path)
    words = _labels(labels, _words_in(found, path))
    model = new_model(chosen.model, num_classes=len(words))
    model.load_state_dict(weights)
    parameters = _crop_parameters(chosen, profile)
    notes = [*found.notes, *_assumed(chosen, found, labels=labels, profile=profile, config=config)]
    kept = {"imported": path.name, "sha256": sha256_of(path), "family": found.family}
    box = chosen.box if parameters["profile"] == "fixed" else None
    chosen = dataclasses.replace(chosen, profile=parameters["profile"], box=box, resolved=kept)
    checkpoint = Checkpoint(
        model=model.state_dict(),
        optimizer={},
        step=0,
        epoch=0,
        batch=0,
        best=None,
        config=as_plain(chosen),
        labels=words,
        parameters=parameters,
        fps=FPS,
        dataset="",
    )
    run.mkdir(parents=True, exist_ok=True)
    save_config(chosen, run / CONFIG)
    save_checkpoint(run / BEST, checkpoint)
    return Imported(
        run=run,
        family=found.family,
        recipe=chosen.recipe,
        profile=parameters["profile"],
        words=len(words),
        parameters=sum(p.numel() for p in model.parameters()),
        tensors=len(weights),
        unused=found.unused,
        notes=notes,
        files=[run / CONFIG, run / BEST, (run / BEST).with_suffix(".json")],
    )


def _assumed(
    chosen: Config, found: Published, *, labels: Path | None, profile: str | None, config: str | None
) -> list[str]:
    """What is taken from elsewhere, as a file of weights cannot say it."""
    model, taken = complete(chosen.model), []
    if config is None:
        taken.append(f"the activation {model['activation']}")
        if "dilations" in model["head"]:
            taken.append(f"the dilations {model['head']['dilations']}")
    if profile is None:
        taken.append(f"the profile {chosen.profile}")
    notes = []
    if taken:
        flags = " and ".join(["--config"] * (config is None) + ["--profile"] * (profile is None))
        known = ", ".join(taken)
        notes.append(f"not in the file, and taken from {chosen.recipe}: {known}. If that is not so: {flags}")
    if labels is None and found.family == "euan":
        notes.append(
            "its words are taken to be LRW's in alphabetical order, but its code numbers them as its folder of videos "
            "listed them: if words come out wrong, give their order with --labels"
        )
    return notes


def _read_config(config: str) -> Config:
    """The Config of a recipe's name, a recipe file, or a file of the published code."""
    if not config.endswith((".yaml", ".yml", ".json")):
        return load_recipe(config)
    path = check_file(Path(config), "configuration")
    settings = read_settings(path)
    if isinstance(settings.get("model"), Mapping):
        return config_from({"recipe": path.stem, **settings})
    try:
        model = model_of(settings)
        complete(model)
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    for recipe in _ordered():
        if _comparable((known := load_recipe(recipe)).model) == _comparable(model):
            return known
    like = {"vipl": "lrw_resnet18_bigru", "euan": "euan_resnet34_bilstm"}
    family = "vipl" if model["head"]["name"] == "bigru" else "euan" if model["trunk"] == "resnet34" else "mpc001"
    base = load_recipe(like.get(family, "lrw_resnet18_mstcn_prelu"))
    # What no recipe has: its crops are not known, those of the others of its family are.
    profile = base.profile if family in like else ""
    return dataclasses.replace(base, recipe=path.stem, model=model, profile=profile)


def _ordered() -> list[str]:
    return [*_FIRST, *(name for name in recipes() if name not in _FIRST)]


def _comparable(model: Mapping[str, Any]) -> dict:
    """A model configuration with all options but those that weights know nothing of."""
    plain = complete(model)
    for part in ("head", "neck"):
        plain[part] = {name: value for name, value in plain[part].items() if "dropout" not in name}
    del plain["init"]
    return plain


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if not name.endswith(_COUNTER)}


def _empty(config: Config, words: int) -> torch.nn.Module:
    with torch.device("meta"):  # shapes alone
        return new_model({**config.model, "init": "torch"}, num_classes=words)


def _recipe_of(found: Published, path: Path) -> Config:
    """The recipe whose network has just these shapes. Raises ValueError where none has, or several that differ do."""
    theirs = {name: tuple(value.shape) for name, value in found.weights.items() if not name.endswith(_COUNTER)}
    networks = _networks(_words_in(found, path))
    fitting = [config for config, ours in networks if ours == theirs]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(config.recipe for config in fitting)
        raise UserError(
            f"{printable(path)}: several networks have its shapes ({names}) and differ in what leaves no trace there: "
            "name one with --config"
        )
    wrong, nearest = min(
        (sum(theirs.get(name) != ours.get(name) for name in {**ours, **theirs}), config.recipe)
        for config, ours in networks
    )
    raise UserError(
        f"{printable(path)}: no recipe has a network of its {len(theirs)} shapes; the nearest, {nearest}, differs in "
        f"{wrong} of them. Name its configuration with --config: a recipe's name, or the file that it was trained with"
    )


@functools.cache
def _networks(words: int) -> list[tuple[Config, dict[str, tuple[int, ...]]]]:
    """Every network that a recipe has, once, with its shapes."""
    found, seen = [], []
    for config in map(load_recipe, _ordered()):
        if (network := _comparable(config.model)) not in seen:
            seen.append(network)
            found.append((config, _shapes(_empty(config, words))))
    return found


def _words_in(found: Published, path: Path) -> int:
    """The words of the classifier. Raises ValueError where it has none."""
    for name in _CLASSIFIERS:
        if name in found.weights and found.weights[name].ndim == 2 and len(found.weights[name]):
            return len(found.weights[name])
    raise UserError(f"{printable(path)} has no classifier (tcn.tcn_output.weight, v_cls.weight or lstm.fc.weight)")


def _fitted(found: Published, config: Config, path: Path) -> dict[str, Tensor]:
    """All weights of the network, in its order. Raises ValueError that lists, key by key, what does not fit."""
    ours = _empty(config, _words_in(found, path)).state_dict()
    wrong, weights = [], {}
    for name, value in ours.items():
        theirs, called = found.weights.get(name), found.names.get(name, name)
        if theirs is None:
            if name.endswith(_COUNTER):
                weights[name] = torch.zeros((), dtype=torch.int64)
            else:
                wrong.append(f"{name} {tuple(value.shape)} is not in the file")
        elif theirs.shape != value.shape:
            wrong.append(f"{called} is {tuple(theirs.shape)} in the file, {tuple(value.shape)} in the network")
        elif theirs.is_floating_point() != value.is_floating_point() or theirs.is_complex():
            wrong.append(f"{called} is of type {theirs.dtype}")
        elif not (ours_now := theirs.to(value.dtype)).isfinite().all():
            wrong.append(f"{called} has values that are no finite numbers")
        elif name.endswith(".running_var") and (ours_now < 0).any():
            wrong.append(f"{called} has variances below 0")
        else:
            weights[name] = ours_now.contiguous()
    wrong += [f"{found.names[name]} is in the file alone" for name in found.weights if name not in ours]
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = "".join(f"\n  {printable(line)}" for line in wrong[:_SHOWN])
        raise UserError(
            f"{printable(path)} does not fit the network of {config.recipe}: {len(wrong)} keys{listed}{more}\n"
            "Name another configuration with --config"
        )
    return weights


def _labels(path: Path | None, words: int) -> list[str]:
    if path is None:
        if words != LRW_WORDS:
            raise UserError(
                f"it knows {words} words, and LRW has {LRW_WORDS}: give the list that it was trained on with --labels, "
                "a word a line, in the order of its classifier"
            )
        lrw = resources.files("lipprep.stages") / "data" / "lrw_words.txt"
        return lrw.read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in read_text(path, "label list", limit=1 << 24).splitlines()]
    labels = [line for line in lines if line]
    if len(labels) != words:
        raise UserError(f"{printable(path)} lists {len(labels)} words, and the checkpoint knows {words}: name its list")
    if len(set(labels)) != words:
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"{printable(path)} lists {printable(twice)!r} twice")
    try:
        check_labels(labels)
    except UserError as error:
        raise UserError(f"{printable(path)}: {printable(error)}") from error
    return labels


def _crop_parameters(config: Config, profile: str | None) -> dict[str, Any]:
    """What is known of the crops that a network was trained on."""
    name = profile or config.profile
    if not name:
        raise UserError(
            "weights do not say what crops they were trained on, and no recipe has this network: name the profile with "
            f"--profile ({', '.join(PROFILES)})"
        )
    find_profile(name)
    parameters: dict[str, Any] = {"profile": name, "crop_size": max(96, config.augment.crop_size), "exact": False}
    if name == "fixed":
        box = config.box or list(CropParameters.box)
        parameters |= {"box": box, "crop_size": box[2]}
    else:
        parameters["detector"] = "archive"  # the landmarks that were published with them
    return parameters


def as_json(imported: Imported) -> str:
    """The outcome as one line of JSON."""
    plain = dataclasses.asdict(imported)
    return json.dumps({**plain, "run": str(imported.run), "files": [str(file) for file in imported.files]})


def told(imported: Imported) -> Sequence[str]:
    """The outcome in lines for people."""
    lines = [
        f"{imported.family}'s checkpoint, network of {imported.recipe}: {imported.parameters:,} parameters, "
        f"{imported.tensors} tensors, {imported.words} words, profile {imported.profile}"
    ]
    for what, keys in imported.unused.items():
        lines.append(f"not used: {len(keys)} tensors of {what} ({', '.join(keys[:2])}, ...)")
    return [*lines, *imported.notes, *map(str, imported.files)]
