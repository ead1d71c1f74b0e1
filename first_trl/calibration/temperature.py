"""Post-hoc temperature scaling (Guo et al. 2017, arXiv 1706.04599): one scalar, so the ranking never changes."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from .arrays import as_numbers, first_boolean, same_order, warn_of_probabilities
from .errors import equal_width_ece
from .scores import brier_of


_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0
_SMALL_N = 1000


@dataclass(frozen=True)
class TemperatureFit:
    """
    A fitted temperature: divide logits (or log-probabilities) by it before the softmax.

    Attributes:
        temperature (`float`): above 1 softens, below 1 sharpens.
        objective (`str`): `"nll"` or `"ece"`, the score that was minimised.
        n (`int`): examples it was fitted on.
        raw, fitted (`dict`): `ece` (top label, equal width), `nll` (nats) and `brier` at T = 1 and at the temperature.
        curve (`list[dict]`): the same scores with their `temperature`, at every value tried, in the order tried.
        at_boundary (`bool`): the temperature is at the end of the range searched.
        messages (`list[str]`): the warnings given.
    """

    temperature: float
    objective: str
    n: int
    raw: dict[str, float]
    fitted: dict[str, float]
    curve: list[dict[str, float]]
    at_boundary: bool
    messages: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python form, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TemperatureFit":
        """Inverse of `to_dict`."""
        return cls(**data)


def check_temperature(temperature: Any) -> float:
    """A temperature as a `float`. Raises `ValueError` for what is no finite number above 0, such as a whole fit."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise ValueError(
            f"`temperature` must be a finite number above 0, got {type(temperature).__name__}"
            + (": give its `.temperature`." if isinstance(temperature, TemperatureFit) else f" {temperature!r}.")
        )
    value = float(temperature)
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}.")
    return value


def _check(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    z, y = as_numbers(logits, "`logits`")[0], as_numbers(labels, "`labels`")[0]
    same_order(logits, labels, "`logits` and `labels`")
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1]:
        raise ValueError(f"`logits` [N, C >= 2] and `labels` [N] are needed, got the shapes {z.shape} and {y.shape}.")
    if len(z) == 0:
        raise ValueError("There is no example to fit a temperature on.")
    if (row := first_boolean(labels)) is not None:
        raise ValueError(f"`labels` row {row} is a boolean: they must be integer class ids, not correctness flags.")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"`labels` must be integer class ids, got {y.dtype}.")
    outside = np.flatnonzero((y < 0) | (y >= z.shape[1]))
    if outside.size:
        row = int(outside[0])
        raise ValueError(f"Label {row} is {y[row]}, outside 0..{z.shape[1] - 1}. Drop the rows without a label first.")
    z = z.astype(np.float64)
    # -inf is a class that cannot be, as log-probabilities write it; it stays impossible at every temperature.
    bad = np.isnan(z) | (z == np.inf)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"`logits` row {row}, column {column} is {z[row, column]}.")
    impossible = np.flatnonzero(z[np.arange(len(z)), y] == -np.inf)
    if impossible.size:
        row = int(impossible[0])
        raise ValueError(
            f"Row {row} gives its label {y[row]} the probability 0: its NLL is infinite at any temperature."
        )
    warn_of_probabilities(z, "`logits`")
    return z - z.max(axis=1, keepdims=True), y


def _scores(z: np.ndarray, y: np.ndarray, temperature: float, n_bins: int) -> dict[str, float]:
    scaled = z / temperature
    lse = np.logaddexp.reduce(scaled, axis=1)
    p = np.exp(scaled - lse[:, None])
    rows = np.arange(len(y))
    best = z.argmax(axis=1)
    confidence = p[rows, best]
    return {
        "temperature": temperature,
        "ece": equal_width_ece(confidence, best == y, n_bins),
        "nll": float(np.mean(lse - scaled[rows, y])),
        "brier": float(np.mean(brier_of(np.square(p).sum(axis=1), p[rows, y]))),
    }


