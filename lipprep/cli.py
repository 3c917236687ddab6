"""The front door: one group whose commands live in the other rooms and are imported when they are called.

`lipprep --help` must answer at once, so the commands are named here as strings, with the line that the
help shows: no other room is imported to print it.
"""

import importlib

import click

from lipprep import __version__
from lipprep.command import CONTEXT, debug_option, interruptible, run

# command: (module, attribute, the line that `lipprep --help` shows)
COMMANDS = {
    "sample": ("lipprep.pipeline.cli", "sample", "Make a small LRW-shaped corpus to try everything on."),
    "manifest": (
        "lipprep.pipeline.cli_manifest",
        "manifest",
        "List the clips of a corpus: LRW, word folders, GRID, captions, CSV.",
    ),
    "landmarks": ("lipprep.pipeline.cli", "landmarks", "Find 68 face landmarks in every frame."),
    "crops": ("lipprep.pipeline.cli", "crops", "Align to the mean face and cut mouth crops."),
    "shards": ("lipprep.pipeline.cli", "shards", "Pack mouth crops into WebDataset shards with an index."),
    "index": ("lipprep.pipeline.cli", "index", "Write the index of shards that were made in slices."),
    "status": ("lipprep.pipeline.cli_status", "status", "Say what is fresh, stale or missing, and why."),
    "verify": ("lipprep.pipeline.cli_verify", "verify", "Check that shards are whole, and sound clip by clip."),
    "failures": ("lipprep.pipeline.cli_status", "failures", "List the clips that failed, with cause and file."),
    "report": (
        "lipprep.pipeline.cli_report",
        "report",
        "Show a data set on one page: crops that play, figures, failures.",
    ),
    "train": ("lipprep.train.cli", "train", "Train a lip reader from shards."),
    "recipes": ("lipprep.train.cli", "recipes", "List the recipes to train with."),
    "models": (
        "lipprep.train.cli_models",
        "models",
        "List every network with its size, cost and published accuracy.",
    ),
    "evaluate": ("lipprep.train.cli_evaluate", "evaluate", "Measure a trained lip reader on a split."),
    "import-checkpoint": (
        "lipprep.train.cli_import",
        "import_checkpoint",
        "Make a run of a published checkpoint: mpc001's, VIPL's, euan's.",
    ),
    "predict": ("lipprep.train.cli_predict", "predict", "Read the words in any video, or before a camera."),
    "demo-app": ("lipprep.train.cli_app", "demo_app", "Read videos on a web page, and see what the network sees."),
    "embed": ("lipprep.train.cli_embed", "embed", "Write the features of each frame, for systems downstream."),
    "export": (
        "lipprep.train.cli_export",
        "export",
        "Write a trained lip reader for others to run: ONNX, torch, safetensors.",
    ),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)

    def invoke(self, ctx: click.Context) -> object:
        with interruptible():  # also while a command is imported
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="lipprep")
def main() -> None:
    """From videos of people saying words to shards, and from shards to a lip reader.

    \b
    Example:
      lipprep manifest lrw data/lipread_mp4 -o manifests/lrw.jsonl
      lipprep landmarks
      lipprep crops
      lipprep shards
      lipprep train --shards shards/
    """


main.params.append(debug_option())


def program() -> None:
    """The program `lipprep`."""
    run(main, prog_name="lipprep")
