"""Scores on a card: every figure with its 95 % interval, from the predictions of an evaluation."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..calibration import CalibrationWarning, calibration_report
from ..calibration.intervals import FEWEST_OF_A_KIND, normal_interval, wilson_interval
from ..evaluation.predictions import MultipleChoiceResult, brier_scores
from ..plugins import report_metrics
from ..vocabulary import METRICS, Metric, number


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
        unit (`str`): What was scored: `"row"`, `"answer"` where rows were scored by the whole text of their answers, or
            `"token"` of free text.
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

    ECE: by inverting the bootstrap (see [`calibration_report`]). Accuracy: Wilson. Trust: from the worst ends of these two
    together to the best ones. NLL and Brier: mean of the rows plus or minus 1.96 standard errors, not below 0; none where
    fewer than three rows are right, or wrong, which does not tell what that kind costs.
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
    right, low, high = wilson_interval(accuracy, len(correct)), calibration["ci_low"], calibration["ci_high"]
    scores = {
        "accuracy": Score(accuracy, *right),
        "ece": Score(ece, low, high),
        "trust": Score(accuracy - ece, right[0] - high, right[1] - low),
        **{name: _mean(values, correct) for name, values in rows.items()},
        # Of a plugin's column nothing is known but its value
        **_stated(report["full_vocab"], report_metrics()[len(METRICS) :]),
    }
    options = {name: float(report["options"][name]) for name in ("accuracy", "ece")}
    return Scored(len(correct), n_bins, scores, calibration, options, _unit(report))


def score_tokens(predictions: Mapping[str, np.ndarray], report: Mapping[str, Any], *, seed: int = 0) -> Scored:
    """Scores of free text, token by token; the intervals are over rows, since tokens of one row hang together."""
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
        _stated(values, report_metrics()),
        dict(values["calibration"]) | null_of_report(report),
        {name: float(options[name]) for name in ("accuracy", "ece")} if isinstance(options, Mapping) else {},
        _unit(report),
    )


def _unit(report: Mapping[str, Any]) -> str:
    return "answer" if report.get("scoring") == "choices" else str(report.get("unit", "row"))


def shown_metrics(models: Iterable[Scored]) -> tuple[Metric, ...]:
    """Columns of a table of these models: the built-in ones, and those of plugins that one of them has."""
    found = {key for scored in models for key in scored.scores}
    return tuple(metric for metric in report_metrics() if metric in METRICS or metric.key in found)


def _stated(values: Mapping[str, Any], metrics: Iterable[Metric]) -> dict[str, Score]:
    return {metric.key: Score(float(values[metric.key])) for metric in metrics if values.get(metric.key) is not None}


def null_of_report(report: Mapping[str, Any]) -> dict[str, float]:
    """The noise floor that a run has computed, so that its card and its report say the same."""
    null = report.get("null_ece")
    return {} if not null else {"null_mean": float(null["mean"]), "null_high": float(null["q95"])}


def _mean(values: np.ndarray, correct: np.ndarray) -> Score:
    mean, limits = float(values.mean()), normal_interval(values)
    if limits is None or np.bincount(correct, minlength=2).min() < FEWEST_OF_A_KIND:
        return Score(mean)
    return Score(mean, max(limits[0], 0.0), limits[1])
