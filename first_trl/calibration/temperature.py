"""Post-hoc temperature scaling (Guo et al. 2017, arXiv 1706.04599): one scalar, so the ranking never changes."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


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


def _check(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1]:
        raise ValueError(f"`logits` [N, C >= 2] and `labels` [N] are needed, got the shapes {z.shape} and {y.shape}.")
    if len(z) == 0:
        raise ValueError("There is no example to fit a temperature on.")
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
    return z - z.max(axis=1, keepdims=True), y


def _scores(z: np.ndarray, y: np.ndarray, temperature: float, n_bins: int) -> dict[str, float]:
    scaled = z / temperature
    lse = np.logaddexp.reduce(scaled, axis=1)
    p = np.exp(scaled - lse[:, None])
    rows = np.arange(len(y))
    best = z.argmax(axis=1)
    confidence = p[rows, best]
    bins = np.clip(np.searchsorted(np.arange(n_bins + 1) / n_bins, confidence, "left") - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=confidence - (best == y), minlength=n_bins)
    return {
        "temperature": temperature,
        "ece": float(np.abs(gaps).sum() / len(y)),
        "nll": float(np.mean(lse - scaled[rows, y])),
        "brier": float(np.mean(np.square(p).sum(axis=1) - 2.0 * p[rows, y] + 1.0)),
    }


def _slope(z: np.ndarray, y: np.ndarray, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL in beta = 1 / T, in which it is convex."""
    finite = np.where(np.isfinite(z), z, 0.0)
    p = np.exp(beta * z - np.logaddexp.reduce(beta * z, axis=1)[:, None])
    mean = (p * finite).sum(axis=1)
    variance = (p * np.square(finite - mean[:, None])).sum(axis=1)
    return float(np.mean(mean - z[np.arange(len(y)), y])), float(variance.mean())


def newton_in_bracket(slope: Any, low: float, high: float, start: float = 1.0) -> float:
    """
    Root of a rising function by Newton steps that never leave the bracket.

    Args:
        slope (`Callable[[float], tuple[float, float]]`): value and derivative.
        low, high (`float`): bracket; the nearer end is returned when there is no root inside.
        start (`float`, *optional*, defaults to `1.0`): first point tried.
    """
    if slope(low)[0] >= 0.0:
        return low
    if slope(high)[0] <= 0.0:
        return high
    x = start
    for _ in range(200):
        value, derivative = slope(x)
        if value < 0.0:
            low = x
        else:
            high = x
        step = x - value / derivative if derivative > 0.0 else math.inf
        following = step if low < step < high else 0.5 * (low + high)
        if abs(following - x) <= 1e-12 * x:
            return following
        x = following
    return x


def fit_temperature(logits: Any, labels: Any, *, objective: str = "nll", n_bins: int = 10) -> TemperatureFit:
    """
    Fit one temperature to the logits or log-probabilities of any model.

    Args:
        logits (`array-like` of shape `[N, C]`):
            Logits or log-probabilities, any float type; `-inf` marks an impossible class.
        labels (`array-like` of shape `[N]`):
            Integer class ids.
        objective (`str`, *optional*, defaults to `"nll"`):
            `"nll"` finds the exact minimum (convex in 1/T). `"ece"` searches a grid, T = 0.05 .. 20 in steps of 5 percent
            and then of 0.5 percent around the best; between equals the T nearest 1 (in log) wins. It is noisier.
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
    if objective not in ("nll", "ece"):
        raise ValueError(f"`objective` must be 'nll' or 'ece', got {objective!r}.")
    if n_bins < 1:
        raise ValueError(f"`n_bins` must be >= 1, got {n_bins}.")
    z, y = _check(logits, labels)
    raw = _scores(z, y, 1.0, n_bins)
    low, high = math.log(_MIN_TEMPERATURE), math.log(_MAX_TEMPERATURE)
    if objective == "nll":
        beta = newton_in_bracket(lambda b: _slope(z, y, b), 1.0 / _MAX_TEMPERATURE, 1.0 / _MIN_TEMPERATURE)
        around = np.exp(np.linspace(low, high, 41))
        curve = [_scores(z, y, float(t), n_bins) for t in around]
        fitted = _scores(z, y, 1.0 / beta, n_bins)
    else:
        # Steps count from T = 1, so that the identity is one of the values tried.
        steps = np.arange(math.ceil(low / 0.05), math.floor(high / 0.05) + 1) * 0.05
        curve = [_scores(z, y, float(np.exp(s)), n_bins) for s in steps]
        center = math.log(_best(curve, "ece")["temperature"])
        fine = np.clip(center + np.arange(-10, 11) * 0.005, low, high)
        curve += [_scores(z, y, float(np.exp(s)), n_bins) for s in fine]
        fitted = _best(curve, "ece")
    temperature = fitted["temperature"]
    at_boundary = not _MIN_TEMPERATURE * 1.05 < temperature < _MAX_TEMPERATURE / 1.05
    messages = []
    if len(y) < _SMALL_N:
        messages.append(f"Only {len(y)} examples: below {_SMALL_N} the fitted temperature is noisy.")
    if fitted["ece"] >= raw["ece"]:
        messages.append(f"T = {temperature:.4g} does not improve the ECE ({raw['ece']:.4f} -> {fitted['ece']:.4f}).")
    if at_boundary:
        messages.append(f"T = {temperature:.4g} is at the end of the range {_MIN_TEMPERATURE} .. {_MAX_TEMPERATURE}.")
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)

    def drop_temperature(s: dict[str, float]) -> dict[str, float]:
        return {name: s[name] for name in ("ece", "nll", "brier")}

    return TemperatureFit(
        temperature, objective, len(y), drop_temperature(raw), drop_temperature(fitted), curve, at_boundary, messages
    )


def _best(curve: list[dict[str, float]], objective: str) -> dict[str, float]:
    return min(curve, key=lambda s: (round(s[objective], 12), round(abs(math.log(s["temperature"])), 9)))
