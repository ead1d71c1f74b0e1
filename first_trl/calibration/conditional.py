"""Temperatures that depend on the question: on its type and number of options, or on any feature of the input."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import as_numbers, first_boolean, same_order, warn_of_probabilities


Array = npt.NDArray[np.float64]
Partition = Callable[[Array], tuple[Array, Array]]

# Log temperatures are kept within these bounds, which no sensible model reaches
_LOG_BOUND = math.log(20.0)


def fit_log_temperature(
    logprobs: Any,
    gold: Any,
    features: npt.NDArray[np.float64],
    *,
    prior_mean: Sequence[float],
    prior_sd: Sequence[float],
    low: Sequence[float] | None = None,
) -> npt.NDArray[np.float64]:
    """
    Coefficients of a log-linear temperature, `T(x) = exp(features(x) @ coefficients)`, by penalised likelihood.

    The sum over rows of the negative log-likelihood of `softmax(logprobs / T)` is minimised with a Gaussian prior on
    every coefficient, so few rows move them little from `prior_mean` and many rows decide alone. The function is smooth;
    L-BFGS-B starts at the prior mean.

    Args:
        logprobs (array-like of shape `(N, C)`):
            Logits or log-probabilities of the options; `-inf` where a row has fewer.
        gold (array-like of shape `(N,)`, int):
            Index of the right option.
        features (`numpy.ndarray` of shape `(N, F)`):
            One row of features each, a constant included.
        prior_mean, prior_sd (sequences of `F` numbers):
            Of the coefficients; an `inf` standard deviation is no prior.
        low (sequence of `F` numbers, *optional*):
            Lower bounds of the coefficients.

    Returns:
        `numpy.ndarray` of shape `(F,)`

    Raises:
        `ValueError`: Shapes that do not fit, NaN, a right option outside the row or with probability 0.
    """
    z, y = checked_options(logprobs, gold)
    return fit_by_partition(
        partition_of(z), z[np.arange(len(z)), y], features, prior_mean=prior_mean, prior_sd=prior_sd, low=low
    )


def partition_of(logits: npt.NDArray[np.float64]) -> Partition:
    """
    The log-partition function of every row as [`fit_by_partition`] takes it.

    Args:
        logits (`numpy.ndarray` of shape `(N, C)`): The largest of a row is 0; `-inf` where a row has fewer options.
    """
    finite = np.where(logits > -np.inf, logits, 0.0)

    def partition(beta: Array) -> tuple[Array, Array]:
        scaled = logits * beta[:, None]
        log_z = np.logaddexp.reduce(scaled, axis=1)
        return log_z, (np.exp(scaled - log_z[:, None]) * finite).sum(1)

    return partition


def fit_by_partition(
    partition: Partition,
    right: Array,
    features: Array,
    *,
    prior_mean: Sequence[float],
    prior_sd: Sequence[float],
    low: Sequence[float] | None = None,
    offset: float | Array = 0.0,
    range_: tuple[float, float] = (-_LOG_BOUND, _LOG_BOUND),
    start: Sequence[float] | None = None,
) -> Array:
    """
    [`fit_log_temperature`] for logits that are known by their partition function alone, such as those over a whole
    vocabulary.

    Args:
        partition (`Callable`):
            From one `beta = 1 / T` a row to `log sum exp(beta z)` and its derivative by `beta`, shape `(N,)` each.
        right (`numpy.ndarray` of shape `(N,)`):
            Logit of the right answer, on the scale of `partition`.
        features, prior_mean, prior_sd, low:
            As in [`fit_log_temperature`].
        offset (`float` or `numpy.ndarray` of shape `(N,)`, *optional*, defaults to 0):
            Part of the log temperature that is known.
        range_ (`tuple[float, float]`, *optional*):
            Log temperatures are kept within it.
        start (sequence of `F` numbers, *optional*):
            Where the search starts; the prior mean by default.

    Returns:
        `numpy.ndarray` of shape `(F,)`
    """
    from scipy.optimize import minimize

    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) != len(right):
        raise ValueError(
            f"`features` must have one row for each of the {len(right)} questions, got the shape {x.shape}."
        )
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
        raise ValueError(f"`features` row {row} is {x[row].tolist()}: NaN or infinite.")
    mean, sd = np.asarray(prior_mean, np.float64), np.asarray(prior_sd, np.float64)
    lower, upper = range_

    def loss(theta: Array) -> tuple[float, Array]:
        free = offset + x @ theta
        log_t = np.clip(free, lower, upper)
        beta = np.exp(-log_t)
        log_z, expected = partition(beta)
        slope = np.where((free > lower) & (free < upper), beta * (right - expected), 0.0)
        pull = np.where(np.isinf(sd), 0.0, (theta - mean) / np.square(np.where(np.isinf(sd), 1.0, sd)))
        value = float((log_z - beta * right).sum() + 0.5 * ((theta - mean) * pull).sum())
        return value, x.T @ slope + pull

    bounds = [(None if low is None or not np.isfinite(low[i]) else low[i], None) for i in range(x.shape[1])]
    first = mean if start is None else np.asarray(start, np.float64)
    if low is not None:
        first = np.maximum(first, np.asarray(low, np.float64))
    found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500, "gtol": 1e-9})
    return np.asarray(found.x, np.float64)


@dataclass(frozen=True)
class KindTemperature:
    """
    Temperature of one question type: `exp(log_temperature + slope * ln(n / n_options))` for `n` options.

    Attributes:
        log_temperature (`float`), slope (`float`): The two coefficients.
        n_options (`float`): Geometric mean of the numbers of options it was fitted on, where the slope plays no part.
        rows (`int`): Rows it was fitted on.
    """

    log_temperature: float
    slope: float
    n_options: float
    rows: int


@dataclass(frozen=True)
class OptionTemperature:
    """
    Temperatures by question type and number of options, from [`fit_option_temperature`].

    Attributes:
        common (`float`): One temperature for all questions; also that of a type that was not seen.
        kinds (`dict[str, KindTemperature]`): By type: `choice`, `score`, `noul` or any other name.
    """

    common: float
    kinds: Mapping[str, KindTemperature]

    def temperature(self, kind: str, n_options: int) -> float:
        """The temperature of a question."""
        if n_options < 1:
            raise ValueError(f"A question has at least one option, got {n_options}.")
        found = self.kinds.get(kind)
        if found is None:
            return self.common
        log_t = found.log_temperature + found.slope * math.log(n_options / found.n_options)
        return math.exp(min(max(log_t, -_LOG_BOUND), _LOG_BOUND))

    def of_rows(self, n_options: Sequence[int], kinds: Sequence[str]) -> Array:
        """The temperatures of questions with these numbers of options, and of these types."""
        return np.array([self.temperature(kind, int(n)) for kind, n in zip(kinds, n_options, strict=True)])

    def scalars(self) -> dict[str, float]:
        """One temperature a type, at its usual number of options: what `decision.json` can express."""
        return {kind: math.exp(found.log_temperature) for kind, found in self.kinds.items()}

    @property
    def depends_on_options(self) -> bool:
        """Whether the scalars leave something out."""
        return any(found.slope != 0.0 for found in self.kinds.values())

    def __str__(self) -> str:
        parts = [
            f"{math.exp(found.log_temperature):.2f}"
            + (f" (n/{found.n_options:.2g})^{found.slope:.2g}" if found.slope else "")
            + (f" for {kind}" if len(self.kinds) > 1 else "")
            for kind, found in self.kinds.items()
        ]
        return ", ".join(parts) or f"{self.common:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"common": self.common, "kinds": {kind: asdict(found) for kind, found in self.kinds.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OptionTemperature":
        """The inverse of [`to_dict`]."""
        return cls(values["common"], {kind: KindTemperature(**found) for kind, found in values["kinds"].items()})


# Spread of a type's log temperature around the common one, and of the slope around 0, before any row is seen: a factor of
# 1.3 between types, and another 1.3 for each factor e of options. 100 rows outweigh them, 10 rows do not.
_KIND_SD = 0.25
_SLOPE_SD = 0.25


def fit_option_temperature(logprobs: Any, gold: Any, kinds: Sequence[str] | None = None) -> OptionTemperature:
    """
    Fit `T(n) = exp(a + b ln n)` for each question type, shrunk towards one temperature where rows are few.

    First one temperature is fitted to all rows by its likelihood. Then each type gets its own `a` and `b`, with Gaussian
    priors: `a` around the common log temperature (standard deviation 0.25), `b` around 0 (0.25). A type whose questions all
    have one number of options keeps `b = 0`. Rows are validation rows that nothing else was chosen on.

    Args:
        logprobs (array-like of shape `(N, C)`, or `N` sequences):
            Logits or log-probabilities of each question's options.
        gold (array-like of shape `(N,)`, int):
            Index of the right option.
        kinds (sequence of `N` `str`, *optional*):
            Type of each question; one type `choice` by default.

    Returns:
        [`OptionTemperature`]

    Raises:
        `ValueError`: as [`fit_log_temperature`].
    """
    z, y = checked_options(logprobs, gold)
    names = np.asarray(["choice"] * len(z) if kinds is None else list(kinds))
    if len(names) != len(z):
        raise ValueError(f"`kinds` has {len(names)} entries for {len(z)} questions.")
    ones = np.ones((len(z), 1))
    (common,) = fit_log_temperature(z, y, ones, prior_mean=[0.0], prior_sd=[math.inf])
    log_n = np.log((z > -np.inf).sum(1))
    fitted: dict[str, KindTemperature] = {}
    for kind in dict.fromkeys(names.tolist()):
        rows = names == kind
        center = float(log_n[rows].mean())
        spread = log_n[rows] - center
        varies = bool(np.abs(spread).max() > 1e-9)
        x = np.stack([np.ones(rows.sum()), spread], 1) if varies else ones[rows]
        theta = fit_log_temperature(
            z[rows], y[rows], x, prior_mean=[common, 0.0][: x.shape[1]], prior_sd=[_KIND_SD, _SLOPE_SD][: x.shape[1]]
        )
        fitted[kind] = KindTemperature(
            float(theta[0]), float(theta[1]) if varies else 0.0, math.exp(center), int(rows.sum())
        )
    return OptionTemperature(math.exp(common), fitted)


def checked_options(logprobs: Any, gold: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Log-probabilities with the largest of a row at 0 and `-inf` for options that it lacks, and right options."""
    if getattr(logprobs, "ndim", 1) == 2:
        z = as_numbers(logprobs, "`logprobs`")[0].astype(np.float64)
    else:
        lists = [as_numbers(values, f"`logprobs` row {i}")[0] for i, values in enumerate(logprobs)]
        odd = next((i for i, values in enumerate(lists) if values.ndim != 1), None)
        if odd is not None:
            raise ValueError(
                f"`logprobs` row {odd} has the shape {lists[odd].shape}: give one number for each option."
            )
        z = np.full((len(lists), max((len(values) for values in lists), default=0)), -np.inf)
        for i, values in enumerate(lists):
            z[i, : len(values)] = values
    y = as_numbers(gold, "`gold`")[0]
    same_order(logprobs, gold, "`logprobs` and `gold`")
    if (flag := first_boolean(gold)) is not None:
        raise ValueError(f"`gold` row {flag} is a boolean: it must be the index of the right option.")
    if len(z) == 0:
        raise ValueError("There is no question to fit on.")
    if y.shape != (len(z),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"`gold` must be {len(z)} integers, got the shape {y.shape} and type {y.dtype}.")
    bad = np.isnan(z) | (z == np.inf)
    if bad.any():
        row = int(np.flatnonzero(bad.any(1))[0])
        raise ValueError(f"`logprobs` row {row} is {z[row].tolist()}: NaN or infinite.")
    outside = (y < 0) | (y >= z.shape[1])
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"`gold` row {row} is {y[row]}: the question has {int((z[row] > -np.inf).sum())} options.")
    impossible = z[np.arange(len(z)), y] == -np.inf
    if impossible.any():
        row = int(np.flatnonzero(impossible)[0])
        raise ValueError(f"Row {row} gives its right option {y[row]} the probability 0, or does not have it.")
    warn_of_probabilities(z, "`logprobs`")
    return z - z.max(1, keepdims=True), y.astype(np.int64)
