"""What all commands of lipprep share: how they fail, and how `--help` is asked for."""

import sys

import click

CONTEXT = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130  # what shells expect of a command that Ctrl-C ended


class Command(click.Command):
    """A command whose bad input ends in one message, and Ctrl-C in what to do next: never in a traceback."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT, **kwargs})

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            raise click.ClickException(named) from error
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nStopped. What is done is kept: run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)
