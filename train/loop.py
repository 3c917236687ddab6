"""The training loop, from top to bottom, with nothing hidden in callbacks.

Every random draw of step n comes from (seed, n), the batches come from the plan, and the learning rate from
the step alone. So a run that was killed and resumed on a CPU ends in the same weights, to the bit, as one that
was not, as long as the number of threads and the precision stay the same. On a GPU the same holds but for the
order in which its kernels add.

Shapes: B clips, N clips of a whole split, T frames, S side of a crop in pixels, C words (classes).
"""

import contextlib
import hashlib
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.stages.remote import RemotePath
from lipprep.stages.store import AGAIN, RemoteError
from lipprep.train.calibrate import Calibration, confidence_figures, fit_calibration
from lipprep.train.checkpoint import BEST, LAST, Checkpoint, save_checkpoint, versions
from lipprep.train.config import Config, save_config
from lipprep.train.epoch import evaluation_plan
from lipprep.train.errors import explained, is_of_reader, less_memory, of_reader
from lipprep.train.evaluate import classify, top_k
from lipprep.train.loader import BatchLoader
from lipprep.train.metrics import METRICS, Metrics, NoMetrics, best_validation, has_evaluation, warn
from lipprep.train.optimize import learning_rate
from lipprep.train.prepare import Kept, Work, prepare, validates
from lipprep.train.ranks import ALONE, Ranks
from lipprep.train.report import CURVES, FIRST_BATCH, SUMMARY, draw_batch, draw_curves, write_summary
from lipprep.train.run import CONFIG, alone_in
from lipprep.train.step import Step
from lipprep.train.timing import FIRST_TRACED, peak_memory, tracing
from lipprep.train.watch import Skipped, Watch

TRACE = "trace.json"


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `best` is its best validation accuracy, None where there is no split val.

    `ended` says why: by all its "steps", by "max_time", or because it had "learned" all it was to overfit.
    """

    steps: int
    best: float | None
    seconds: float
    ended: str
    validated: int  # clips
    files: list[Path]


def train(
    config: Config,
    *,
    shards: Path | RemotePath,
    run: Path,
    device: str = "auto",
    resume: Checkpoint | None = None,
    cache: Path | None = None,
    cache_size: int | None = None,
    skip_corrupt: bool = False,
    other_shards: bool = False,
    trace: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train on the split `train` of a folder of shards, into the folder `run`; go on from `resume` if given.

    Remote shards are read through `cache`, a local folder that takes up to `cache_size` bytes. `skip_corrupt` leaves
    out up to one damaged clip in a thousand, `other_shards` goes on with shards that are not those that the run began
    with, and `trace` writes a trace of a few steps. Where `ranks` are several, each calls this, and the main one
    writes and speaks for all.

    Raises ValueError where shards, recipe and checkpoint do not go together, loss or weights are no longer
    numbers, or memory does not suffice, and, with last.pt saved, KeyboardInterrupt where Ctrl-C was pressed or SIGTERM
    came, and RemoteError where a store does not answer.
    """
    # Asked before any rank can fail by itself: other machines may not have the folder.
    kept = ranks.of_main(lambda: Kept((run / BEST).is_file(), resume is not None and has_evaluation(run, resume.step)))
    where = {"device": device, "cache": cache, "cache_size": cache_size}
    how = {"skip_corrupt": skip_corrupt, "other_shards": other_shards}
    with ranks.agreed(), explained(less_memory(config)):
        if config.teacher and run.resolve() in (Path(config.teacher).resolve(), Path(config.teacher).resolve().parent):
            raise UserError(f"teacher={config.teacher} is of the run itself: name another one to learn from")
        work = prepare(config, shards, resume=resume, kept=kept, ranks=ranks, **where, **how)
    _check_alike(work)
    with explained(less_memory(config)), contextlib.ExitStack() as stack:
        ranks.of_main(lambda: stack.enter_context(alone_in(run, after=work.done)))
        return _train(work, work.step(), run, skip_corrupt=skip_corrupt, trace=trace)


