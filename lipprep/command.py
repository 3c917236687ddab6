"""What all commands of lipprep share: how they are called, how they fail, and how `--help` is asked for."""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

from lipprep.io.errors import DEBUG, UserError, debugging, log_internal_error
from lipprep.stages.atomic import disk_remedy
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.store import RemoteError, masked
from lipprep.stages.untrusted import printable, shortened

CONTEXT = {"help_option_names": ["-h", "--help"]}
_LOG_FOLDER = "lipprep.log_folder"
_MAX_MESSAGE = 3000  # characters
INTERRUPTED = 130  # what shells expect of a command that Ctrl-C ended


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(command: click.Command, **more: object) -> None:
    """Call a command as the whole of a program: SIGTERM, which cluster schedulers send, is answered like Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command(**more)
    finally:
        # All is said and done, and idle workers are sent home: there is nothing left to interrupt.
        for late in (signal.SIGINT, signal.SIGTERM):
            signal.signal(late, signal.SIG_IGN)


@contextlib.contextmanager
def interruptible(*, resumes: bool = True) -> Iterator[None]:
    """Let Ctrl-C end in what to do next; a command that does not go on where it was has nothing to say of that."""
    try:
        yield
    except KeyboardInterrupt:
        kept = " What is done is kept: run the same command again to go on." if resumes else ""
        click.echo(f"\nStopped.{kept}", err=True)
        sys.exit(INTERRUPTED)


def _legible(message: str) -> str:
    """`message` without what could speak to the terminal, and no longer than a screen: it may quote whole files."""
    return "\n".join(printable(line) for line in shortened(masked(message), _MAX_MESSAGE).split("\n"))


class Place(click.ParamType):
    """A path on a disk, or the URL of one in a store."""

    name = "path"

    def convert(self, value: str | Path, param: object, ctx: object) -> Path | RemotePath:
        try:
            return place(value)
        except ValueError as error:
            self.fail(str(error))


class Number(click.FloatRange):
    """A number within bounds. Not a number, which lies within any, is none."""

    def convert(self, value: object, param: object, ctx: object) -> float:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number")
        return number


class LocalFolder(click.Path):
    """A folder that is written to bit by bit, as no store can."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: str | Path, param: object, ctx: object) -> Path:
        if "://" in str(value):
            self.fail(f"{printable(masked(str(value)))} is a URL: name a local folder")
        return super().convert(value, param, ctx)


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ[DEBUG] = "1"  # worker processes inherit it


def debug_option() -> click.Option:
    """Return the option --debug, which every command and the program itself take."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Print the traceback of an internal error, too (or set LIPPREP_DEBUG=1).",
    )


def log_to(folder: Path | RemotePath) -> None:
    """Let the command that runs log its internal errors in `folder`; those of a folder in a store go to TMPDIR."""
    if isinstance(folder, Path) and (ctx := click.get_current_context(silent=True)) is not None:
        ctx.find_root().meta[_LOG_FOLDER] = folder


class Command(click.Command):
    """A command whose bad input ends in one message, and Ctrl-C in what to do next: never in a traceback.

    An exception that is not the user's fault is told as an internal error, in one line that names the log with the
    traceback. `resumes`: called again, it goes on where it was stopped.
    """

    def __init__(self, *args: object, resumes: bool = True, **kwargs: object) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT, **kwargs})
        self.params.append(debug_option())
        self._resumes = resumes

    def invoke(self, ctx: click.Context) -> object:
        try:
            with interruptible(resumes=self._resumes):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (UserError, RemoteError) as error:
            raise click.ClickException(_legible(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout closed the pipe; click knows what to do
                raise
            named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            if remedy := disk_remedy(error):
                named += f". What is done is kept: {remedy}, then run the same command again"
            raise click.ClickException(_legible(named)) from error
        except Exception as error:
            raise click.ClickException(_internal_error(error, ctx)) from error


def _internal_error(error: Exception, ctx: click.Context) -> str:
    """Log the traceback of `error` and return the line that tells the user of it."""
    log = log_internal_error(error, ctx.command_path, ctx.find_root().meta.get(_LOG_FOLDER))
    if debugging():
        traceback.print_exception(error)
    said = _legible(str(error)).partition("\n")[0][:200]
    where = f"report it with the traceback in {printable(log)}" if log else "run it again with --debug and report it"
    return f"internal error, a fault in lipprep and not in your input ({type(error).__name__}: {said}): {where}"
