"""The rescales of a teacher's kept probabilities: each with its formula, the values it can have, and its search."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np


class Method:
    """
    One rescale. A subclass gives the attributes and [`~Method.rescale`].

    Attributes:
        symbol (`str`):
            What reports call its value.
        domain (`str`):
            What the value must be, for messages: `"a finite temperature above 0"`.
        grid (`tuple[float, float, float, float]`):
            Start, stop, coarse step and fine step of the search for the value.
        identity (`float` or `None`):
            The value that changes nothing; between equal scores the value nearest to it wins. `None` where there is
            none: then the value that changes the confidences least does.
    """

    symbol: ClassVar[str] = "value"
    domain: ClassVar[str] = "a finite number"
    grid: ClassVar[Sequence[float]] = (0.1, 1.0, 0.1, 0.02)
    identity: ClassVar[float | None] = None

    def allows(self, value: float) -> bool:
        """Whether the value is in the domain."""
        return math.isfinite(value)

    def rescale(self, logprobs: np.ndarray, value: float) -> np.ndarray:
        """
        The rescaled distribution over the kept tokens.

        Args:
            logprobs (`np.ndarray` of shape `(positions, k)`):
                Raw log-probabilities over the full vocabulary in nats, float64, most likely first.
            value (`float`):
                In the domain.

        Returns:
            `np.ndarray` of shape `(positions, k)`: log of the target; each row sums to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `rescale`")


class _Unchanged(Method):
    r"""\\( q_i / \sum_j q_j \\): top-k distillation. Takes no value."""

    def rescale(self, logprobs: np.ndarray, value: float | None = None) -> np.ndarray:
        return normalise(logprobs)


class _Temperature(Method):
    domain = "a finite temperature above 0"

    def allows(self, value: float) -> bool:
        return value > 0.0 and math.isfinite(value)


class _ProbabilityTemperature(_Temperature):
    r"""\\( \exp(q_i/c) / \sum_j \exp(q_j/c) \\): FIRST, section 3, whose two-stage search it has."""

    symbol = "c"
    grid = (0.1, 1.0, 0.1, 0.02)

    def rescale(self, logprobs: np.ndarray, value: float) -> np.ndarray:
        return normalise(np.exp(logprobs) / value)


class _LogitTemperature(_Temperature):
    r"""\\( q_i^{1/T} / \sum_j q_j^{1/T} \\): temperature scaling (Guo et al. 2017)."""

    symbol = "T"
    # A memorising teacher needs T well above 1
    grid = (0.5, 5.0, 0.1, 0.02)
    identity = 1.0

    def rescale(self, logprobs: np.ndarray, value: float) -> np.ndarray:
        return normalise(logprobs / value)


class _LabelSmoothing(Method):
    r"""\\( q / \sum_j q_j \\), `delta` moved from rank 1 to the others evenly: FIRST, section 3."""

    symbol = "δ"
    domain = "0 <= delta < 1"
    grid = (0.0, 0.5, 0.05, 0.01)
    identity = 0.0

    def allows(self, value: float) -> bool:
        return 0.0 <= value < 1.0

    def rescale(self, logprobs: np.ndarray, value: float) -> np.ndarray:
        log_target = normalise(logprobs)
        if not value:
            return log_target
        _check_others(logprobs)
        target = np.exp(log_target)
        # Where rank 1 holds less than delta (large k only) it gives what it has: a probability cannot go below 0.
        moved = np.minimum(value, target[:, 0])
        target[:, 0] -= moved
        target[:, 1:] += (moved / (target.shape[1] - 1))[:, None]
        with np.errstate(divide="ignore"):
            return np.log(target)


class _LogLabelSmoothing(Method):
    r"""\\( q_1 e^{-\delta} \\) and \\( q_i e^{\delta/(k-1)} \\), renormalised: FIRST, the authors' code."""

    symbol = "δ"
    domain = "a finite delta >= 0"
    # Rank 1 goes from .99 to a half at about 3.7
    grid = (0.0, 4.0, 0.1, 0.02)
    identity = 0.0

    def allows(self, value: float) -> bool:
        return value >= 0.0 and math.isfinite(value)

    def rescale(self, logprobs: np.ndarray, value: float) -> np.ndarray:
        if value:
            _check_others(logprobs)
        shift = np.full(logprobs.shape[1], value / max(logprobs.shape[1] - 1, 1))
        shift[0] = -value
        return normalise(logprobs + shift)


NONE = _Unchanged()
PROBABILITY_TEMPERATURE = _ProbabilityTemperature()
LOGIT_TEMPERATURE = _LogitTemperature()
LABEL_SMOOTHING = _LabelSmoothing()
LOG_LABEL_SMOOTHING = _LogLabelSmoothing()


def normalise(x: np.ndarray) -> np.ndarray:
    """Log of the softmax of each row."""
    return x - logsumexp(x)[:, None]


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the last axis; -inf for an empty or all -inf row."""
    if x.shape[-1] == 0:
        return np.full(x.shape[:-1], -np.inf)
    largest = x.max(axis=-1)
    # An all -inf row has no largest entry to subtract.
    shift = np.where(largest == -np.inf, 0.0, largest)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - shift[..., None]).sum(axis=-1)) + shift


def _check_others(logprobs: np.ndarray) -> None:
    if logprobs.shape[1] == 1:
        raise ValueError("Label smoothing needs at least two kept tokens to share delta with, got k = 1.")
