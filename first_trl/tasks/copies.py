"""Rows that ask the same question: in what is trained or chosen on and in what is evaluated, and with two answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .base import TaskSplit


@dataclass(frozen=True)
class Copies:
    """
    What [`find_copies`] found.

    Attributes:
        dropped (`dict[str, dict[str, int]]`): for each role that loses rows the reasons, with the count of each.
        ids (`dict[str, set[str]]`): for each role the ids of the rows it loses.
        shared (`dict[str, dict[str, int]]`): for each evaluation role how many of its rows stand in another one too; they
            stay.
    """

    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    ids: dict[str, set[str]] = field(default_factory=dict)
    shared: dict[str, dict[str, int]] = field(default_factory=dict)


def find_copies(splits: Mapping[str, TaskSplit], used: Sequence[str]) -> Copies:
    """
    Finds the rows that cannot be trained or chosen on honestly.

    Two rows are copies when they have the same `key` ([`~first_trl.tasks.base.Example`]): the same question with the same
    choices in any order, or the same prompt where there are no lettered choices. Of the roles in `used`

    - a row of what is trained on loses its place when `validation` or an evaluation role has a copy, a row of
      `validation` when an evaluation role has one;
    - rows lose their place when a copy in the same role has another answer, as nothing tells which is right. Free texts
      do not contradict each other: a request may be answered in many ways.

    Rows of a task with `drop_copies=False` are no copies of anything.

    Copies with the same answer inside one role stay: they are that often in the data.

    Args:
        splits (`Mapping[str, TaskSplit]`): rows of every role.
        used (`Sequence[str]`): roles that are trained on, and `validation`.

    Returns:
        [`Copies`]

    Example:

    ```python
    >>> found = find_copies({"train": train, "validation": validation, "test": test}, ["train", "validation"])
    >>> found.dropped
    {'train': {'same question as in test': 3, 'same question with another answer': 2}}
    ```
    """
    found = Copies()
    keys = {role: set(split.keys.values()) for role, split in splits.items()}
    evaluated = [role for role in splits if role not in used and role != "pretrain"]
    for role in used:
        later = [*evaluated, *(["validation"] if role != "validation" and "validation" in splits else [])]
        contradicted = _contradicted(splits[role])
        reasons: Counter[str] = Counter()
        ids = set()
        for row_id, key in splits[role].keys.items():
            other = next((name for name in later if key in keys[name]), None)
            if other is not None:
                reasons[f"same question as in {other}"] += 1
            elif key in contradicted:
                reasons["same question with another answer"] += 1
            else:
                continue
            ids.add(row_id)
        if ids:
            found.dropped[role], found.ids[role] = dict(reasons), ids
    for i, role in enumerate(evaluated):
        shared = {other: len(keys[role] & keys[other]) for other in evaluated[:i]}
        if any(shared.values()):
            found.shared[role] = {other: number for other, number in shared.items() if number}
    return found


def _contradicted(split: TaskSplit) -> set[str]:
    """Keys that stand in a role with two answers."""
    answers: dict[str, str] = {}
    twice = set()
    for row_id, answer in split.answers.items():
        if answers.setdefault(split.keys[row_id], answer) != answer:
            twice.add(split.keys[row_id])
    return twice
