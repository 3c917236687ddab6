"""What torch's errors mean to who trains: a cause and a remedy in place of a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lipprep.io.errors import UserError
from lipprep.train.config import Config

# Of CPUs (Linux's words, Windows'), of torch on GPUs, of CUDA itself, of cuBLAS and cuDNN.
_SCARCE = (
    "can't allocate memory",
    "not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
)


def less_memory(config: Config) -> str:
    """How training takes less memory."""
    more = 2 * config.accumulate
    return (
        f"lower batch_size (it is {config.batch_size}), or take each batch in {more} parts with accumulate={more}; "
        "precision=bf16 takes less, too"
    )


@contextlib.contextmanager
def explained(less: str) -> Iterator[None]:
    """Raise ValueError with what to change where memory does not suffice (`less`), or torch needs something else."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if is_memory(error):
            raise UserError(f"out of memory: {less} ({text.splitlines()[0] if text else 'no details'})") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(text.splitlines()[:2])
            raise UserError(f"torch.compile failed: leave out compile=true ({reason})") from error
        if "DataLoader worker" in text:  # in a rehearsal, or an evaluation
            raise UserError(of_reader(error)) from error
        if "more than 1 value per channel" in text:
            raise UserError(
                "batch normalisation has one frame of one clip to go by: raise batch_size, or lower accumulate"
            ) from error
        raise


def is_memory(error: Exception) -> bool:
    """Whether memory did not suffice, of the host or of a GPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SCARCE)


def is_of_reader(error: Exception) -> bool:
    """Return whether `of_reader` knows what to do about an error that reading clips raised."""
    return isinstance(error, UserError) or is_memory(error) or "DataLoader worker" in str(error)


def of_reader(error: Exception) -> str:
    """What went wrong with reading, and what to do about it."""
    text = str(error).partition("\n")[0]
    if "DataLoader worker" in text:
        main = Path(getattr(sys.modules["__main__"], "__file__", None) or "lipprep").stem
        own = "" if main in ("lipprep", "__main__") else f"; {main}.py must train below `if __name__ == '__main__':`"
        return (
            f"a process that reads clips ended ({text}): if that was for want of memory, lower workers or batch_size; "
            f"in a container, give it more shared memory (docker: --shm-size){own}"
        )
    if is_memory(error):
        return f"{text}: lower batch_size or workers"
    if " is damaged" in text:
        return f"{text}, or add --skip-corrupt to leave such clips out, up to 0.1 % of them"
    return text
