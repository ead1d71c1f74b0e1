"""Rows that ask the same question: in what is trained or chosen on and in what is evaluated, and with two answers."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset

from ..vocabulary import THRESHOLD_ROLE
from .base import TaskSplit


# Roles that something is chosen on, the second after the first
CHOSEN_ON = ("validation", THRESHOLD_ROLE)


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
    choices in any order, or the same prompt where there are no lettered choices; white space and the encoding of accents do
    not count, and between roles neither does case. Of the roles in `used`

    - a row loses its place when a role that it yields to has a copy, see [`yields_to`];
    - rows lose their place when a copy in the same role has another answer, as nothing tells which is right. Free texts
      do not contradict each other: a request may be answered in many ways.

    Rows of a task with `drop_copies=False` are no copies of anything.

    Copies with the same answer inside one role stay: they are that often in the data.

    Args:
        splits (`Mapping[str, TaskSplit]`): rows of the roles that are trained on, chosen on and evaluated.
        used (`Sequence[str]`): roles that are trained on, and those that something is chosen on.

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
    # A row is given up for a copy in other case. That two such have two answers is no contradiction: "is b a capital?"
    keys = {role: {key.casefold() for key in split.keys.values()} for role, split in splits.items()}
    evaluated = [role for role in splits if role not in used]
    for role in used:
        later = yields_to(role, list(splits), used)
        contradicted = _contradicted(splits[role])
        reasons: Counter[str] = Counter()
        ids = set()
        for row_id, key in splits[role].keys.items():
            other = next((name for name in later if key.casefold() in keys[name]), None)
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


def yields_to(role: str, roles: Sequence[str], used: Sequence[str]) -> list[str]:
    """
    Roles whose questions must not stand in `role`, one of `used`: those that are evaluated, and in front of what is trained
    on also those that epochs and temperatures, and thresholds, are chosen on.
    """
    chosen = [name for name in CHOSEN_ON if name in roles]
    return [
        *(name for name in roles if name not in used),
        *(chosen[: chosen.index(role)] if role in chosen else chosen),
    ]


def drop_copies(
    splits: Mapping[str, TaskSplit], rows: Mapping[str, Dataset], used: Sequence[str]
) -> tuple[dict[str, Dataset], Copies]:
    """
    Leaves out what [`find_copies`] finds.

    Args:
        splits (`Mapping[str, TaskSplit]`): what was read for the roles that are trained on, chosen on and evaluated.
        rows (`Mapping[str, Dataset]`): what is left of it by now.
        used (`Sequence[str]`): roles that are trained on, and those that something is chosen on.

    Returns:
        `tuple[dict[str, Dataset], Copies]`: the rows that stay, in their order, and what was found among `rows`.

    Raises:
        `ValueError`: when no row of a role stays.
    """
    left = {}
    for role, split in splits.items():
        ids = set(rows[role]["id"])
        keys = {row_id: key for row_id, key in split.keys.items() if row_id in ids}
        answers = {row_id: answer for row_id, answer in split.answers.items() if row_id in ids}
        left[role] = dataclasses.replace(split, keys=keys, answers=answers)
    found = find_copies(left, used)
    kept = dict(rows)
    for role, ids in found.ids.items():
        stay = [i for i, row_id in enumerate(rows[role]["id"]) if row_id not in ids]
        if not stay:
            raise ValueError(nothing_left(role, found.dropped[role]))
        kept[role] = rows[role].select(stay)
    return kept, found


def nothing_left(role: str, dropped: Mapping[str, int]) -> str:
    """What to say where every row of a role is a copy."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
    return (
        f"No row of {role!r} is left without copies ({reasons}). Give the roles different rows, or keep copies with "
        "task.options.drop_copies=false."
    )


def _contradicted(split: TaskSplit) -> set[str]:
    """Keys that stand in a role with two answers."""
    answers: dict[str, str] = {}
    twice = set()
    for row_id, answer in split.answers.items():
        if answers.setdefault(split.keys[row_id], answer) != answer:
            twice.add(split.keys[row_id])
    return twice
