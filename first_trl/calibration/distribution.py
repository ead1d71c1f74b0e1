"""A distribution over a few options, given by someone: checked, and scaled to add up to 1."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..vocabulary import TARGET_VOTES


# How far the probabilities of a distribution may add up from 1: what rounding to three digits leaves over a few options
SUM_TOLERANCE = 5e-3


def check_distribution(values: Any, what: str) -> np.ndarray:
    """
    A distribution, scaled to add up to 1 exactly.

    Raises:
        `ValueError`: NaN, a negative number, or a sum further from 1 than rounding explains.
    """
    p = np.asarray(values, dtype=np.float64)
    if p.ndim != 1 or not len(p):
        raise ValueError(f"{what} must be a list of probabilities, got the shape {p.shape}.")
    if not np.isfinite(p).all():
        raise ValueError(f"{what} has a probability that is {p[~np.isfinite(p)][0]}.")
    if (p < 0).any():
        raise ValueError(f"{what} has the negative probability {p.min():g}.")
    total = float(p.sum())
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"{what} adds up to {total:.4g}, not to 1. Divide counts by their sum first.")
    return p / total


def votes_to_distribution(votes: Sequence[float]) -> np.ndarray:
    """
    Votes of annotators as a distribution.

    Raises:
        `ValueError`: A negative or fractional count, NaN, or no vote.
    """
    counts = np.asarray(votes, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1 != 0).any():
        raise ValueError(f"Votes are counts (0, 1, 2, ...), got {list(votes)}.")
    if not counts.sum():
        raise ValueError("No annotator voted: leave the row out, or give it a gold answer.")
    return counts / counts.sum()


def soft_label(column: str, values: Any, n_choices: int) -> np.ndarray:
    """
    The distribution over the choices of one row, as its column holds it.

    Args:
        column (`str`): `target_probs`, probabilities, or `target_votes`, counts; the values do not decide that.
        values (`list`): One number a choice.
        n_choices (`int`): How many choices the row has.

    Raises:
        `ValueError`: The values are missing, no numbers, not one for each choice, or no distribution.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"`{column}` is {'missing' if values is None else 'empty' if values == [] else repr(values)}."
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"`{column}` holds {value!r}, which is no number.")
    if len(values) != n_choices:
        raise ValueError(f"`{column}` has {len(values)} numbers for {n_choices} choices; there must be one for one.")
    try:
        return votes_to_distribution(values) if column == TARGET_VOTES else check_distribution(values, "It")
    except ValueError as error:
        raise ValueError(f"`{column}` is {values}. {error}") from None
