import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lipprep.cli import main
from lipprep.train import config, table
from lipprep.train.models import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def all_rows():
    """Every recipe's, by its name."""
    return {row.recipe: row for row in table.rows(config.recipes())}


def cells(lines, first_heading):
    """The rows of the Markdown table whose first heading is this, headings first, without its rule."""
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\|\n)+", "\n".join(lines) + "\n", re.MULTILINE)]
    (found,) = [rows for rows in tables if rows[0].startswith(f"| {first_heading} |")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (found[0], *found[2:])]


def test_the_page_of_networks_is_what_the_command_gives(all_rows):
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    stands = cells(page, "recipe")
    assert stands[0][-1] == "clips/s" and all(float(row[-1]) > 0 for row in stands[1:])
    assert [row[:-1] for row in stands] == cells(table.as_markdown(list(all_rows.values())), "recipe")
    assert cells(page, "trunk") == cells(table.trunks(), "trunk")
    assert cells(page, "head") == cells(table.heads(), "head")


def test_the_short_table_of_the_readme_agrees(all_rows):
    headings, *stands = cells((ROOT / "README.md").read_text().splitlines(), "recipe")
    assert len(stands) > 5
    for row in stands:
        said = dict(zip(headings, row, strict=True))
        known = all_rows[re.match("`(.+?)`", said["recipe"])[1]]
        assert said["parameters"] == f"{known.parameters:,}"
        accuracy = said["published accuracy on LRW"]
        if known.accuracy is None:
            assert accuracy == "-"
        else:
            assert float(accuracy.split(" %")[0]) == known.accuracy.percent
            assert ("boundaries" in accuracy) == (known.boundary is not None)


def test_every_network_that_is_told_boundaries_says_so_of_its_accuracy(all_rows):
    for row in all_rows.values():
        if row.accuracy is not None:
            assert 50 < row.accuracy.percent < 100
            assert ("boundaries" in row.accuracy.told) == (row.boundary is not None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "As in 2022. Published on LRW: 92.1 % with the boundaries known (Ma et al. 2022). 52.5 M.",
            table.Accuracy(92.1, "92.1 % with the boundaries known", "Ma et al. 2022"),
        ),
        ("X (Y, 2021). No accuracy on LRW was published. 39.7 M parameters.", None),
        ("Small. Not for LRW's 500 words.", None),
    ],
)
def test_accuracies_are_read_from_what_recipes_say(text, expected, monkeypatch):
    monkeypatch.setattr(table, "about", lambda recipe: text)
    assert table.published("mine") == expected


@pytest.mark.parametrize("text", ["A network.", "Published on LRW: 90 %.", "Published on LRW: about 90 % (me)."])
def test_a_recipe_that_does_not_say_what_was_published_is_named(text, monkeypatch):
    monkeypatch.setattr(table, "about", lambda recipe: text)
    with pytest.raises(ValueError, match=r"the recipe mine .* 'No accuracy on LRW was published\.'"):
        table.published("mine")


def test_networks_cost_what_the_published_code_costs(all_rows):
    # G multiply-adds of a clip, as measured of that code.
    published = {
        "lrw_resnet18_mstcn": 10.284,
        "lrw_resnet18_mstcn_prelu": 10.284,
        "lrw_resnet18_dctcn": 10.640,
        "lrw_resnet18_dctcn_boundary": 10.640,
        "lrw_snv1x_dsmstcn3x": 1.244,
        "lrw_snv1x_tcn2x": 1.292,
        "lrw_snv1x_tcn1x": 1.106,
        "lrw_snv05x_tcn2x": 0.760,
        "lrw_snv05x_tcn1x": 0.574,
        "lrw_senet18_mstcn": 10.287,
        "lrw_snv2_2x_mstcn": 4.608,
        "lrw_efficientnet_mstcn": 1.656,
        "euan_resnet34_temporal_conv": 28.57,
    }
    costs = {name: all_rows[name].published_multiply_adds / 1e9 for name in published}
    assert costs == pytest.approx(published, rel=3e-4, abs=5e-4)


