"""Scores that go with a calibration error: Brier and its decomposition, NLL, AUROC, selective risk."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import FloatArray
from .bins import BinTable
from .examples import Examples


def average(values: npt.NDArray[Any], weight: npt.NDArray[np.float64] | None) -> float:
    """Weighted mean in float64."""
    if weight is None:
        return float(np.mean(values, dtype=np.float64))
    return float(np.dot(values.astype(np.float64), weight) / weight.sum())


def brier_of(sum_squares: Any, gold_probability: Any) -> Any:
    """Brier score of a distribution against one right class, `Σ (p - y)²`, from `Σ p²` and the right class's `p`."""
    return sum_squares - 2.0 * gold_probability + 1.0


def brier_score(examples: Examples) -> float:
    """
    Mean squared error of the probabilities: over all classes, summed, for full rows (Brier 1950, range [0, 2]); of the
    confidence against the 0/1 outcome for 1-d confidences (range [0, 1]).
    """
    if examples.probabilities is None or examples.labels is None:
        return average((examples.confidence.astype(np.float64) - examples.correct) ** 2, examples.weight)
    rows = examples.probabilities
    picked = rows[np.arange(len(rows)), examples.labels].astype(np.float64)
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return average(squares - 2 * picked + 1, examples.weight)


def negative_log_likelihood(examples: Examples) -> float | None:
    """Mean of -ln p(label) in nats for full rows, `None` for 1-d confidences; infinite if a label had probability 0."""
    if examples.probabilities is None or examples.labels is None:
        return None
    logprob = examples.label_logprob
    if logprob is None:
        picked = examples.probabilities[np.arange(len(examples)), examples.labels].astype(np.float64)
        with np.errstate(divide="ignore"):
            logprob = np.log(picked)
    if examples.weight is None:
        return float(-logprob.mean())
    used = examples.weight > 0  # 0 * inf would be NaN
    return float(-np.dot(logprob[used], examples.weight[used]) / examples.weight.sum())


def brier_decomposition(table: BinTable, brier: float) -> dict[str, float]:
    """
    Murphy's decomposition of the Brier score of 0/1 outcomes over bins.

    `brier = reliability - resolution + uncertainty + within_bin`. The last term is what binning leaves out (Stephenson
    et al. 2008): it is 0 when all confidences of a bin are equal.

    Args:
        table (`BinTable`):
            Bins of the confidences.
        brier (`float`):
            Brier score of the same confidences, unbinned.

    Returns:
        `dict[str, float]`: `brier`, `reliability` (lower is better), `resolution` (higher is better), `uncertainty`
        (a property of the data) and `within_bin`.
    """
    filled = table.weight > 0
    weight = table.weight[filled]
    total = weight.sum()
    gap = table.gap_sum[filled] / weight
    accuracy = table.correct_sum[filled] / weight
    base = float(table.correct_sum.sum() / total)
    reliability = float((weight * gap**2).sum() / total)
    resolution = float((weight * (accuracy - base) ** 2).sum() / total)
    uncertainty = base * (1 - base)
    return {
        "brier": brier,
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": uncertainty,
        "within_bin": brier - (reliability - resolution + uncertainty),
    }


def rank_scores(
    confidence: FloatArray, correct: npt.NDArray[np.bool_], coverages: tuple[float, ...]
) -> tuple[float | None, float, dict[str, list[float]]]:
    """
    How well confidence ranks right answers above wrong ones.

    Ties are counted as the average over all orders of the tied rows, so that the order of the rows does not matter.

    Args:
        confidence (`numpy.ndarray` of shape `(N,)`):
            Confidences in [0, 1].
        correct (`numpy.ndarray` of bool, shape `(N,)`):
            Outcomes.
        coverages (`tuple[float, ...]`):
            Shares of the examples answered, most confident first.

    Returns:
        `tuple[float | None, float, dict]`: AUROC (the probability that a right answer has the higher confidence, ties
        one half; `None` when all answers are right or all wrong), AURC (mean error rate over all coverages 1/N .. 1,
        Geifman & El-Yaniv 2017) and the selective risk as lists `coverage`, `risk` and `threshold` (the confidence of
        the last example answered).
    """
    n = len(confidence)
    # Confidence and outcome in one integer: doubles in [0, 1] order like their bits, and sorting plain integers is
    # several times faster than argsort. Inverted bits sort the most confident first.
    keys = (confidence.astype(np.float64) + 0.0).view(np.uint64)
    keys <<= np.uint64(1)
    keys |= correct
    np.invert(keys, out=keys)
    keys.sort()
    wrong = (keys & np.uint64(1)).astype(np.float64)
    keys >>= np.uint64(1)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    errors = np.cumsum(wrong)
    n_wrong = float(errors[-1])
    n_right = n - n_wrong
    if len(starts) < n:
        # Within a run of equal confidences errors arrive evenly, the mean over all its orders.
        sizes = np.diff(np.append(starts, n))
        wrong_in_run = np.add.reduceat(wrong, starts)
        wrong_above = np.cumsum(wrong_in_run) - wrong_in_run
        place = np.arange(1, n + 1) - np.repeat(starts, sizes)
        errors = np.repeat(wrong_above, sizes) + place * np.repeat(wrong_in_run / sizes, sizes)
        lost = float(((sizes - wrong_in_run) * (wrong_above + wrong_in_run / 2)).sum())
    else:
        lost = float(np.dot(errors, 1.0 - wrong))
    auroc = 1.0 - lost / (n_right * n_wrong) if n_right and n_wrong else None
    aurc = float((errors / np.arange(1, n + 1)).mean())
    answered = [min(n, max(1, round(coverage * n))) for coverage in coverages]
    selective = {
        "coverage": [k / n for k in answered],
        "risk": [float(errors[k - 1] / k) for k in answered],
        "threshold": [
            float((~(keys[k - 1 : k] << np.uint64(1)) >> np.uint64(1)).view(np.float64)[0]) for k in answered
        ],
    }
    return auroc, aurc, selective


def auroc_between(low: np.ndarray, high: np.ndarray) -> float:
    """Probability that a value of `high` is above one of `low`, ties one half."""
    order = np.sort(low)
    below = np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")
    return float(below.mean() / (2 * len(low)))
