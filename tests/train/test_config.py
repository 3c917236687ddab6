import pytest
import torch

from lipprep.train.config import DEFAULT_RECIPE, as_plain, config_from, load_recipe, recipes, save_config
from lipprep.train.device import new_model
from lipprep.train.models import HEADS, TRUNKS, build, complete


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_builds(name):
    config = load_recipe(name)
    assert config.recipe == name
    with torch.device("meta"):
        model = build({**config.model, "init": "torch"}, num_classes=7)
    assert sum(p.numel() for p in model.parameters()) > 1e5


def test_the_recipes_that_are_promised_are_there():
    assert {"compact", "lrw_resnet18_mstcn", "lrw_resnet18_mstcn_prelu", "lrw_snv05x_tcn1x"} <= set(recipes())
    assert load_recipe(DEFAULT_RECIPE).profile == "lrw2021"
    assert load_recipe("lrw_resnet18_mstcn").profile == "lrw2022"


def test_published_settings_are_the_defaults():
    config = load_recipe("lrw_resnet18_mstcn")
    assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (3e-4, 1e-2, 32, 80)
    assert (config.augment.mixup, config.augment.flip, config.augment.crop_size) == (0.4, 0.5, 88)
    assert (config.augment.time_mask, config.augment.variable_length) == (15, True)


def test_overrides_are_typed_and_dotted():
    config = load_recipe("compact", ["lr=1e-3", "augment.mixup=0.2", "model.head.dropout=0", "max_steps=7"])
    assert (config.lr, config.augment.mixup, config.max_steps) == (1e-3, 0.2, 7)
    assert config.model["head"]["dropout"] == 0
    assert load_recipe("compact", ["max_steps=7", "max_steps=null"]).max_steps is None


def plain(options):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


@pytest.mark.parametrize("name", [*TRUNKS, *HEADS])
def test_another_trunk_or_head_needs_no_more_than_its_name(name):
    changes = [f"model.trunk={name}"] if name in TRUNKS else []
    changes += [f"model.head.name={name}"] if name in HEADS else []  # compact is both
    for recipe in ("lrw_snv05x_tcn1x", "lrw_senet18_bigru"):
        model = load_recipe(recipe, changes).model
        with torch.device("meta"):
            build({**model, "init": "torch"}, num_classes=7)
        assert name in (model["trunk"], model["head"]["name"])
        # Of the old head nothing is left, of the new one the defaults.
        if name in HEADS and load_recipe(recipe).model["head"]["name"] != name:
            assert complete(model)["head"] == {"name": name, **plain(HEADS[name][1])}


def test_options_of_another_head_are_left_behind_but_not_those_that_are_asked_for():
    mstcn = load_recipe("lrw_resnet18_mstcn").model["head"]
    assert load_recipe("lrw_resnet18_mstcn", ["model.head.name=mstcn"]).model["head"] == mstcn
    model = load_recipe("lrw_resnet18_mstcn", ["model.head={name: bigru, hidden: 64}", "model.head.num_layers=2"]).model
    assert model["head"] == {"name": "bigru", "hidden": 64, "num_layers": 2}
    kernel = ["model.head.name=bigru", "model.head.kernel_size=3"]
    width = ["model.trunk=compact", "model.width_mult=2.0"]
    for changes in (kernel, kernel[::-1], width, width[::-1]):
        with pytest.raises(ValueError, match=r"kernel_size|width_mult"):
            new_model(load_recipe("lrw_snv05x_tcn1x", changes).model, num_classes=7)
    for odd in ("model.head.name=[tcn]", "model.head.name=lstm", "model.trunk={a: 1}", "model.trunk=vgg"):
        with pytest.raises(ValueError, match=r"model|unknown"):
            new_model(load_recipe("compact", [odd]).model, num_classes=7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "did you mean epochs"),
        ("augment.mixp=0", r"did you mean augment\.mixup"),
        ("zzz=1", "known are"),
        ("lr=fast", "lr"),
        ("augment=3", "augment|Augment"),
        ("precision=fp8", "fp32"),
        ("lr", "key=value"),
        ("lr=", "lr|float"),
        ("lr=[", "YAML"),
        ("lr=-1", "lr is -1"),
        ("epochs=0", "epochs is 0"),
        ("seed=-1", "seed is -1"),
        ("warmup=1", "warmup is 1"),
        ("lr_min=1", "lr_min is 1.0, it must be at least 0 and at most lr"),
        ("schedule=cosinus", "cosine_by_epoch"),
        ("optimizer=lion", "adamw"),
        ("distill_weight=0", "distill_weight is 0.0, it must be greater than 0"),
        ("distill_temperature=.inf", "distill_temperature is inf"),
        ("freeze=[[trunk]]", r"freeze=\[frontend3D,trunk\]"),
        ("freeze=trunk", r"freeze is a list, written as freeze=\[A,B\]"),
        ("halve_every=0", "halve_every is 0"),
        ("augment.scale=2", "scale is 2"),
        ("lr=.nan", "lr is nan"),
        ("weight_decay=.nan", "weight_decay is nan"),
        ("weight_decay=.inf", "weight_decay is inf"),
        ("augment.mixup=.nan", "mixup is nan"),
        ("augment.mean=.nan", "mean is nan"),
        ("lr=${oc.env:HOME}", "write the value itself"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("compact", [override])


def test_an_unknown_recipe_names_a_close_one():
    with pytest.raises(ValueError, match=r"did you mean compact\?"):
        load_recipe("compat")


def test_a_saved_config_is_a_recipe(tmp_path):
    config = load_recipe("compact", ["lr=1e-3", "augment.shift=0.01"])
    save_config(config, tmp_path / "mine.yaml")
    again = load_recipe(str(tmp_path / "mine.yaml"))
    assert again.recipe == "mine"
    assert as_plain(again) == as_plain(config) | {"recipe": "mine"}
    assert config_from(as_plain(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "mapping"), ("lr: [", "YAML"), ("lr: 1\n", "model|profile"), ("epoch: 1\n", "epoch")],
)
def test_bad_recipe_files_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_config_from_elsewhere_does_not_read_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "resnet18")
    plain = as_plain(load_recipe("compact"))
    for change in ({"profile": "${oc.env:SECRET}"}, {"model": {"trunk": "${oc.env:SECRET}"}}):
        with pytest.raises(ValueError, match="write the value itself"):
            config_from(plain | change)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no recipe file"):
        load_recipe(str(tmp_path / "r.yaml"))
