"""A confidence threshold whose error rate is guaranteed, and the check that it still holds on new rows."""

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import as_numbers, same_order


# Shares of the held-out rows that candidates accept: fixed before any outcome is seen, which the guarantee needs
_COVERAGES = np.arange(20, 0, -1) / 20


@dataclass(frozen=True)
class ThresholdPoint:
    """
    One candidate.

    Attributes:
        threshold (`float`): Answers with at least this confidence are given.
        coverage (`float`): Share of the held-out rows that it answers.
        n_answered (`int`): The rows it was judged on.
        error (`float`): Share of wrong answers among them.
        error_bound (`float`): Upper bound of the true error rate, simultaneously valid for all candidates.
    """

    threshold: float
    coverage: float
    n_answered: int
    error: float
    error_bound: float


@dataclass(frozen=True)
class ConfidenceThreshold:
    """
    Result of [`fit_threshold`].

    Attributes:
        threshold (`float` or `None`): Answer at this confidence and above; `None` when no candidate qualifies.
        max_error (`float`), delta (`float`): The promise: the error rate among the answers given is at most
            `max_error`, with probability `1 - delta` over the held-out rows.
        n (`int`): Held-out rows.
        coverage (`float`): Share of rows that are answered; 0 without a threshold.
        refused (`float`): The rest.
        error (`float` or `None`), error_bound (`float` or `None`): Share of wrong answers among the answered held-out
            rows, and the upper bound of the true rate.
        candidates (`tuple` of [`ThresholdPoint`]): All that were tried, the curve of risk against coverage.
        reason (`str` or `None`): Why there is no threshold.
    """

    threshold: float | None
    max_error: float
    delta: float
    n: int
    coverage: float
    refused: float
    error: float | None
    error_bound: float | None
    candidates: tuple[ThresholdPoint, ...]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"candidates": [asdict(point) for point in self.candidates]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ConfidenceThreshold":
        """The inverse of [`to_dict`]."""
        points = tuple(ThresholdPoint(**point) for point in values["candidates"])
        return cls(**{**values, "candidates": points})


@dataclass(frozen=True)
class ThresholdCheck:
    """
    Result of [`check_threshold`].

    Attributes:
        holds (`bool`): `False` when the rows contradict the promise.
        n (`int`), n_answered (`int`): Rows, and those at or above the threshold.
        coverage (`float`): Share of answered rows.
        error (`float` or `None`): Share of wrong answers among them.
        error_low (`float`), error_high (`float`): Two-sided exact interval of the error rate.
        p_value (`float`): Of as many errors or more, were the error rate `max_error`.
    """

    holds: bool
    n: int
    n_answered: int
    coverage: float
    error: float | None
    error_low: float
    error_high: float
    p_value: float


def fit_threshold(confidence: Any, correct: Any, max_error: float = 0.05, delta: float = 0.05) -> ConfidenceThreshold:
    """
    The smallest threshold on the confidence above which the error rate is guaranteed.

    With probability at least `1 - delta` over the held-out rows, the error rate of answers at or above the threshold is
    at most `max_error`, on rows drawn from the same distribution. Nothing is assumed about the confidences: a model
    whose confidence says little gets a high threshold or none.

    Twenty candidates are fixed in advance by the share of rows that they answer (100 %, 95 %, ..., 5 %); candidates that
    answer too few rows to qualify even without an error are left out, which depends on the number of rows alone. Given
    the confidence of the first row that a candidate refuses, the rows above it are independent draws from what the
    candidate accepts, ties included, so their errors are binomial; each candidate gets the exact upper bound of Clopper
    and Pearson (1934) at level `delta / candidates` (Bonferroni). This is selective classification with guaranteed risk
    (Geifman and El-Yaniv, NeurIPS 2017, arXiv 1705.08500, lemma 3.1) over a fixed set of coverages.

    The assumption: held-out rows and later rows are independent draws from one distribution, and the held-out rows were
    used for nothing else, neither for training nor for choosing. After a shift the promise is void: see
    [`check_threshold`].

    Args:
        confidence (array-like of shape `(n,)`):
            Confidences in [0, 1].
        correct (array-like of shape `(n,)`):
            1 or `True` where the answer is right.
        max_error (`float`, *optional*, defaults to `0.05`):
            Largest error rate among the answers given, in (0, 1).
        delta (`float`, *optional*, defaults to `0.05`):
            Probability that the promise is broken, in (0, 1).

    Returns:
        [`ConfidenceThreshold`]: without a threshold, and with the reason, where no candidate qualifies.

    Raises:
        `ValueError`: Values outside their range, NaN, arrays of different length, or no row.

    Example:

    ```python
    >>> found = fit_threshold(confidence, correct, max_error=0.1)
    >>> answers = confidence >= found.threshold
    ```
    """
    values, right = _rows(confidence, correct)
    _check_share(max_error, "max_error")
    _check_share(delta, "delta")
    n = len(values)
    coverages = _feasible(n, max_error, delta)
    if not coverages:
        needed = math.ceil(math.log(delta) / math.log1p(-max_error))
        return _none(
            max_error, delta, n, (), f"{n} rows are too few: even without an error, {needed} would be needed."
        )
    order = np.argsort(-values, kind="stable")
    falling, wrong = values[order], np.concatenate([[0], np.cumsum(~right[order])])
    points = []
    for answered in coverages:
        # The first refused row gives the border; rows tied with it are refused too
        border = falling[answered] if answered < n else -math.inf
        above = int(np.searchsorted(-falling, -border, side="left"))
        threshold = float(np.nextafter(border, math.inf)) if answered < n else 0.0
        errors = int(wrong[above])
        bound = _upper_bound(errors, above, delta / len(coverages))
        points.append(ThresholdPoint(threshold, above / n, above, errors / above if above else 0.0, bound))
    good = [point for point in points if point.n_answered and point.error_bound <= max_error]
    if not good:
        best = min(points, key=lambda point: point.error_bound)
        reason = (
            f"No threshold has an error rate below {max_error:g} with confidence {1 - delta:g}: the best candidate "
            f"answers {best.coverage:.0%} of the rows, {best.error:.1%} of them wrong, so the rate may be "
            f"{best.error_bound:.1%}. Give more held-out rows, a larger max_error, or a better model."
        )
        return _none(max_error, delta, n, tuple(points), reason)
    chosen = min(good, key=lambda point: point.threshold)
    return ConfidenceThreshold(
        chosen.threshold,
        max_error,
        delta,
        n,
        chosen.coverage,
        1 - chosen.coverage,
        chosen.error,
        chosen.error_bound,
        tuple(points),
    )


