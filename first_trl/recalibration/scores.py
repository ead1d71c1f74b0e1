"""Scores of rescaled targets against the labels of a cache: what the fit of a rescale compares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration.errors import equal_width_ece, equal_width_gaps
from ..calibration.scores import brier_of
from ..plugins import estimator_target
from .rescale import Recalibration, get_method


@dataclass(frozen=True)
class CurvePoint:
    """
    One value tried by `fit_recalibration` and what the rescaled target scores there.

    `nll` is in nats, `None` where it is infinite (the target gives a label the probability 0).
    """

    stage: str
    value: float | None
    ece: float
    nll: float | None
    brier: float
    mean_confidence: float


@dataclass(frozen=True)
class FlatCache:
    logprobs: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    tail_logprob: np.ndarray | None
    row: np.ndarray


def flat_cache(cache: Any, positions: str) -> FlatCache:
    """Arrays of the supervised positions of `cache`, checked against one another."""
    if hasattr(cache, "column_names"):
        from ..cache.schema import flatten_cache

        cache = flatten_cache(cache)
    get = cache.get if isinstance(cache, Mapping) else lambda name: getattr(cache, name, None)
    source = {name: get(name) for name in ("logprobs", "ids", "labels", "tail_logprob", "first")}
    missing = [name for name in ("logprobs", "ids", "labels") if source[name] is None]
    if missing:
        raise ValueError(
            f"`cache` ({type(cache).__name__}) lacks {missing}: give a dataset with the cache columns, or flat arrays "
            "'logprobs' [N, k], 'ids' [N, k], 'labels' [N] and 'tail_logprob' [N]."
        )
    logprobs, ids, labels = (np.asarray(source[name]) for name in ("logprobs", "ids", "labels"))
    if labels.size == 0:
        raise ValueError(
            "The validation split has no supervised position: nothing to fit on. Give rows whose labels are not all -100."
        )
    if logprobs.ndim != 2 or ids.shape != logprobs.shape or labels.shape != logprobs.shape[:1]:
        raise ValueError(
            "The shapes of the cache do not fit together: logprobs [N, k], ids [N, k] and labels [N] are needed, got "
            f"{logprobs.shape}, {ids.shape} and {labels.shape}."
        )
    for name, array in (("ids", ids), ("labels", labels)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"The {name} of the cache must be integer token ids, got {array.dtype}.")
    if (labels < 0).any():
        bad = int(np.flatnonzero(labels < 0)[0])
        raise ValueError(
            f"Label {bad} of the cache is {labels[bad]}: give supervised positions only, -100 marks the others."
        )
    tail, first = source["tail_logprob"], source["first"]
    first_mask = np.ones(len(labels), dtype=bool) if first is None else np.asarray(first, dtype=bool)
    if first_mask.shape != labels.shape or not first_mask[0]:
        raise ValueError("`first` must mark, for every position, whether it is the first supervised one of its row.")
    if positions == "first" and first is None:
        raise ValueError("positions='first' needs to know where a row starts: give 'first' (bool [N]) or a dataset.")
    row = np.cumsum(first_mask) - 1
    keep = first_mask if positions == "first" else slice(None)
    return FlatCache(
        logprobs[keep],
        ids[keep],
        labels[keep],
        None if tail is None else np.asarray(tail)[keep],
        row[keep],
    )


class TargetScores:
    """Scores of rescaled targets on one set of positions, each value computed once."""

    def __init__(
        self,
        arrays: FlatCache,
        method: str,
        objective: str,
        estimator: str,
        top_k: int,
        n_bins: int,
        unit: np.ndarray,
    ) -> None:
        self.method, self.objective, self.top_k, self.n_bins = method, objective, top_k, n_bins
        self.unit, self.n_units = unit, int(unit.max()) + 1
        self.hit = arrays.ids[:, :top_k] == arrays.labels[:, None]
        self.covered = self.hit.any(axis=1)
        # `apply` checks its arrays; once is enough for all values tried.
        Recalibration().apply(arrays.logprobs, arrays.tail_logprob, estimator=estimator, top_k=top_k)
        self.logprobs = np.minimum(np.asarray(arrays.logprobs, dtype=np.float64), 0.0)
        self.tail = None
        if estimator_target(estimator) == "tail":
            self.tail = np.minimum(np.asarray(arrays.tail_logprob, dtype=np.float64), 0.0)
        self.points: dict[float | None, CurvePoint] = {}
        self.units: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self.raw_confidence = np.empty(0)
        self.distance: dict[float, float] = {}
        self._score(None)

    def point(self, value: float, stage: str) -> CurvePoint:
        if value not in self.points:
            self._score(value)
        scored = self.points[value]
        return CurvePoint(stage, scored.value, scored.ece, scored.nll, scored.brier, scored.mean_confidence)

    def _score(self, value: float | None) -> None:
        recalibration = Recalibration() if value is None else Recalibration(self.method, value)
        n = len(self.hit)
        head, tail = recalibration.target(self.logprobs, self.tail, self.top_k)
        target = np.exp(head)
        rows = np.arange(n)
        # The prediction is a token, so the bucket never is one, even where it holds the largest mass.
        best = np.argmax(target, axis=1)
        confidence = target[rows, best]
        correct = self.hit[rows, best]
        ece = equal_width_ece(confidence, correct, self.n_bins)
        # A label outside the kept tokens is the bucket. Without a bucket its target is 0 at every value: such rows cannot
        # move the choice, and leaving them out keeps the number finite.
        gold_logprob = np.where(self.hit, head, 0.0).sum(axis=1, where=self.hit)
        gold_target = np.where(self.covered, np.exp(gold_logprob), 0.0)
        counted = self.covered
        square = np.square(target).sum(axis=1)
        if tail is not None:
            gold_logprob = np.where(self.covered, gold_logprob, tail)
            gold_target = np.exp(gold_logprob)
            counted = np.ones(n, dtype=bool)
            square = square + np.exp(2.0 * tail)
        losses = np.where(counted, -gold_logprob, 0.0)
        nll = float(losses.sum() / counted.sum()) if counted.any() else math.inf
        brier = float(np.mean(brier_of(square, gold_target)))
        self.points[value] = CurvePoint(
            "raw", value, ece, nll if math.isfinite(nll) else None, brier, float(confidence.mean())
        )
        if value is None:
            self.raw_confidence = confidence
            return
        identity = get_method(self.method).identity
        self.distance[value] = (
            float(np.abs(confidence - self.raw_confidence).mean()) if identity is None else abs(value - identity)
        )
        if self.objective == "ece":
            sums = equal_width_gaps(confidence, correct, self.n_bins, group=self.unit, n_groups=self.n_units)
            self.units[value] = (sums, np.bincount(self.unit).astype(float))
        else:
            totals = np.bincount(self.unit, weights=losses, minlength=self.n_units)
            self.units[value] = (totals[:, None], np.bincount(self.unit, weights=counted, minlength=self.n_units))

    def choose(self, values: list[float]) -> float:
        """The best value; between equals the one nearest to no rescale."""
        for value in values:
            self.point(value, "")
        scores = {v: getattr(self.points[v], self.objective) for v in values}
        usable = [v for v in values if scores[v] is not None]
        if not usable:
            raise ValueError(
                f"The {self.objective.upper()} is not finite at any value tried: the label has probability 0 in the "
                "target. Keep more tokens (a larger k), use the estimator 'bucket' or fit by objective='ece'."
            )
        return min(usable, key=lambda v: (round(scores[v], 12), self.distance[v]))

    def choose_resampled(self, values: list[float], weights: np.ndarray) -> np.ndarray:
        """`choose` for every row of resampling `weights`, float64 [resamples, units]."""
        for value in values:
            self.point(value, "")
        ordered = sorted(values, key=lambda v: self.distance[v])
        scores = []
        for value in ordered:
            sums, counts = self.units[value]
            total = np.maximum(weights @ counts, 1.0)
            with np.errstate(invalid="ignore"):
                scores.append(np.round(np.abs(weights @ sums).sum(axis=1) / total, 12))
        # A label of probability 0 has an infinite loss, and 0 * inf is not a number.
        return np.asarray(ordered)[np.argmin(np.nan_to_num(np.stack(scores), nan=np.inf), axis=0)]
