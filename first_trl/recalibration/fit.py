"""Fit of a rescale on a validation split: the two-stage grid of FIRST, its curve and its spread."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..calibration.bins import assign, width_edges
from .rescale import ESTIMATORS, METHODS, Recalibration, check_top_k


# Below this the choice is visibly noisy (sd of a fitted T above 0.1).
_SMALL_N = 1000
# Resampling more independent groups than this changes the spread less than 200 resamples can show.
_MAX_RESAMPLING_UNITS = 4096


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
class RecalibrationFit:
    """
    What `fit_recalibration` found, the whole curve included. JSON-serialisable through `to_dict`.

    Attributes:
        recalibration (`Recalibration`): the chosen method and value.
        raw (`CurvePoint`): the target without any rescale.
        chosen (`CurvePoint`): the target at the chosen value.
        curve (`list[CurvePoint]`): every value tried, coarse stage first.
        bootstrap (`dict` or `None`): `n_resamples`, `mean`, `sd`, `low` and `high` (2.5 and 97.5 percent) of the chosen
            value when whole rows are resampled.
        at_boundary (`bool`): the chosen value is the smallest or the largest one tried.
        n (`int`): positions used; `n_rows`: sequences they come from.
        accuracy (`float`): share of positions where the teacher's first rank is the label.
        gold_coverage (`float`): share of positions whose label is among the kept tokens.
        messages (`list[str]`): the warnings given.
    """

    recalibration: Recalibration
    objective: str
    estimator: str
    top_k: int
    positions: str
    n_bins: int
    n: int
    n_rows: int
    accuracy: float
    gold_coverage: float
    raw: CurvePoint
    chosen: CurvePoint
    curve: list[CurvePoint]
    bootstrap: dict[str, float] | None
    at_boundary: bool
    seed: int
    messages: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python form, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RecalibrationFit":
        """Inverse of `to_dict`."""
        values = dict(data)
        values["recalibration"] = Recalibration.from_dict(values["recalibration"])
        values["raw"] = CurvePoint(**values["raw"])
        values["chosen"] = CurvePoint(**values["chosen"])
        values["curve"] = [CurvePoint(**point) for point in values["curve"]]
        return cls(**values)


# Coarse (start, stop, step) and fine step of the search. c: the two stages of the paper. T has the same steps over a
# wider range, since a memorising teacher needs T well above 1.
_GRIDS = {
    "probability_temperature": (0.1, 1.0, 0.1, 0.02),
    "logit_temperature": (0.5, 5.0, 0.1, 0.02),
    "label_smoothing": (0.0, 0.5, 0.05, 0.01),
}


def _coarse_values(method: str) -> list[float]:
    start, stop, step, _ = _GRIDS[method]
    return [round(start + i * step, 10) for i in range(round((stop - start) / step) + 1)]


def _fine_values(method: str, center: float) -> list[float]:
    _, _, coarse_step, step = _GRIDS[method]
    reach = round(coarse_step / step)
    values = (round(center + i * step, 10) for i in range(-reach, reach + 1))
    return [v for v in values if (0.0 <= v < 1.0 if method == "label_smoothing" else v > 0.0)]


class _Scores:
    """Scores of rescaled targets on one set of positions, each value computed once."""

    def __init__(
        self,
        arrays: "_FlatCache",
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
        if estimator == "bucket":
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
        bins = assign(np.minimum(confidence, 1.0), width_edges(self.n_bins), "right", uniform=self.n_bins)
        gap = confidence - correct
        ece = float(np.abs(np.bincount(bins, weights=gap, minlength=self.n_bins)).sum() / n)
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
        brier = float(np.mean(square - 2.0 * gold_target + 1.0))
        self.points[value] = CurvePoint(
            "raw", value, ece, nll if math.isfinite(nll) else None, brier, float(confidence.mean())
        )
        if value is None:
            self.raw_confidence = confidence
            return
        self.distance[value] = {
            "logit_temperature": abs(value - 1.0),
            "label_smoothing": value,
        }.get(self.method, float(np.abs(confidence - self.raw_confidence).mean()))
        if self.objective == "ece":
            sums = np.bincount(self.unit * self.n_bins + bins, weights=gap, minlength=self.n_units * self.n_bins)
            self.units[value] = (sums.reshape(self.n_units, self.n_bins), np.bincount(self.unit).astype(float))
        else:
            sums = np.bincount(self.unit, weights=losses, minlength=self.n_units)
            self.units[value] = (sums[:, None], np.bincount(self.unit, weights=counted, minlength=self.n_units))

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


@dataclass(frozen=True)
class _FlatCache:
    logprobs: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    tail_logprob: np.ndarray | None
    row: np.ndarray


def _flat_cache(cache: Any, positions: str) -> _FlatCache:
    """Arrays of the supervised positions of `cache`, checked against one another."""
    if hasattr(cache, "column_names"):
        from ..teacher.schema import flatten_cache

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
    return _FlatCache(
        logprobs[keep],
        ids[keep],
        labels[keep],
        None if tail is None else np.asarray(tail)[keep],
        row[keep],
    )


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")


def fit_recalibration(
    cache: Any,
    *,
    method: str = "probability_temperature",
    objective: str = "ece",
    estimator: str = "topk",
    top_k: int | None = None,
    positions: str = "all",
    n_bins: int = 10,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> RecalibrationFit:
    """
    Fit the value of a rescale on a validation split, on the target that training will use.

    The search has the two stages of FIRST (section 3): `c` in 0.1, 0.2 .. 1.0, then steps of 0.02 within 0.1 of the best.
    `T` runs over 0.5, 0.6 .. 5.0 and `delta` over 0, 0.05 .. 0.5, refined in the same way (steps of 0.02 and 0.01).
    Between equal scores the value nearest to no rescale wins: the T nearest 1, the smallest delta, and, since no c is the
    identity, the c that changes the confidences least.

    The ECE (equal-width bins, right edges closed) compares the largest entry of the rescaled target with whether its token
    is the label. NLL and Brier score read the whole target; for `"bucket"` a label outside the k counts as the bucket, for
    the other estimators the NLL is over the positions whose label is kept (`gold_coverage` says how many).

    Args:
        cache (`datasets.Dataset` or `Mapping`):
            Rows with the cache columns (see `add_teacher_topk`), or flat arrays `{"logprobs": [N, k], "ids": [N, k],
            "labels": [N], "tail_logprob": [N], "first": [N]}`, the last two optional.
        method (`str`, *optional*, defaults to `"probability_temperature"`):
            A method of [`Recalibration`].
        objective (`str`, *optional*, defaults to `"ece"`):
            `"ece"` (the paper) or `"nll"` (less noisy at the same size).
        estimator (`str`, *optional*, defaults to `"topk"`):
            The target that will be trained on: `"topk"`, `"bucket"` or `"renormalized"`.
        top_k (`int`, *optional*):
            Number of ranks to use, all of them by default.
        positions (`str`, *optional*, defaults to `"all"`):
            `"first"` fits on the first supervised position of each row only, where answers are one token and what follows
            is punctuation or an end token.
        n_bins (`int`, *optional*, defaults to `10`):
            Bins of the ECE.
        n_bootstrap (`int`, *optional*, defaults to `200`):
            Resamples for the spread of the choice, 0 for none. Whole rows are resampled: positions of one row are not
            independent. Above 4096 rows, random groups of rows.
        seed (`int`, *optional*, defaults to `0`):
            Of the resampling.

    Returns:
        [`RecalibrationFit`]

    Warns:
        `UserWarning`: below 1000 positions; when the ECE does not improve on the target without rescale; when the chosen
        value is the last one tried on either side.

    Raises:
        `ValueError`: for an empty split, arrays that do not fit together, and everything [`Recalibration.apply`] refuses.
    """
    _check_choice("method", method, METHODS)
    _check_choice("objective", objective, ("ece", "nll"))
    _check_choice("estimator", estimator, ESTIMATORS)
    _check_choice("positions", positions, ("all", "first"))
    if n_bins < 1 or n_bootstrap < 0:
        raise ValueError(f"`n_bins` must be >= 1 and `n_bootstrap` >= 0, got {n_bins} and {n_bootstrap}.")
    arrays = _flat_cache(cache, positions)
    n, k = arrays.logprobs.shape
    kept_k = k if top_k is None else check_top_k(top_k, k)
    rng = np.random.default_rng(seed)
    _, row = np.unique(arrays.row, return_inverse=True)
    n_rows = int(row.max()) + 1
    unit = row
    if n_rows > _MAX_RESAMPLING_UNITS:
        unit = (rng.permutation(n_rows) % _MAX_RESAMPLING_UNITS)[row]
    scores = _Scores(arrays, method, objective, estimator, kept_k, n_bins, unit)
    raw = scores.points[None]

    curve: list[CurvePoint] = []
    bootstrap = None
    at_boundary = False
    if method == "none":
        recalibration, chosen = Recalibration(), raw
    else:
        coarse = _coarse_values(method)
        center = scores.choose(coarse)
        fine = _fine_values(method, center)
        best = scores.choose(fine)
        curve = [scores.point(v, "coarse") for v in coarse] + [scores.point(v, "fine") for v in fine]
        recalibration, chosen = Recalibration(method, best), scores.point(best, "chosen")
        at_boundary = best in (min(*coarse, *fine), max(*coarse, *fine))
        if n_bootstrap:
            picks = _bootstrap(scores, method, coarse, n_bootstrap, rng)
            low, high = np.quantile(picks, [0.025, 0.975])
            bootstrap = {
                "n_resamples": n_bootstrap,
                "mean": float(picks.mean()),
                "sd": float(picks.std()),
                "low": float(low),
                "high": float(high),
            }

    messages = []
    if n < _SMALL_N:
        messages.append(
            f"Only {n} positions to fit on: below {_SMALL_N} the choice is noisy, see the bootstrap spread. Use more "
            "validation rows or objective='nll'."
        )
    if method != "none" and chosen.ece >= raw.ece:
        messages.append(
            f"The rescale does not improve the validation ECE ({raw.ece:.4f} without it, {chosen.ece:.4f} with "
            f"{method} = {recalibration.value}): recalibration='none' may serve better."
        )
    if at_boundary:
        messages.append(
            f"The chosen {method} = {recalibration.value} is at the edge of the values tried: the best one may lie "
            "outside, look at the curve."
        )
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    return RecalibrationFit(
        recalibration=recalibration,
        objective=objective,
        estimator=estimator,
        top_k=kept_k,
        positions=positions,
        n_bins=n_bins,
        n=n,
        n_rows=n_rows,
        accuracy=float((arrays.ids[:, 0] == arrays.labels).mean()),
        gold_coverage=float(scores.covered.mean()),
        raw=raw,
        chosen=chosen,
        curve=curve,
        bootstrap=bootstrap,
        at_boundary=at_boundary,
        seed=seed,
        messages=messages,
    )


def _bootstrap(
    scores: _Scores, method: str, coarse: list[float], n_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """The value the two-stage search picks on each resample, float64 [n_resamples]."""
    n_units = scores.n_units
    weights = rng.multinomial(n_units, np.full(n_units, 1.0 / n_units), size=n_resamples).astype(np.float64)
    centers = scores.choose_resampled(coarse, weights)
    picks = np.empty(n_resamples)
    for center in np.unique(centers):
        chosen = centers == center
        picks[chosen] = scores.choose_resampled(_fine_values(method, float(center)), weights[chosen])
    return picks
