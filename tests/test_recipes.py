"""What the recipes say of crops, the command that makes crops, and the checkpoints of such crops go together."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from lipprep.cli import main
from lipprep.stages.shard.index import load_index
from lipprep.train import recipes
from lipprep.train.checkpoint import check_fits, load_checkpoint
from lipprep.train.config import load_recipe
from lipprep.train.importing import import_checkpoint
from lipprep.train.models import build

SAYS = "# Crops: lipprep shards "
OPTIONS = {
    path.stem: line.removeprefix(SAYS).split()
    for path in sorted(Path(recipes.__file__).parent.glob("*.yaml"))
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith(SAYS)
}
WORDS = ("ABOUT", "BLACK")


@pytest.fixture
def lipprep(tmp_path, monkeypatch):
    """Run one command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    return run


@pytest.mark.parametrize("recipe", OPTIONS)
def test_the_crops_that_a_recipe_names_are_those_it_is_for(recipe, lipprep, make_video):
    make_video(Path("videos/ABOUT/train/ABOUT_00001.mp4"), [np.full((256, 256), 90 + t, np.uint8) for t in range(3)])
    lipprep("manifest", "lrw", "videos", "-o", "manifests/m.jsonl")
    lipprep("shards", "--engine", "serial", *OPTIONS[recipe])
    config, index = load_recipe(recipe), load_index(Path("shards"))
    assert index.profile == config.profile and index.parameters.get("box") == config.box
    assert index.crop_size >= config.augment.crop_size


def test_every_recipe_of_a_box_names_its_crops():
    boxed = {path.stem for path in Path(recipes.__file__).parent.glob("*.yaml") if load_recipe(path.stem).box}
    assert boxed == set(OPTIONS)


def test_published_crops_go_with_the_checkpoint_that_was_trained_on_them(lipprep, capsys):
    for word in WORDS:
        path = Path(f"mouths/{word}/test/{word}_00001.npz")
        path.parent.mkdir(parents=True)
        np.savez(path, data=np.zeros((2, 96, 96), np.uint8))
    network = {
        "trunk": "shufflenetv2",
        "width_mult": 0.5,
        "activation": "relu",
        "head": {"name": "tcn", "channels": 16},
    }
    recipe = {"profile": "fixed", "box": [79, 115, 96, 96], "model": network}
    Path("published.yaml").write_text(yaml.safe_dump(recipe))
    Path("words.txt").write_text("\n".join(WORDS))
    torch.save({"model_state_dict": build(network, len(WORDS)).state_dict()}, "published.pth")
    import_checkpoint(Path("published.pth"), Path("run"), config="published.yaml", labels=Path("words.txt"))
    checkpoint = load_checkpoint(Path("run/best.pt"))
    packed = ("shards", "--engine", "serial", "--from-crops", "mouths", "--profile", "fixed")
    capsys.readouterr()
    for box, said in (
        ((), "the shards do not say which box"),
        (("--box", "79,115,96,96"), ""),
    ):
        lipprep(*packed, *box, "--replace")
        check_fits(checkpoint, load_index(Path("shards")))
        err = capsys.readouterr().err
        assert said in err and bool(said) == bool(err)
    lipprep(*packed, "--box", "80,116,96,96", "--replace")
    with pytest.raises(ValueError, match="another box"):
        check_fits(checkpoint, load_index(Path("shards")))
