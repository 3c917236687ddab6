"""What a reader's confidence is worth: one temperature, fitted on clips that training has not seen.

Networks that are trained until they make few mistakes are surer than they are right (Guo et al. 2017, arXiv
1706.04599). Logits divided by a temperature before the softmax keep their order, so that no answer changes, and can be
made as sure as the answers are right. That holds for clips like those of the fit, of words that the reader knows:
nothing can be fitted on the words that it does not.

Shapes: N clips, C words (classes).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lipprep.io.errors import UserError

LEAST, MOST = 0.01, 100.0  # of temperatures
BINS = 15  # of confidence, as Guo et al. have it
KEPT = (
    0.95  # of the right answers: the part at which detectors of unknown classes are compared (ODIN, Liang et al. 2018)
)
EVEN = 0.5  # the confidence of an answer that is as likely wrong as right
_TOLERANCE = 1e-10  # of a temperature, relative
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """By what logits are divided before the softmax, and the confidence after it below which a reader abstains."""

    temperature: float
    threshold: float


def fit_calibration(logits_NC: np.ndarray, labels_N: np.ndarray) -> Calibration:
    """The temperature and the threshold for a reader that answered so to clips that it was not trained on."""
    temperature = fit_temperature(logits_NC, labels_N)
    confidences_N, correct_N = answered(mean_probabilities([logits_NC], [temperature]), labels_N)
    return Calibration(temperature, abstain_threshold(confidences_N, correct_N))


def fit_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature of the greatest likelihood, from 0.01 to 100 (Guo et al. 2017).

    Each clip counts by 1 / (N + 2) as if its word were the likeliest of the others. That is what Laplace's rule of
    succession gives to the mistakes that N clips have not shown (Platt 1999 smooths his targets alike): N clips that
    are all read without a mistake make a reader about (N + 1) / (N + 2) sure, and not certain.
    Raises ValueError where there are no clips, or a logit is no number.
    """
    N, C = logits_NC.shape
    if not N:
        raise UserError("there are no clips to fit a temperature on")
    if not np.isfinite(logits_NC).all():
        raise UserError("the network answers what is no number: its training went wrong; take another checkpoint")
    if C == 1:
        return 1.0  # a reader of one word is certain whatever its logits are divided by
    x_NC = logits_NC.astype(np.float64)
    x_NC -= x_NC.max(axis=1, keepdims=True)
    rows = np.arange(N)
    others_NC = x_NC.copy()
    others_NC[rows, labels_N] = -np.inf
    unseen = 1 / (N + 2)
    wanted = float(np.mean((1 - unseen) * x_NC[rows, labels_N] + unseen * others_NC.max(axis=1)))

    def slope(b: float) -> tuple[float, float]:
        """The first and the second derivative of the negative log likelihood, which is convex in b = 1 / T."""
        p_NC = np.exp(b * x_NC)
        p_NC /= p_NC.sum(axis=1, keepdims=True)
        p_NC *= x_NC
        mean_N = p_NC.sum(axis=1)
        return float(mean_N.mean()) - wanted, float(np.mean((p_NC * x_NC).sum(axis=1) - mean_N**2))

    low, high = 1 / MOST, 1 / LEAST
    if slope(low)[0] >= 0:  # its words are no likelier than any
        return MOST
    if slope(high)[0] <= 0:
        return LEAST
    b = 1.0
    for _ in range(_STEPS):  # Newton's, and a bisection where that would leave the bracket
        first, second = slope(b)
        low, high = (b, high) if first < 0 else (low, b)
        following = b - first / second if second > 0 else math.inf
        if not low < following < high:
            following = math.sqrt(low * high)
        done = abs(following - b) <= _TOLERANCE * b
        b = following
        if done:
            break
    return 1 / b


def mean_probabilities(members: Sequence[np.ndarray], temperatures: Sequence[float]) -> np.ndarray:
    """The mean of the softmax of each member's logits (N, C) divided by its temperature: (N, C) float64."""
    total_NC = np.zeros(members[0].shape)
    for logits_NC, temperature in zip(members, temperatures, strict=True):
        x_NC = logits_NC.astype(np.float64) / temperature
        p_NC = np.exp(x_NC - x_NC.max(axis=1, keepdims=True))
        total_NC += p_NC / p_NC.sum(axis=1, keepdims=True)
    return total_NC / len(members)


def answered(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each clip the probability of the likeliest word, float64, and whether that is its word, bool."""
    return probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == labels_N


def expected_calibration_error(confidences_N: np.ndarray, correct_N: np.ndarray, *, bins: int = BINS) -> float:
    """How far confidence is from accuracy, in equal bins of confidence, in the mean over clips (Guo et al. 2017).

    0 where as many are right as their confidence says, 1 where all are certain and wrong. With few clips in a bin it is
    above 0 by chance alone.
    """
    # bin_N: (N,), bin i holds confidences over i / bins up to (i + 1) / bins
    bin_N = np.clip(np.ceil(confidences_N * bins).astype(np.int64) - 1, 0, bins - 1)
    off = np.bincount(bin_N, weights=confidences_N - correct_N, minlength=bins)
    return float(np.abs(off).sum() / len(confidences_N))


def abstain_threshold(confidences_N: np.ndarray, correct_N: np.ndarray, *, keep: float = KEPT) -> float:
    """The calibrated confidence below which a reader should abstain, rounded down to four digits.

    No clip of a validation split has an unknown word, so that what such words cost cannot be weighed; what a threshold
    costs can: the part `keep` of the right answers is kept. A reader whose right answers are often unsure would answer
    nearly always, and mostly wrongly: below 0.5, where an answer is likelier wrong than right, it abstains as well.
    """
    right = np.sort(confidences_N[correct_N])
    lowest = right[int((1 - keep) * len(right) + 1e-9)] if len(right) else EVEN
    return max(EVEN, math.floor(1e4 * float(lowest)) / 1e4)


def confidence_figures(
    members: Sequence[np.ndarray], calibrations: Sequence[Calibration | None], labels_N: np.ndarray
) -> dict:
    """What the confidence of a reader is worth, or of several (logits (N, C) each) whose probabilities are averaged.

    `ece` without temperatures and, where a member has one, `ece_calibrated` with them. Of one reader that has, also the
    part of the clips that its threshold leaves (`kept`), and if there are any, their accuracy (`kept_top1`).
    """
    plain = answered(mean_probabilities(members, [1.0] * len(members)), labels_N)
    figures = {"ece": expected_calibration_error(*plain)}
    if any(calibrations):
        confidences_N, correct_N = answered(mean_probabilities(members, temperatures(calibrations)), labels_N)
        figures["ece_calibrated"] = expected_calibration_error(confidences_N, correct_N)
        if len(members) == 1:
            kept_N = confidences_N >= calibrations[0].threshold
            figures["kept"] = float(kept_N.mean())
            if kept_N.any():
                figures["kept_top1"] = float(correct_N[kept_N].mean())
    return figures


def temperatures(calibrations: Sequence[Calibration | None]) -> list[float]:
    """The temperature of each; 1, which changes nothing, where there is none."""
    return [1.0 if each is None else each.temperature for each in calibrations]
