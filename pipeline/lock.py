"""One run at a time in a folder: two that make the same chunks would only be in each other's way.

Slices of one number of parts share a folder, for no two of them make the same chunk; those of another number wait.
Of a folder in a store, runs on other machines are not seen: stores have no locks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lipprep.pipeline.plan import WHOLE, Slice
from lipprep.stages.lock import LOCK, hold, holder_of, take
from lipprep.stages.remote import RemotePath
from lipprep.stages.scratch import local_scratch


@contextlib.contextmanager
def alone_in(folder: Path | RemotePath, *, shared: bool = False, part: Slice = WHOLE) -> Iterator[None]:
    """Hold `folder`'s lock; `shared` with others who only read there. The system frees it when the process ends.

    A `part` shares the folder with other parts of as many. Raises ValueError, saying who, where another process makes
    something there (or reads, unless `shared` or a part). Where the file system knows no locks there are none.
    """
    there = local_scratch(folder)
    lock = there / LOCK
    if shared and not lock.exists():  # nothing was made there by anybody
        yield
        return
    if not shared:
        there.mkdir(parents=True, exist_ok=True)
    if part.whole:
        with _hold(lock, folder, shared=shared):
            if not shared:  # then nobody holds a part's
                for left in there.glob(f"{LOCK}-*"):
                    with contextlib.suppress(OSError):  # it does no harm
                        left.unlink()
            yield
        return
    lock.touch()
    mine = there / f"{LOCK}-{part.number}-of-{part.of}"
    with _hold(lock, folder, shared=True), _hold(mine, folder, says=f"slice {part}, "):
        # Each holds its own before it looks at the others': of two that begin at once, one at least sees the other.
        for other in there.glob(f"{LOCK}-*"):
            if not other.name.endswith(f"-of-{part.of}"):
                with _hold(other, folder, shared=True):
                    pass
        yield


def _hold(
    path: Path, folder: Path | RemotePath, *, shared: bool = False, says: str = ""
) -> contextlib.AbstractContextManager[None]:
    def refusal() -> str:
        return f"another run ({_holder(path)}) is at work in {folder}: wait for it, or stop it first"

    return hold(path, refusal, shared=shared, says=says)


def _holder(path: Path) -> str:
    """Who holds a lock that cannot be had: what is written there tells of those alone who share it with nobody."""
    with path.open(errors="replace") as file:
        # If it is now held by us, too, nobody removes the parts' meanwhile.
        locks = sorted(path.parent.glob(f"{LOCK}-*")) if take(file, shared=True) else []
        for lock in (path, *locks):
            if (holder := holder_of(lock)) is not None:
                return holder or "it has not said which"
    return "one that reads there, as the next stage and lipprep verify do"
