"""Our networks against straightforward builds of the same, benchmarks/networks, on many small configurations."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lipprep.train.models import HEADS, TRUNKS, build


def straightforward():
    """The package benchmarks/networks, which is not installed."""
    folder = Path(__file__).parents[2] / "benchmarks" / "networks"
    where = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location("straightforward_networks", folder / "__init__.py", **where)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


network = straightforward().network

TCN = {"num_layers": 2, "channels": 6, "dropout": 0.0}
DCTCN = {
    "block_layers": [2, 1],
    "growth_rates": [6, 9],
    "kernel_sizes": [3, 5, 7],
    "dilations": [1, 3],
    "reduced_channels": 16,
    "dropout": 0.0,
}
RNN = {"hidden": 5, "num_layers": 2, "dropout": 0.0}
# Kernels that 9 frames are enough for: in training, how many zeros are put to fewer shows in the norms.
TEMPORAL_CONV = {"kernel_size": 2, "channels": [6, 7], "hidden": 5}
# (trunk and its options, activation, head, what else), after published ones first: with these, the order of the keys is
# the published one too.
PUBLISHED = [
    ({"trunk": "resnet18"}, "prelu", {"name": "mstcn", **TCN}, {}),
    ({"trunk": "resnet18"}, "swish", {"name": "dctcn", **DCTCN}, {"boundary": "mpc001"}),
    ({"trunk": "senet18"}, "prelu", {"name": "mstcn", **TCN, "kernel_sizes": [3, 5]}, {}),
    ({"trunk": "shufflenetv2", "width_mult": 0.5}, "prelu", {"name": "tcn", **TCN}, {}),
    ({"trunk": "shufflenetv2", "width_mult": 1.0}, "relu", {"name": "dsmstcn", **TCN}, {}),
    ({"trunk": "shufflenetv2", "width_mult": 1.5}, "prelu", {"name": "dstcn", **TCN}, {"boundary": "times"}),
    ({"trunk": "shufflenetv2", "width_mult": 2.0}, "prelu", {"name": "mstcn", **TCN}, {}),
    ({"trunk": "efficientnet_b3"}, "prelu", {"name": "mstcn", **TCN}, {}),
]
OTHERS = [
    ({"trunk": "compact"}, "swish", {"name": "mstcn", **TCN, "kernel_sizes": [5]}, {}),
    ({"trunk": "compact"}, "prelu", {"name": "dctcn", **DCTCN, "squeeze_excitation": False}, {"boundary": "vipl"}),
    ({"trunk": "compact"}, "relu", {"name": "dctcn", **DCTCN, "reduced_channels": 32}, {}),
    ({"trunk": "compact"}, "swish", {"name": "dsmstcn", **TCN}, {"boundary": "vipl"}),
    ({"trunk": "compact"}, "prelu", {"name": "tcn", **TCN, "channels": 128, "kernel_size": 5}, {}),
    ({"trunk": "compact"}, "relu", {"name": "dstcn", **TCN, "kernel_size": 7}, {"neck": {"channels": 6}}),
    ({"trunk": "compact"}, "prelu", {"name": "compact", **TCN}, {"boundary": "times"}),
    ({"trunk": "compact"}, "relu", {"name": "compact", **TCN, "channels": 128}, {"neck": {"norm": True}}),
    ({"trunk": "compact"}, "relu", {"name": "bigru", **RNN}, {"boundary": "vipl"}),
    ({"trunk": "compact"}, "relu", {"name": "bilstm", **RNN, "independent": True, "consensus": "posteriors"}, {}),
    (
        {"trunk": "compact"},
        "swish",
        {"name": "transformer", "channels": 8, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
        {},
    ),
    ({"trunk": "compact"}, "prelu", {"name": "temporal_conv", **TEMPORAL_CONV}, {"boundary": "vipl"}),
    ({"trunk": "senet18", "gate_bias": True}, "relu", {"name": "bigru", **RNN, "num_layers": 1}, {}),
    (
        {"trunk": "resnet34", "preactivation": True, "stem_bias": True},
        "relu",
        {"name": "temporal_conv", **TEMPORAL_CONV},
        {"neck": {"channels": 9, "norm": True}},
    ),
    ({"trunk": "resnet34"}, "relu", {"name": "tcn", **TCN}, {}),
    ({"trunk": "resnet18", "preactivation": True}, "prelu", {"name": "tcn", **TCN}, {}),
]


def name_of(case) -> str:
    trunk, activation, head, others = case
    return "-".join([trunk["trunk"], activation, head["name"], *others])


def model_of(case) -> dict:
    trunk, activation, head, others = case
    return {**trunk, "activation": activation, "head": head, **others}


def settled(model: nn.Module, case) -> nn.Module:
    """With nothing left to chance, the statistics of the last batch kept, and in double precision where it can be."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop"):
            module.drop = 0.0
    return model.to(precision(case))


