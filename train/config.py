"""What a training run is made of: recipes, overrides on the command line, and the types of both."""

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lipprep.io.errors import UserError
from lipprep.stages.atomic import write_text
from lipprep.stages.untrusted import MAX_ECHO, check_yaml, parse_settings, printable
from lipprep.train.draws import AugmentOptions

DEFAULT_RECIPE = "lrw_resnet18_mstcn_prelu"


@dataclass(frozen=True)
class Config:
    """A resolved recipe. The defaults are those of the published LRW trainers (AdamW, cosine, 80 epochs).

    `model` is what `lipprep.train.models.build` takes. `profile` names the alignment that the recipe is meant for,
    and `box` (x, y, width, height in pixels) what is cut where that is `fixed`. `optimizer` and `schedule` are those
    of `lipprep.train.optimize`. `warmup` is the part of all steps in which the rate rises linearly; from there it
    falls, as `cosine` to `lr_min` at the last step, which is that of `epochs` or `max_steps`, whichever comes first.
    `halve_every` is in epochs. `batch_size` clips of all processes together make a step; each process takes its part
    of them in `accumulate` slices, and with `sync_batchnorm` batch normalisation sees those of all processes at once.
    In the first `augment_after` steps nothing is mixed, masked, erased or shortened.

    Gradients are shortened to a norm of `clip_norm`; `ema` is the decay of an exponential moving average of the
    weights (0: none), which is then what is validated, evaluated and used to read. `init_from` is a run or a
    checkpoint whose weights a run begins with, as far as their names and shapes agree. `freeze` names parts of the
    network that stay as they are, weights and statistics, and are run as in evaluation. `teacher` is a run or a
    checkpoint that this one learns from, too, by `distill_weight` and `distill_temperature`
    (`lipprep.train.distill`); an empty name says that one must be given. `overfit` is the number of clips that are
    trained on and validated on, so that a network that cannot learn is found in minutes.

    `eval_every` and `save_every` count steps; without them, a run validates and saves last.pt after every epoch.
    `keep_every` steps a checkpoint is kept as step-N.pt. `max_time` is in seconds, of each start of the run: after it,
    the run saves and ends, and can go on. `workers` are processes that read and decode; without it, the device and
    the number of cores decide. `precision` is that of autocast in training steps, where auto is what was measured to
    be fastest on the device (`lipprep.train.device.training_precision`); all else runs in fp32 unless `precision` says
    otherwise. With `compile` the network goes through torch.compile, and all batches are padded to one length.
    `resolved` is what a run made of its settings: device, precision, workers, processes.
    """

    recipe: str
    profile: str
    model: dict[str, Any]
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    box: list[int] | None = None
    seed: int = 1
    epochs: int = 80
    max_steps: int | None = None
    batch_size: int = 32
    lr: float = 3e-4
    weight_decay: float = 1e-2
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Literal["cosine", "cosine_by_epoch", "mpc001", "halving"] = "cosine"
    lr_min: float = 0.0
    halve_every: int = 5
    warmup: float = 0.0
    label_smoothing: float = 0.0
    accumulate: int = 1
    sync_batchnorm: bool = False
    augment_after: int = 0
    clip_norm: float | None = None
    ema: float = 0.0
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    teacher: str | None = None
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    overfit: int | None = None
    max_time: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    workers: int | None = None
    log_every: int = 20
    eval_every: int | None = None
    save_every: int | None = None
    keep_every: int | None = None
    resolved: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "distill_weight", "distill_temperature"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}, it must be a finite number")
        counts = ("epochs", "max_steps", "batch_size", "accumulate", "overfit", "log_every", "halve_every")
        for name in (*counts, "eval_every", "save_every", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, it must be at least 1")
        for name in ("seed", "workers", "weight_decay", "augment_after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} is {value}, it must not be negative")
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}, it must be below 2**63")
        for name in ("lr", "clip_norm", "max_time", "distill_weight", "distill_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}, it must be greater than 0")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        if not all(isinstance(name, str) and name for name in self.freeze):
            raise UserError(f"freeze is {self.freeze}, it must be names: freeze=[frontend3D,trunk]")
        if not 0 <= self.lr_min <= self.lr:
            raise UserError(f"lr_min is {self.lr_min}, it must be at least 0 and at most lr, {self.lr}")


def without_effect(config: Config) -> list[str]:
    """What a config sets in vain, a sentence each."""
    told = []
    if config.schedule == "halving" and config.lr_min:
        told.append(f"lr_min={config.lr_min:g} is for cosines: schedule=halving falls without end")
    if config.schedule != "halving" and config.halve_every != Config.halve_every:
        told.append(f"halve_every={config.halve_every} is without effect: it goes with schedule=halving")
    for name in ("distill_weight", "distill_temperature"):
        if config.teacher is None and getattr(config, name) != getattr(Config, name):
            told.append(f"{name}={getattr(config, name):g} is without effect: it goes with a teacher=RUN")
    return told


def overfitting(clips: int) -> list[str]:
    """The overrides with which a network is to learn `clips` clips by heart: nothing by chance, nothing in its way."""
    chance = ("random_crop", "variable_length", "flip", "mixup", "cutmix", "time_mask", "erasing")
    chance += ("gain", "bias", "scale", "aspect", "rotation", "shift")
    still = {f"augment.{name}": 0 for name in chance} | {"label_smoothing": 0, "ema": 0, "schedule": "cosine"}
    still |= {"overfit": clips, "epochs": 100_000, "max_steps": 300, "eval_every": 25, "save_every": 100}
    still |= {"teacher": "null", "freeze": "[]"}
    return [f"{name}={value}" for name, value in still.items()]


