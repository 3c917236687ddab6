"""How well a model reads a split: accuracies with their intervals, what its confidence is worth, words it confuses.

Shapes: N clips, C words (classes), T frames, S side of a crop in pixels.
"""

import contextlib
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lipprep.io.errors import UserError
from lipprep.stages.atomic import check_own, write_text
from lipprep.stages.lock import LOCK, hold
from lipprep.stages.remote import RemotePath
from lipprep.stages.shard.index import Index, load_index
from lipprep.stages.untrusted import printable, read_text
from lipprep.train.augment import eval_batch
from lipprep.train.boundary import boundary_vectors, words_of
from lipprep.train.cache import open_cache
from lipprep.train.calibrate import Calibration, confidence_figures, fit_calibration, mean_probabilities, temperatures
from lipprep.train.checkpoint import Checkpoint, check_fits, find_checkpoint, load_checkpoint, save_checkpoint
from lipprep.train.config import Config, config_from
from lipprep.train.confusion import CONFUSION_FILES, confusion, write_confusion
from lipprep.train.device import choose_device, load_model, reading
from lipprep.train.draws import AugmentOptions
from lipprep.train.epoch import evaluation_plan, places
from lipprep.train.errors import explained
from lipprep.train.loader import BatchLoader, ShardBatches, default_workers
from lipprep.train.watch import Skipped

Z95 = 1.959964  # the two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Answers:
    """What a model says of clips: logits (N, C) float32, beside the clips' labels (N,) int64 and keys.

    Of a model that is told word boundaries, `untold` (N, C) is what it says where it is not, else None; `told` (N,)
    bool are the clips whose boundary is known.
    """

    logits: np.ndarray
    labels: np.ndarray
    keys: list[str]
    untold: np.ndarray | None
    told: np.ndarray

    @property
    def in_the_wild(self) -> np.ndarray:
        """Logits (N, C) of a model that is told no word boundaries."""
        return self.logits if self.untold is None else self.untold


def classify(
    model: torch.nn.Module,
    loader: Iterable[dict],
    *,
    options: AugmentOptions,
    fps: float,
    device: torch.device,
    precision: str,
    bar: bool = True,
) -> Answers:
    """The model's answer to each clip once; `fps` is that of the clips.

    A network that sees the padding gets the clips of each length by themselves, without any, so that a clip's
    answer does not depend on what it is batched with.
    """
    logits, untold, told, labels, keys = [], [], [], [], []
    formulas = {model.boundary} - {None}

    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=device.type == "cuda")

    model.eval()
    with torch.inference_mode():
        silent = None if bar else True  # None: where it is no terminal
        for batch in tqdm(loader, unit="batch", desc="classify", leave=False, disable=silent, dynamic_ncols=True):
            lengths_B = batch["lengths"]
            rows = [torch.arange(len(lengths_B))]
            if not model.ignores_padding:
                rows = [(lengths_B == length).nonzero()[:, 0] for length in lengths_B.unique()]
            words = words_of(batch, formulas, fps=fps)
            parts = []
            for rows_b in rows:
                lengths_b = lengths_B[rows_b]
                video_bTSS = to(batch["video"][rows_b, : lengths_b.max()])
                x_b1TSS, at_b = eval_batch(video_bTSS, lengths_b, options), to(lengths_b)
                with reading(device, precision):
                    feat_bTC = model.extract_features(x_b1TSS, at_b)
                    ways = [to(boundary_vectors(w[rows_b.numpy()], feat_bTC.shape[1])) for w in words.values()]
                    parts.append([model.read_features(feat_bTC, at_b, b).float() for b in (*ways, None)])
            order = to(torch.cat(rows).argsort())
            answers = [torch.cat(part)[order] for part in zip(*parts, strict=True)]
            logits.append(answers[0])
            untold.append(answers[-1])
            told += [frames_B2[:, 0] < frames_B2[:, 1] for frames_B2 in words.values()]
            labels.append(batch["labels"])
            keys += batch["keys"]
    labels_N = torch.cat(labels).numpy()
    return Answers(
        torch.cat(logits).cpu().numpy(),
        labels_N,
        keys,
        torch.cat(untold).cpu().numpy() if formulas else None,
        np.concatenate(told) if formulas else np.zeros(len(labels_N), bool),
    )


