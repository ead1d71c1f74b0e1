"""Training rows that give away an evaluation split: found by their group or by their question, and left out."""

import re
import unicodedata

from datasets import Dataset


KEYS = ("group", "question")
# An evaluation question of fewer characters is too common a phrase to mean anything inside a longer one.
SHORTEST_PART = 20


def drop_overlap(train: Dataset, evaluation: Dataset, *, by: str) -> tuple[Dataset, int]:
    """
    Leaves out the training rows that share their key with a row of an evaluation split.

    Args:
        train ([`~datasets.Dataset`]):
            Rows of a task.
        evaluation ([`~datasets.Dataset`]):
            Rows of the same or another task.
        by (`str`):
            `"group"` (the concept, subject or pair of a row; rows without a group share nothing) or `"question"`: the
            same text but for case, punctuation and white space, or a training question that holds an evaluation
            question of 20 or more characters.

    Returns:
        `tuple[Dataset, int]`: the rows that stay, in their order, and how many were left out.

    Raises:
        `ValueError`: for an unknown `by`, a missing column, an evaluation split without groups, or when no row stays.

    Example:

    ```python
    >>> from first_trl.tasks import get_task
    >>> from first_trl.tasks.overlap import drop_overlap
    >>> train, ood = (get_task("noisy_world").load(split).dataset for split in ("train", "ood"))
    >>> drop_overlap(train, ood, by="group")[1]
    0
    ```
    """
    if by not in KEYS:
        raise ValueError(f"`by` must be one of {', '.join(KEYS)}; got {by!r}.")
    for name, rows in (("training rows", train), ("evaluation split", evaluation)):
        if by not in rows.column_names:
            raise ValueError(f"The {name} have no column {by!r} (they have {', '.join(rows.column_names)}).")
    if by == "group":
        shared = _shared_groups(train["group"], evaluation["group"])
    else:
        shared = _shared_questions(train["question"], evaluation["question"])
    kept = [i for i, drop in enumerate(shared) if not drop]
    if not kept:
        raise ValueError(
            f"Every training row shares its {by} with the evaluation split, so none is left. Give the two different "
            "rows, or choose another key."
        )
    return (train.select(kept) if len(kept) < len(shared) else train), len(shared) - len(kept)


def normalized(text: str) -> str:
    """A question without what two copies of it may differ in: case, punctuation, white space, width of characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def _shared_groups(train: list[str], evaluation: list[str]) -> list[bool]:
    groups = {group for group in evaluation if group}
    if not groups:
        raise ValueError(
            "The evaluation split has no groups (all are empty), so nothing can be unseen by group. Use 'question'."
        )
    return [group in groups for group in train]


def _shared_questions(train: list[str], evaluation: list[str]) -> list[bool]:
    questions = {text for question in evaluation if (text := normalized(question))}
    # First characters -> the questions that start so: one look-up per position of a training text, whatever the number
    # of evaluation questions. Texts in scripts without spaces are covered since no word is looked for.
    starts: dict[str, list[str]] = {}
    for text in questions:
        if len(text) >= SHORTEST_PART:
            starts.setdefault(text[:SHORTEST_PART], []).append(text)

    def is_shared(question: str) -> bool:
        text = normalized(question)
        if text in questions:
            return True
        for i in range(len(text) - SHORTEST_PART + 1):
            candidates = starts.get(text[i : i + SHORTEST_PART])
            if candidates and any(text.startswith(candidate, i) for candidate in candidates):
                return True
        return False

    return [is_shared(question) for question in train]
