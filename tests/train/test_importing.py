import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.train.boundary import boundary_vectors
from lipprep.train.checkpoint import load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.device import load_model
from lipprep.train.importing import import_checkpoint
from lipprep.train.models import build, complete
from lipprep.train.published import model_of, options_of, read_weights
from tests.train.test_models import GOLDEN, published_weights

CPU = torch.device("cpu")
SMALL = {"trunk": "shufflenetv2", "width_mult": 0.5, "activation": "relu", "head": {"name": "tcn", "channels": 16}}


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def video():
    return torch.from_numpy(np.load(GOLDEN / "input.npz", allow_pickle=False)["video"]).float()


def network(recipe, found):
    model = build(load_recipe(recipe).model, 500).eval()
    model.load_state_dict(found.weights, strict=True)
    return model


def test_vipl_gives_its_published_output():
    about, expected = golden("vipl_bigru_se_border")
    found = read_weights({"video_model": published_weights("vipl_bigru_se_border")})
    model = network("lrw_senet18_bigru_boundary", found)
    boundary = boundary_vectors(np.array(about["boundary"]), 29)
    with torch.inference_mode():
        logits = model((video() / 255)[:, None], torch.tensor([29, 29]), boundary)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-3)
    assert model_of(about["config"]) == load_recipe("lrw_senet18_bigru_boundary").model


@pytest.mark.parametrize("head", ["bilstm", "temporal_conv"])
def test_euan_gives_its_published_output(head):
    about, expected = golden("euan_resnet34_lstm")
    found = read_weights(published_weights("euan_resnet34_lstm"), head=head)
    model = network(f"euan_resnet34_{head}", found)
    x = torch.nn.functional.interpolate(video(), size=(112, 112), mode="nearest")
    x, lengths = ((x / 255 - 0.4161) / 0.1688)[:, None], torch.tensor([29, 29])
    with torch.inference_mode():
        features = model.extract_features(x, lengths)
        np.testing.assert_allclose(features, expected["features"], rtol=0, atol=1e-2)
        if head == "bilstm":
            np.testing.assert_allclose(model.tcn.read_frames(features), expected["output"], rtol=0, atol=1e-3)
            mean = model(x, lengths)
            np.testing.assert_allclose(mean, expected["output"].mean(1), rtol=0, atol=1e-3)
    stem = next(keys for what, keys in found.unused.items() if "stem" in what)
    assert "resnet.resnetModel.conv1.weight" in stem and len(stem) == 6
    assert any("two heads" in note for note in found.notes)
    assert (
        model_of(about["config"] | {"type": "LSTM" if head == "bilstm" else "temp-conv"})
        == load_recipe(f"euan_resnet34_{head}").model
    )


@pytest.mark.parametrize(
    "name",
    [
        "lrw_resnet18_mstcn_prelu",
        "lrw_snv05x_tcn1x",
        "lrw_snv1x_dsmstcn3x",
        "lrw_senet18_mstcn",
        "lrw_resnet18_dctcn_boundary",
    ],
)
def test_published_configurations_are_the_recipes_and_back(name):
    model = load_recipe(name).model
    options = golden(name)[0]["config"]
    assert complete(model_of(options)) == complete(model)
    ours = options_of(complete(model))
    assert model_of(ours) == model_of(options)
    if "tcn_options" not in options:
        assert ours == options


# As torch saved before and since version 1.6, of several GPUs, in whatever it is held.
@pytest.mark.parametrize("form", ["pth", "pth.tar", "ckpt-step", "bare"])
def test_a_published_checkpoint_becomes_a_run(tmp_path, form):
    weights = published_weights("lrw_snv05x_tcn1x")
    path, how = tmp_path / "weights", {}
    if form == "pth":
        state = {"epoch_idx": 80, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}, "best_prec": 0.8}
    elif form == "pth.tar":
        state, how = {"model_state_dict": weights}, {"_use_new_zipfile_serialization": False}
    elif form == "ckpt-step":
        path = tmp_path / "ckpt-step-15000"
        scheduler = {"lr_ori": 3e-4, "epochs": 80}
        state = {"step": 15000, "epoch": 1, "model_state_dict": weights, "lr_scheduler_state_dict": scheduler}
    else:
        # Each tensor of the TCN once, and none of what old versions of torch did not count.
        few = {k: v for k, v in weights.items() if ".net." not in k and not k.endswith("num_batches_tracked")}
        state = {f"module.{key}": value for key, value in few.items()}
    torch.save(state, path, **how)
    result = CliRunner().invoke(main, ["import-checkpoint", str(path), "-o", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["recipe"], told["profile"], told["words"]) == ("lrw_snv05x_tcn1x", "lrw2021", 500)
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint.labels[:2] == ["ABOUT", "ABSOLUTELY"] and checkpoint.labels[-1] == "YOUNG"
    model = load_model(checkpoint, CPU)
    for key, value in model.state_dict().items():
        if form != "bare" or not key.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[key]), key
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resolved"]["imported"] == path.name


