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


_CELLS_AT_ONCE = 1 << 22


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
    Confidence interval of the calibration error by resampling rows.

    A percentile interval is not offered: resampling adds the upward bias of a binned error a second time, and the
    interval can then exclude its own estimate. `"basic"` reflects the resampled values around the estimate, which
    removes that bias; `"bca"` corrects for bias and skewness (Efron 1987).

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
    n = len(cells.index)
    residual = cells.confidence - cells.outcome
    replicates = np.sort(
        _replicate(cells, config, lambda: _resample(cells, residual, rng.integers(0, n, size=n)), config.n_resamples)
    )
    tail = (1 - level) / 2
    if config.interval_method == "basic":
        low, high = np.quantile(replicates, [tail, 1 - tail])
        limits = (2 * estimate - high, 2 * estimate - low)
    else:
        normal = NormalDist()
        below = (np.count_nonzero(replicates < estimate) + np.count_nonzero(replicates <= estimate)) / 2
        share = min(max(below / len(replicates), 0.5 / len(replicates)), 1 - 0.5 / len(replicates))
        bias, acceleration = normal.inv_cdf(share), _acceleration(cells, residual, config)
        levels = []
        for z in (normal.inv_cdf(tail), normal.inv_cdf(1 - tail)):
            denominator = 1 - acceleration * (bias + z)
            levels.append(normal.cdf(bias + (bias + z) / denominator) if denominator > 0 else float(bias + z > 0))
        low, high = np.quantile(replicates, levels)
        limits = (low, high)
    return float(min(max(limits[0], 0.0), 1.0)), float(min(max(limits[1], 0.0), 1.0))


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

    return _replicate(cells, config, replicate, config.n_resamples)


def _replicate(
    cells: Cells,
    config: CalibrationConfig,
    replicate: Callable[[], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    times: int,
) -> npt.NDArray[np.float64]:
    gaps, weights = np.empty((times, cells.n_cells)), np.empty((times, cells.n_cells))
    for i in range(times):
        gaps[i], weights[i] = replicate()
    return np.asarray(cells.error(gaps, weights, config))


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
