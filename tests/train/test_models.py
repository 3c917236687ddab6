import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lipprep.train.boundary import boundary_vectors
from lipprep.train.config import load_recipe
from lipprep.train.models import build
from lipprep.train.models.tcn import conv_norm, same_conv

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
OURS = (
    "lrw_resnet18_mstcn_prelu",
    "lrw_snv05x_tcn1x",
    "lrw_snv1x_dsmstcn3x",
    "lrw_senet18_mstcn",
    "lrw_resnet18_dctcn_boundary",
)
SMALL = {"trunk": "shufflenetv2", "width_mult": 0.5, "activation": "prelu", "head": {"name": "tcn"}}
COMPACT = {"trunk": "compact", "activation": "relu", "head": {"name": "compact"}}


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """Small tensors as stored, large ones drawn from a generator seeded with their name."""
    tensors = json.loads((GOLDEN / f"{name}.json").read_text())["tensors"]
    stored = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    weights = {}
    for key, tensor in tensors.items():
        source, shape = tensor.get("alias_of", key), tensor["shape"]
        if len(shape) < 2:
            weights[key] = torch.from_numpy(stored[f"w/{source}"])
        else:
            rng = np.random.default_rng(zlib.crc32(source.encode()))
            drawn = rng.standard_normal(shape, dtype=np.float32)
            weights[key] = torch.from_numpy(drawn * np.float32(math.sqrt(2 / math.prod(shape[1:]))))
    return weights


@pytest.mark.parametrize("name", OURS)
def test_published_checkpoint_loads_and_gives_the_published_output(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    model = build(load_recipe(name).model, 500).eval()
    state = model.state_dict()
    assert list(state) == list(golden["tensors"])
    first_of = {}
    for key, tensor in golden["tensors"].items():
        assert list(state[key].shape) == tensor["shape"]
        assert str(state[key].dtype) == f"torch.{tensor['dtype']}"
        owner = first_of.setdefault(state[key].data_ptr(), key)
        assert tensor.get("alias_of", key) == owner
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]

    model.load_state_dict(published_weights(name), strict=True)
    video = np.load(GOLDEN / "input.npz", allow_pickle=False)["video"]
    x = ((torch.from_numpy(video).float() / 255 - 0.421) / 0.165)[:, None]
    x[1, :, golden["lengths"][1] :] = 0
    lengths = torch.tensor(golden["lengths"])
    expected = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    boundary = None
    if golden["boundary"]:
        boundary = boundary_vectors(np.array(golden["boundary"]), 29)
    with torch.inference_mode():
        features = model.extract_features(x, lengths)
        logits = model.read_features(features, lengths, boundary)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-3)
    if "features" in expected:
        seen = features if boundary is None else torch.cat([features, boundary], dim=2)
        np.testing.assert_allclose(seen, expected["features"].astype(np.float32), rtol=0, atol=1e-2)


# Recipe, parameters, state_dict keys, as measured of the published code; multiply-adds are in test_table.py.
@pytest.mark.parametrize(
    ("recipe", "parameters", "keys"),
    [
        ("lrw_resnet18_mstcn", 36_361_396, 298),
        ("lrw_resnet18_mstcn_prelu", 36_374_516, 343),
        ("lrw_resnet18_dctcn", 52_548_532, 752),
        ("lrw_resnet18_dctcn_boundary", 52_549_044, 752),
        ("lrw_snv1x_dsmstcn3x", 9_264_200, 634),
        ("lrw_snv1x_tcn2x", 9_136_480, 473),
        ("lrw_snv1x_tcn1x", 3_821_664, 473),
        ("lrw_snv05x_tcn2x", 8_224_668, 473),
        ("lrw_snv05x_tcn1x", 2_909_852, 473),
        ("lrw_senet18_mstcn", 36_461_556, 359),
        ("lrw_snv2_2x_mstcn", 37_615_968, 543),
        ("lrw_efficientnet_mstcn", 39_670_508, 787),
        ("lrw_resnet18_bigru", 59_431_092, None),
        ("lrw_resnet18_bigru_boundary", 59_437_236, None),
        ("lrw_senet18_bigru", 59_520_172, None),
        ("lrw_senet18_bigru_boundary", 59_526_316, None),
    ],
)
def test_networks_have_the_published_size(recipe, parameters, keys):
    with torch.device("meta"):
        model = build({**load_recipe(recipe).model, "init": "torch"}, 500)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert keys is None or len(model.state_dict()) == keys


def test_initialisation_follows_the_fan():
    model = build(SMALL, 500)
    stem = model.frontend3D[0].weight
    assert stem.shape == (24, 1, 5, 7, 7)
    assert stem.std().item() == pytest.approx(math.sqrt(2 / (5 * 7 * 7 * 24)), rel=0.05)
    output = model.tcn.tcn_output.weight
    assert output.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)