_CHECKPOINT = re.compile(r"\.(last|best|step-\d+)\.pt\.[0-9a-f]+\.tmp")  # unfinished


def _train(work: Work, step: Step, run: Path, *, skip_corrupt: bool, trace: bool) -> Outcome:
    config, index, total, per_epoch, ranks = work.config, work.index, work.total, work.per_epoch, work.ranks
    if ranks.main:
        save_config(config, run / CONFIG)
        for left in run.glob(".*.pt.*.tmp"):  # by a run that was killed while it saved
            if _CHECKPOINT.match(left.name):
                left.unlink(missing_ok=True)
        if work.done == 0:
            step.show = lambda batch, labels: draw_batch(batch, labels, list(index.labels), run / FIRST_BATCH)
    reading = {"workers": config.resolved["workers"], "pin_memory": work.device.type == "cuda"}
    loader = iter(BatchLoader(work.batches, _planned(work, step), **reading))
    skipped = Skipped(sum(work.batches.counts) + (sum(work.val.counts) if work.val else 0), ranks)
    if trace and ranks.main and total - work.done < FIRST_TRACED:
        warn(f"there will be no {TRACE}: it begins with step {FIRST_TRACED}, and {total - work.done} are left")
    validation = None
    if work.val is not None:
        share = max(1, config.batch_size // ranks.world)
        val_plan = evaluation_plan(work.to_validate(), batch_size=share, rank=ranks.rank, world=ranks.world)
        validation = BatchLoader(work.val, val_plan, **reading)

    def save(name: str) -> None:
        if ranks.main:
            if not _are_finite(work.model):
                raise watch.failed(f"a weight after step {work.done}", math.nan)
            for batches in filter(None, (work.batches, work.val)):
                batches.check_unchanged()
            save_checkpoint(run / name, work.checkpoint())

    def rescue() -> None:
        """Save where this rank fails: alone, for what the others do meanwhile is not known."""
        if ranks.world == 1:
            watch.look()
        save(LAST)

    def read(split: str, loader: Iterable[dict]) -> Iterator[dict]:
        """The batches of a loader; where one cannot be read, save first."""
        batches = skipped.noted(split, loader, masked=split != "train")
        while True:
            try:
                batch = next(batches, None)
            except (UserError, RuntimeError) as error:
                rescue()
                if pressed:  # and the signal has ended a reader, too
                    raise KeyboardInterrupt from error
                if not is_of_reader(error):
                    raise
                raise UserError(f"{of_reader(error)}. {_go_on(run, ranks)}") from error
            if batch is None:
                return
            yield batch

    started = time.monotonic()
    # On a CPU nothing is queued: a look at each step costs nothing, and none is taken after a loss that is no number.
    eager = work.device.type == "cpu" and ranks.world == 1
    last: dict = {}  # figures of the last validation
    ended = None
    silent = None if ranks.main else True
    bar = tqdm(total=total, initial=work.done, unit="step", desc="train", disable=silent, dynamic_ncols=True)
    writing = Metrics(run, step=work.done) if ranks.main else NoMetrics()
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(writing)
        profile = stack.enter_context(tracing(run / TRACE, work.device)) if trace and ranks.main else None
        watch = Watch(work, run, writing, bar)
        pressed = stack.enter_context(_interrupted())
        stack.enter_context(_resumable(run, rescue, ranks))
        if work.done and ranks.main and not (run / LAST).is_file():
            save(LAST)  # the run can go on from here whatever comes

        def validate() -> None:
            epoch = -(-work.done // per_epoch)
            ranks.spread(work.reader)
            figures = _validate(work, read("val", validation), ranks)
            with ranks.agreed():
                if not math.isfinite(figures["loss"]):
                    raise watch.failed(f"the validation loss after step {work.done}", figures["loss"])
            last.update(step=work.done, **figures)
            if "temperature" in figures:
                work.calibration = Calibration(figures["temperature"], figures["threshold"])
            # Of equal ones the last: on small splits many are equal, and the rate has fallen further.
            better = work.best is None or figures["top1"] >= work.best
            if better:
                work.best = figures["top1"]
                save(BEST)
            if better or work.done == total:  # which ends with its temperature
                save(LAST)
            writing.evaluation(work.done, "val", epoch=epoch, **figures)
            if ranks.main:
                accuracy = f"val top-1 {100 * figures['top1']:.1f} %"
                if "top1_without_boundary" in figures:
                    accuracy += f", word boundaries untold {100 * figures['top1_without_boundary']:.1f} %"
                tqdm.write(f"epoch {epoch}/{-(-total // per_epoch)}  val loss {figures['loss']:.3f}  {accuracy}")

        batches = read("train", loader)
        if work.owed:
            validate()
        watch.pause()
        while ended is None and work.done < total:
            late = config.max_time is not None and time.monotonic() - started > config.max_time
            stops, times_out = ranks.gather(np.array([[bool(pressed), late]])).any(axis=0)
            if stops or times_out:
                ended = "interrupted" if stops else "max_time"
                break
            with watch.waiting.for_batch():
                batch = next(batches)
            lr = learning_rate(work.done, total=total, per_epoch=per_epoch, config=config)
            watch.step(step(batch, step=work.done, lr=lr), batch["keys"])
            work.done += 1
            work.calibration = None  # that of other weights
            done = work.done
            looks_back = validation is not None and validates(config, done, total, per_epoch)
            saves = looks_back or done == total or done % (config.save_every or per_epoch) == 0
            keeps = config.keep_every is not None and done % config.keep_every == 0
            logs = done % config.log_every == 0 or done == total
            if eager or logs or saves or keeps:
                watch.look()
                if skip_corrupt and ranks.world > 1:
                    skipped.check()
            if logs:
                watch.line(lr=lr)
            if saves:
                save(LAST)
            if keeps:
                save(f"step-{done}.pt")
            if looks_back:
                validate()
                if config.overfit and work.best == 1.0:
                    ended = "learned"
            if profile is not None:
                profile.step()
            if saves or keeps:
                watch.pause()  # to save and to validate is not to train
        if ended in ("interrupted", "max_time"):
            watch.look()
            save(LAST)
            if ended == "max_time" and validation is not None and last.get("step") != work.done:
                validate()
                save(LAST)
    if ended == "interrupted":
        raise KeyboardInterrupt
    validated = 0 if work.val is None else len(work.to_validate())
    outcome = Outcome(work.done, work.best, time.monotonic() - started, ended or "steps", validated, [])
    if not ranks.main:
        return outcome
    write_summary(run, _summary(work, outcome, watch, skipped, {"best": best_validation(run), "last": last or None}))
    draw_curves(run)
    names = (CONFIG, METRICS, LAST, BEST, SUMMARY, CURVES, FIRST_BATCH, *([TRACE] if trace else []))
    return replace(outcome, files=[run / name for name in names if (run / name).is_file()])


def _check_alike(work: Work) -> None:
    """Raise ValueError, saying which, where ranks have other shards, or another teacher, than the main one.

    As from a stale copy on a machine.
    """
    ranks = work.ranks
    shards = f"{work.index.fingerprint} {work.total} {work.per_epoch} {work.val is None}"
    for what, mine in (("shards", shards), ("teacher's weights", work.config.resolved.get("teacher_sha256", ""))):
        digests = ranks.gather(np.array(list(hashlib.sha256(mine.encode()).digest()))).reshape(ranks.world, -1)
        others = (digests != digests[0]).any(axis=1).nonzero()[0].tolist()
        with ranks.agreed():
            if others:
                raise UserError(
                    f"the {what} of rank {', '.join(map(str, others))} are others than those of rank 0: copy them anew "
                    "to that machine, or name one folder that all see"
                )


def _validate(work: Work, loader: Iterable[dict], ranks: Ranks) -> dict:
    config, count = work.config, len(work.to_validate())
    how = {"options": config.augment, "fps": work.index.fps, "precision": config.precision}
    answers = classify(work.reader, loader, device=work.device, bar=ranks.main, **how)

    def of_all(values_n: np.ndarray) -> np.ndarray:
        # Row i of rank r is of sample world * i + r; those beyond the last sample are repeated ones.
        values = ranks.gather(values_n).reshape(ranks.world, -1, *values_n.shape[1:])
        return values.swapaxes(0, 1).reshape(-1, *values_n.shape[1:])[:count]

    labels_N = of_all(answers.labels)
    whole_N = labels_N >= 0
    logits_NC, labels_N = of_all(answers.logits)[whole_N], labels_N[whole_N]
    negative = functional.nll_loss if work.model.normalised else functional.cross_entropy
    loss = negative(torch.from_numpy(logits_NC), torch.from_numpy(labels_N))
    figures = {"loss": loss.item(), "top1": top_k(logits_NC, labels_N, 1), "top5": top_k(logits_NC, labels_N, 5)}
    if answers.untold is not None:
        logits_NC = of_all(answers.untold)[whole_N]
        figures["top1_without_boundary"] = top_k(logits_NC, labels_N, 1)
    # Of confidence in the wild, so without boundaries; and on clips that are learnt by heart none can be measured.
    if not config.overfit and len(labels_N) and np.isfinite(logits_NC).all():
        calibration = fit_calibration(logits_NC, labels_N)
        figures |= asdict(calibration) | confidence_figures([logits_NC], [calibration], labels_N)
    return figures


def _summary(work: Work, outcome: Outcome, watch: Watch, skipped: Skipped, validations: dict) -> dict:
    config, index = work.config, work.index
    return {
        "ended": outcome.ended,
        "recipe": config.recipe,
        "steps": outcome.steps,
        "epochs": round(outcome.steps / work.per_epoch, 2),
        "best_val_top1": outcome.best,
        "best_validation": validations["best"],
        "last_validation": validations["last"],
        "seconds": round(outcome.seconds, 1),
        "clips_per_s": round(watch.clips / watch.seconds, 1) if watch.seconds else None,
        "wait": round(watch.waited / watch.seconds, 4) if watch.seconds else None,
        "peak_memory_mb": round(peak_memory(work.device) / 1e6),
        "skipped": len(skipped.places),
        "parameters": sum(weight.numel() for weight in work.model.parameters()),
        "words": len(index.labels),
        "clips": {"train": sum(work.batches.counts), "val": sum(work.val.counts) if work.val else 0},
        "dataset": index.fingerprint,
        "dataset_name": index.dataset,
        "profile": index.profile,
        "generation": 0,
        **config.resolved,
        "versions": versions(),
    }


def _planned(work: Work, step: Step) -> Iterator[np.ndarray]:
    """What this process reads for each step from the one at hand on, over the ends of epochs."""
    number = work.done
    while number < work.total:
        epoch, first = divmod(number, work.per_epoch)
        for batch in work.plan(epoch)[first : first + work.total - number]:
            yield batch[step.rows(number)]
            number += 1


def _are_finite(model: torch.nn.Module) -> bool:
    """Whether all weights and running statistics are numbers: else none of it is worth saving."""
    return bool(torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all())


def _go_on(run: Path, ranks: Ranks) -> str:
    saved = "The run is saved: go on" if ranks.main else "Go on from where the run was saved last,"
    return f"{saved} with `--run {run} --resume auto`"


@contextlib.contextmanager
def _resumable(run: Path, stop: Callable[[], None], ranks: Ranks) -> Iterator[None]:
    """Where a store stops answering, save by `stop` and say how to go on."""
    try:
        yield
    except RemoteError as error:
        stop()
        raise RemoteError(f"{str(error).removesuffix(AGAIN)}. {_go_on(run, ranks)}") from error


@contextlib.contextmanager
def _interrupted() -> Iterator[list]:
    """A list that holds something once Ctrl-C was pressed or SIGTERM came: the step and its checkpoint come first.

    Pressed again, it stops at once. In a thread, which gets no signals, the list stays empty.
    """
    pressed: list = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(*_: object) -> None:
        pressed.append(True)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield pressed
    finally:
        restore()
