"""Orders of the options of a question: for training on several of them, and for what an answer owes to the order."""

import math
import zlib
from itertools import permutations
from typing import Any

import numpy as np


def has_free_order(kind: str | None) -> bool:
    """Whether options of a question can be shown in another order: a `score` has its levels in order, a `noul` always asks for
    true, then false. Rows without a kind are choices."""
    return kind in (None, "choice")


def option_orders(n_options: int, n_orders: int, *, seed: int = 0, key: Any = "") -> list[tuple[int, ...]]:
    """
    Different orders of options, drawn at random; the same for the same seed and key.

    They come in rounds of `n_options` rotations of one random order, so that each option stands in each place equally often
    when `n_orders` is a multiple of `n_options`.

    Args:
        n_options (`int`): Options of the question.
        n_orders (`int`): Orders to draw. Where there are no more than that, all of them, sorted.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
        key (*optional*): What tells this question from others, such as its id; anything with a `str`.

    Returns:
        `list[tuple[int, ...]]`: each holds the indices of the options in the order in which they are shown.

    Example:

    ```python
    >>> option_orders(3, 6)
    [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    ```
    """
    if n_orders < 1:
        raise ValueError(f"The number of orders must be at least 1, got {n_orders}.")
    # Factorials grow too fast to be computed for all
    if n_options <= 12 and n_orders >= math.factorial(n_options):
        return list(permutations(range(n_options)))
    rng = np.random.default_rng([seed, zlib.crc32(str(key).encode())])
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < n_orders:
        order = rng.permutation(n_options).tolist()
        for shift in range(n_options):
            orders.setdefault(tuple(order[shift:] + order[:shift]))
    return list(orders)[:n_orders]
