"""The command demo-app. What is slow to import is imported when it runs."""

from pathlib import Path

import click

from lipprep.command import Command
from lipprep.train.cli import CHECKPOINT, DEVICE


@click.command("demo-app", cls=Command, resumes=False)
@CHECKPOINT
@click.option(
    "--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0: any port that is free."
)
@DEVICE
def demo_app(checkpoint: Path, port: int, device: str) -> None:
    """Read videos on a web page: see the face, what the network sees of it, and the words.

    Drop a video on the page, or record one with a camera. The page is served to this machine alone (127.0.0.1), and
    asks for nothing beyond it; a video is deleted as soon as it is read. Needs Gradio: pip install "lipprep[demo]".

    \b
    Example:
      lipprep demo-app --checkpoint runs/small
      lipprep demo-app --checkpoint runs/small --port 8000 --device cpu
    """
    from lipprep.train.app import claim, serve

    with claim(port) as socket:  # before torch is imported, which takes seconds
        from lipprep.train.predict import load_reader

        serve(load_reader(checkpoint, device=device), socket, name=str(checkpoint))
