"""Trustworthy maximization: the rescale of the teacher's cached top-k.

The cache holds raw log-probabilities over the full vocabulary. Everything here acts on those, in float64, so the method,
its value, the estimator and `k' <= k` can all change without running the teacher again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration.arrays import as_numbers
from ..plugins import ESTIMATORS, RECALIBRATIONS, estimator_target, one
from ..utils.names import nearest
from ..vocabulary import NO_ENTRY
from .methods import Method, logsumexp


# float16 rounding of k log-probabilities moves their sum by well under one percent; more than this is another quantity.
_MASS_TOLERANCE = 0.05
_POSITIVE_TOLERANCE = 1e-6


def _log1mexp(x: np.ndarray) -> np.ndarray:
    """log(1 - exp(x)) for x <= 0 without cancellation at either end."""
    with np.errstate(divide="ignore"):
        return np.where(x > -math.log(2.0), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def check_logprobs(logprobs: Any) -> np.ndarray:
    lp = as_numbers(logprobs, "`logprobs`")[0].astype(np.float64)
    if lp.ndim != 2 or lp.shape[1] == 0:
        raise ValueError(f"`logprobs` must have the shape [positions, k] with k >= 1, got {lp.shape}.")
    bad = np.isnan(lp) | (lp > _POSITIVE_TOLERANCE)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"`logprobs` row {row}, column {column} is {lp[row, column]}: a log-probability is a number <= 0. "
            "Cache the log-softmax over the full vocabulary, not logits or probabilities."
        )
    rising = lp[:, 1:] > lp[:, :-1]
    if rising.any():
        row, column = (int(i) for i in np.argwhere(rising)[0])
        raise ValueError(
            f"`logprobs` row {row} rises from column {column} ({lp[row, column]}) to column {column + 1} "
            f"({lp[row, column + 1]}): entries must be sorted by falling log-probability, ids along with them."
        )
    lp = np.minimum(lp, 0.0)
    mass = np.exp(logsumexp(lp))
    wrong = np.flatnonzero((mass > 1.0 + _MASS_TOLERANCE) | (mass == 0.0))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"`logprobs` row {row} holds a probability mass of {mass[row]:.6g}, it must be in (0, 1]. "
            "Cache the log-softmax over the full vocabulary."
        )
    return lp


def check_tail(tail_logprob: Any, lp: np.ndarray) -> np.ndarray:
    tail = as_numbers(tail_logprob, "`tail_logprob`")[0].astype(np.float64)
    if tail.shape != lp.shape[:1]:
        raise ValueError(
            f"`tail_logprob` must have the shape [{len(lp)}], one per row of `logprobs`, got {tail.shape}."
        )
    bad = np.flatnonzero(np.isnan(tail) | (tail > _POSITIVE_TOLERANCE))
    if bad.size:
        raise ValueError(f"`tail_logprob` row {bad[0]} is {tail[bad[0]]}: the log of a mass is a number <= 0.")
    tail = np.minimum(tail, 0.0)
    total = np.exp(logsumexp(lp)) + np.exp(tail)
    wrong = np.flatnonzero(np.abs(total - 1.0) > _MASS_TOLERANCE)
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"Row {row}: the kept mass plus the tail is {total[row]:.6g}, it must be 1. `tail_logprob` is the log of the "
            "teacher's mass outside the k kept tokens."
        )
    return tail


@dataclass(frozen=True)
class Recalibration:
    r"""
    Rescale of a teacher's kept probabilities, applied once and to the teacher only.

    With \\( q_1 \ge \dots \ge q_k \\) the raw probabilities of one position:

    | method | target | source |
    | --- | --- | --- |
    | `"none"` | \\( q_i / \sum_j q_j \\) | top-k distillation |
    | `"probability_temperature"` | \\( \exp(q_i/c) / \sum_j \exp(q_j/c) \\) | FIRST, section 3 |
    | `"logit_temperature"` | \\( q_i^{1/T} / \sum_j q_j^{1/T} \\) | temperature scaling (Guo et al. 2017) |
    | `"label_smoothing"` | \\( q / \sum_j q_j \\), `delta` moved from rank 1 to the others evenly | FIRST, section 3 |
    | `"log_label_smoothing"` | \\( q_1 e^{-\delta} \\) and \\( q_i e^{\delta/(k-1)} \\), renormalised | FIRST, authors' code |

    `c = 1` is not the identity: the softmax of probabilities can give rank 1 at most `e / (e + k - 1)`. `T = 1` and
    `delta = 0` are.

    `"log_label_smoothing"` moves `delta` between *log*-probabilities, as the authors' code does, and is far milder: at
    `k = 5` a `delta` of 0.1 takes a rank 1 of 0.95 to 0.944, where `"label_smoothing"` takes it to 0.85. Their weights
    do not sum to 1. Dividing them by their sum leaves the optimum where it is, and only drops a weight of the position
    in the loss, which lies between \\( e^{-\delta} \\) and \\( e^{\delta/(k-1)} \\), near 1.

    Args:
        method (`str`, *optional*, defaults to `"none"`):
            One of the methods above, or one that was added with [`register_recalibration`].
        value (`float`, *optional*):
            c > 0, T > 0, 0 <= delta < 1, or delta >= 0 for `"log_label_smoothing"`; must be `None` for `"none"`.

    Raises:
        `ValueError`: for an unknown method or a value outside its range.
    """

    method: str = "none"
    value: float | None = None

    def __post_init__(self) -> None:
        method = get_method(self.method)
        if self.method == "none":
            if self.value is not None:
                raise ValueError(f"Recalibration 'none' takes no value, got {self.value!r}: leave it out.")
            return
        if self.value is None:
            raise ValueError(
                f"Recalibration {self.method!r} needs a value: give one, or fit it with `fit_recalibration`."
            )
        if isinstance(self.value, bool) or not isinstance(self.value, int | float | np.number):
            raise ValueError(f"The value of recalibration {self.method!r} must be a number, got {self.value!r}.")
        value = float(self.value)
        object.__setattr__(self, "value", value)
        if not method.allows(value):
            raise ValueError(f"Recalibration {self.method!r} needs {method.domain}, got {value}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain Python form, ready for JSON."""
        return {"method": self.method, "value": self.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recalibration":
        """Inverse of `to_dict`."""
        unknown = set(data) - {"method", "value"}
        if unknown or "method" not in data:
            raise ValueError(f"A recalibration is {{'method': ..., 'value': ...}}, got the keys {sorted(data)}.")
        return cls(data["method"], data.get("value"))

    def apply(
        self,
        logprobs: Any,
        tail_logprob: Any | None = None,
        *,
        estimator: str = "topk",
        top_k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Log of the training target of every position.

        The rule is the same for every method: the rescale gives a distribution over the k kept tokens. That is the
        target, but for `"bucket"`, where it is multiplied by `1 - tail` and the tail keeps its mass.

        Args:
            logprobs (`array-like` of shape `[positions, k]`):
                Raw log-probabilities over the full vocabulary, sorted to fall along a row, any float type.
                `-inf` is a probability of 0.
            tail_logprob (`array-like` of shape `[positions]`, *optional*):
                Log of the mass outside the k. Needed for `"bucket"`, not read otherwise.
            estimator (`str`, *optional*, defaults to `"topk"`):
                `"topk"`, `"bucket"`, `"renormalized"` or `"probability_softmax"`.
            top_k (`int`, *optional*):
                Use the first `top_k <= k` ranks; the others move into the tail before the rescale.

        Returns:
            `tuple`: log-target, float64 of shape `[positions, top_k]`, and the log of the bucket's target, float64 of
            shape `[positions]`, or `None` where the estimator has no bucket. Each row sums to 1 (both parts together).

        Raises:
            `ValueError`: naming the row (and column) for NaN, positive or unsorted log-probabilities, for a mass that is
            not one distribution, for a missing tail, and for a `top_k` outside 1..k.
        """
        if estimator not in rescaled_estimators():
            raise ValueError(
                f"Unknown estimator {estimator!r} for a recalibrated target, choose one of {rescaled_estimators()}."
            )
        lp = check_logprobs(logprobs)
        kept_k = lp.shape[1] if top_k is None else check_top_k(top_k, lp.shape[1])
        tail = None
        if estimator_target(estimator) == "tail":
            if tail_logprob is None:
                raise ValueError(
                    f"The estimator {estimator!r} needs `tail_logprob`, the log of the teacher's mass outside the k."
                )
            tail = check_tail(tail_logprob, lp)
        return self.target(lp, tail, kept_k)

    def target(self, lp: np.ndarray, tail: np.ndarray | None, kept_k: int) -> tuple[np.ndarray, np.ndarray | None]:
        """[`~Recalibration.apply`] on arrays that were checked before; with a `tail` the target has a bucket."""
        k = lp.shape[1]
        counts = (lp != NO_ENTRY).sum(axis=1)
        if (counts < k).any():
            # What fills up a row takes no part in the rescale
            log_target = np.full((len(lp), kept_k), -np.inf)
            log_tail = None if tail is None else np.empty(len(lp))
            for n in np.unique(counts):
                rows = counts == n
                part, part_tail = self.target(lp[rows, :n], None if tail is None else tail[rows], min(kept_k, int(n)))
                log_target[rows, : part.shape[1]] = part
                if log_tail is not None:
                    log_tail[rows] = part_tail
            return log_target, log_tail
        kept = lp[:, :kept_k]
        # "none" has no value to pass on
        head = get_method(self.method).rescale(kept, math.nan if self.value is None else self.value)
        if tail is None:
            return head, None
        # The tail is exact and the k values are rounded, so the k share what the tail leaves: rows sum to 1 exactly.
        share = _log1mexp(tail) - logsumexp(lp)
        new_tail = np.logaddexp(tail, share + logsumexp(lp[:, kept_k:])) if kept_k < k else tail
        head_mass = share + logsumexp(kept) if kept_k < k else _log1mexp(tail)
        return head + head_mass[:, None], new_tail


def get_method(name: str) -> Method:
    """The rescale of a name. Raises `ValueError`."""
    if name not in RECALIBRATIONS:
        raise ValueError(
            f"Unknown recalibration method {name!r}, choose one of {list(RECALIBRATIONS)}."
            + nearest(str(name), RECALIBRATIONS, list_known=False)
        )
    method = one(RECALIBRATIONS[name])
    if not isinstance(method, Method):
        raise ValueError(
            f"The recalibration {name!r} is {type(method).__name__}: register a subclass of "
            "`first_trl.recalibration.Method`, or an instance of one."
        )
    return method


def rescaled_estimators() -> list[str]:
    """Estimators that train on a rescaled target; draws cannot be rescaled."""
    return [name for name in ESTIMATORS if estimator_target(name) != "draws"]


def check_top_k(top_k: int, k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or not 1 <= top_k <= k:
        raise ValueError(f"`top_k` must be an integer from 1 to the {k} tokens kept in the cache, got {top_k!r}.")
    return int(top_k)
