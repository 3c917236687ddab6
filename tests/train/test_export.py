"""What is exported answers as the network does, and says of itself what it takes to run it."""

import copy
import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.export.passes import move_to_device_pass

from lipprep.cli import main
from lipprep.stages.lrw import is_lrw
from lipprep.train import export
from lipprep.train.augment import eval_batch
from lipprep.train.boundary import FORMULAS
from lipprep.train.card import BOUNDARIES, model_card
from lipprep.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lipprep.train.config import AugmentOptions, Config, as_plain, config_from
from lipprep.train.device import load_model
from lipprep.train.licence import is_of_lrw
from lipprep.train.models import HEADS, TRUNKS, build

LAYERS = {"channels": 8, "num_layers": 2}
SMALL = {
    "tcn": LAYERS,
    "dstcn": LAYERS,
    "mstcn": LAYERS,
    "dsmstcn": LAYERS,
    "compact": {"channels": 128, "num_layers": 2},  # as many as the trunk has, so that no layer is between them
    "dctcn": {"block_layers": [2, 1], "growth_rates": [6, 6], "reduced_channels": 16},
    "bigru": {"hidden": 6, "num_layers": 2},
    "bilstm": {"hidden": 6, "independent": True, "consensus": "posteriors"},
    "temporal_conv": {"channels": [8, 12], "hidden": 6},
    "transformer": {"channels": 12, "num_heads": 3, "num_layers": 2},
}
# Every head on the smallest trunk, and every trunk under the smallest head; each head is told a boundary, or is not.
WITH_HEADS = [
    {"trunk": "compact", "activation": "swish", "head": {"name": name, **options}, "boundary": boundary}
    for (name, options), boundary in zip(SMALL.items(), 5 * ["times", None], strict=True)
]
WITH_HEADS.append({"trunk": "compact", "activation": "relu", "head": {"name": "bilstm", "hidden": 6}})
PECULIAR = ("compact", "bigru", "temporal_conv", "transformer")  # what these do is not the same for every length
WITH_TRUNKS = [
    {**trunk, "activation": "prelu", "head": {"name": "tcn", **LAYERS}}
    for trunk in (
        {"trunk": "resnet18", "neck": {"channels": 16, "norm": True}},
        {"trunk": "resnet34", "preactivation": True, "stem_bias": True},
        {"trunk": "senet18"},
        {"trunk": "shufflenetv2", "width_mult": 0.5},
        {"trunk": "efficientnet_b3"},
        {"trunk": "compact"},
    )
]


@pytest.fixture(autouse=True)
def untraced(monkeypatch):
    """Tracing logs all that it does for those who ask, as pytest does: it takes several times as long then."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


def told(model) -> str:
    return "-".join([model["trunk"], model["head"]["name"], "boundary" if model.get("boundary") else ""]).rstrip("-")


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation, with norms that make something of zeros, so that padding shows where it leaks."""
    random = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3, generator=random)
            nn.init.normal_(module.running_mean, std=0.3, generator=random)
    return model.eval()


def checkpoint_of(model: dict, **changed) -> Checkpoint:
    torch.manual_seed(0)
    words = ["down", "grow", "shrink", "up"]
    side = 48 if model["trunk"] == "efficientnet_b3" else 32
    config = Config(recipe="mine", profile="lrw2022", model=model, augment=AugmentOptions(crop_size=side))
    made = Checkpoint(
        model=shaken(build(model, len(words))).state_dict(),
        optimizer={},
        step=7,
        epoch=1,
        batch=0,
        best=0.75,
        config=as_plain(config),
        labels=words,
        parameters={"profile": "lrw2022", "crop_size": 96, "exact": True},
        fps=25.0,
        dataset="0123abcd",
    )
    return dataclasses.replace(made, **changed)


COMPACT = {"trunk": "compact", "activation": "relu", "head": {"name": "compact", **LAYERS}}


