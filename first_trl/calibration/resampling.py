"""Sampling error of a calibration error: bootstrap intervals, and what a perfectly calibrated model would score."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .bins import bin_index, choose_edges
from .config import CalibrationConfig
from .errors import bin_error
from .examples import Examples


@dataclass(frozen=True)
class Cells:
    """
    Where every example falls, with bins held fixed: the bins of a resample are those of the sample.

    Args:
        index (`numpy.ndarray` of intp, shape `(N, M)`):
            Cell (group times bin) of each of the M values of a row: M = 1 for top-label, M = C otherwise.
        confidence, outcome (`numpy.ndarray` of float64, shape `(N, M)`):
            Values and 0/1 outcomes.
        weight (`numpy.ndarray` of float64, shape `(N,)`, *optional*):
            Sample weights.
        groups (`list[slice]`):
            Cells of each group: one group, or one per class for class-wise errors, whose mean is reported.
    """

    index: npt.NDArray[np.intp]
    confidence: npt.NDArray[np.float64]
    outcome: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64] | None
    groups: list[slice]

    @property
    def n_cells(self) -> int:
        return self.groups[-1].stop

    def error(
        self, gap_sum: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], config: CalibrationConfig
    ) -> Any:
        """Error of tables of shape `(..., n_cells)`."""
        per_group = [bin_error(gap_sum[..., g], weight[..., g], config.norm, config.weighting) for g in self.groups]
        return np.mean(per_group, axis=0)


def locate(examples: Examples, config: CalibrationConfig) -> Cells:
    """Assign every value of `examples` to its cell."""
    if config.mode == "top-label" or examples.probabilities is None or examples.labels is None:
        values = examples.confidence[:, None]
        outcome = examples.correct[:, None].astype(np.float64)
    else:
        values = examples.probabilities
        outcome = (examples.labels[:, None] == np.arange(values.shape[1])).astype(np.float64)
    groups: list[slice] = []
    index = np.empty(values.shape, dtype=np.intp)
    columns: list[Any] = (
        [slice(c, c + 1) for c in range(values.shape[1])] if config.mode == "classwise" else [slice(None)]
    )
    stop = 0
    for column in columns:
        part = np.ascontiguousarray(values[:, column])
        edges = choose_edges(part.ravel(), config)
        index[:, column] = stop + bin_index(part, edges, config, examples.edge_dtype)
        groups.append(slice(stop, stop + len(edges) - 1))
        stop = groups[-1].stop
    return Cells(index, values.astype(np.float64, copy=False), outcome, examples.weight, groups)


def bootstrap_interval(
    cells: Cells, estimate: float, config: CalibrationConfig, rng: np.random.Generator
) -> tuple[float, float]:
    """
    Confidence interval of the calibration error (of the population, with these bins) by resampling rows.

    A binned error is a norm of noisy gaps and therefore too large on average, the more so the smaller the true error.
    A percentile interval adds this bias a second time and can exclude its own estimate; it is not offered.

    - `"inversion"` asks which true errors would make the observed one unsurprising. Candidates shrink (or stretch) the
      observed gaps along the path of a soft threshold proportional to each bin's sampling variance, the bootstrap
      supplies the noise around them, and the limits are the errors at which the observed value reaches the tails of
      that distribution. The lower limit is 0 when a calibrated model would do as badly by chance.
      In simulations a 95 % interval of the l1 and l2 errors covers 92 to 98 % of the time from 50 to 5000 rows in 10
      bins. It covers too often where many bins hold a few rows each (50 bins, 500 rows, small error: up to 100 %), and
      too seldom (about 90 %) for `norm="max"`, which hangs on the bin with the fewest rows.
    - `"basic"` reflects the resampled errors around the estimate.
    - `"bca"` corrects their quantiles for bias and skewness (Efron 1987).

    Args:
        cells (`Cells`):
            The located examples.
        estimate (`float`):
            The calibration error of the sample itself.
        config (`CalibrationConfig`):
            Level, method and number of resamples.
        rng (`numpy.random.Generator`):
            Source of randomness.

    Returns:
        `tuple[float, float]`: lower and upper limit, within [0, 1].
    """
    level = config.confidence_interval
    assert level is not None
    tail = (1 - level) / 2
    n = len(cells.index)
    residual = cells.confidence - cells.outcome
    gaps, weights = _replicate(
        cells, lambda: _resample(cells, residual, rng.integers(0, n, size=n)), config.n_resamples
    )
    if config.interval_method == "inversion":
        limits = _invert(cells, residual, estimate, gaps, weights, config, tail)
    elif config.interval_method == "basic":
        low, high = np.quantile(cells.error(gaps, weights, config), [tail, 1 - tail])
        limits = (2 * estimate - high, 2 * estimate - low)
    else:
        limits = _bca(cells, residual, estimate, np.asarray(cells.error(gaps, weights, config)), config, tail)
    return float(min(max(limits[0], 0.0), 1.0)), float(min(max(limits[1], 0.0), 1.0))


def _invert(
    cells: Cells,
    residual: npt.NDArray[np.float64],
    estimate: float,
    gaps: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    config: CalibrationConfig,
    tail: float,
) -> tuple[float, float]:
    gap = _cell_sums(cells, cells.index, residual, cells.weight)
    weight = _cell_sums(cells, cells.index, None, cells.weight)
    variance, noise = gaps.var(axis=0), gaps - gap
    size, sign = np.abs(gap), np.sign(gap)
    # Sums that agree up to rounding count as equal.
    slack = 1e-12

    def candidate(threshold: float) -> npt.NDArray[np.float64]:
        return sign * np.maximum(size - threshold * variance, 0.0)

    def true_error(threshold: float) -> float:
        return float(cells.error(candidate(threshold), weight, config))

    def drawn(threshold: float) -> npt.NDArray[np.float64]:
        return np.asarray(cells.error(candidate(threshold) + noise, weights, config))

    def plausible_below(threshold: float) -> bool:
        return float(np.mean(drawn(threshold) >= estimate - slack)) >= tail

    def plausible_above(threshold: float) -> bool:
        return float(np.mean(drawn(-threshold) <= estimate + slack)) >= tail

    # Beyond this threshold every gap with any sampling noise is gone.
    noisy = variance > 0
    everything = float((size[noisy] / variance[noisy]).max(initial=0.0)) * (1 + 1e-9)
    low = true_error(_last_true(plausible_below, everything))
    stretch = 1e-6 * max(everything, 1e-6)
    while noisy.any() and plausible_above(stretch) and true_error(-stretch) < 1:
        stretch *= 2
    high = true_error(-_last_true(plausible_above, stretch)) if noisy.any() else estimate
    return min(low, estimate), max(high, estimate)


def _last_true(holds: Callable[[float], bool], end: float) -> float:
    """Largest value in [0, end] up to which `holds` is true (0 when it never is), by bisection."""
    if holds(end):
        return end
    low, high = 0.0, end
    for _ in range(40):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _bca(
    cells: Cells,
    residual: npt.NDArray[np.float64],
    estimate: float,
    replicates: npt.NDArray[np.float64],
    config: CalibrationConfig,
    tail: float,
) -> tuple[float, float]:
    normal = NormalDist()
    below = (np.count_nonzero(replicates < estimate) + np.count_nonzero(replicates <= estimate)) / 2
    share = min(max(below / len(replicates), 0.5 / len(replicates)), 1 - 0.5 / len(replicates))
    bias, acceleration = normal.inv_cdf(share), _acceleration(cells, residual, config)
    levels = []
    for z in (normal.inv_cdf(tail), normal.inv_cdf(1 - tail)):
        denominator = 1 - acceleration * (bias + z)
        levels.append(normal.cdf(bias + (bias + z) / denominator) if denominator > 0 else float(bias + z > 0))
    low, high = np.quantile(replicates, levels)
    return float(low), float(high)


def null_errors(
    cells: Cells, probabilities: npt.NDArray[Any] | None, config: CalibrationConfig, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """
    Calibration errors of a perfectly calibrated model with these very confidences.

    Labels are drawn from the predictions themselves, which stay where they are; the spread that remains is the noise
    floor of the estimate at this n and these bins.

    Returns:
        `numpy.ndarray` of shape `(n_resamples,)`.
    """
    n = len(cells.index)
    weight = _cell_sums(cells, cells.index, np.ones_like(cells.confidence), cells.weight)
    if config.mode == "top-label" or probabilities is None:

        def draw() -> npt.NDArray[np.float64]:
            return (rng.random((n, 1)) < cells.confidence).astype(np.float64)
    else:
        cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
        cumulative /= cumulative[:, -1:]
        classes = np.arange(probabilities.shape[1])

        def draw() -> npt.NDArray[np.float64]:
            label = (rng.random((n, 1)) >= cumulative).sum(axis=1)
            return (label[:, None] == classes).astype(np.float64)

    def replicate() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return _cell_sums(cells, cells.index, cells.confidence - draw(), cells.weight), weight

    return np.asarray(cells.error(*_replicate(cells, replicate, config.n_resamples), config))


def _replicate(
    cells: Cells,
    replicate: Callable[[], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    times: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    gaps, weights = np.empty((times, cells.n_cells)), np.empty((times, cells.n_cells))
    for i in range(times):
        gaps[i], weights[i] = replicate()
    return gaps, weights


def _resample(
    cells: Cells, residual: npt.NDArray[np.float64], rows: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    weight = None if cells.weight is None else cells.weight[rows]
    index = cells.index[rows]
    return (
        _cell_sums(cells, index, residual[rows], weight),
        _cell_sums(cells, index, None, weight),
    )


def _cell_sums(
    cells: Cells,
    index: npt.NDArray[np.intp],
    values: npt.NDArray[np.float64] | None,
    weight: npt.NDArray[np.float64] | None,
) -> npt.NDArray[np.float64]:
    if values is None and weight is None:
        return np.bincount(index.ravel(), minlength=cells.n_cells).astype(np.float64)
    if values is None:
        values = np.ones(index.shape)
    if weight is not None:
        values = values * weight[:, None]
    return np.bincount(index.ravel(), weights=values.ravel(), minlength=cells.n_cells).astype(np.float64, copy=False)


def _acceleration(cells: Cells, residual: npt.NDArray[np.float64], config: CalibrationConfig) -> float:
    """Skewness of the influence of blocks of rows (delete-a-block jackknife)."""
    n = len(cells.index)
    blocks = min(n, 500)
    if blocks < 2:
        return 0.0
    gap = _cell_sums(cells, cells.index, residual, cells.weight)
    weight = _cell_sums(cells, cells.index, None, cells.weight)
    left_out = []
    for block in range(blocks):
        rows = np.arange(block, n, blocks)
        block_weight = None if cells.weight is None else cells.weight[rows]
        less_gap = gap - _cell_sums(cells, cells.index[rows], residual[rows], block_weight)
        less_weight = weight - _cell_sums(cells, cells.index[rows], None, block_weight)
        if less_weight.sum() > 0:
            left_out.append(float(cells.error(less_gap, np.maximum(less_weight, 0.0), config)))
    deviation = np.mean(left_out) - np.asarray(left_out)
    scale = float((deviation**2).sum())
    if scale == 0 or not math.isfinite(scale):
        return 0.0
    return float((deviation**3).sum() / (6 * scale**1.5))