def check_threshold(
    threshold: ConfidenceThreshold | float,
    confidence: Any,
    correct: Any,
    *,
    max_error: float | None = None,
    alpha: float = 0.05,
) -> ThresholdCheck:
    """
    Whether a threshold keeps its promise on fresh labelled rows: a check for drift that can fail.

    The number of wrong answers at or above the threshold is compared with a binomial law of rate `max_error`: the check
    fails when so many errors or more have a probability below `alpha`. It cannot prove that the promise holds; with few
    answered rows it says little, which the interval of the error rate shows.

    Args:
        threshold ([`ConfidenceThreshold`] or `float`):
            What is checked.
        confidence, correct (array-like of shape `(n,)`):
            Fresh rows, as in [`fit_threshold`].
        max_error (`float`, *optional*):
            The promised rate; needed when `threshold` is a number.
        alpha (`float`, *optional*, defaults to `0.05`):
            Probability of failing although the rate is `max_error`; also the interval's.

    Raises:
        `ValueError`: As in [`fit_threshold`]; also when there is no threshold or no promise to check.
    """
    values, right = _rows(confidence, correct)
    if isinstance(threshold, ConfidenceThreshold):
        if threshold.threshold is None:
            raise ValueError(f"There is no threshold to check: {threshold.reason}")
        max_error = threshold.max_error if max_error is None else max_error
        threshold = threshold.threshold
    if max_error is None:
        raise ValueError("Give `max_error`, the error rate that the threshold promises.")
    _check_share(max_error, "max_error")
    _check_share(alpha, "alpha")
    from scipy.stats import binom

    answered = values >= threshold
    n, errors = int(answered.sum()), int((~right[answered]).sum())
    if n == 0:
        warnings.warn(f"No confidence reaches the threshold {threshold:.4g}: nothing was checked.", stacklevel=2)
    p_value = float(binom.sf(errors - 1, n, max_error)) if n else 1.0
    return ThresholdCheck(
        p_value >= alpha,
        len(values),
        n,
        n / len(values),
        errors / n if n else None,
        1 - _upper_bound(n - errors, n, alpha / 2) if n else 0.0,
        _upper_bound(errors, n, alpha / 2) if n else 1.0,
        p_value,
    )


def _rows(confidence: Any, correct: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values, _ = as_numbers(confidence, "confidence")
    outcomes, _ = as_numbers(correct, "correct")
    same_order(confidence, correct, "confidence and correct")
    values = values.astype(np.float64)
    if values.ndim != 1 or outcomes.shape != values.shape:
        raise ValueError(
            f"confidence and correct must be two lists of one length, got shapes {values.shape} and {outcomes.shape}."
        )
    if len(values) == 0:
        raise ValueError("There are no rows: give at least one confidence.")
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"confidence row {row} is {values[row]}: a confidence lies between 0 and 1.")
    odd = (outcomes != 0) & (outcomes != 1)
    if odd.any():
        row = int(np.flatnonzero(odd)[0])
        raise ValueError(f"correct row {row} is {outcomes[row]}: give 1 for a right answer, 0 for a wrong one.")
    return values, outcomes.astype(bool)


def _check_share(value: float, name: str) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` must lie between 0 and 1, exclusive; got {value}.")


def _feasible(n: int, max_error: float, delta: float) -> list[int]:
    """Numbers of answered rows that could qualify, were there no error, at the level left by their number."""
    counts = list(dict.fromkeys(round(coverage * n) for coverage in _COVERAGES))
    while counts and counts[-1] < math.log(delta / len(counts)) / math.log1p(-max_error):
        counts.pop()
    return counts


def _upper_bound(errors: int, n: int, level: float) -> float:
    """One-sided upper limit of a binomial rate: exact (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    return 1.0 if errors >= n else float(beta.ppf(1 - level, errors + 1, n - errors))


def _none(
    max_error: float, delta: float, n: int, points: tuple[ThresholdPoint, ...], reason: str
) -> ConfidenceThreshold:
    return ConfidenceThreshold(None, max_error, delta, n, 0.0, 1.0, None, None, points, reason)