def call(*args, code: int = 0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def clips(model, lengths: list[int], side: int) -> tuple[torch.Tensor, ...]:
    """A batch whose padding is of zeros, and one frame of words in the middle of each clip."""
    video = torch.randn(len(lengths), 1, max(lengths), side, side, generator=torch.Generator().manual_seed(5))
    boundary = torch.zeros(len(lengths), max(lengths), 1)
    for clip, length in enumerate(lengths):
        video[clip, :, length:] = 0
        boundary[clip, length // 2] = 1
    inputs = (video, torch.tensor(lengths))
    return inputs if model.boundary is None else (*inputs, boundary)


def test_every_head_and_trunk_is_exported():
    assert {model["head"]["name"] for model in WITH_HEADS} == set(HEADS)
    assert {model["trunk"] for model in WITH_TRUNKS} == set(TRUNKS)


def assert_traced(model: dict) -> None:
    side = 48 if model["trunk"] == "efficientnet_b3" else 32
    torch.manual_seed(0)
    network = shaken(build(model, 7))
    graph = export.captured(network, AugmentOptions(crop_size=side)).module()
    for lengths in ([1], [6, 2, 4], [33, 9]):
        inputs = clips(network, lengths, side)
        with torch.inference_mode():
            expected = network(*inputs)
            torch.testing.assert_close(graph(*inputs), expected, rtol=0, atol=1e-4)
    assert expected.std(0).max() > 1e-4  # it tells the two clips from each other


@pytest.mark.parametrize("model", [m for m in WITH_HEADS if m["head"]["name"] in PECULIAR], ids=told)
def test_a_graph_reads_any_number_of_clips_and_frames(model):
    assert_traced(model)


@pytest.mark.cluster
@pytest.mark.parametrize(
    "model", [*(m for m in WITH_HEADS if m["head"]["name"] not in PECULIAR), *WITH_TRUNKS], ids=told
)
def test_so_does_that_of_any_other_head_and_trunk(model):
    assert_traced(model)


@pytest.mark.cluster
@pytest.mark.parametrize("model", [*WITH_HEADS, *WITH_TRUNKS], ids=told)
@pytest.mark.parametrize("format_name", ["onnx", "torch"])
def test_any_network_becomes_a_file_that_answers_as_it_does(model, format_name, tmp_path):
    # Whoever writes the file compares it: here it is that all of them can be written, without a warning.
    assert export.FORMATS[format_name](checkpoint_of(model), tmp_path / "reader") == [tmp_path / "reader"]


@pytest.mark.parametrize("format_name", ["onnx", "torch", "safetensors"])
def test_a_card_tells_how_to_run_what_lies_beside_it(format_name, trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = json.loads(
        call("export", trained_run, "--format", format_name, "-o", "reader.bin", "--json").stdout.splitlines()[-1]
    )
    beside = ["reader.bin.json"] if format_name == "safetensors" else []
    assert written["files"] == ["reader.bin", *beside, "reader.bin.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written["files"])

    checkpoint = load_checkpoint(trained_run / "best.pt")
    crop = np.random.default_rng(0).integers(0, 256, (9, 96, 96), dtype=np.uint8)
    normalise, run = re.findall(r"```python\n(.*?)```", Path("reader.bin.md").read_text(), re.DOTALL)
    known = {"crop": crop, "np": np, "torch": torch}
    exec(normalise, known)
    with torch.inference_mode():
        exec(run, known)
        options, length = config_from(checkpoint.config).augment, torch.tensor([9])
        x = eval_batch(torch.from_numpy(crop)[None], length, options)
        expected = load_model(checkpoint, torch.device("cpu"))(x, length)
    np.testing.assert_allclose(known["video"], x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(known["logits"], expected, rtol=0, atol=1e-4)

    if format_name == "onnx":
        import onnx

        model = onnx.load("reader.bin")
        onnx.checker.check_model(model)
        fields = {prop.key: prop.value for prop in model.metadata_props}
        fields = {
            k: v if k in ("recipe", "profile", "normalise", "lipprep") else json.loads(v) for k, v in fields.items()
        }
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        assert shapes == {
            "video": ["batch", 1, "frames", 72, 72],
            "lengths": ["batch"],
            "logits": ["batch", 4],
        }
        assert str(Path(export.__file__).parent) not in str(model)
    elif format_name == "torch":
        extra = {export.PROGRAM_FIELDS: ""}
        program = torch.export.load("reader.bin", extra_files=extra)
        # As the card says, but to a device that every machine has.
        moved = move_to_device_pass(program, "meta").module()
        assert moved(x.to("meta"), length.to("meta")).device.type == "meta"
        fields = json.loads(extra[export.PROGRAM_FIELDS])
    else:
        fields = json.loads(Path("reader.bin.json").read_text())
    assert fields["labels"] == checkpoint.labels and fields["recipe"] == "compact" and fields["fps"] == 25
    assert fields["profile"] == "lrw2021" and fields["crop_size"] == 72 and fields["mean"] == 0.421
    assert fields["normalise"] == normalise.strip() and fields.get("boundary") is None
    assert (fields["temperature"], fields["threshold"]) == (checkpoint.temperature, checkpoint.threshold)


def test_a_boundary_is_an_input_and_the_moving_average_is_taken(tmp_path):
    import onnxruntime

    model = {"trunk": "compact", "activation": "relu", "head": {"name": "bigru", "hidden": 6, "num_layers": 1}}
    model["boundary"] = "vipl"
    checkpoint = checkpoint_of(model)
    average = {name: weight * 0.5 for name, weight in checkpoint.model.items()}
    checkpoint = dataclasses.replace(checkpoint, ema=average)
    export.to_onnx(checkpoint, tmp_path / "reader.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "reader.onnx")
    assert [(given.name, given.shape[-1]) for given in session.get_inputs()] == [
        ("video", 32),
        ("lengths", "batch"),
        ("boundary", 1),
    ]
    assert session.get_modelmeta().custom_metadata_map["boundary"] == "vipl"
    network = load_model(checkpoint, torch.device("cpu"))
    inputs = clips(network, [7, 3], 32)
    names = [given.name for given in session.get_inputs()]
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, network(*inputs), rtol=0, atol=1e-4)
        assert np.abs(logits - network(*inputs[:2]).numpy()).max() > 1e-4


@pytest.mark.parametrize("format_name", [pytest.param("onnx", marks=pytest.mark.cluster), "torch"])
def test_what_answers_otherwise_is_not_kept(format_name, tmp_path, monkeypatch):
    def changed(network, options):
        other = copy.deepcopy(network)
        other.tcn.output.bias[2] += 0.25
        return captured(other, options)

    captured = export.captured
    monkeypatch.setattr(export, "captured", changed)
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(COMPACT))
    out = tmp_path / "reader"
    out.write_text("an older one")
    before = sorted(tmp_path.iterdir())
    message = call("export", tmp_path, "--format", format_name, "-o", out, "--replace", code=1).output
    assert "reader is not kept: for clips of 29 frames it differs from the network by 0.25 in logits" in message
    assert sorted(tmp_path.iterdir()) == before and out.read_text() == "an older one"


class Exact(nn.Module):
    """A network that rounds otherwise: it computes in float64."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.exact, self.boundary = copy.deepcopy(network).double(), network.boundary

    def forward(self, video, lengths, boundary=None):
        return self.exact(video.double(), lengths, boundary).float()


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_a_network_that_rounds_much_is_kept_and_a_wrong_one_is_not(share, tmp_path, monkeypatch):
    """What all classes have in common is large here: rounding it makes more than the tolerance of their differences."""

    def other(network, options):
        exact = Exact(network)
        exact.exact.tcn.tcn_output.weight[2] *= 1 + share
        return captured(exact, options)

    captured = export.captured
    monkeypatch.setattr(export, "captured", other)
    checkpoint = checkpoint_of({"trunk": "compact", "activation": "relu", "head": {"name": "dctcn", **SMALL["dctcn"]}})
    checkpoint.model["tcn.tcn_output.weight"][:] += 5e3
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    command = ("export", tmp_path, "--format", "torch", "-o", tmp_path / "reader")
    if share:
        assert "reader is not kept" in call(*command, code=1).output
    else:
        call(*command)
        with monkeypatch.context() as patch:
            patch.setattr(export, "ROUNDING", 0.0)
            assert "reader is not kept" in call(*command, "--replace", code=1).output


def test_an_export_is_tried_on_mouths():
    mouths = export._mouths(3, 20, 48, np.random.default_rng(0))
    assert mouths.dtype == np.uint8 and mouths.shape == (3, 20, 48, 48)
    middle, rim = mouths[:, :, 20:28, 20:28].mean((2, 3)), mouths[:, :, :4, :4].mean((2, 3))
    assert (middle < rim).all() and mouths[:, :, 24].std((1, 2)).min() > 10


class Branching(nn.Module):
    """A network that does to bright clips what it does not do to others."""

    boundary = None

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(32, 4)

    def forward(self, video, lengths, boundary=None):
        if video.sum() > 0:
            video = -video
        return self.output(video.mean((1, 2, 3)))


class Counting(Branching):
    """A network for clips of as many frames as it was shown."""

    def forward(self, video, lengths, boundary=None):
        return self.output(video.mean((1, 2, 3))) + sum(1 for _ in range(video.shape[2]))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Branching,
            r"a branch that depends on its input \(test_export.py, line \d+: if video.sum\(\) > 0:\), which a traced "
            r"graph cannot hold: .* torch.where, .*--format safetensors",
        ),
        (Counting, r"a traced graph for any number of clips and frames: .*frames.*--format safetensors"),
    ],
)
def test_a_network_that_cannot_be_traced_is_told_where(network, message, tmp_path, monkeypatch, capfd):
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(COMPACT))
    monkeypatch.setattr(export, "new_model", lambda *args, **options: network())
    monkeypatch.setattr(export, "load_weights", lambda *args: None)
    output = call("export", tmp_path, "--format", "torch", "-o", tmp_path / "reader", code=1).output
    assert re.search(message, output) and len(output.splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "reader").exists()


def test_bad_input_is_told_with_what_to_do(trained_run, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.write_text("")
    few = ["export", trained_run, "--format", "safetensors", "-o"]
    for args, message in [
        (["export", tmp_path, "--format", "onnx", "-o", tmp_path / "x"], "holds neither best.pt nor last.pt"),
        (["export", tmp_path / "none", "--format", "onnx", "-o", tmp_path / "x"], "does not exist"),
        (["export", there, "--format", "onnx", "-o", tmp_path / "x"], "is damaged"),
        (
            ["export", trained_run, "--format", "tflite", "-o", tmp_path / "x"],
            "known are onnx, torch, safetensors, mpc001",
        ),
        (["export", trained_run, "--format", "mpc001", "-o", tmp_path / "x"], "mpc001's code cannot load this network"),
        ([*few, tmp_path / "no" / "x"], f"there is no folder {tmp_path / 'no'}: make it first"),
        ([*few, tmp_path], "is a folder: name a file in it"),
        ([*few, there], "there is there already: name another file, or add --replace"),
        ([*few, tmp_path / "x", "--card", there], "add --replace"),
        ([*few, tmp_path / "x", "--card", tmp_path / "x"], "is a file of the export and cannot be its card"),
        ([*few, tmp_path / "x", "--card", tmp_path / "y" / ".." / "x.json"], "cannot be its card: name another"),
        ([*few, tmp_path / ("x" * 250)], "File name too long"),
    ]:
        output = call(*args, code=1).output
        assert message in output and output.startswith("Error: ") and len(output.splitlines()) == 1
    for extra, package in (("onnx", "onnxruntime"), ("safetensors", "safetensors.torch")):
        monkeypatch.setitem(sys.modules, package, None)
        output = call("export", trained_run, "--format", extra, "-o", tmp_path / "x", code=1).output
        assert f'pip install "lipprep[{extra}]"' in output
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def card_of(checkpoint: Checkpoint, run: Path) -> str:
    return model_card(checkpoint, path=run / "best.pt", format="onnx", file=Path("reader.onnx"))


def test_a_card_tells_accuracies_of_these_weights_alone(tmp_path):
    checkpoint = checkpoint_of({**COMPACT, "boundary": "vipl"})
    card = card_of(checkpoint, tmp_path)
    assert "Not evaluated" in card and "Best validation accuracy up to here: 75.0 %" in card
    assert "It chose the weights" in card
    last = model_card(checkpoint, path=tmp_path / "last.pt", format="onnx", file=Path("reader.onnx"))
    assert "chose" not in last and "75.0 %. It need not be that of these weights" in last
    assert "`crop`, (T, 96, 96) uint8, is cut as those of its training (profile lrw2022, crop size 96, exact)" in card
    assert "augmentation: random_crop True, flip 0.5, mixup 0.4, time_mask 15, variable_length True" in card
    assert "of these, those from 0 to T - 1" in card and "its name is not known here" in card
    assert "input `boundary` | (B, T, 1) float32" in card and "int(T / 2 - h)" in card
    assert "4: down, grow, shrink, up" in card and "The licence of the training videos decides" in card

    figures = {"top1": 0.9, "top1_interval95": [0.85, 0.94], "top5": 0.99}
    results = {"step": 7, "dataset": "mine", "split": "test", "clips": 1500, **figures, "boundaries_known": 1400}
    confidence = {"ece": 0.12, "ece_calibrated": 0.03, "kept": 0.6, "kept_top1": 0.9}
    results["temperature"] = 1.25
    results["without_boundary"] = {"top1": 0.8, "top1_interval95": [0.75, 0.84], "top5": 0.95, **confidence}
    for name, content in {
        "test": json.dumps(results),
        "val": json.dumps(results | {"step": 8, "split": "val", "clips": 99}),  # other weights
        "unseen": "{",
        "test-ensemble": json.dumps({"members": [], **figures}),
    }.items():
        (tmp_path / f"evaluate-{name}").mkdir()
        (tmp_path / f"evaluate-{name}" / "results.json").write_text(content)
    (tmp_path / "summary.json").write_text(
        json.dumps({"dataset": "0123abcd", "dataset_name": "grid", "clips": {"train": 48000, "val": 100}})
    )
    assert "Not calibrated" in card
    checkpoint = dataclasses.replace(checkpoint, temperature=1.25, threshold=0.5)
    card = card_of(checkpoint, tmp_path)
    assert "temperature 1.25" in card and "Below a confidence of 0.5" in card and "told no word boundaries" in card
    assert "(ECE) 12.0 %, with the temperature 3.0 %; by the threshold it answers 60.0 % of the clips, of" in card
    assert "(ECE)" not in card_of(dataclasses.replace(checkpoint, temperature=1.5), tmp_path)  # fitted anew since
    assert "| mine, test | 1,500 | 90.0 % (85.0 to 94.0) | 99.0 % |" in card
    assert "| mine, test without word boundaries, as in the wild | 1,500 | 80.0 % (75.0 to 84.0) | 95.0 % |" in card
    assert "told where they are known: 1400 of 1500 in test." in card
    assert "Not evaluated" not in card and " 99 |" not in card
    assert "data set: grid" in card and "48,000 train, 100 val" in card
    other = card_of(dataclasses.replace(checkpoint, dataset="other"), tmp_path)
    assert "48,000" not in other and "data set: mine, as its evaluation says" in other


def test_what_was_trained_on_lrw_is_bound_by_its_agreement(tmp_path):
    model = checkpoint_of(COMPACT)
    assert "agreement with the BBC" not in card_of(model, tmp_path)
    (tmp_path / "evaluate-test").mkdir()
    results = {"step": 7, "dataset": "my-LRW-100", "split": "test", "clips": 9}
    results |= {"top1": 1.0, "top1_interval95": [0.7, 1.0], "top5": 1.0}
    (tmp_path / "evaluate-test" / "results.json").write_text(json.dumps(results))
    assert "agreement with the BBC" in card_of(model, tmp_path)
    save_checkpoint(tmp_path / "best.pt", model)
    out = tmp_path / "reader.safetensors"
    result = call("export", tmp_path, "--format", "safetensors", "-o", out, "--card", tmp_path / "CARD.md")
    assert "not to be passed on" in result.stderr
    assert str(tmp_path / "CARD.md") in result.stdout and (tmp_path / "CARD.md").is_file()


def test_lrw_is_known_by_its_words_its_name_and_what_was_learnt_from_it():
    assert is_lrw(["about", "PEOPLE"]) and not is_lrw(["about"]) and not is_lrw(["about", "people", "lipprep"])
    assert is_lrw(["yes", "no"], ["grid", "mini_LRW"]) and not is_lrw(["yes", "no"], ["grid", ""])
    model = checkpoint_of(COMPACT)
    for resolved, bound in (
        ({}, False),
        ({"of_lrw": True}, True),
        ({"of_lrw": "no"}, False),
        ({"imported": "lrw_snv1x.pth.tar"}, True),
        ({"imported": "mine.pth"}, False),
        (None, False),
    ):
        assert is_of_lrw(dataclasses.replace(model, config=model.config | {"resolved": resolved})) == bound


def test_a_card_of_an_imported_checkpoint_says_where_it_is_from(tmp_path):
    checkpoint = checkpoint_of(COMPACT, step=0, best=None, dataset="")
    checkpoint.config["resolved"] = {"imported": "lrw_snv1x.pth.tar", "family": "mpc001"}
    card = card_of(checkpoint, tmp_path)
    assert "imported from lrw_snv1x.pth.tar, a checkpoint of mpc001's code" in card
    assert "settings:" not in card and "augmentation:" not in card and "validation" not in card


def test_a_card_names_the_runs_that_were_learnt_from_and_crops_that_are_not_known(tmp_path):
    checkpoint = checkpoint_of(COMPACT, parameters={"profile": "fixed", "crop_size": 122, "crops_from": "files"})
    checkpoint.config.update(init_from="runs/first", teacher="runs/lrw/best.pt")
    card = card_of(checkpoint, tmp_path)
    assert "* init_from: first\n* teacher: lrw/best.pt" in card
    assert "(T, 122, 122) uint8" in card and "a box that is not known here, not cut by lipprep" in card


def test_a_checkpoint_for_mpc001s_code_has_a_card_too(tmp_path):
    tcn = {"trunk": "shufflenetv2", "width_mult": 0.5, "activation": "prelu", "head": {"name": "tcn", "num_layers": 1}}
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(tcn))
    out = tmp_path / "mine.pth"
    assert (
        "cannot be its card"
        in call(
            "export", tmp_path, "--format", "mpc001", "-o", out, "--card", tmp_path / "mine.pth.json", code=1
        ).output
    )
    files = call("export", tmp_path, "--format", "mpc001", "-o", out).stdout.splitlines()[1:]
    assert files == [f"{out}", f"{out}.json", f"{out}.md"]
    card = Path(files[-1]).read_text()
    assert "--config-path mine.pth.json --model-path mine.pth`." in card
    assert "input `video`" not in card and "lengths" not in card
    (tmp_path / "mine.bin.yaml").touch()  # which it does not write
    call("export", tmp_path, "--format", "mpc001", "-o", tmp_path / "mine.bin")
    assert (
        "--model-path mine.bin.pth`, for which mine.bin must be called mine.bin.pth."
        in (tmp_path / "mine.bin.md").read_text()
    )


def test_every_formula_of_boundaries_is_told():
    assert set(BOUNDARIES) == set(FORMULAS)


def test_help_has_an_example_and_imports_nothing_slow():
    assert "lipprep export " in call("export", "--help").output.split("Example")[1]
    code = "import sys, lipprep.train.cli_export; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
