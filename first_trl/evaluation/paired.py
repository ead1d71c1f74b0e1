"""Two models on the same rows: differences of their scores with intervals."""

import warnings
from dataclasses import fields
from typing import Any

import numpy as np

from ..calibration.config import CalibrationConfig
from ..calibration.examples import CalibrationWarning, prepare
from ..calibration.intervals import mover_difference, paired_shares_interval
from ..calibration.resampling import Cells, locate
from .confidence import Confidences


def paired_differences(
    first: Confidences, second: Confidences, *, n_resamples: int = 1000, seed: int = 0, **options: Any
) -> dict[str, dict[str, float | None]]:
    """
    Scores of `second` minus those of `first`, row i of the one against row i of the other.

    The accuracy has the score interval of Tango (1998), which has a width also where both models are right on the same
    rows. The calibration error is no mean of rows: its interval is put together from those of the two models (MOVER, Zou &
    Donner 2008), so that it is as wide as they are where bins are pure, around their medians rather than the errors
    themselves, which are too large by more or less noise (around 0 where that is not excluded). That the rows are the same narrows it by the correlation of the
    two errors over resampled rows, unless one of the models may be calibrated: an error that is noise around 0 tells
    nothing of the other.

    Args:
        first, second ([`Confidences`]):
            Two results on the same rows in the same order.
        n_resamples (`int`, *optional*, defaults to `1000`), seed (`int`, *optional*, defaults to `0`):
            Of the intervals; 0 resamples leave out the interval of the error.
        options:
            Those of [`calibration_report`] that say what the error is: `n_bins`, `strategy`, `norm` ...

    Returns:
        `dict`: for each of `accuracy`, `mean_confidence` and `ece`: `difference`, `low` and `high` (the 95 % interval; `None`
        for the confidence, which is known).

    Raises:
        `ValueError`: when the two have different numbers of rows.
    """
    n = len(first.confidence)
    if len(second.confidence) != n:
        raise ValueError(
            f"{first.name} has {n} rows and {second.name} {len(second.confidence)}: a paired difference needs the same rows."
        )
    more, less = int((second.correct & ~first.correct).sum()), int((first.correct & ~second.correct).sum())
    low, high = paired_shares_interval(more, less, n)
    confidence = float(second.confidence.mean(dtype=np.float64) - first.confidence.mean(dtype=np.float64))
    return {
        "accuracy": {"difference": (more - less) / n, "low": low, "high": high},
        "mean_confidence": {"difference": confidence, "low": None, "high": None},
        "ece": _error_difference(first, second, n_resamples, seed, options),
    }


def _error_difference(
    first: Confidences, second: Confidences, n_resamples: int, seed: int, options: dict[str, Any]
) -> dict[str, float | None]:
    fixed = options | {"return_bins": False, "seed": seed} | ({"n_resamples": n_resamples} if n_resamples else {})
    with warnings.catch_warnings():
        # What they say of one model is said in its own report
        warnings.simplefilter("ignore", CalibrationWarning)
        levels = (0.95, 0.5) if n_resamples else (None,)
        reports = [[one.report(**fixed, confidence_interval=level) for level in levels] for one in (first, second)]
    errors = [report[0]["ece"] for report in reports]
    difference = float(errors[1] - errors[0])
    if not n_resamples:
        return {"difference": difference, "low": None, "high": None}
    (a, b), correlation = [_median_and_limits(*pair) for pair in reports], _correlation(first, second, reports, seed)
    if a[1] == 0 or b[1] == 0:
        correlation = min(correlation, 0.0)
    low, high = mover_difference(b, a, correlation)
    return {"difference": difference, "low": min(low, difference), "high": max(high, difference)}


def _median_and_limits(wide: dict[str, Any], half: dict[str, Any]) -> tuple[float, float, float]:
    # Where 0 is not excluded the error may be there, and then everything observed of it is noise
    median = (half["ci_low"] + half["ci_high"]) / 2 if wide["ci_low"] > 0 else 0.0
    return min(max(median, wide["ci_low"]), wide["ci_high"]), wide["ci_low"], wide["ci_high"]


def _correlation(first: Confidences, second: Confidences, reports: list[list[dict[str, Any]]], seed: int) -> float:
    """Correlation of the two errors over resampled rows; 0 where one of them does not move."""
    n, names = len(first.confidence), [field.name for field in fields(CalibrationConfig)]
    config = CalibrationConfig(**{name: reports[0][0]["config"][name] for name in names} | {"edge_dtype": "auto"})
    cells = [locate(prepare(one.confidence, one.correct.astype(np.int64), config), config) for one in (first, second)]
    rng, errors = np.random.default_rng(seed), np.empty((2, config.n_resamples))
    for i in range(config.n_resamples):
        times = np.bincount(rng.integers(0, n, size=n), minlength=n).astype(np.float64)
        errors[:, i] = [_error(one, times, config) for one in cells]
    spread = errors.std(axis=1)
    if (spread < 1e-12).any():
        return 0.0
    return float(np.mean(np.prod(errors - errors.mean(axis=1, keepdims=True), axis=0)) / np.prod(spread))


def _error(cells: Cells, times: np.ndarray, config: CalibrationConfig) -> float:
    """The error of a resample that takes each row `times`."""
    index, gap = cells.index[:, 0], (cells.confidence - cells.outcome)[:, 0]
    sums = [
        np.bincount(index, weights=weights, minlength=cells.n_cells).astype(np.float64)
        for weights in (times * gap, times)
    ]
    return float(cells.error(sums[0], sums[1], config))