def test_what_the_published_code_cuts_off_is_counted_apart(all_rows):
    mstcn = all_rows["lrw_resnet18_mstcn"]
    # Twice in each of four blocks, whose dilations double, kernels of 3, 5 and 7 give 256 channels more than 29 frames.
    surplus = sum(
        256 * width * k * 2**block * (k - 1)
        for block in range(4)
        for k in (3, 5, 7)
        for width in (512 if block == 0 else 768, 768)
    )
    assert mstcn.published_multiply_adds - mstcn.multiply_adds == surplus
    same = all_rows["lrw_resnet18_bigru"]
    assert same.published_multiply_adds == same.multiply_adds


@pytest.mark.parametrize("head", [{"name": "bigru", "hidden": 5}, {"name": "bilstm", "hidden": 6, "independent": True}])
def test_recurrent_layers_are_counted_as_torch_counts_them_frame_by_frame(head):
    model = {"trunk": "shufflenetv2", "width_mult": 0.5, "activation": "relu", "neck": {"channels": 7}, "head": head}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(model, 500).eval()(torch.zeros(1, 1, 29, 40, 40), torch.tensor([29]))
    assert table.count(model, size=40)[1] == counter.get_total_flops() / 2


def test_convolutions_and_matrix_products_are_counted():
    model = {"trunk": "compact", "activation": "relu", "head": {"name": "compact", "num_layers": 1, "channels": 128}}
    parameters, here, published = table.count(model, size=32)
    network = build(model, 500)
    assert parameters == sum(p.numel() for p in network.parameters())
    # By how many places of how many frames each weight is seen: 16x16 pixels after halving, 8x8, 4x4, 2x2, 1x1.
    side = {"frontend3D.conv": 8, "trunk.layer1": 4, "trunk.layer2": 2, "trunk.layer3": 1, "tcn.convs": 1}
    expected = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            (places,) = [pixels**2 for start, pixels in side.items() if name.startswith(start)]
            expected += module.weight.numel() * places * 29
    assert here == published == expected + 128 * 500


def test_networks_are_told_by_their_names_and_what_differs():
    recipe = config.load_recipe("lrw_resnet34_bilstm").model
    neck = "neck (channels 256, norm)"
    head = "bilstm (independent, consensus posteriors)"
    assert table.network_of(recipe) == f"resnet34 (preactivation) + {neck} + {head}, relu"
    narrow = config.load_recipe("lrw_resnet18_mstcn", ["model.head.kernel_sizes=[3,5]", "model.head.dropout=0"]).model
    assert table.network_of(narrow) == "resnet18 + mstcn (kernel_sizes (3, 5)), swish"


def call(*args, code=0):
    result = CliRunner().invoke(main, ["models", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_lists_measures_and_explains(tmp_path):
    lines = call("compact", "lrw_snv05x_tcn1x").splitlines()
    assert re.split("  +", lines[0])[1:4] == ["parameters", "G multiply-adds", "as published"]
    assert lines[3].split() == ["lrw_snv05x_tcn1x", "2,909,852", "0.561", "0.574", "79.9", "%", "-", "lrw2021"]
    assert lines[4] == "  shufflenetv2 (width_mult 0.5) + tcn, prelu; 79.9 %, after distillation (mpc001, 2021)"

    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "profile: fixed\naugment: {crop_size: 40}\nmodel: {trunk: compact, activation: relu, head: {name: tcn}}\n"
    )
    (row,) = json.loads(call(str(mine), "--measure", "--device", "cpu", "--json"))
    assert row["clips_per_s"] > 0 and row["accuracy"] is None and row["size"] == 40
    assert row["network"] == "compact + tcn, relu; 40x40 pixels"

    assert "did you mean compact?" in call("compat", code=1)
    assert "one or the other" in call("--json", "--markdown", code=2)
    mine.write_text(mine.read_text().replace("tcn", "lstm"))
    assert "unknown head 'lstm'" in call(str(mine), code=1)


def test_help_has_examples_and_imports_nothing_slow():
    code = "import sys, lipprep.train.cli_models; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tqdm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "lipprep models --json" in call("--help")