def top_k(logits_NC: np.ndarray, labels_N: np.ndarray, k: int) -> float:
    """The part of the clips whose word is among the k likeliest."""
    best_Nk = np.argsort(-logits_NC, axis=1, kind="stable")[:, :k]
    return float((best_Nk == labels_N[:, None]).any(axis=1).mean())


def wilson(correct: int, clips: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, 1927); it takes the clips to be independent."""
    p, spread = correct / clips, Z95**2 / clips
    middle = (p + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(p * (1 - p) / clips + spread / clips / 4) / (1 + spread)
    return middle - half if correct else 0.0, middle + half if correct < clips else 1.0


def read_groups(path: Path, labels: Sequence[str]) -> list[list[str]]:
    """Groups of words, one a line, the words separated by spaces or commas; labels with spaces by commas.

    Raises ValueError where a word is no label or stands in two groups, or a group has fewer than two words.
    """
    groups: list[list[str]] = []
    for number, line in enumerate(read_text(path, "list of groups", limit=1 << 24).splitlines(), start=1):
        words = [w.strip() for w in line.split(",")]
        if not all(w in labels for w in words):
            words = re.split(r"[\s,]+", line.strip())
        words = [w for w in words if w]
        if not words:
            continue
        for word in words:
            if word not in labels:
                close = difflib.get_close_matches(word, labels, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise UserError(f"{path}, line {number}: {word!r} is none of the model's {len(labels)} words{hint}")
            if any(word in group for group in groups) or words.count(word) > 1:
                raise UserError(f"{path}, line {number}: {word!r} stands there twice; a word has one group")
        if len(words) < 2:
            raise UserError(f"{path}, line {number}: a group needs at least two words to choose from")
        groups.append(words)
    if not groups:
        raise UserError(f"{path} holds no groups: write one a line, as in `blue red white green`")
    return groups


def within_groups(
    logits_NC: np.ndarray, labels_N: np.ndarray, *, labels: Sequence[str], groups: Sequence[Sequence[str]]
) -> dict:
    """Accuracy where the word's group is given away: the likeliest word of the group alone counts.

    Groups whose words no clip says are left out. `chance` is that of a guess inside the group.
    """
    places = {word: i for i, word in enumerate(labels)}
    rows = []
    for words in groups:
        columns = np.array([places[word] for word in words])
        inside_N = np.isin(labels_N, columns)
        clips = int(inside_N.sum())
        if clips:
            answers = columns[np.argmax(logits_NC[inside_N][:, columns], axis=1)]
            correct = int((answers == labels_N[inside_N]).sum())
            rows.append({"words": list(words), **_proportion(correct, clips), "chance": 1 / len(words)})
    clips = sum(row["clips"] for row in rows)
    if not clips:
        return {"groups": [], "all_groups": None}
    chance = sum(row["chance"] * row["clips"] for row in rows) / clips
    return {
        "groups": rows,
        "all_groups": {**_proportion(sum(row["correct"] for row in rows), clips), "chance": chance},
    }


def evaluate(
    run: Path,
    *others: Path,
    shards: Path | RemotePath,
    split: str = "test",
    calibrate: bool = False,
    groups: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    cache: Path | None = None,
    cache_size: int | None = None,
    skip_corrupt: bool = False,
) -> dict:
    """Measure a run (its best.pt) or a checkpoint on a split, and write tables and picture to a folder.

    With `calibrate`, temperature and threshold are fitted on the split first and stored in the checkpoint.
    Several are measured as an ensemble, whose answer is the mean of its members' probabilities, each by its own
    temperature; each member sees the clips by its own options, and results.json holds the figures of each under
    `members`.
    Remote shards are read through `cache`, a local folder that takes up to `cache_size` bytes.
    `skip_corrupt` leaves out up to one damaged clip in a thousand; `damaged` counts them.
    Returns what results.json there holds; `not_in_shards` counts, by class of failure, the clips of the split
    that no shard holds, so that no figure speaks of them. Raises ValueError where the checkpoint is none, its labels or
    its training crops are not like those of the shards, or it cannot be calibrated, and RemoteError where a store does
    not answer.
    """
    if calibrate and others:
        raise UserError("an ensemble has no temperature of its own: calibrate its members, one after another")
    if calibrate and split == "train":
        raise UserError("a reader is surer of the clips that it has learnt than of others: calibrate it on --split val")
    members = [_Member.load(path) for path in (run, *others)]
    paths = [member.path.resolve() for member in members]
    if twice := [str(path) for number, path in enumerate(paths) if path in paths[:number]]:
        raise UserError(f"{twice[0]} is named twice: each member of an ensemble counts once")
    index = load_index(shards)
    for member in members:
        member.check_fits(index)
    folder = Path(out) if out else members[0].path.parent / f"evaluate-{split}{'-ensemble' if others else ''}"
    _check_folder(folder)
    kept = open_cache(shards, index.split(split), folder=cache, size=cache_size)
    batches = ShardBatches(shards, index, split, cache=kept, skip_damaged=skip_corrupt)
    wanted = read_groups(groups, index.labels) if groups else None
    where = choose_device(device)
    skipped = Skipped(sum(batches.counts))
    answers = [member.answers(batches, split, skipped, device=where, batch_size=batch_size) for member in members]
    # What one of them could not read is left out of all.
    answers = _whole(answers)
    labels_N = answers[0].labels
    if calibrate:
        members = [members[0].calibrated(answers[0])]
    calibrations = [member.checkpoint.calibration for member in members]
    scores_NC = together([own.logits for own in answers], for_told(answers, calibrations))

    if others:
        figures = [_figures([own], [calibration]) for own, calibration in zip(answers, calibrations, strict=True)]
        about = {"members": [member.about() | own for member, own in zip(members, figures, strict=True)]}
    else:
        about = members[0].about()
    results = {
        **about,
        "dataset": index.dataset,
        "split": split,
        "words": len(index.labels),
        "clips": len(labels_N),
        **_figures(answers, calibrations),
        "damaged": len(skipped.places),
        "not_in_shards": dict(index.failures.get(split, {})),
    }
    if wanted:
        results |= within_groups(scores_NC, labels_N, labels=index.labels, groups=wanted)
        if "without_boundary" in results:
            untold_NC = together([own.in_the_wild for own in answers], calibrations)
            results["without_boundary"] |= within_groups(untold_NC, labels_N, labels=index.labels, groups=wanted)
    results["files"] = [str(folder / name) for name in ("results.json", *CONFUSION_FILES)]
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    told = ", word boundaries told" if "without_boundary" in results else ""
    confusion_CC = confusion(scores_NC.argmax(axis=1), labels_N, words=len(index.labels))
    write_confusion(confusion_CC, index.labels, folder, title=f"{index.dataset}, {split}{told}")
    return results


def _check_folder(folder: Path) -> None:
    """Raise UserError where tables or picture would replace files in `folder` that no evaluation made."""
    results = folder / "results.json"
    check_own(results, b'"checkpoint": ')
    if not results.exists() and (there := [name for name in CONFUSION_FILES if (folder / name).exists()]):
        raise UserError(f"{printable(folder / there[0])} is not lipprep's, and is never replaced: name another folder")


@dataclass(frozen=True)
class _Member:
    """What is measured: a checkpoint and its config."""

    path: Path
    checkpoint: Checkpoint
    config: Config

    @classmethod
    def load(cls, run: Path) -> "_Member":
        path = find_checkpoint(run)
        checkpoint = replace(load_checkpoint(path), optimizer={})  # of several, that would be the most memory
        return cls(path, checkpoint, config_from(checkpoint.config))

    def check_fits(self, index: Index) -> None:
        """Raise ValueError, naming the file, where it cannot be used on these shards."""
        try:
            check_fits(self.checkpoint, index)
        except UserError as error:
            raise UserError(f"{printable(self.path)}: {error}") from error

    def about(self) -> dict:
        own = self.checkpoint
        found = {"checkpoint": str(self.path), "step": own.step, "recipe": self.config.recipe}
        return {**found, "temperature": own.temperature, "threshold": own.threshold}

    def answers(
        self, batches: ShardBatches, split: str, skipped: Skipped, *, device: torch.device, batch_size: int | None
    ) -> Answers:
        """The answers to all clips, the label -1 where one is damaged."""
        size, workers = batch_size or self.config.batch_size, self.config.workers
        plan = evaluation_plan(places(batches.counts), batch_size=size)
        workers = default_workers(device) if workers is None else workers
        loader = BatchLoader(batches, plan, workers=workers, pin_memory=device.type == "cuda")
        how = {"options": self.config.augment, "fps": self.checkpoint.fps, "precision": self.config.precision}
        with explained(f"lower --batch-size (it is {size}), or use --device cpu"):
            model = load_model(self.checkpoint, device)
            return classify(model, skipped.noted(split, loader), device=device, **how)

    def calibrated(self, own: Answers) -> "_Member":
        """With temperature and threshold as its answers have them, which its file holds from now on.

        Raises ValueError where a training is at work on the file, or has been since it was read.
        """
        found = fit_calibration(own.in_the_wild, own.labels)
        fitted = {"temperature": found.temperature, "threshold": found.threshold}
        shown, lock = printable(self.path), self.path.parent / LOCK
        refusal = f"a training is at work in {printable(self.path.parent)}: calibrate {shown} when it has ended"
        with hold(lock, lambda: refusal) if lock.is_file() else contextlib.nullcontext():
            whole = load_checkpoint(self.path)  # with the state of its optimizer
            same = whole.step == self.checkpoint.step and whole.weights.keys() == self.checkpoint.weights.keys()
            if not same or not all(torch.equal(w, self.checkpoint.weights[k]) for k, w in whole.weights.items()):
                raise UserError(f"{shown} holds other weights than when it was read: calibrate it again")
            save_checkpoint(self.path, replace(whole, **fitted))
        return replace(self, checkpoint=replace(self.checkpoint, **fitted))


def together(members: Sequence[np.ndarray], calibrations: Sequence[Calibration | None]) -> np.ndarray:
    """What an ensemble answers: the mean of its members' probabilities, of logits (N, C) each; one's are its logits."""
    return members[0] if len(members) == 1 else mean_probabilities(members, temperatures(calibrations))


def _whole(members: Sequence[Answers]) -> list[Answers]:
    """The answers to the clips that every member could read."""
    whole_N = np.all([own.labels >= 0 for own in members], axis=0)
    keys = list(itertools.compress(members[0].keys, whole_N))
    return [
        Answers(
            own.logits[whole_N],
            own.labels[whole_N],
            keys,
            None if own.untold is None else own.untold[whole_N],
            own.told[whole_N],
        )
        for own in members
    ]


def _figures(members: Sequence[Answers], calibrations: Sequence[Calibration | None]) -> dict:
    """Accuracies of members together; where one is told word boundaries, those without them apart."""
    labels_N = members[0].labels

    def of(logits: list[np.ndarray], calibrations: Sequence[Calibration | None]) -> dict:
        scores_NC = together(logits, calibrations)
        correct = int((np.argmax(scores_NC, axis=1) == labels_N).sum())
        interval = list(wilson(correct, len(labels_N)))
        figures = {"top1": correct / len(labels_N), "top1_interval95": interval, "top5": top_k(scores_NC, labels_N, 5)}
        return figures | confidence_figures(logits, calibrations, labels_N)

    figures = of([own.logits for own in members], for_told(members, calibrations))
    if all(own.untold is None for own in members):
        return figures
    told = int(np.any([own.told for own in members], axis=0).sum())
    untold = of([own.in_the_wild for own in members], calibrations)
    return {**figures, "boundaries_known": told, "without_boundary": untold}


def for_told(members: Sequence[Answers], calibrations: Sequence[Calibration | None]) -> list[Calibration | None]:
    """The calibrations for answers with word boundaries: none where one is told them, for its own is without."""
    return [each if own.untold is None else None for own, each in zip(members, calibrations, strict=True)]


def _proportion(correct: int, clips: int) -> dict:
    return {"clips": clips, "correct": correct, "accuracy": correct / clips, "interval95": list(wilson(correct, clips))}