def test_a_file_that_no_recipe_has_is_read_with_its_configuration(tmp_path):
    options = {"backbone_type": "shufflenet", "relu_type": "relu", "width_mult": 0.5, "tcn_kernel_size": [5]}
    options |= {"tcn_num_layers": 2, "tcn_dropout": 0.2, "tcn_dwpw": True, "tcn_width_mult": 1}
    model = build(model_of(options), 3)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "own.pth")
    (tmp_path / "own.json").write_text(json.dumps(options))
    (tmp_path / "words.txt").write_text("no\nmaybe\nyes\n")
    call = ["import-checkpoint", str(tmp_path / "own.pth"), "-o", str(tmp_path / "run")]
    runner = CliRunner()
    for more, message in (
        ([], "no recipe has a network of its"),
        (["--config", str(tmp_path / "own.json")], "3 words, and LRW has 500"),
        (["--config", str(tmp_path / "own.json"), "--labels", str(tmp_path / "words.txt")], "name the profile"),
    ):
        result = runner.invoke(main, [*call, *more])
        assert result.exit_code == 1 and message in result.output, result.output
    result = runner.invoke(main, [*call, *more, "--profile", "lrw2022"])
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint.labels == ["no", "maybe", "yes"] and checkpoint.profile == "lrw2022"
    # A folder with something in it is not written to.
    assert "is not empty" in runner.invoke(main, call).output


