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


# Share of calibrated models with a smaller error than any from which an upper limit is read
_LUCK = 0.16


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
    cells: Cells,
    estimate: float,
    config: CalibrationConfig,
    rng: np.random.Generator,
    null: npt.NDArray[np.float64],
) -> tuple[float, float]:
    """
    Confidence interval of the calibration error (of the population, with these bins).

    A binned error is a norm of noisy gaps and therefore too large on average, the more so the smaller the true error.
    A percentile interval adds this bias a second time and can exclude its own estimate; it is not offered.

    - `"inversion"` asks which true accuracies of the bins would make the observed error unsurprising. Towards smaller
      errors, candidates shrink the observed gaps along the path of a soft threshold proportional to the variance of a bin's
      outcomes, which changes the mean gap most for what it costs in likelihood; towards larger ones they stretch them, and where a bin has no room left on its side (all answers right: the
      accuracy cannot be higher) cross to the other. For each candidate the rows of the bins and their right answers are
      drawn anew, binomially with the *candidate's* accuracies: a bin whose observed outcomes are all equal is as uncertain
      as its candidate says, not certain. The limits are the errors at which the observed value reaches the tails. The
      upper one is read from an error no smaller than what 16 % of calibrated models stay below (a power-constrained limit,
      Cowan et al. 2011): a luckier error, or one that was fitted on these very rows, promises no more than that. The
      lower limit is 0 exactly when a calibrated model would do as badly with a probability (`p_value`) above half of
      `1 - level`, so the interval and the null test never contradict each other.
      A 95 % interval covers the true l1 error at least 92 % of the time from 20 rows on, with pure bins and with
      confidences of .999; `tests/benchmarks/interval_coverage.py` prints the table. It covers too often where the true
      error is near 0 or bins hold a few rows each, and too seldom (about 90 %) for `norm="max"`, which hangs on the bin
      with the fewest rows.
    - `"basic"` reflects the errors of resampled rows around the estimate; `"bca"` corrects their quantiles for bias and
      skewness (Efron 1987). Both take a bin whose outcomes are all equal for certain and cannot hold where there is one.

    Args:
        cells (`Cells`):
            The located examples.
        estimate (`float`):
            The calibration error of the sample itself.
        config (`CalibrationConfig`):
            Level, method and number of resamples.
        rng (`numpy.random.Generator`):
            Source of randomness.
        null (`numpy.ndarray`):
            From [`null_errors`].

    Returns:
        `tuple[float, float]`: lower and upper limit, within [0, 1].
    """
    level = config.confidence_interval
    assert level is not None
    tail = (1 - level) / 2
    if config.interval_method == "inversion":
        limits = _invert(cells, estimate, config, rng, tail, calibrated=null_p_value(null, estimate) > tail)
    else:
        n = len(cells.index)
        residual = cells.confidence - cells.outcome
        gaps, weights = _replicate(
            cells, lambda: _resample(cells, residual, rng.integers(0, n, size=n)), config.n_resamples
        )
        replicates = np.asarray(cells.error(gaps, weights, config))
        if config.interval_method == "basic":
            low, high = np.quantile(replicates, [tail, 1 - tail])
            limits = (2 * estimate - high, 2 * estimate - low)
        else:
            limits = _bca(cells, residual, estimate, replicates, config, tail)
    return float(min(max(limits[0], 0.0), 1.0)), float(min(max(limits[1], 0.0), 1.0))


