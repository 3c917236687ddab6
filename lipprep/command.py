"""What all commands of lipprep share: how they fail, and how `--help` is asked for."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import click

from lipprep.stages.atomic import disk_remedy

CONTEXT = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130  # what shells expect of a command that Ctrl-C ended


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Answer SIGTERM, as cluster schedulers send it, like Ctrl-C: what is open is closed, and one can go on."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Command(click.Command):
    """A command whose bad input ends in one message, and Ctrl-C in what to do next: never in a traceback."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT, **kwargs})

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _terminable():
                return super().invoke(ctx)
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            if remedy := disk_remedy(error):
                named += f". What is done is kept: {remedy}, then run the same command again"
            raise click.ClickException(named) from error
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nStopped. What is done is kept: run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)
