"""The interface of a teacher engine."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass
class Scores:
    """
    Teacher entries of one row.

    Args:
        ids (`np.ndarray` of shape `(N, k)`, int32): Most likely first; equal values by rising id.
        logprobs (`np.ndarray` of shape `(N, k)`, float32): Full-vocabulary log-softmax at temperature 1.
        tail_logprob (`np.ndarray` of shape `(N,)`, float32): Log-mass outside the k ids; `-inf` when there is none.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray


class TeacherBackend(Protocol):
    """
    A teacher that scores given text.

    Attributes:
        head_size (`int`): Rows of the teacher's head.
        max_length (`int` or `None`): Longest row the teacher can take.
    """

    head_size: int
    max_length: int | None

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`teacher` and `backend` entries of the manifest."""
        ...

    def score(self, rows: list[np.ndarray], positions: list[np.ndarray], k: int, num_tokens: int) -> list[Scores]:
        """
        Args:
            rows (`list[np.ndarray]`): `input_ids` of each row.
            positions (`list[np.ndarray]`): Positions `t >= 1` whose token's distribution is wanted, for each row.
            k (`int`): Entries to keep.
            num_tokens (`int`): Ids from here up (a head padded beyond the tokenizer) are never kept; their mass
                belongs to the tail.
        """
        ...