def test_layers_may_keep_the_weights_that_torch_draws():
    model = build({**SMALL, "init": "torch"}, 500)
    output = model.tcn.tcn_output.weight
    assert output.abs().max() <= 1 / math.sqrt(256) and output.std().item() == pytest.approx(
        1 / math.sqrt(3 * 256), rel=0.05
    )
    with pytest.raises(ValueError, match="unknown init 'he': known are published, torch"):
        build({**SMALL, "init": "he"}, 500)


def test_training_statistics_include_the_padded_frames_as_published():
    torch.manual_seed(0)
    conv, norm, x = same_conv(3, 4, 5, dilation=2), nn.BatchNorm1d(4), torch.randn(2, 3, 9)
    wide = nn.functional.conv1d(x, conv.weight, conv.bias, padding=8, dilation=2)
    reference = nn.BatchNorm1d(4)
    expected = reference(wide)[:, :, 4:-4]
    torch.testing.assert_close(conv_norm(conv, norm, x), expected)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    norm.eval(), reference.eval()
    torch.testing.assert_close(conv_norm(conv, norm, x), reference(wide)[:, :, 4:-4])


def clips(batch_size, num_frames, size=32, seed=0):
    return torch.randn(batch_size, 1, num_frames, size, size, generator=torch.Generator().manual_seed(seed))