def test_what_does_not_fit_is_listed_key_by_key(tmp_path):
    weights = dict(build(SMALL, 5).state_dict())
    weights["trunk.extra.weight"] = torch.zeros(2)
    weights["frontend3D.0.weight"] = torch.zeros(3, 1, 5, 7, 7)
    weights["trunk.1.0.weight"] = torch.full_like(weights["trunk.1.0.weight"], torch.nan)
    del weights["tcn.tcn_output.bias"]
    torch.save({"model_state_dict": weights}, tmp_path / "c.pth")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"profile": "lrw2021", "model": SMALL}))
    with pytest.raises(ValueError, match="does not fit the network of small: 4 keys") as caught:
        import_checkpoint(tmp_path / "c.pth", tmp_path / "run", config=str(tmp_path / "small.yaml"))
    for line in (
        "frontend3D.0.weight is (3, 1, 5, 7, 7) in the file, (24, 1, 5, 7, 7) in the network",
        "trunk.extra.weight is in the file alone",
        "tcn.tcn_output.bias (5,) is not in the file",
        "trunk.1.0.weight has values that are no finite numbers",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_two_copies_that_differ_are_refused():
    weights = dict(build(SMALL, 5).state_dict())
    weights["tcn.tcn_trunk.network.1.net.5.weight"] = weights["tcn.tcn_trunk.network.1.conv2.weight"] + 1
    with pytest.raises(ValueError, match="twice, and the two differ"):
        read_weights({"model_state_dict": weights})


def test_labels_must_be_as_many_as_the_classifier_has_rows(tmp_path):
    torch.save({"model_state_dict": published_weights("lrw_snv05x_tcn1x")}, tmp_path / "c.pth")
    (tmp_path / "many.txt").write_text("".join(f"W{n}\n" for n in range(1000)))
    with pytest.raises(ValueError, match="lists 1000 words, and the checkpoint knows 500"):
        import_checkpoint(tmp_path / "c.pth", tmp_path / "run", labels=tmp_path / "many.txt")
    (tmp_path / "twice.txt").write_text("".join(f"W{n % 499}\n" for n in range(500)))
    with pytest.raises(ValueError, match="lists 'W0' twice"):
        import_checkpoint(tmp_path / "c.pth", tmp_path / "run", labels=tmp_path / "twice.txt")
    with pytest.raises(ValueError, match="unknown profile 'lrw'"):
        import_checkpoint(tmp_path / "c.pth", tmp_path / "run", profile="lrw")
    with pytest.raises(ValueError, match="does not fit the network of lrw_snv05x_tcn2x"):
        import_checkpoint(tmp_path / "c.pth", tmp_path / "run", config="lrw_snv05x_tcn2x")


def test_what_a_file_cannot_say_is_told(tmp_path):
    torch.save({"model_state_dict": published_weights("lrw_snv05x_tcn1x")}, tmp_path / "c.pth")
    (note,) = import_checkpoint(tmp_path / "c.pth", tmp_path / "a").notes
    assert "the activation prelu, the profile lrw2021. If that is not so: --config and --profile" in note
    (note,) = import_checkpoint(tmp_path / "c.pth", tmp_path / "b", config="lrw_snv05x_tcn1x").notes
    assert "activation" not in note and note.endswith("--profile")
    # An import has made no step: it is begun with, not gone on with.
    result = CliRunner().invoke(main, ["train", "--resume", str(tmp_path / "a"), "--shards", str(tmp_path)])
    assert "neither best.pt nor last.pt" not in result.output


def test_of_euan_nothing_is_left_out_unsaid():
    weights = {
        **published_weights("euan_resnet34_lstm"),
        "resnet.odd.weight": torch.zeros(1),
        "lstm.odd": torch.zeros(1),
    }
    found = read_weights(weights)
    assert len(found.unused["the other head"]) == 23
    assert {"resnet.odd.weight", "lstm.odd"} <= set(found.weights)  # which no network has: they are told as such


def test_networks_of_the_fork_are_described_in_its_words(tmp_path):
    config = load_recipe("lrw_senet18_mstcn").model
    options = options_of(complete(config))
    about = golden("lrw_senet18_mstcn")[0]["config"]
    assert {name: options[name] for name in about if name != "num_classes"} == {
        name: value for name, value in about.items() if name != "num_classes"
    }


def test_what_is_exported_for_mpc001_is_its_checkpoint_and_comes_back_the_same(tmp_path):
    weights = published_weights("lrw_snv05x_tcn1x")
    torch.save({"model_state_dict": weights}, tmp_path / "c.pth")
    import_checkpoint(tmp_path / "c.pth", tmp_path / "run")
    out = tmp_path / "out" / "ckpt.best.pth"
    out.parent.mkdir()
    call = ["export", str(tmp_path / "run"), "--format", "mpc001", "-o", str(out), "--json"]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    again = torch.load(out, weights_only=True)["model_state_dict"]
    assert list(again) == list(weights)
    for key, value in again.items():
        assert torch.equal(value, weights[key]) and value.is_contiguous() and value.dtype == weights[key].dtype
    assert json.loads(out.with_name("ckpt.best.pth.json").read_text()) == golden("lrw_snv05x_tcn1x")[0]["config"]
    import_checkpoint(out, tmp_path / "again", config=str(out.with_name("ckpt.best.pth.json")))
    ours, theirs = (load_checkpoint(tmp_path / run / "best.pt").model for run in ("run", "again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and list(ours) == list(theirs)


def test_a_network_that_mpc001_has_not_is_not_exported_for_it(trained_run, tmp_path):
    call = ["export", str(trained_run), "--format", "mpc001", "-o", str(tmp_path / "c.pth")]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 1 and "mpc001's code cannot load this network: its trunk compact" in result.output
    assert not list(tmp_path.iterdir())


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_rubbish_and_pickles_are_refused(tmp_path, capsys):
    whole = tmp_path / "whole.pth"
    torch.save({"model_state_dict": build(SMALL, 5).state_dict()}, whole)
    data = whole.read_bytes()
    cases = {"empty": b"", "short": data[: len(data) // 2], "text": b"not a checkpoint\n" * 99}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
            import_checkpoint(tmp_path / name, tmp_path / "run")
    for zipped in (True, False):
        torch.save({"model_state_dict": Hostile()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"its pickle wants (builtins|__builtin__) print"):
            import_checkpoint(tmp_path / "evil.pth", tmp_path / "run")
    assert "executed" not in capsys.readouterr().out
    for other in ({"encoder.weight": torch.zeros(2)}, {"state_dict": {}, "x": 1}, [1, 2], torch.zeros(3)):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"another architecture|no weights that are known"):
            import_checkpoint(tmp_path / "other.pth", tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"data\.pkl"):
        import_checkpoint(tmp_path / "zip.pth", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"trunk": "resnet34", "head": {"name": "tcn"}}, "trunk resnet34"),
        ({"trunk": "resnet18", "stem_bias": True, "head": {"name": "tcn"}}, "stem_bias"),
        ({"trunk": "resnet18", "neck": {"norm": True}, "head": {"name": "tcn"}}, "neck"),
        ({"trunk": "resnet18", "head": {"name": "bigru"}}, "head bigru"),
        ({"trunk": "resnet18", "boundary": "mpc001", "head": {"name": "mstcn"}}, "dctcn alone"),
        ({"trunk": "resnet18", "boundary": "vipl", "head": {"name": "dctcn"}}, "formula vipl"),
        ({"trunk": "resnet18", "head": {"name": "tcn", "channels": 100}}, "multiples of 256"),
        ({"trunk": "resnet18", "head": {"name": "mstcn", "kernel_sizes": [3]}}, "one kernel size"),
    ],
)
def test_networks_that_mpc001_has_not_are_not_described_in_its_words(model, why):
    with pytest.raises(ValueError, match=why):
        options_of(complete({"activation": "relu", **model}))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backbone_type": "vgg", "relu_type": "relu"}, "known are resnet, senet, shufflenet, efficientnet"),
        ({"backbone_type": "resnet"}, "lacks 'relu_type'"),
        ({"backbone_type": "resnet", "relu_type": "relu", "tcn_kernel_size": [3]}, "lacks 'num_layers'"),
        ({"layers": 3}, "none that is known"),
        ({"backbone_type": "resnet", "modality": "audio"}, "it is for audio"),
        ({"backbone_type": "resnet", "relu_type": "relu", "tcn_kernel_size": [], "tcn_num_layers": 4}, "is empty"),
        ({"border": "perhaps"}, "neither true nor false"),
    ],
)
def test_configurations_that_are_none_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        model_of(options)
