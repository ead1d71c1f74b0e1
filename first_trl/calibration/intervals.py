"""Intervals of shares, means, paired differences and scores over clustered rows. (That of a calibration error itself: `resampling`.)"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import CalibrationConfig
from .errors import equal_width_bins
from .resampling import Cells, clustered_inversion


LEVEL = 0.95
_Z = 1.959964  # 97.5 % point of the normal distribution
# Right and wrong rows, of each, that tell what the other kind costs: with one or two wrong ones of 500, an interval of the
# mean NLL never covered that of a model that is right in 99 %
FEWEST_OF_A_KIND = 3


def wilson_interval(share: float, n: float, z: float = _Z) -> tuple[float, float]:
    """Interval of a share of `n` independent rows (Wilson 1927), by default of 95 %; within [0, 1] also at 0 and 1."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal_interval(values: npt.NDArray[Any]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent rows, 1.96 standard errors to each side; `None` for fewer than two."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def summarize(values: Mapping[str, float]) -> dict[str, Any]:
    """
    Mean and sample standard deviation of one number a run.

    Args:
        values (`Mapping[str, float]`): Run -> value.

    Returns:
        `dict`: `mean`, `sd` (`None` for one value), `n` and `values`.
    """
    # `fsum` rounds once: the mean does not depend on the order in which runs were found
    n = len(values)
    mean = math.fsum(values.values()) / n
    if len(set(values.values())) == 1:
        # Equal numbers have no spread; the rounding of their mean would give them one
        mean = next(iter(values.values()))
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / (n - 1)) if n > 1 else None
    return {"mean": mean, "sd": sd, "n": n, "values": dict(values)}


def paired_difference(
    values: Mapping[str, float], others: Mapping[str, float], *, higher_is_better: bool
) -> dict[str, Any] | None:
    """
    `values` minus `others` over the runs that have both.

    Returns:
        `dict`: `mean`, `sd`, `low` and `high` (95 % Student-t interval; `None` with one pair, and where all differ by the
        same, as accuracies of few rows may: no spread is no certainty), `n` pairs and `better` (pairs in which `values` is
        strictly better); `None` when no run has both.
    """
    differences = {run: value - others[run] for run, value in values.items() if run in others}
    if not differences:
        return None
    summary = summarize(differences)
    n, low, high = summary["n"], None, None
    # Differences that agree up to rounding; those of 0 are no difference at all
    if n > 1 and (summary["sd"] > 1e-12 or abs(summary["mean"]) <= 1e-12):
        # Imported here: the calibration core needs numpy only
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * summary["sd"] / math.sqrt(n)
        low, high = summary["mean"] - half, summary["mean"] + half
    better = sum((difference > 0) if higher_is_better else (difference < 0) for difference in differences.values())
    return {
        "mean": summary["mean"],
        "sd": summary["sd"],
        "low": low,
        "high": high,
        "n": n,
        "better": better,
    }


def paired_shares_interval(more: int, less: int, n: int) -> tuple[float, float]:
    """
    95 % interval of the difference of two shares over the same rows: the differences that the score test does not reject
    (Tango 1998). It has a width also where no row differs.

    Args:
        more, less (`int`): Rows that only the one, and only the other share counts.
        n (`int`): All rows.
    """

    def statistic(delta: float) -> float:
        # The likeliest share of rows that differ downwards, were `delta` the true difference
        b = -more - less + (2 * n - more + less) * delta
        share = (math.sqrt(max(b * b + 8 * n * less * delta * (1 - delta), 0.0)) - b) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        distance = more - less - n * delta
        return (
            distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
        )

    def limit(sign: float, end: float) -> float:
        inside, outside = (more - less) / n, end
        for _ in range(60):
            middle = (inside + outside) / 2
            if sign * statistic(middle) <= _Z:
                inside = middle
            else:
                outside = middle
        return inside

    return limit(1.0, -1.0), limit(-1.0, 1.0)


def mover_difference(
    first: tuple[float, float, float], second: tuple[float, float, float], correlation: float = 0.0
) -> tuple[float, float]:
    """
    Interval of `first - second` from an interval of each (MOVER, Zou & Donner 2008).

    Args:
        first, second (`tuple[float, float, float]`): Estimate, lower and upper limit.
        correlation (`float`, *optional*, defaults to 0): Of the two estimates, where they come from the same rows.
    """
    (x, x_low, x_high), (y, y_low, y_high) = first, second

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a + b * b - 2 * correlation * a * b, 0.0))

    return x - y - reach(x - x_low, y_high - y), x - y + reach(x_high - x, y - y_low)