def clustered_inversion(
    cells: Cells, estimate: float, config: CalibrationConfig, design_effect: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """
    The `"inversion"` interval where rows hang together: the right answers of a bin vary more than those of as many rows
    that stand alone.

    Args:
        cells (`Cells`): The located examples.
        estimate (`float`): The calibration error of the sample itself.
        config (`CalibrationConfig`): Level, number of resamples and seed.
        design_effect (`numpy.ndarray` of shape `(n_cells,)`): How many times more, in variance (Kish 1965).

    Returns:
        `tuple[float, float]`: lower and upper limit.
    """
    level = config.confidence_interval
    assert level is not None
    rng = np.random.default_rng(config.seed)
    return _invert(cells, estimate, config, rng, (1 - level) / 2, calibrated=None, design_effect=design_effect)


def null_p_value(null: npt.NDArray[np.float64], estimate: float) -> float:
    """Share of calibrated models that score at least as badly; draws that equal the estimate up to rounding count."""
    return float((1 + np.count_nonzero(null >= estimate - 1e-12)) / (1 + len(null)))


def pure_bins(cells: Cells) -> int:
    """Bins with rows whose outcomes are all equal although their confidences are not certain."""
    weight, confidence, right = (
        _cell_sums(cells, cells.index, values, None) for values in (None, cells.confidence, cells.outcome)
    )
    uncertain = (confidence > 0) & (confidence < weight)
    return int((uncertain & ((right == 0) | (right == weight))).sum())


@dataclass(frozen=True)
class _Bins:
    """
    What the draws of candidates need to know of the cells; arrays of shape `(n_cells,)`.

    Attributes:
        rows: Rows, as many as they count for with their weights (Kish's effective number).
        scale: Weight of one of these rows.
        confidence: Mean confidence.
        gap: Mean confidence minus accuracy.
        narrowing: What the spread of confidences inside a bin takes off the variance of confidence minus outcome, which is
            `a (1 - a)` less this.
        variance: Variance of one outcome, smoothed (Jeffreys) so that a pure bin has one.
    """

    rows: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]
    gap: npt.NDArray[np.float64]
    narrowing: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    @classmethod
    def of(cls, cells: Cells) -> "_Bins":
        weight = _cell_sums(cells, cells.index, None, cells.weight)
        filled = weight > 0
        safe = np.where(filled, weight, 1.0)
        confidence = _cell_sums(cells, cells.index, cells.confidence, cells.weight) / safe
        accuracy = _cell_sums(cells, cells.index, cells.outcome, cells.weight) / safe
        square = _cell_sums(cells, cells.index, cells.confidence**2, cells.weight) / safe
        rows = weight
        if cells.weight is not None:
            squares = _cell_sums(cells, cells.index, np.ones(cells.index.shape), cells.weight**2)
            rows = np.where(filled, weight**2 / np.where(filled, squares, 1.0), 0.0)
        rows = np.where(filled, np.maximum(np.round(rows), 1.0), 0.0)
        smooth = (accuracy * rows + 0.5) / (rows + 1.0)
        return cls(
            rows,
            weight / np.maximum(rows, 1.0),
            confidence,
            np.where(filled, confidence - accuracy, 0.0),
            np.maximum(square - confidence**2, 0.0),
            np.where(filled, smooth * (1 - smooth), 0.0),
        )