def search_temperature(
    scores: Callable[[float], dict[str, float]],
    n: int,
    *,
    objective: str = "nll",
    low: float = _MIN_TEMPERATURE,
    high: float = _MAX_TEMPERATURE,
) -> TemperatureFit:
    """
    Minimise a score over the temperature; what [`fit_temperature`] does once the scores can be computed.

    Args:
        scores (`Callable[[float], dict]`):
            `temperature`, `ece`, `nll` and `brier` at a temperature.
        n (`int`):
            Examples behind the scores.
        objective (`str`, *optional*, defaults to `"nll"`):
            `"nll"` or `"ece"`.
        low, high (`float`, *optional*):
            Range searched, `low < 1 < high`.
    """
    if objective not in ("nll", "ece"):
        raise ValueError(f"`objective` must be 'nll' or 'ece', got {objective!r}.")
    raw = scores(1.0)
    # Steps count from T = 1, so that the identity is one of the values tried.
    steps = np.arange(math.ceil(math.log(low) / 0.1), math.floor(math.log(high) / 0.1) + 1) * 0.1
    curve = [scores(float(np.exp(step))) for step in steps]
    center = math.log(_best(curve, objective)["temperature"])
    start, end = max(center - 0.1, math.log(low)), min(center + 0.1, math.log(high))
    if objective == "nll":
        # The NLL is convex in 1/T, hence has one valley in log T, and the curve has bracketed it.
        fitted = scores(math.exp(_golden_section(lambda step: scores(math.exp(step))["nll"], start, end)))
    else:
        fine = np.clip(center + np.arange(-20, 21) * 0.005, start, end)
        curve += [scores(float(np.exp(step))) for step in fine]
        fitted = _best(curve, "ece")
    temperature = fitted["temperature"]
    at_boundary = not low * 1.01 < temperature < high / 1.01
    messages = []
    if n < _SMALL_N:
        messages.append(f"Only {n} examples: below {_SMALL_N} the fitted temperature is noisy.")
    if fitted["ece"] >= raw["ece"]:
        messages.append(f"T = {temperature:.4g} does not improve the ECE ({raw['ece']:.4f} -> {fitted['ece']:.4f}).")
    if at_boundary:
        messages.append(f"T = {temperature:.4g} is at the end of the range {low:.4g} .. {high:.4g}.")
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=3)
    before, after = ({name: s[name] for name in ("ece", "nll", "brier")} for s in (raw, fitted))
    return TemperatureFit(temperature, objective, n, before, after, curve, at_boundary, messages)


def _golden_section(f: Callable[[float], float], low: float, high: float, tolerance: float = 1e-9) -> float:
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    while high - low > tolerance:
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
    return 0.5 * (low + high)


def _best(curve: list[dict[str, float]], objective: str) -> dict[str, float]:
    return min(curve, key=lambda s: (round(s[objective], 12), round(abs(math.log(s["temperature"])), 9)))


def fit_temperature(logits: Any, labels: Any, *, objective: str = "nll", n_bins: int = 10) -> TemperatureFit:
    """
    Fit one temperature to the logits or log-probabilities of any model.

    Args:
        logits (`array-like` of shape `[N, C]`):
            Logits or log-probabilities, any float type; `-inf` marks an impossible class.
        labels (`array-like` of shape `[N]`):
            Integer class ids.
        objective (`str`, *optional*, defaults to `"nll"`):
            `"nll"` finds the exact minimum. `"ece"` searches a grid, T = 0.05 .. 20 in steps of 0.1 of log T and then of
            0.005 around the best; between equals the T nearest 1 (in log) wins. It is noisier.
        n_bins (`int`, *optional*, defaults to `10`):
            Bins of the ECE.

    Returns:
        [`TemperatureFit`]

    Warns:
        `UserWarning`: below 1000 examples, when the ECE does not improve, when the end of the range is reached.

    Raises:
        `ValueError`: for shapes, labels or values that cannot be scored, naming the row.

    Example:

    ```python
    >>> import numpy as np
    >>> from first_trl.calibration.temperature import fit_temperature
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(5000, 4))
    >>> labels = (np.exp(z).cumsum(1) / np.exp(z).sum(1, keepdims=True) > rng.random((5000, 1))).argmax(1)
    >>> round(fit_temperature(2.0 * z, labels).temperature, 1)
    2.0

    ```
    """
    if n_bins < 1:
        raise ValueError(f"`n_bins` must be >= 1, got {n_bins}.")
    z, y = _check(logits, labels)
    return search_temperature(lambda t: _scores(z, y, t, n_bins), len(y), objective=objective)
