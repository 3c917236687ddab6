"""What the networks of the recipes cost and what was published of them: `lipprep models`, and docs/models.md.

A multiply-add is one multiplication with its addition, in convolutions and matrix products; nothing else is counted.
"""

import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.utils.flop_counter import FlopCounterMode

from lipprep.io.errors import UserError
from lipprep.train.config import about, load_recipe, recipes
from lipprep.train.device import new_model, place, reading
from lipprep.train.models import HEADS, TRUNKS

WORDS, FRAMES, SIZE = 500, 29, 88  # LRW's clips, as the published networks see them; a recipe may have another size
BATCH = 8  # clips that are timed at once
_PUBLISHED = re.compile(r"Published on LRW: (?P<told>(?P<percent>\d+(?:\.\d+)?) %[^()]*) \((?P<source>[^()]+)\)\.")
_UNPUBLISHED = ("No accuracy on LRW was published", "Not for LRW")


@dataclass(frozen=True)
class Accuracy:
    """An accuracy on LRW's test split in percent, what its authors say it is of, and where they say so."""

    percent: float
    told: str
    source: str


@dataclass(frozen=True)
class Row:
    """A recipe's network.

    `multiply_adds` are those of a clip of 29 frames of `size` pixels a side, in evaluation; `published_multiply_adds`
    also count the frames that the published code computes and cuts off. `clips_per_s` is None where it is not measured.
    """

    recipe: str
    network: str
    boundary: str | None
    parameters: int
    multiply_adds: int
    published_multiply_adds: int
    accuracy: Accuracy | None
    profile: str
    size: int
    clips_per_s: float | None = None


def published(recipe: str) -> Accuracy | None:
    """What a recipe's own comment says of its accuracy; None where it says that none was published.

    Raises ValueError where it says neither.
    """
    text = about(recipe)
    if found := _PUBLISHED.search(text):
        return Accuracy(float(found["percent"]), found["told"], found["source"])
    if any(words in text for words in _UNPUBLISHED):
        return None
    raise UserError(
        f"the recipe {recipe} does not say what was published of it: its comment needs a sentence like "
        "'Published on LRW: 88.9 % (mpc001, 2022).' or 'No accuracy on LRW was published.'"
    )


def network_of(model: Mapping[str, Any]) -> str:
    """A model's configuration in a few words: its parts, each with the options in which it differs from the defaults.

    Dropout, which changes no network, is left out.
    """
    head = dict(model["head"])
    name = head.pop("name")
    neck = _part("neck", model.get("neck") or {}, {"channels": None, "norm": False})
    parts = [_part(model["trunk"], model, TRUNKS[model["trunk"]][1]), neck, _part(name, head, HEADS[name][1])]
    return f"{' + '.join(part for part in parts if part != 'neck')}, {model['activation']}"


