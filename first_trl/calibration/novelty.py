"""
A temperature that rises where an input is new: `T(x) = exp(a + b d(x))` with `b >= 0`, for a feature `d` that says how far
an input is from the training rows. After density-aware calibration (Tomani et al. 2023, arXiv 2302.05118).

The rule of the fit, in full:

1. The scalar temperature is fitted by NLL, as [`~first_trl.calibration.temperature.fit_temperature`] does. It is what all
   else is measured against, and what is returned wherever the feature is not worth it.
2. `a` and `b` are fitted by NLL together with a Gaussian prior on `b` (mean 0, standard deviation `prior_sd`; `a` is
   free), within `b >= 0` and 1/8 <= T(x) <= 16.
3. The scalar temperature stays, `b = 0`, with fewer than 50 rows, with a constant feature, or where the summed NLL falls by
   less than a likelihood-ratio test at 5 % asks for: 1.92 nats for one feature, 3.00 for two.

The temperature of a row divides all its logits, so the answer and the ranking of the options never change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .conditional import Array, Partition, checked_options, fit_by_partition, partition_of
from .partition import HIGHEST, LOWEST, PartitionTable


MIN_ROWS = 50
LOG_RANGE = (math.log(LOWEST), math.log(HIGHEST))
LEVEL = 0.05


@dataclass(frozen=True)
class NoveltyTemperature:
    """
    A fitted temperature by input, from [`fit_novelty_temperature`].

    Attributes:
        intercept (`float`): `a`.
        slopes (`tuple[float, ...]`): `b`, one a feature; all 0 where one temperature serves every input.
        scalar (`float`): The one temperature that fits best; for programs that know of no other.
        at_least_scalar (`bool`): No temperature is below `scalar`.
        n (`int`): Rows it was fitted on.
        gain (`float`): Nats a row by which the NLL of these rows is below that of `scalar`.
        reason (`str`): Why the slopes are 0, where they are.
    """

    intercept: float
    slopes: tuple[float, ...]
    scalar: float
    at_least_scalar: bool
    n: int
    gain: float
    reason: str = ""

    def temperature(self, features: Any) -> Array:
        """
        The temperature of each input.

        Args:
            features (array-like of shape `(N,)` or `(N, F)`): As in the fit.

        Raises:
            `ValueError`: NaN, or another number of features.
        """
        x = feature_matrix(features)
        if x.shape[1] != len(self.slopes):
            raise ValueError(f"This temperature was fitted on {len(self.slopes)} features, got {x.shape[1]}.")
        lower, upper = _range(self.scalar, self.at_least_scalar)
        return np.exp(np.clip(self.intercept + x @ np.asarray(self.slopes), lower, upper))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"slopes": list(self.slopes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NoveltyTemperature":
        """The inverse of [`to_dict`]."""
        return cls(**{**values, "slopes": tuple(values["slopes"])})


def feature_matrix(features: Any) -> Array:
    """
    Features as float64 of shape `(N, F)`.

    Raises:
        `ValueError`: Another shape, or a row that is NaN or infinite.
    """
    x = np.asarray(features, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2:
        raise ValueError(f"`features` must have the shape (N,) or (N, F), got {x.shape}.")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if bad.size:
        raise ValueError(f"`features` row {bad[0]} is {x[bad[0]].tolist()}: NaN or infinite.")
    return x


def logits_partition(logits: Any, gold: Any) -> tuple[Partition, Array]:
    """
    What the fit needs of logits that are at hand: the partition functions, and the logit of each right answer.

    Args:
        logits (array-like of shape `(N, C)`): Logits or log-probabilities; `-inf` where a row has fewer options.
        gold (array-like of shape `(N,)`, int): Index of the right option.
    """
    z, y = checked_options(logits, gold)
    return partition_of(z), z[np.arange(len(z)), y]


def mean_nll(partition: Partition | PartitionTable, right: Array, temperature: float | Array) -> float:
    """Mean negative log-likelihood, nats, at one temperature or one a row."""
    beta = np.broadcast_to(1.0 / np.asarray(temperature, np.float64), right.shape)
    return float((_function(partition)(beta)[0] - beta * right).mean())


def scalar_temperature(partition: Partition | PartitionTable, right: Array) -> float:
    """The one temperature with the lowest NLL."""
    return math.exp(_intercept(partition, right, np.zeros(len(right)), LOG_RANGE))


def _intercept(
    partition: Partition | PartitionTable, right: Array, known: Array, range_: tuple[float, float]
) -> float:
    """`a` of `log T = a + known`. The NLL is convex in `exp(-a)`, so it has one valley."""
    from scipy.optimize import minimize_scalar

    def nll(a: float) -> float:
        return mean_nll(partition, right, np.exp(np.clip(a + known, *range_)))

    bounds = (range_[0] - float(known.max()), range_[1] - float(known.min()))
    return float(minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)


def fit_novelty_temperature(
    partition: Partition | PartitionTable,
    right: Array,
    features: Any,
    *,
    prior_sd: float = 0.5,
    low: Sequence[float] | None = None,
    at_least_scalar: bool = False,
    slopes: Sequence[float] | None = None,
    test: bool = True,
) -> NoveltyTemperature:
    """
    Fit `T(x) = exp(a + b d(x))` on validation rows; the rule is in the head of this module.

    Args:
        partition (`Callable` or [`~first_trl.calibration.partition.PartitionTable`]), right (`numpy.ndarray` of shape `(N,)`):
            From [`logits_partition`], or of the whole vocabulary.
        features (array-like of shape `(N,)` or `(N, F)`):
            `d`, larger where the input is less like the training rows, with a spread of about 1.
        prior_sd (`float`, *optional*, defaults to 0.5):
            Of the slopes, around 0.
        low (sequence of `F` `float`, *optional*):
            Lower bounds of the slopes; 0 for all by default.
        at_least_scalar (`bool`, *optional*, defaults to `False`):
            Fit under the bound that no temperature is below the scalar one.
        slopes (sequence of `F` `float`, *optional*):
            Slopes that are known from elsewhere: only `a` is fitted, and neither prior nor test is applied.
        test (`bool`, *optional*, defaults to `True`):
            Ask for a significant gain (the last of the three reasons in rule 3).

    Returns:
        [`NoveltyTemperature`]

    Raises:
        `ValueError`: No row, shapes that do not fit, NaN.
    """
    x = feature_matrix(features)
    if len(right) == 0:
        raise ValueError("There is no row to fit a temperature on.")
    if len(x) != len(right):
        raise ValueError(f"`features` must have one row for each of the {len(right)} questions, got {len(x)}.")
    scalar = scalar_temperature(partition, right)
    f = x.shape[1]

    def result(intercept: float, b: Sequence[float], reason: str = "") -> NoveltyTemperature:
        made = NoveltyTemperature(
            float(intercept), tuple(float(v) for v in b), scalar, at_least_scalar, len(right), 0.0, reason
        )
        gain = mean_nll(partition, right, scalar) - mean_nll(partition, right, made.temperature(x))
        return NoveltyTemperature(**{**asdict(made), "slopes": made.slopes, "gain": gain})

    fixed: dict[str, Any] = {"right": right, "range_": _range(scalar, at_least_scalar)}
    if slopes is not None:
        known = x @ np.asarray(slopes, np.float64)
        a = _intercept(partition, right, known, _range(scalar, at_least_scalar))
        return result(a, slopes)
    flat = [0.0] * f
    if len(right) < MIN_ROWS:
        return result(math.log(scalar), flat, f"{len(right)} rows, at least {MIN_ROWS} are needed")
    if (np.ptp(x, axis=0) <= 1e-9).all():
        return result(math.log(scalar), flat, "the feature is constant")
    prior: dict[str, Any] = {
        "prior_mean": [math.log(scalar), *flat],
        "prior_sd": [math.inf, *[prior_sd] * f],
        "low": [-math.inf, *(flat if low is None else low)],
    }
    columns = np.column_stack([np.ones(len(x)), x])
    theta = fit_by_partition(_function(partition), right, columns, range_=LOG_RANGE, **prior)
    if at_least_scalar:
        # From the free optimum: where all rows lie on the bound the likelihood is flat
        theta = fit_by_partition(_function(partition), features=columns, start=theta.tolist(), **fixed, **prior)
    found = result(theta[0], theta[1:].tolist())
    if test and found.gain * len(right) < least_gain(f):
        return result(math.log(scalar), flat, f"the NLL falls by less than a test at {100 * LEVEL:.0f} % asks for")
    return found


def _function(partition: Partition | PartitionTable) -> Partition:
    return partition.with_slope if isinstance(partition, PartitionTable) else partition


def _range(scalar: float, at_least_scalar: bool) -> tuple[float, float]:
    return (math.log(scalar), LOG_RANGE[1]) if at_least_scalar else LOG_RANGE


def least_gain(features: int) -> float:
    """Summed nats by which the NLL must fall for the slopes of so many features to count."""
    from scipy.stats import chi2

    return 0.5 * float(chi2.ppf(1.0 - LEVEL, features))
