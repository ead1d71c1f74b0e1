"""Bins: their edges, which example falls where, and the per-bin sums every estimator is made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import FloatArray, round_to
from .config import CalibrationConfig


IntArray = npt.NDArray[np.intp]
_CHUNK = 1 << 14
_MOST_UNIFORM = 4096


def width_edges(n_bins: int) -> npt.NDArray[np.float64]:
    """
    Edges `k / n_bins` of equal-width bins, shape `(n_bins + 1,)`.

    Not `linspace`: `linspace(0, 1, 11)[3]` is 0.30000000000000004, so a confidence of 0.3 would miss its own edge.
    """
    return np.arange(n_bins + 1) / n_bins


def mass_edges(confidence: FloatArray, n_bins: int, bin_edges: str) -> npt.NDArray[np.float64]:
    """
    Edges of equal-mass bins, midway between neighbouring values; at most `n_bins + 1` of them.

    Sizes follow `numpy.array_split`: the first `n % n_bins` bins hold one example more. A run of equal values is never
    cut: it stays with the bin below the cut for right-closed bins and with the bin above it for left-closed ones, so
    the result does not depend on the order of the rows. A bin emptied by a long run disappears.
    """
    ordered = np.sort(confidence).astype(np.float64, copy=False)
    n = len(ordered)
    sizes = np.full(n_bins, n // n_bins)
    sizes[: n % n_bins] += 1
    cuts = np.cumsum(sizes)[:-1]
    cuts = cuts[(cuts > 0) & (cuts < n)]
    if bin_edges == "right":
        cuts = np.searchsorted(ordered, ordered[cuts - 1], side="right")
    else:
        cuts = np.searchsorted(ordered, ordered[cuts], side="left")
    cuts = np.unique(cuts[(cuts > 0) & (cuts < n)])
    below, above = ordered[cuts - 1], ordered[cuts]
    middle = (below + above) / 2
    # The midpoint of two neighbouring floats rounds onto one of them; keep it on the side that leaves both in place.
    middle = (
        np.where(middle >= above, below, middle) if bin_edges == "right" else np.where(middle <= below, above, middle)
    )
    return np.concatenate([[0.0], middle, [1.0]])


def quantile_edges(confidence: FloatArray, n_bins: int) -> npt.NDArray[np.float64]:
    """Edges at the `k / n_bins` quantiles (linear interpolation), the outer two moved to 0 and 1, duplicates merged."""
    inner = np.quantile(confidence.astype(np.float64, copy=False), np.arange(1, n_bins) / n_bins)
    inner = np.unique(inner)
    return np.concatenate([[0.0], inner[(inner > 0) & (inner < 1)], [1.0]])


def assign(
    confidence: FloatArray, edges: npt.NDArray[np.float64], bin_edges: str, uniform: int | None = None
) -> IntArray:
    """
    Bin of each confidence.

    Args:
        confidence (`numpy.ndarray`):
            Values in [0, 1], any shape.
        edges (`numpy.ndarray` of shape `(n_bins + 1,)`):
            Rising edges from 0 to 1.
        bin_edges (`str`):
            `"right"`: bins `(a, b]`, 0 in the first. `"left"`: bins `[a, b)`, 1 in the last.
        uniform (`int`, *optional*):
            `n_bins` when `edges` are `k / n_bins` rounded to the dtype of `confidence`; allows arithmetic in place of
            a search.

    Returns:
        `numpy.ndarray` of intp: indices in `0 .. n_bins - 1`.
    """
    right = bin_edges == "right"
    if uniform is None or uniform > _MOST_UNIFORM:
        return np.searchsorted(edges[1:-1], confidence, side="left" if right else "right")
    # Arithmetic is several times faster than a search, but rounds. A value whose bin depends on the last bits of the
    # product lies next to an edge, and those few are searched for.
    slack = 8 * float(np.finfo(confidence.dtype).eps)
    index = _scaled(confidence, uniform * (1 - slack), right)
    doubtful = index != _scaled(confidence, uniform * (1 + slack), right)
    found = index.astype(np.intp)
    if doubtful.any():
        found[doubtful] = assign(confidence[doubtful], edges, bin_edges)
    return np.minimum(found, uniform - 1, out=found)


def _scaled(confidence: FloatArray, factor: float, right: bool) -> FloatArray:
    scaled = confidence * confidence.dtype.type(factor)
    if right:
        np.ceil(scaled, out=scaled)
        scaled -= 1
        return np.maximum(scaled, 0, out=scaled)
    return np.floor(scaled, out=scaled)


@dataclass(frozen=True)
class BinTable:
    """
    Per-bin sums over examples; every array has shape `(..., n_bins)` and sums are float64.

    Args:
        lower, upper (`numpy.ndarray`):
            Nominal edges.
        count (`numpy.ndarray`):
            Number of examples.
        weight (`numpy.ndarray`):
            Sum of weights (equal to `count` without sample weights).
        confidence_sum, correct_sum, variance_sum (`numpy.ndarray`):
            Weighted sums of the confidence p, of the 0/1 outcome, and of `weight * p (1 - p)` (the variance of the
            outcome's sum if the model is calibrated; the weight enters squared).
    """

    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]
    confidence_sum: npt.NDArray[np.float64]
    correct_sum: npt.NDArray[np.float64]
    variance_sum: npt.NDArray[np.float64]

    @property
    def gap_sum(self) -> npt.NDArray[np.float64]:
        return self.confidence_sum - self.correct_sum

    def to_dict(self) -> dict[str, list[Any]]:
        """
        Plain lists, one entry per bin: `lower`, `upper`, `count`, `confidence`, `accuracy`, `gap` (confidence minus
        accuracy), `null_low` and `null_high` (where 95 % of the accuracies of a calibrated model would lie, normal
        approximation). Means of an empty bin are `None`.
        """
        columns: dict[str, list[Any]] = {
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "count": self.count.tolist(),
        }
        filled = self.weight > 0
        weight = np.where(filled, self.weight, 1.0)
        confidence, accuracy = self.confidence_sum / weight, self.correct_sum / weight
        spread = 1.959963984540054 * np.sqrt(np.maximum(self.variance_sum, 0)) / weight
        for name, values in (
            ("confidence", confidence),
            ("accuracy", accuracy),
            ("gap", confidence - accuracy),
            ("null_low", np.maximum(confidence - spread, 0)),
            ("null_high", np.minimum(confidence + spread, 1)),
        ):
            columns[name] = [float(v) if used else None for v, used in zip(values, filled, strict=True)]
        return columns


def choose_edges(confidence: FloatArray, config: CalibrationConfig) -> npt.NDArray[np.float64]:
    """Edges for one group of values, as `config.strategy` says."""
    if config.strategy == "width":
        return width_edges(config.n_bins)
    if config.strategy == "mass":
        return mass_edges(confidence, config.n_bins, config.bin_edges)
    return quantile_edges(confidence, config.n_bins)


def bin_index(
    confidence: FloatArray, edges: npt.NDArray[np.float64], config: CalibrationConfig, edge_dtype: str
) -> IntArray:
    """Bin of each confidence under the edges of [`choose_edges`], with equal-width edges rounded to `edge_dtype`."""
    if config.strategy != "width":
        return assign(confidence, edges, config.bin_edges)
    if edge_dtype == "float32":
        confidence = confidence.astype(np.float32, copy=False)
    elif confidence.dtype != np.float64:
        confidence = confidence.astype(np.float64)
    uniform = config.n_bins if edge_dtype in ("float32", "float64") else None
    return assign(confidence, round_to(edges, edge_dtype), config.bin_edges, uniform=uniform)


def tabulate(
    confidence: FloatArray,
    correct: npt.NDArray[np.bool_],
    config: CalibrationConfig,
    edge_dtype: str,
    weight: npt.NDArray[np.float64] | None = None,
) -> BinTable:
    """Bin 1-d confidences in one pass of constant extra memory."""
    edges = choose_edges(confidence, config)
    n_bins = len(edges) - 1
    # Axis 0 of the cells is the outcome (0 wrong, 1 right): counts and sums by outcome give every other sum.
    count = np.zeros(2 * n_bins, dtype=np.int64)
    mass = np.zeros(2 * n_bins)
    total = np.zeros(2 * n_bins)
    variance = np.zeros(n_bins)
    for start in range(0, len(confidence), _CHUNK):
        part = confidence[start : start + _CHUNK]
        cell = bin_index(part, edges, config, edge_dtype)
        values = part.astype(np.float64, copy=False)
        w = None if weight is None else weight[start : start + _CHUNK]
        spread = values * (1 - values)
        variance += np.bincount(cell, weights=spread if w is None else spread * w * w, minlength=n_bins)
        cell = cell + n_bins * correct[start : start + _CHUNK]
        count += np.bincount(cell, minlength=2 * n_bins)
        total += np.bincount(cell, weights=values if w is None else values * w, minlength=2 * n_bins)
        if w is not None:
            mass += np.bincount(cell, weights=w, minlength=2 * n_bins)
    if weight is None:
        mass = count.astype(np.float64)
    return BinTable(
        lower=edges[:-1],
        upper=edges[1:],
        count=count[:n_bins] + count[n_bins:],
        weight=mass[:n_bins] + mass[n_bins:],
        confidence_sum=total[:n_bins] + total[n_bins:],
        correct_sum=mass[n_bins:],
        variance_sum=variance,
    )
