"""The folder of a run: opening a new one, or an old one to go on in."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.stages.lock import LOCK, hold, holder_of
from lipprep.train.checkpoint import LAST, Checkpoint, find_checkpoint, load_checkpoint
from lipprep.train.config import DEFAULT_RECIPE, Config, config_from, differences, load_config, load_recipe
from lipprep.train.metrics import warn

CONFIG = "config.yaml"


def open_run(
    run: Path | None, *, recipe: str | None = None, overrides: Sequence[str] = (), resume: str | None = None
) -> tuple[Path, Config, Checkpoint | None]:
    """The folder, the config and the checkpoint to start from (None: from the beginning).

    `run` is runs/DATE-RECIPE by default. `resume` is "auto" for the last.pt of `run`, from the beginning
    where it was stopped before it saved one, or a run folder or checkpoint file, whose folder is then the
    default for `run`. A resumed run keeps its own config, with `overrides` on top, and warns where `recipe`
    says otherwise. Raises ValueError where a new run would write into a folder with something in it, or the
    two recipes are not of one name.
    """
    path = None
    if resume == "auto":
        if run is None:
            raise UserError("--resume auto goes on in a run folder: name it with --run")
        path = run / LAST if (run / LAST).is_file() else None
        if path is None and holds_something(run) and not (run / CONFIG).is_file():
            raise UserError(f"{run} is not empty and no run folder: name another --run")
    elif resume is not None:
        path = find_checkpoint(Path(resume), LAST)
        run = run or path.parent
    if path is None:
        if recipe is None and run is not None and (run / CONFIG).is_file():
            config = load_config(run / CONFIG, overrides)
        else:
            config = load_recipe(recipe or DEFAULT_RECIPE, overrides)
        run = run or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.recipe}"
    if resume != "auto" and (path is None or path.parent.resolve() != run.resolve()) and holds_something(run):
        raise UserError(f"{run} is not empty: go on in it with `--resume auto`, or name another --run")
    if path is None:
        return run, config, None
    checkpoint = load_checkpoint(path)
    config = config_from(checkpoint.config, overrides)
    if recipe is not None and Path(recipe).stem != config.recipe:
        raise UserError(
            f"{path} was trained with recipe {config.recipe}, not {recipe}: leave out --recipe to go on with it, "
            "or start a new run with another --run"
        )
    if recipe is not None and (kept := differences(config, load_recipe(recipe, overrides))):
        warn(f"a resumed run keeps its settings; give as KEY=VALUE what is to change. Kept: {'; '.join(kept)}")
    return run, config, checkpoint


@contextlib.contextmanager
def alone_in(run: Path, *, after: int) -> Iterator[None]:
    """Make the folder and hold it: two processes that train into one would each save over the other's weights.

    Raises ValueError, saying who, where another does so, or where the run has more than the `after` steps that are gone
    on from: by one that has ended since they were read, or because an older checkpoint was named.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = run / LOCK

    def refusal() -> str:
        holder = holder_of(lock) or "it has not said which"
        return f"another process trains into {run} ({holder}): wait for it, stop it, or name another --run"

    with hold(lock, refusal):
        last = load_checkpoint(run / LAST).step if (run / LAST).is_file() else 0
        if last > after:
            raise UserError(
                f"{run} has gone on to step {last}, and going on from step {after} would overwrite that: "
                "use `--resume auto`, or name another --run"
            )
        yield


def holds_something(folder: Path) -> bool:
    """Whether a folder is there, with more than a lock in it."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
