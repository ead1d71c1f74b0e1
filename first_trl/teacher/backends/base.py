"""The interface of a teacher engine."""

from typing import Any, Protocol

import numpy as np

from ...cache.scores import Scores


class TeacherBackend(Protocol):
    """
    A teacher that scores given text.

    Attributes:
        head_size (`int` or `None`): Rows of the teacher's head; `None` when the engine does not tell, and the
            tokenizer's size is taken.
        max_length (`int` or `None`): Longest row the teacher can take.
        ranks_per_teacher (`int`): Processes that hold one teacher together (tensor parallelism); they score the same
            rows.
        notes (`list[str]`): What a reader of the manifest must know about the values.

    An engine that waits for others more than it computes can have the attribute `concurrency` (`int`): that many calls
    of `score` are then under way at a time, each in a thread of its own. Without it there is one, in the caller's thread.

    An engine whose model can be exchanged while it runs can have a method `watch(row)`: a capture gives it the beginning of
    one of its rows, by which it should tell the models apart.
    """

    head_size: int | None
    max_length: int | None
    ranks_per_teacher: int
    notes: list[str]

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`teacher` and `backend` entries of the manifest."""
        ...

    def confirm(self, teacher: dict[str, Any]) -> None:
        """Raises `ValueError` unless this is the teacher of an earlier capture's manifest entry."""
        ...

    def score(
        self,
        rows: list[np.ndarray],
        positions: list[np.ndarray],
        k: int,
        num_tokens: int,
        uniforms: list[np.ndarray] | None = None,
    ) -> list[Scores]:
        """
        Args:
            rows (`list[np.ndarray]`): `input_ids` of each row.
            positions (`list[np.ndarray]`): Positions `t >= 1` whose token's distribution is wanted, for each row.
            k (`int`): Entries to keep.
            num_tokens (`int`): Ids from here up (a head padded beyond the tokenizer) are never kept; their mass
                belongs to the tail.
            uniforms (`list[np.ndarray]`, *optional*): For each row, uniform numbers of shape `(positions, draws)` that
                choose the draws.
        """
        ...