def _part(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    told = []
    for key, default in defaults.items():
        value = options.get(key, default)
        value = tuple(value) if isinstance(value, list) else value
        if value != default and not key.endswith("dropout"):
            told.append(key if value is True else f"{key} {value}")
    return f"{name} ({', '.join(told)})" if told else name


def count(model: Mapping[str, Any], *, size: int = SIZE) -> tuple[int, int, int]:
    """Parameters, multiply-adds of a clip, and multiply-adds as published, of a network for 500 words.

    Shapes alone are computed. In training, the TCNs compute and cut off the frames that the published code computes and
    cuts off always.
    """
    # On the meta device, torch gives no indices where their number depends on values: here every frame is valid.
    with torch.device("meta"), fx_config.patch(meta_nonzero_assume_all_nonzero=True), torch.no_grad():
        network = new_model({**model, "init": "torch"}, num_classes=WORDS)  # which draws nothing there
        recurrent: list[int] = []
        for module in network.modules():
            if isinstance(module, nn.RNNBase):
                module.forward = partial(_recur, module, recurrent)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.forward = lambda x: x  # of which nothing is counted, and most of the time would be
        # Two clips: batch normalisation in training wants more than one value.
        clips, lengths = torch.zeros(2, 1, FRAMES, size, size), torch.tensor([FRAMES, FRAMES])
        totals = []
        for training in (False, True):
            recurrent.clear()
            with FlopCounterMode(display=False) as counter:
                network.train(training)(clips, lengths)
            totals.append((counter.get_total_flops() // 2 + sum(recurrent)) // 2)
    return sum(p.numel() for p in network.parameters()), *totals


def _recur(layers: nn.RNNBase, counted: list[int], x_BTC: Tensor) -> tuple[Tensor, None]:
    """In place of recurrent layers: what they would multiply, which torch counts frame by frame, or not at all."""
    matrices = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    counted.append(x_BTC.shape[0] * x_BTC.shape[1] * matrices)
    return x_BTC.new_zeros(*x_BTC.shape[:2], layers.hidden_size * (2 if layers.bidirectional else 1)), None


def measure(model: Mapping[str, Any], *, size: int = SIZE, device: torch.device) -> float:
    """Clips a second of a network in evaluation, in fp32, 8 clips of 29 frames at once: the median of three passes or
    more, after one that does not count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = place(new_model(model, num_classes=WORDS), device, precision="fp32").eval()
        clips = torch.randn(BATCH, 1, FRAMES, size, size).to(device)
    lengths = torch.full((BATCH,), FRAMES, device=device)
    seconds = []
    with torch.inference_mode(), reading(device, "fp32"):
        while len(seconds) < 4 or (sum(seconds) < 2 and len(seconds) < 50):
            began = time.perf_counter()
            network(clips, lengths).cpu()  # which waits for a GPU
            seconds.append(time.perf_counter() - began)
    return BATCH / sorted(seconds[1:])[len(seconds[1:]) // 2]


def rows(names: Sequence[str], *, device: torch.device | None = None) -> Iterator[Row]:
    """The networks of these recipes, one after another; timed on `device` where there is one.

    A name may also be a FILE.yaml. Recipes with the same network share its figures. Raises ValueError where there is no
    such recipe.
    """
    configs = [load_recipe(name) for name in names]  # all of them, before the first takes its time
    known: dict[str, tuple[int, int, int]] = {}
    speeds: dict[str, float] = {}
    for name, config in zip(names, configs, strict=True):
        size = config.augment.crop_size
        network = json.dumps([config.model, size], sort_keys=True)
        if network not in known:
            known[network] = count(config.model, size=size)
        if device is not None and network not in speeds:
            speeds[network] = measure(config.model, size=size, device=device)
        parameters, here, there = known[network]
        yield Row(
            recipe=config.recipe,
            network=network_of(config.model) + (f"; {size}x{size} pixels" if size != SIZE else ""),
            boundary=config.model.get("boundary"),
            parameters=parameters,
            multiply_adds=here,
            published_multiply_adds=there,
            accuracy=published(name) if name in recipes() else None,
            profile=config.profile,
            size=size,
            clips_per_s=speeds.get(network),
        )


# The columns of figures: heading, and what of a row stands below it.
_COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("parameters", lambda row: f"{row.parameters:,}"),
    ("G multiply-adds", lambda row: f"{row.multiply_adds / 1e9:.3f}"),
    ("as published", lambda row: f"{row.published_multiply_adds / 1e9:.3f}"),
]


def _speed(row: Row) -> str:
    return "-" if row.clips_per_s is None else f"{row.clips_per_s:.3g}"


def as_text(table: Sequence[Row]) -> list[str]:
    """A network's figures below their headings, and below these what it is."""
    columns = [*_COLUMNS, ("LRW", lambda row: f"{row.accuracy.told.partition(' %')[0]} %" if row.accuracy else "-")]
    if any(row.clips_per_s is not None for row in table):
        columns.append(("clips/s", _speed))
    columns += [("boundary", lambda row: row.boundary or "-"), ("profile", lambda row: row.profile)]
    cells = [["recipe", *(heading for heading, _ in columns)]]
    cells += [[row.recipe, *(cell(row) for _, cell in columns)] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = {0, len(columns) - 1, len(columns)}  # these to the left, figures to the right
    lines = [
        "  ".join(f"{cell:{'<' if n in words else '>'}{widths[n]}}" for n, cell in enumerate(line)).rstrip()
        for line in cells
    ]
    for number, row in reversed(list(enumerate(table, 2))):
        found = f"; {row.accuracy.told} ({row.accuracy.source})" if row.accuracy else ""
        lines[number:number] = textwrap.wrap(row.network + found, 110, initial_indent="  ", subsequent_indent="  ")
    return lines


def as_markdown(table: Sequence[Row]) -> list[str]:
    """The table of docs/models.md."""
    columns = [
        ("recipe", lambda row: f"`{row.recipe}`"),
        ("network", lambda row: row.network),
        ("boundary", lambda row: row.boundary or "-"),
        *_COLUMNS,
        ("published accuracy on LRW", lambda row: row.accuracy.told if row.accuracy else "-"),
        ("source", lambda row: row.accuracy.source if row.accuracy else "-"),
        ("profile", lambda row: row.profile),
    ]
    if any(row.clips_per_s is not None for row in table):
        columns.append(("clips/s", _speed))
    return _markdown([heading for heading, _ in columns], [[cell(row) for _, cell in columns] for row in table])


def trunks() -> list[str]:
    """Every trunk in Markdown, with its options and their defaults."""
    cells = []
    with torch.device("meta"):
        for name, (make, options) in TRUNKS.items():
            stem, trunk = make("relu", **options)
            size = sum(p.numel() for part in (stem, trunk) for p in part.parameters())
            cells.append([f"`{name}`", _options(options), f"{trunk.channels:,}", f"{size:,}"])
    return _markdown(["trunk", "options and defaults", "features of a frame", "parameters"], cells)


def heads() -> list[str]:
    """Every head in Markdown, with its options and their defaults."""
    cells = []
    with torch.device("meta"):
        for name, (make, options) in HEADS.items():
            head = make(512, WORDS, activation_name="relu", **options)
            size = sum(p.numel() for p in head.parameters())
            cells.append([f"`{name}`", _options(options), f"{size:,}"])
    return _markdown(["head", "options and defaults", "parameters, for 512 features and 500 words"], cells)


def _options(options: Mapping[str, Any]) -> str:
    """As they are written in a recipe."""
    written = {key: json.dumps(value).strip('"') for key, value in options.items()}
    return ", ".join(f"`{key}: {value}`" for key, value in written.items()) or "-"


def _markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in (headings, *cells)]
    return [rows[0], "|---" * len(headings) + "|", *rows[1:]]
