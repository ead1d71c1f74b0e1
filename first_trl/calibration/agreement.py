"""
A temperature without labels, by agreement with another model (disagreement-aware confidence alignment, DACA: Luo et al. 2025,
arXiv 2505.16690).

A model before fine-tuning is often calibrated where the fine-tuned one is over-confident. On prompts where both give the same
answer its confidence is a target for the other's; where they differ it is one for another answer, and would make the
fine-tuned model less sure than it should be: these prompts are left out. The prompts need no answers, so they can be those of
the domain that the model is used in.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .arrays import as_numbers, same_order
from .conditional import partition_of
from .partition import HIGHEST, LOWEST


@dataclass(frozen=True)
class AgreementTemperature:
    """
    From [`fit_agreement_temperature`].

    Attributes:
        temperature (`float`): Divides the logits of the fine-tuned model.
        n (`int`), agreed (`int`): Prompts, and those on which both models give the same answer.
        at_boundary (`bool`): The temperature is at the end of the range, 1/8 to 16.
    """

    temperature: float
    n: int
    agreed: int
    at_boundary: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def fit_agreement_temperature(logits: Any, other: Any) -> AgreementTemperature:
    """
    The temperature at which the model's distributions over the options are nearest to another model's, by their mean KL
    divergence over the prompts on which both choose the same option.

    Args:
        logits (array-like of shape `(N, C)`):
            Logits or log-probabilities of the options; `-inf` where a prompt has fewer.
        other (array-like of shape `(N, C)`):
            The same of the model before fine-tuning.

    Raises:
        `ValueError`: Shapes that do not fit, NaN, other options, or no prompt on which both agree.
    """
    from scipy.optimize import minimize_scalar

    z, base = (
        as_numbers(values, name)[0].astype(np.float64) for values, name in ((logits, "logits"), (other, "other"))
    )
    same_order(logits, other, "logits and other")
    if z.ndim != 2 or z.shape != base.shape or len(z) == 0:
        raise ValueError(f"Two arrays of the shape (N, C) are needed, got {z.shape} and {base.shape}.")
    bad = np.flatnonzero((np.isnan(z) | np.isnan(base) | (z == np.inf) | (base == np.inf)).any(1))
    if bad.size:
        raise ValueError(f"Row {bad[0]} holds NaN or infinity: {z[bad[0]].tolist()} and {base[bad[0]].tolist()}.")
    differ = np.flatnonzero(((z == -np.inf) != (base == -np.inf)).any(1))
    if differ.size:
        raise ValueError(f"Row {differ[0]}: the two models have different options.")
    agree = z.argmax(1) == base.argmax(1)
    if not agree.any():
        raise ValueError(
            f"On none of {len(z)} prompts both models choose the same option: the temperature cannot be learnt from them."
        )
    z, base = (values[agree] - values[agree].max(1, keepdims=True) for values in (z, base))
    target = np.exp(base - np.logaddexp.reduce(base, axis=1, keepdims=True))
    # Of the right answer's logit in a likelihood, the expected one
    expected = (target * np.where(z > -np.inf, z, 0.0)).sum(1)
    partition = partition_of(z)

    def cross_entropy(log_t: float) -> float:
        beta = np.full(len(z), math.exp(-log_t))
        return float((partition(beta)[0] - beta * expected).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    found = float(minimize_scalar(cross_entropy, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).x)
    return AgreementTemperature(math.exp(found), len(agree), int(agree.sum()), min(found - low, high - found) < 1e-3)
