"""Scores on a card: every figure with its 95 % interval, from the predictions of an evaluation."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..calibration import CalibrationWarning, calibration_report
from ..calibration.config import CalibrationConfig
from ..calibration.examples import prepare
from ..calibration.resampling import locate
from ..evaluation.predictions import MultipleChoiceResult, brier_scores
from ..vocabulary import METRICS, Metric, number


_Z = 1.959964  # 97.5 % point of the normal distribution
_RESAMPLES = 1000


class Score(NamedTuple):
    """A score and its 95 % interval, where the predictions to compute one are there."""

    value: float
    low: float | None = None
    high: float | None = None

    def shown(self, metric: Metric) -> str:
        text = number(self.value, metric)
        if self.low is None or self.high is None:
            return text
        return f"{text} [{number(self.low, metric)}, {number(self.high, metric)}]"


@dataclass(frozen=True)
class Scored:
    """
    One model on one set of rows.

    Attributes:
        n (`int`): Rows with an answer.
        n_bins (`int`): Bins of the ECE.
        scores (`dict[str, Score]`): By the keys of the report.
        calibration (`dict`): Report of the confidences, with bins, for the diagram.
        options (`dict[str, float]`): Accuracy and ECE renormalised over the choices.
        unit (`str`): What was scored: `"row"`, or `"token"` of free text.
    """

    n: int
    n_bins: int
    scores: dict[str, Score]
    calibration: dict[str, Any]
    options: dict[str, float] = field(default_factory=dict)
    unit: str = "row"

    @property
    def null(self) -> tuple[float, float] | None:
        """Mean and 95 % point of the ECE of a perfectly calibrated model with these confidences."""
        mean, high = self.calibration.get("null_mean"), self.calibration.get("null_high")
        return None if mean is None or high is None else (mean, high)


def score_result(result: MultipleChoiceResult, *, seed: int = 0) -> Scored:
    """
    Scores of an evaluation with 95 % intervals, over all tokens of the vocabulary, as the report of a run has them.

    ECE: by inverting the bootstrap (see [`calibration_report`]). Trust: basic bootstrap of accuracy and ECE together.
    Accuracy: Wilson. NLL and Brier: mean of the rows plus or minus 1.96 standard errors.
    """
    report = result.report
    n_bins = int(report["full_vocab"]["calibration"]["config"]["n_bins"])
    p = {name: values[result.predictions["gold"] >= 0] for name, values in result.predictions.items()}
    confidence, correct = p["top_prob"].astype(np.float64), p["top_is_gold"].astype(np.int64)
    with warnings.catch_warnings():
        # What they say of small samples stands in the card
        warnings.simplefilter("ignore", CalibrationWarning)
        calibration = calibration_report(
            confidence, correct, n_bins=n_bins, confidence_interval=0.95, null_test=True, seed=seed
        )
    rows = {"nll": -p["gold_logprob"], "brier": brier_scores(p)}
    ece, accuracy = float(calibration["ece"]), float(correct.mean())
    scores = {
        "accuracy": Score(accuracy, *_wilson(accuracy, len(correct))),
        "ece": Score(ece, calibration["ci_low"], calibration["ci_high"]),
        "trust": Score(accuracy - ece, *_trust_interval(confidence, correct, accuracy - ece, n_bins, seed)),
        **{name: _mean(values) for name, values in rows.items()},
    }
    options = {name: float(report["options"][name]) for name in ("accuracy", "ece")}
    return Scored(len(correct), n_bins, scores, calibration, options)


def score_tokens(predictions: Mapping[str, np.ndarray], report: Mapping[str, Any], *, seed: int = 0) -> Scored:
    """Scores of free text, token by token; the intervals resample rows, since tokens of one row hang together."""
    # Needs torch, which a card of multiple choice does not
    from ..evaluation.token_level import row_intervals

    scored = scores_of_report(report)
    assert scored is not None
    limits = row_intervals(predictions, n_bins=scored.n_bins, seed=seed)
    scores = {key: Score(score.value, *limits.get(key, (None, None))) for key, score in scored.scores.items()}
    return replace(scored, scores=scores)


def scores_of_report(report: Mapping[str, Any]) -> Scored | None:
    """Scores without intervals, from the report of an evaluation alone; `None` when it holds none."""
    values = report.get("full_vocab")
    if not isinstance(values, Mapping) or "calibration" not in values:
        return None
    options = report.get("options")
    return Scored(
        int(report["n"]),
        int(values["calibration"]["config"]["n_bins"]),
        {metric.key: Score(float(values[metric.key])) for metric in METRICS if values.get(metric.key) is not None},
        dict(values["calibration"]) | null_of_report(report),
        {name: float(options[name]) for name in ("accuracy", "ece")} if isinstance(options, Mapping) else {},
        str(report.get("unit", "row")),
    )


def null_of_report(report: Mapping[str, Any]) -> dict[str, float]:
    """The noise floor that a run has computed, so that its card and its report say the same."""
    null = report.get("null_ece")
    return {} if not null else {"null_mean": float(null["mean"]), "null_high": float(null["q95"])}


def _mean(values: np.ndarray) -> Score:
    mean = float(values.mean())
    if len(values) < 2:
        return Score(mean)
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Score(mean, mean - half, mean + half)


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _trust_interval(
    confidence: np.ndarray, correct: np.ndarray, estimate: float, n_bins: int, seed: int
) -> tuple[float, float]:
    """Accuracy and ECE hang together, so that their difference is resampled, not put together from two intervals.
    Reflected around the estimate: resampling adds to the noise in an ECE, and percentiles would keep that."""
    config = CalibrationConfig(n_bins=n_bins)
    cells = locate(prepare(confidence, correct, config), config)
    bins, rng = cells.index[:, 0], np.random.default_rng(seed)
    drawn = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        rows = rng.integers(0, len(correct), size=len(correct))
        gaps = np.bincount(bins[rows], weights=(confidence - correct)[rows], minlength=cells.n_cells)
        counts = np.bincount(bins[rows], minlength=cells.n_cells).astype(np.float64)
        drawn[i] = correct[rows].mean() - float(cells.error(gaps.astype(np.float64), counts, config))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(max(2 * estimate - high, -1.0)), float(min(2 * estimate - low, 1.0))