def _invert(
    cells: Cells,
    estimate: float,
    config: CalibrationConfig,
    rng: np.random.Generator,
    tail: float,
    *,
    calibrated: bool | None,
    design_effect: npt.NDArray[np.float64] | None = None,
) -> tuple[float, float]:
    bins = _Bins.of(cells)
    weight = bins.rows * bins.scale
    size, sign = np.abs(bins.gap), np.where(bins.gap < 0, -1.0, 1.0)
    # The same rows and the same stream for every candidate, so that two of them differ by their accuracies more than by luck
    stream = np.random.default_rng(int(rng.integers(2**32)))
    rows = _rows(stream, cells, bins, config.n_resamples)
    start = stream.bit_generator.state
    # Sums that agree up to rounding count as equal
    slack = 1e-12

    def shrunk(threshold: float) -> npt.NDArray[np.float64]:
        return sign * np.maximum(size - threshold * bins.variance, 0.0)

    def stretched(threshold: float) -> npt.NDArray[np.float64]:
        # A true accuracy lies in [0, 1], so the gap in [confidence - 1, confidence]
        same = np.clip(sign * (size + threshold * bins.variance), bins.confidence - 1, bins.confidence)
        other = np.clip(sign * (size - threshold * bins.variance), bins.confidence - 1, bins.confidence)
        return np.where(np.abs(other) > np.abs(same), other, same)

    def true_error(gap: npt.NDArray[np.float64]) -> float:
        return float(cells.error(gap * weight, weight, config))

    def drawn(gap: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
        stream.bit_generator.state = start
        gaps, weights, moved = _draw(stream, rows, bins, gap, design_effect)
        # A draw of the very outcomes that were observed is a tie
        return np.asarray(cells.error(gaps, weights, config)), slack + float((weight * moved).sum() / weight.sum())

    def plausible_below(threshold: float) -> bool:
        errors, tie = drawn(shrunk(threshold))
        return float(np.mean(errors >= estimate - tie)) >= tail

    # Smaller than what calibrated models mostly score, an error is luck, or was fitted on these very rows
    luckless = max(estimate, float(np.quantile(drawn(np.zeros_like(bins.gap))[0], _LUCK)))

    def plausible_above(threshold: float) -> bool:
        errors, tie = drawn(stretched(threshold))
        return float(np.mean(errors <= luckless + tie)) >= tail

    noisy = bins.variance > 0
    # Beyond this threshold every gap is gone
    everything = float((size[noisy] / bins.variance[noisy]).max(initial=0.0))
    if calibrated if calibrated is not None else plausible_below(everything):
        low = 0.0
    else:
        # A calibrated model is not plausible: the path ends short of it
        low = true_error(shrunk(min(_last_true(plausible_below, everything), everything * (1 - 1e-6))))
    # Beyond this one every accuracy is at the end of its range
    end = float(((size[noisy] + 1.0) / bins.variance[noisy]).max(initial=0.0))
    high = true_error(stretched(_last_true(plausible_above, end)))
    return min(low, estimate), max(high, estimate)


def _rows(rng: np.random.Generator, cells: Cells, bins: _Bins, times: int) -> npt.NDArray[np.float64]:
    """Numbers of rows in the cells of `times` samples."""
    return np.concatenate(
        [_spread(rng, bins.rows[group], times) if bins.rows[group].sum() else np.zeros((times, group.stop - group.start))
         for group in cells.groups],
        axis=1,
    )  # fmt: skip


def _draw(
    rng: np.random.Generator,
    rows: npt.NDArray[np.float64],
    bins: _Bins,
    gap: npt.NDArray[np.float64],
    design_effect: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """
    Sums of gaps and weights of samples with these rows, each of shape `(times, n_cells)`, were the true mean gaps of the bins
    `gap`; and how far the narrowing of the noise moves the mean gap of the observed outcomes, shape `(n_cells,)`.
    """
    accuracy = np.clip(bins.confidence - gap, 0.0, 1.0)
    chance = accuracy if design_effect is None else _dispersed(rng, accuracy, bins.rows, design_effect, len(rows))
    right = rng.binomial(rows.astype(np.int64), chance)
    spread = accuracy * (1 - accuracy)
    narrowed = np.sqrt(np.clip(1 - bins.narrowing / np.where(spread > 0, spread, np.inf), 0.0, 1.0))
    gaps = rows * gap + narrowed * (rows * accuracy - right)
    moved = (1 - narrowed) * np.abs(gap - bins.gap)
    return gaps * bins.scale, rows * bins.scale, moved


def _dispersed(
    rng: np.random.Generator,
    accuracy: npt.NDArray[np.float64],
    rows: npt.NDArray[np.float64],
    design_effect: npt.NDArray[np.float64],
    times: int,
) -> npt.NDArray[np.float64]:
    """Accuracies of shape `(times, n_cells)` that vary as much as rows that hang together make them (a beta law)."""
    more = (design_effect > 1) & (rows > 1) & (accuracy > 0) & (accuracy < 1)
    # Of `rows` outcomes the variance is that of `rows` which stand alone, times the design effect
    strength = np.maximum((rows - 1) / np.where(more, design_effect - 1, 1.0) - 1, 0.01)
    drawn = rng.beta(
        np.where(more, np.maximum(accuracy * strength, 1e-6), 1.0),
        np.where(more, np.maximum((1 - accuracy) * strength, 1e-6), 1.0),
        size=(times, len(rows)),
    )
    return np.where(more, drawn, accuracy)


def _spread(rng: np.random.Generator, rows: npt.NDArray[np.float64], times: int) -> npt.NDArray[np.float64]:
    total = int(rows.sum())
    return rng.multinomial(total, rows / rows.sum(), size=times).astype(np.float64)


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