def holds_zero(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of a paired difference leaves open which of the two is better."""
    return difference["low"] is not None and difference["low"] <= 0 <= difference["high"]


def clustered_intervals(
    cluster: npt.NDArray[Any],
    confidence: npt.NDArray[np.float64],
    correct: npt.NDArray[np.float64],
    values: Mapping[str, npt.NDArray[np.float64]],
    *,
    level: float = LEVEL,
    n_resamples: int = 1000,
    n_bins: int = 10,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    Intervals of scores whose rows hang together in clusters, such as the tokens of one answer. Rows that stand alone are
    clusters of one.

    Means get Student-t intervals of the clusters' sums, with one degree of freedom less than there are clusters; `values` get
    none where fewer than three clusters (of two: fewer than both) have a right row, or a wrong one, which does not tell
    what that kind costs. Accuracy
    (Wilson 1927) and ECE (the `"inversion"` interval of [`calibration_report`]) take account of the design effect, which is
    how much more a mean varies over these clusters than over as many rows that stand alone (Kish 1965), the ECE bin by
    bin. It is drawn towards that of clusters right or wrong as a whole, with the weight of half a wrong cluster, because
    few wrong answers say little of how they hang together. The limits are moved outwards by what Student's t asks of few
    clusters, and those of the ECE by what clusters that are off in many bins at once ask. The trust (accuracy less ECE) runs
    from the worst ends of both together to the best ones, and covers more often than it says.

    `tests/benchmarks/cluster_coverage.py` prints how often they hold: 5 to 50 clusters of 1 to 10 rows, sure and unsure models.

    Args:
        cluster (`numpy.ndarray` of shape `(N,)`): What belongs together; any labels.
        confidence, correct (`numpy.ndarray` of shape `(N,)`): Confidences in [0, 1], and 1 where right.
        values (mapping of `numpy.ndarray` of shape `(N,)`): Further scores whose means are wanted, such as `nll`.
        level, n_resamples, n_bins, seed: Of the intervals, the draws for the ECE, the ECE and its draws.

    Returns:
        `dict`: lower and upper limit of `accuracy`, `mean_confidence`, `ece`, `trust` and of `values`; empty for a
        single cluster, which tells nothing of how clusters differ.
    """
    if not 0.0 < level < 1.0 or n_resamples < 1:
        raise ValueError(
            f"`level` must lie between 0 and 1 and `n_resamples` be at least 1, got {level} and {n_resamples}."
        )
    _, row = np.unique(cluster, return_inverse=True)
    n, n_clusters = len(row), int(row.max()) + 1
    if n_clusters < 2:
        return {}
    # Imported here: the calibration core needs numpy only
    from scipy.special import stdtrit

    z, t = NormalDist().inv_cdf(0.5 + level / 2), float(stdtrit(n_clusters - 1, 0.5 + level / 2))

    def influence(deviation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(row, weights=deviation, minlength=n_clusters).astype(np.float64)

    intervals = {}
    told = all(
        np.count_nonzero(influence(kind)) >= min(FEWEST_OF_A_KIND, n_clusters) for kind in (correct, 1.0 - correct)
    )
    for name, value in {"mean_confidence": confidence, **(values if told else {})}.items():
        mean = float(value.mean())
        half = t * math.sqrt(n_clusters / (n_clusters - 1) * float((influence(value - mean) ** 2).sum())) / n
        intervals[name] = (mean - half, mean + half)
    low, high = intervals["mean_confidence"]
    intervals["mean_confidence"] = (max(low, 0.0), min(high, 1.0))

    def design_effect(deviation: npt.NDArray[np.float64], of: npt.NDArray[np.bool_]) -> tuple[float, float]:
        """And the variance of the sum of the deviations, both of the rows `of`."""
        apart = float((deviation[of] ** 2).sum())
        together = n_clusters / (n_clusters - 1) * float((influence(deviation * of) ** 2).sum())
        # A cluster that is right or wrong as a whole counts as one row
        whole = float((influence(of.astype(np.float64)) ** 2).sum()) / int(of.sum())
        effect = (together + whole**2 / 2) / (apart + whole / 2)
        return (1.0 if n_clusters == n else max(effect, 1.0)), together

    # Few clusters do not tell how much clusters differ
    wider = t / z if n_clusters < n else 1.0
    accuracy = float(correct.mean())
    off, everywhere = correct - accuracy, np.ones(n, dtype=bool)
    effect, _ = design_effect(off, everywhere)
    intervals["accuracy"] = wilson_interval(accuracy, n / (effect * wider**2), z)

    bins = equal_width_bins(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    gap = np.bincount(bins, weights=confidence - correct, minlength=n_bins)
    ece = float(np.abs(gap).sum() / n)
    deviation = confidence - correct - (gap / np.maximum(count, 1))[bins]
    signed = deviation * np.sign(gap)[bins]
    effects, variance = np.ones(n_bins), 0.0
    for index in np.flatnonzero(count):
        effects[index], own = design_effect(deviation, bins == index)
        variance += own
    # A cluster may be off in all of its bins at once; the signs of small gaps are chance
    total = max(design_effect(values, everywhere)[1] for values in (signed, deviation))
    wider *= math.sqrt(max(total / variance, 1.0)) if variance > 0 else 1.0
    cells = Cells(bins[:, None], confidence[:, None], correct[:, None], None, [slice(0, n_bins)])
    config = CalibrationConfig(n_bins=n_bins, confidence_interval=level, n_resamples=max(n_resamples, 100), seed=seed)
    low, high = clustered_inversion(cells, ece, config, effects)
    low, high = max(ece - wider * (ece - low), 0.0), min(ece + wider * (high - ece), 1.0)
    intervals["ece"] = (low, high)

    # The ends that are worst together: an ECE near 0 is estimated too large, which no correlation tells
    low, high = intervals["accuracy"][0] - high, intervals["accuracy"][1] - low
    intervals["trust"] = (max(low, -1.0), min(high, 1.0))
    return intervals
