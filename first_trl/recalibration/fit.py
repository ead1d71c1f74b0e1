"""Fit of a rescale on a validation split: the two-stage grid of FIRST, its curve and its spread."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..plugins import RECALIBRATIONS
from .rescale import Recalibration, check_top_k, get_method, rescaled_estimators
from .scores import CurvePoint, TargetScores, flat_cache


# Below this the choice is visibly noisy (sd of a fitted T above 0.1).
_SMALL_N = 1000
# Resampling more independent groups than this changes the spread less than 200 resamples can show.
_MAX_RESAMPLING_UNITS = 4096


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
            value when whole rows are resampled. The fine step of the search (0.02, or 0.01 for delta) is their resolution.
        at_boundary (`bool`): the chosen value is the smallest or the largest one tried, and is neither `min_value` nor
            the delta of 0, which bound the search on purpose.
        n (`int`): positions used; `n_rows`: sequences they come from.
        accuracy (`float`): share of positions where the teacher's first rank is the label.
        gold_coverage (`float`): share of positions whose label is among the kept tokens.
        min_value (`float` or `None`): the lower bound of the values tried.
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
    min_value: float | None = None
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


def _check_min_value(method: str, min_value: float | None) -> float | None:
    if min_value is None:
        return None
    if method == "none":
        raise ValueError(
            f"`min_value={min_value}` has no effect with method='none', which has no value: leave it out."
        )
    stop = get_method(method).grid[1]
    bound = Recalibration(method, min_value).value  # raises outside the method's range
    if bound is None or bound > stop:
        raise ValueError(f"`min_value={min_value}` leaves no {method} to try: the search ends at {stop}. Lower it.")
    return bound


def _coarse_values(method: str, min_value: float | None) -> list[float]:
    start, stop, step, _ = get_method(method).grid
    values = [round(start + i * step, 10) for i in range(round((stop - start) / step) + 1)]
    return values if min_value is None else [min_value, *(v for v in values if v > min_value)]


def _fine_values(method: str, center: float, min_value: float | None) -> list[float]:
    _, _, coarse_step, step = get_method(method).grid
    reach = round(coarse_step / step)
    values = [round(center + i * step, 10) for i in range(-reach, reach + 1)]
    if min_value is not None and values[0] < min_value:
        values = [min_value, *(v for v in values if v > min_value)]
    return [v for v in values if get_method(method).allows(v)]


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
    min_value: float | None = None,
    positions: str = "all",
    n_bins: int = 10,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> RecalibrationFit:
    """
    Fit the value of a rescale on a validation split, on the target that training will use.

    The search has the two stages of FIRST (section 3): `c` in 0.1, 0.2 .. 1.0, then steps of 0.02 within 0.1 of the best.
    `T` runs over 0.5, 0.6 .. 5.0 and `delta` over 0, 0.05 .. 0.5, refined in the same way (steps of 0.02 and 0.01), or,
    between log-probabilities, over 0, 0.1 .. 4.0.
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
            The target that will be trained on: `"topk"`, `"bucket"`, `"renormalized"` or `"probability_softmax"`.
        top_k (`int`, *optional*):
            Number of ranks to use, all of them by default.
        min_value (`float`, *optional*):
            Lower bound of the values tried, itself one of them. `1.0` for `"logit_temperature"` allows no rescale and
            every softer target, and no sharper one.
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
        value is the last one tried on either side (`min_value` and a delta of 0 aside).

    Raises:
        `ValueError`: for an empty split, arrays that do not fit together, a `min_value` outside the search, and
        everything [`Recalibration.apply`] refuses.
    """
    _check_choice("method", method, RECALIBRATIONS)
    _check_choice("objective", objective, ("ece", "nll"))
    _check_choice("estimator", estimator, rescaled_estimators())
    _check_choice("positions", positions, ("all", "first"))
    if n_bins < 1 or n_bootstrap < 0:
        raise ValueError(f"`n_bins` must be >= 1 and `n_bootstrap` >= 0, got {n_bins} and {n_bootstrap}.")
    min_value = _check_min_value(method, min_value)
    arrays = flat_cache(cache, positions)
    n, k = arrays.logprobs.shape
    kept_k = k if top_k is None else check_top_k(top_k, k)
    rng = np.random.default_rng(seed)
    _, row = np.unique(arrays.row, return_inverse=True)
    n_rows = int(row.max()) + 1
    unit = row
    if n_rows > _MAX_RESAMPLING_UNITS:
        unit = (rng.permutation(n_rows) % _MAX_RESAMPLING_UNITS)[row]
    scores = TargetScores(arrays, method, objective, estimator, kept_k, n_bins, unit)
    raw = scores.points[None]

    curve: list[CurvePoint] = []
    bootstrap = None
    at_boundary = False
    if method == "none":
        recalibration, chosen = Recalibration(), raw
    else:
        coarse = _coarse_values(method, min_value)
        center = scores.choose(coarse)
        fine = _fine_values(method, center, min_value)
        best = scores.choose(fine)
        curve = [scores.point(v, "coarse") for v in coarse] + [scores.point(v, "fine") for v in fine]
        recalibration, chosen = Recalibration(method, best), scores.point(best, "chosen")
        lowest, highest = min(*coarse, *fine), max(*coarse, *fine)
        at_boundary = best == highest or (best == lowest and best not in (0.0, min_value))
        if n_bootstrap:
            picks = _bootstrap(scores, method, coarse, min_value, n_bootstrap, rng)
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
            "validation rows" + (", or objective='nll'." if objective == "ece" else ".")
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
        min_value=min_value,
        messages=messages,
    )


def _bootstrap(
    scores: TargetScores,
    method: str,
    coarse: list[float],
    min_value: float | None,
    n_resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The value the two-stage search picks on each resample, float64 [n_resamples]."""
    n_units = scores.n_units
    weights = rng.multinomial(n_units, np.full(n_units, 1.0 / n_units), size=n_resamples).astype(np.float64)
    centers = scores.choose_resampled(coarse, weights)
    picks = np.empty(n_resamples)
    for center in np.unique(centers):
        chosen = centers == center
        picks[chosen] = scores.choose_resampled(_fine_values(method, float(center), min_value), weights[chosen])
    return picks