def recipes() -> list[str]:
    """The names of the recipes that come with lipprep."""
    return sorted(p.name[:-5] for p in resources.files("lipprep.train.recipes").iterdir() if p.name.endswith(".yaml"))


def about(recipe: str) -> str:
    """What a recipe that comes with lipprep says of itself: the comment that its file begins with."""
    text = (resources.files("lipprep.train.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe of a name or a FILE.yaml, with `key=value` overrides (dotted keys, YAML values) on top.

    Raises ValueError where there is no such recipe, or a key or value does not fit.
    """
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        name = path.stem
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
    else:
        path = resources.files("lipprep.train.recipes") / f"{recipe}.yaml"
        name = recipe
        if recipe not in recipes():
            close = difflib.get_close_matches(recipe, recipes(), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"there is no recipe {recipe!r}: {hint}(recipes: {', '.join(recipes())}, or a FILE.yaml)")
    return config_from({**read_settings(path), "recipe": name}, overrides)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The Config that a run saved, with overrides on top. Raises ValueError."""
    try:
        return config_from(read_settings(path), overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def config_from(plain: Mapping, overrides: Sequence[str] = ()) -> Config:
    """The Config of plain containers (a recipe's, a checkpoint's), with overrides on top.

    An override that names another trunk or head leaves behind what `plain` says of the old one's options.
    Raises ValueError, also for OmegaConf's interpolations `${...}`: they can read the environment.
    """
    if any("${" in text for text in (*_strings(plain), *overrides)):
        raise UserError("settings with ${...} in them are not read: write the value itself")
    for override in overrides:
        _check_override(override)
    try:
        plain = {**plain, "model": _fitting(plain["model"], overrides)} if "model" in plain else dict(plain)
        config = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(plain))
        for override in overrides:
            key = override.partition("=")[0]
            known = list(_keys(OmegaConf.to_container(config)))
            if key not in known and not key.startswith("model."):  # of those, the network knows
                close = difflib.get_close_matches(key, known, n=3)
                hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"
                raise UserError(f"there is no setting {key!r}: {hint}")
            try:
                config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
            except (OmegaConfBaseException, TypeError) as error:
                reason = str(error).splitlines()[0]
                if "ListConfig" in reason:
                    reason = f"{key} is a list, written as {key}=[A,B]"
                raise UserError(f"{override!r}: {reason}") from error
        return OmegaConf.to_object(config)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError("; ".join(line.strip() for line in str(error).splitlines()[:2])) from error


def _check_override(override: str) -> None:
    """Raise ValueError where an override is no `key=value`, or its value is no YAML that is read."""
    _, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{printable(override, MAX_ECHO)!r} is no override: write key=value, as in lr=1e-3")
    try:
        check_yaml(value)
        OmegaConf.from_dotlist([override])
    except UserError as error:
        raise UserError(f"the override {printable(override, MAX_ECHO)}: {error}") from error
    # Numbers such as 0x_ raise whatever Python's conversion does.
    except (OmegaConfBaseException, YAMLError, ValueError, ArithmeticError) as error:
        raise UserError(f"the override {printable(override, MAX_ECHO)} holds no readable YAML value") from error


def _fitting(model: Any, overrides: Sequence[str]) -> Any:
    """A `model` less the options of a trunk or head for which `overrides` name another: those are of the old one."""
    wanted = OmegaConf.from_dotlist([text for text in overrides if text.startswith("model") and "=" in text])
    trunk, head = OmegaConf.select(wanted, "model.trunk"), OmegaConf.select(wanted, "model.head.name")
    if not isinstance(model, Mapping) or (trunk is None and head is None):
        return model
    from lipprep.train.models import TRUNKS  # torch comes with them: not for settings alone

    model = dict(model)
    if trunk is not None and trunk != model.get("trunk"):
        of_trunks = set().union(*(options for _, options in TRUNKS.values()))
        model = {key: value for key, value in model.items() if key not in of_trunks}
    old = model.get("head")
    if head is not None and isinstance(old, Mapping) and head != old.get("name"):
        model["head"] = {}
    return model


def as_plain(config: Config) -> dict:
    """The config as dictionaries, lists, strings and numbers."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def save_config(config: Config, path: Path) -> None:
    """Write the config as YAML that `load_recipe` reads again."""
    write_text(path, config_text(config))


def config_text(config: Config) -> str:
    """The config as YAML that `load_recipe` reads again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(ours: Config, theirs: Config) -> list[str]:
    """The settings, by their dotted keys, in which two configs differ, as `lr=0.003, not 0.001`."""
    a, b = dict(_leaves(as_plain(ours))), dict(_leaves(as_plain(theirs)))
    keys = [key for key in {**a, **b} if key != "recipe" and key.split(".")[0] != "resolved"]
    return [f"{key}={a.get(key)}, not {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def read_settings(path: Path | Traversable) -> dict:
    """The settings of a YAML (or JSON) file as plain containers. Raises ValueError where it holds none."""
    try:
        return parse_settings(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{printable(path.name)}: {error}") from error


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _strings(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from (*_strings(key), *_strings(value))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _strings(value)


def _keys(tree: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