def shaken(model: nn.Module) -> nn.Module:
    """With norms and slopes that are not as they are made."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0, 0.5)
    return model


def precision(case) -> torch.dtype:
    """In training, norms over three clips make much of the last digits; recurrence is in single precision always."""
    return torch.float32 if case[2]["name"] in ("bigru", "bilstm") else torch.float64


def batch(case) -> tuple:
    """Three clips, two of them padded."""
    trunk, _, _, others = case
    random = {"generator": torch.Generator().manual_seed(2), "dtype": precision(case)}
    side = 48 if trunk["trunk"] == "efficientnet_b3" else 32  # nothing would be left of less
    lengths = torch.tensor([9, 4, 6])
    x = torch.randn(3, 1, 9, side, side, **random)
    for clip, length in zip(x, lengths, strict=True):
        clip[:, length:] = 0
    boundary = (torch.rand(3, 9, 1, **random) < 0.5).to(x.dtype) if "boundary" in others else None
    return x, lengths, boundary


def owners(state: dict) -> dict[str, str]:
    """Each key with the first one that has the same tensor."""
    first = {}
    return {key: first.setdefault(tensor.data_ptr(), key) for key, tensor in state.items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = max(1.0, theirs.abs().max().item())
    tolerance = 1e-6 if theirs.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("case", PUBLISHED + OTHERS, ids=name_of)
@torch.no_grad()
def test_weights_pass_either_way_and_give_the_same_output(case):
    ours, theirs = settled(build(model_of(case), 7), case), settled(shaken(network(model_of(case), 7)), case)
    if case in PUBLISHED:
        assert owners(ours.state_dict()) == owners(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, lengths, boundary = batch(case)

    assert_close(ours.train()(x, lengths, boundary), theirs.train()(x, lengths, boundary))
    found = ours.state_dict()
    for key, statistics in theirs.state_dict().items():
        assert_close(found[key], statistics)
    logits = theirs.eval()(x, lengths, boundary)
    assert_close(ours.eval()(x, lengths, boundary), logits)
    assert logits.std(0).max() > 1e-2  # they tell the clips from each other
    # Where a head sees a boundary, to know none is to see zeros.
    few = x[1:, :, :6], lengths[1:]
    assert_close(ours(*few), theirs(*few))


def test_every_trunk_head_and_activation_is_compared():
    cases = PUBLISHED + OTHERS
    assert {trunk["trunk"] for trunk, *_ in cases} == set(TRUNKS)
    assert {head["name"] for _, _, head, _ in cases} == set(HEADS)
    options = {name: set().union(*(trunk for trunk, *_ in cases if trunk["trunk"] == name)) for name in TRUNKS}
    for name in set(TRUNKS) - {"resnet18", "resnet34"}:  # which are one
        assert options[name] == {"trunk", *TRUNKS[name][1]}
    assert options["resnet18"] | options["resnet34"] == {"trunk", *TRUNKS["resnet18"][1]}
