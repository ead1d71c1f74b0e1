"""Means over seeds and paired differences, with Student-t intervals."""

import math
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtrit


LEVEL = 0.95


def summarize(values: Mapping[str, float]) -> dict[str, Any]:
    """
    Mean and sample standard deviation of one number a run.

    Args:
        values (`Mapping[str, float]`): Run -> value.

    Returns:
        `dict`: `mean`, `sd` (`None` for one value), `n` and `values`.
    """
    # `fsum` rounds once: the mean does not depend on the order in which runs were found
    n = len(values)
    mean = math.fsum(values.values()) / n
    if len(set(values.values())) == 1:
        # Equal numbers have no spread; the rounding of their mean would give them one
        mean = next(iter(values.values()))
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / (n - 1)) if n > 1 else None
    return {"mean": mean, "sd": sd, "n": n, "values": dict(values)}


def paired_difference(
    values: Mapping[str, float], others: Mapping[str, float], *, higher_is_better: bool
) -> dict[str, Any] | None:
    """
    `values` minus `others` over the runs that have both.

    Returns:
        `dict`: `mean`, `sd`, `low` and `high` (95 % Student-t interval; `None` with one pair), `n` pairs and `better`
        (pairs in which `values` is strictly better); `None` when no run has both.
    """
    differences = {run: value - others[run] for run, value in values.items() if run in others}
    if not differences:
        return None
    summary = summarize(differences)
    n, low, high = summary["n"], None, None
    if n > 1:
        half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * summary["sd"] / math.sqrt(n)
        low, high = summary["mean"] - half, summary["mean"] + half
    better = sum((difference > 0) if higher_is_better else (difference < 0) for difference in differences.values())
    return {
        "mean": summary["mean"],
        "sd": summary["sd"],
        "low": low,
        "high": high,
        "n": n,
        "better": better,
    }


def holds_zero(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of a paired difference leaves open which of the two is better."""
    return difference["low"] is not None and difference["low"] <= 0 <= difference["high"]
