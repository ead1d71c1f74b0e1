"""Calibration errors from per-bin sums: l1 (ECE), l2 (RMSCE), max (MCE) and the debiased l2."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .bins import BinTable, assign, width_edges


def bin_error(
    gap_sum: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], norm: str, weighting: str = "count"
) -> Any:
    """
    Norm of the per-bin gaps between confidence and accuracy.

    Args:
        gap_sum (`numpy.ndarray` of shape `(..., n_bins)`):
            Weighted sum of confidence minus outcome in each bin.
        weight (`numpy.ndarray` of shape `(..., n_bins)`):
            Sum of weights in each bin. Empty bins contribute nothing.
        norm (`str`):
            `"l1"`: mean of |gap| (Guo et al. 2017, eq. 3). `"l2"`: root of the mean of gap². `"max"`: largest |gap|.
        weighting (`str`):
            `"count"`: the mean weighs bins by their share of the examples. `"uniform"`: every non-empty bin weighs the
            same.

    Returns:
        `numpy.ndarray` of shape `(...)`.
    """
    filled = weight > 0
    gap = np.abs(gap_sum) / np.where(filled, weight, 1.0)
    if norm == "max":
        return np.where(filled, gap, 0.0).max(axis=-1)
    share = weight if weighting == "count" else filled.astype(np.float64)
    total = share.sum(axis=-1)
    if norm == "l1":
        return (share * gap).sum(axis=-1) / total
    return np.sqrt((share * gap**2).sum(axis=-1) / total)


def debiased_l2(table: BinTable) -> tuple[float | None, str | None]:
    """
    Debiased l2 calibration error (Kumar et al. 2019, arXiv 1909.10155, definition 5.1).

    Each squared gap is lowered by its sampling variance acc (1 - acc) / (count - 1), negative sums become 0.

    Returns:
        `tuple[float | None, str | None]`: the value, or `None` and the reason: a bin with a single example has no
        variance estimate.
    """
    filled = table.count > 0
    count = table.count[filled].astype(np.float64)
    if (count == 1).any():
        index = int(np.flatnonzero(table.count == 1)[0])
        return None, (
            f"the debiased error needs at least two examples in every used bin, but bin {index} "
            f"({table.lower[index]:.6g} to {table.upper[index]:.6g}) holds one: use fewer bins or equal-mass bins"
        )
    accuracy = table.correct_sum[filled] / count
    gap = table.gap_sum[filled] / count
    squares = gap**2 - accuracy * (1 - accuracy) / (count - 1)
    return float(np.sqrt(max(0.0, float((count * squares).sum() / count.sum())))), None


def equal_width_bins(confidence: npt.NDArray[np.float64], n_bins: int) -> npt.NDArray[np.intp]:
    """Right-closed bin of equal width of each confidence. Checks nothing."""
    return assign(np.minimum(confidence, 1.0), width_edges(n_bins), "right", uniform=n_bins)


def equal_width_gaps(
    confidence: npt.NDArray[np.float64],
    correct: npt.NDArray[Any],
    n_bins: int,
    group: npt.NDArray[np.intp] | None = None,
    n_groups: int = 1,
) -> npt.NDArray[np.float64]:
    """
    Sums of confidence minus outcome in each right-closed bin of equal width, of shape `(n_bins,)`, or `(n_groups, n_bins)`
    for groups of rows. Checks nothing: for loops over values known to be float64 in [0, 1 + rounding].
    """
    bins = equal_width_bins(confidence, n_bins)
    cell = bins if group is None else group * n_bins + bins
    gaps = np.bincount(cell, weights=confidence - correct, minlength=n_groups * n_bins).astype(np.float64, copy=False)
    return gaps if group is None else gaps.reshape(n_groups, n_bins)


def equal_width_ece(confidence: npt.NDArray[np.float64], correct: npt.NDArray[Any], n_bins: int) -> float:
    """ECE of confidences already known to be in [0, 1], for a search that asks for it hundreds of times."""
    return float(np.abs(equal_width_gaps(confidence, correct, n_bins)).sum() / len(confidence))