def settle(model):
    """Give batch norm the statistics of real activations and some bias, so that a leak shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, std=0.3, generator=generator)
    with torch.no_grad():
        model.train()(clips(4, 9, seed=5), torch.tensor([9, 9, 7, 5]))
    return model


SMALL_HEADS = [
    *({"name": name, "channels": 8, "num_layers": 2} for name in ("mstcn", "dsmstcn", "tcn", "dstcn", "compact")),
    {"name": "dctcn", "block_layers": [2, 1], "growth_rates": [6, 6], "reduced_channels": 16},
    {"name": "bigru", "hidden": 6, "num_layers": 2},
    {"name": "bilstm", "hidden": 6, "independent": True, "consensus": "posteriors"},
    {"name": "temporal_conv", "channels": [8, 12], "hidden": 6},
    {"name": "transformer", "channels": 12, "num_heads": 3, "num_layers": 2},
]
TRUNKS_WITH_OPTIONS = [
    {"trunk": "resnet18"},
    {
        "trunk": "resnet34",
        "preactivation": True,
        "stem_bias": True,
        "neck": {"channels": 16, "norm": True, "dropout": 0.1},
    },
    {"trunk": "senet18", "gate_bias": True},
    {"trunk": "shufflenetv2", "width_mult": 0.5},
    {"trunk": "efficientnet_b3"},
    {"trunk": "compact"},
]


# Every head on the fastest trunk, without a neck and with one, every trunk under the fastest head: in between stand
# features (B, T, C) alone.
NECKED = {"trunk": "compact", "neck": {"channels": 16, "norm": True, "dropout": 0.1}}
COMBINATIONS = [(trunk, head) for trunk in (TRUNKS_WITH_OPTIONS[-1], NECKED) for head in SMALL_HEADS]
COMBINATIONS += [(trunk, SMALL_HEADS[2]) for trunk in TRUNKS_WITH_OPTIONS]


@pytest.mark.parametrize(("trunk", "head"), COMBINATIONS, ids=lambda part: part.get("trunk", part.get("name")))
def test_any_trunk_goes_with_any_head_and_with_a_word_boundary(trunk, head):
    torch.manual_seed(0)
    size = 48 if trunk["trunk"] == "efficientnet_b3" else 32
    config = {**trunk, "activation": "swish", "boundary": "times", "head": head}
    model = build(config, 7)
    lengths = torch.tensor([4, 2])
    features = model.extract_features(clips(2, 4, size), lengths)
    assert features.shape == (2, 4, model.features)
    boundary = boundary_vectors(np.array([[1, 3], [0, 2]]), 4)
    logits = model(clips(2, 4, size), lengths, boundary)
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([3, 5])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    stem = model.frontend3D.get_submodule("conv" if trunk["trunk"] == "compact" else "0")
    assert stem.weight.grad.abs().sum() > 0
    model.eval()
    assert torch.isfinite(model(clips(1, 1, size), torch.tensor([1]))).all()
    with torch.inference_mode():
        known, unknown, none = (
            model.read_features(features, lengths, b) for b in (boundary, torch.zeros_like(boundary), None)
        )
    torch.testing.assert_close(unknown, none)
    assert not torch.equal(known, unknown)
    assert model.normalised == (head["name"] == "bilstm")
    if model.normalised:  # a mean of log posteriors is no distribution, but it is one of them if there is one frame
        torch.testing.assert_close(model(clips(1, 1, size), torch.tensor([1])).exp().sum(), torch.tensor(1.0))
    assert model.classifier in dict(model.named_modules())
    assert model.get_submodule(model.classifier).weight.shape[0] == 7


@pytest.mark.parametrize("trunk", ["resnet18", "shufflenetv2"])
def test_published_networks_pool_over_valid_frames_only(trunk):
    # Kernels of one frame: padding can leak through the stem alone, which reaches two frames.
    head = {"name": "mstcn", "kernel_sizes": [1], "channels": 8, "num_layers": 2}
    model = settle(build({"trunk": trunk, "activation": "prelu", "head": head}, 7)).eval()
    x, lengths = clips(2, 9), torch.tensor([9, 4])
    changed = x.clone()
    changed[1, :, 6:] = 5.0
    with torch.inference_mode():
        logits, after = model(x, lengths), model(changed, lengths)
        torch.testing.assert_close(logits, after, rtol=0, atol=1e-5)
        changed[1, :, 5] = 5.0
        assert (logits - model(changed, lengths))[1].abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_compact_ignores_padding_and_its_amount(training):
    torch.manual_seed(0)
    model = settle(build(COMPACT | {"head": {"name": "compact", "dropout": 0.0}}, 7)).train(training)
    x, lengths = clips(3, 9), torch.tensor([9, 5, 1])
    longer = torch.full((3, 1, 14, 32, 32), 7.0)
    for clip, length in enumerate(lengths):
        longer[clip, :, :length] = x[clip, :, :length]
    logits, after = model(x, lengths), model(longer, lengths)
    torch.testing.assert_close(logits, after, rtol=0, atol=1e-4)
    features = model.extract_features(longer, lengths)
    for clip, length in enumerate(lengths):
        assert features[clip, :length].any(1).all() and not features[clip, length:].any()
    if not training:
        for clip, length in enumerate(lengths):
            alone = model(x[clip : clip + 1, :, :length], lengths[clip : clip + 1])
            torch.testing.assert_close(logits[clip : clip + 1], alone, rtol=0, atol=1e-4)


def test_compact_is_small_and_starts_to_learn_at_once():
    torch.manual_seed(0)
    model = build(COMPACT, 4)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    labels = torch.arange(8) % 4
    patterns = clips(4, 6, seed=2)
    x = patterns[labels] + 0.5 * clips(8, 6, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lengths = torch.tensor([6, 5] * 4)
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(4)


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({"trunk": "vgg"}, "resnet18, resnet34, senet18, shufflenetv2, efficientnet_b3, compact"),
        ({"activation": "gelu"}, "prelu, relu, swish"),
        (
            {"head": {"name": "lstm"}},
            "tcn, dstcn, mstcn, dsmstcn, dctcn, bigru, bilstm, temporal_conv, transformer, compact",
        ),
        ({"head": {"name": "dctcn", "growth_rates": [384, 384, 384, 100]}}, "growth_rates 100 .* 3 kernel_sizes"),
        ({"head": {"name": "dctcn", "growth_rates": [384]}}, "4 block_layers, and 1 growth_rates"),
        ({"head": {"name": "dctcn", "reduced_channels": 8}}, "16 or more"),
        ({"head": {"name": "transformer", "channels": 10, "num_heads": 3}}, "no multiple of its 3 num_heads"),
        ({"head": {"name": "temporal_conv", "channels": [8]}}, "give two"),
        ({"head": {"name": "bigru", "consensus": "votes"}}, "scores, posteriors"),
        ({"boundary": "lrw"}, "mpc001, vipl, times"),
        ({"neck": {"width": 3}}, "channels, dropout, norm"),
        ({"gate_bias": True}, "the trunk resnet18 has no gate_bias: that is of senet18"),
        ({"head": {"name": "tcn", "kernel_sizes": [3]}}, "channels, dropout, kernel_size, num_layers"),
        ({"head": {"name": "mstcn", "kernel_sizes": [3, 4]}}, "odd"),
        ({"trunk": "shufflenetv2", "width_mult": 0.7}, "0.5, 1.0, 1.5, 2.0"),
        ({"width_mult": 0.5}, "the trunk resnet18 has no width_mult: that is of shufflenetv2"),
        ({"head": {"name": "tcn", "droput": 0}}, "did you mean dropout"),
        ({"stem": "conv3d"}, "activation, boundary, head, init, neck, preactivation, stem_bias, trunk"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(changed, known):
    with pytest.raises(ValueError, match=known):
        build({"trunk": "resnet18", "activation": "prelu", "head": {"name": "mstcn"}} | changed, 5)


@pytest.mark.parametrize("missing", ["trunk", "activation", "head"])
def test_what_is_required_is_named(missing):
    config = {key: value for key, value in COMPACT.items() if key != missing}
    with pytest.raises(ValueError, match=missing):
        build(config, 5)
