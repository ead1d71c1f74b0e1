"""
Your own multiple-choice questions: a CSV, TSV, Excel, JSON, JSON-lines, Parquet or Arrow file, or a dataset on the Hub.

Columns: `question`; the choices, either as `choices` (a list, or the text of a JSON list) or one column per choice,
`A`, `B` and so on; `answer`, the letter of the right choice (`B`, `b`, `(B)`, `B.`) or its exact text, or its number
where the option `answers_from` says whether numbers count from 0 or from 1; and, where you have them, `id` and `group`
(rows that belong together, such as those of one document). Other columns are left alone. A row may have 2 to 26
choices. Soft labels stand in a column of their own, a list or the text of a JSON list in the order of the choices:
`target_probs` (probabilities that add up to 1) or `target_votes` (how many annotators chose each). With them `answer` may
be left out, and is then the most likely choice, of equal ones the first. What a cell means, and what is missing, is told in [`first_trl.utils.tables`].

```text
question,A,B,C,answer
What do people use to absorb extra ink?,shirt pocket,blotter,,B
```

Template as in [`~first_trl.tasks.multiple_choice.MultipleChoice`]. One file is cut into splits by slices
(`"train[:70%]"`, `"train[70%:85%]"`, `"train[85%:]"`), a folder holds one file per split with the split's name in its
own. The split `unlabelled` is for questions without an answer, `ood` for questions of another kind than the training
ones.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..calibration.distribution import soft_label
from ..utils.tables import as_text, is_nan
from ..vocabulary import TARGET_PROBS, TARGET_VOTES
from .base import Example
from .multiple_choice import LETTERS, MultipleChoice, cell_texts, optional_text, required
from .source import SPLIT_WORDS, names_split


@dataclass(frozen=True)
class Custom(MultipleChoice):
    """
    Questions of your own.

    Attributes:
        shuffle_seed (`int` or `None`): Puts the rows of a file in an order drawn with this seed before a slice is
            taken. `None` keeps the order of the file, in which the last rows may be about other things than the first.
        answers_from (`0`, `1` or `None`): What the first choice is called where answers are numbers. With `None` a number
            is an answer only where it is the text of a choice.
    """

    shuffle_seed: int | None = None
    answers_from: int | None = None

    name = "custom"
    splits = {split: split for split in ("train", "validation", "test", "ood", "unlabelled")}
    unlabelled_splits: ClassVar[tuple[str, ...]] = ("unlabelled",)
    n_choices = (2, len(LETTERS))
    needs_path = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers_from not in (None, 0, 1) or isinstance(self.answers_from, bool):
            raise ValueError(f"`answers_from` must be 0 or 1, got {self.answers_from!r}.")

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterable[tuple[str, dict[str, Any] | Example | None]]:
        file = Path(path or "").expanduser()
        if split != "train" and file.is_file() and not names_split(file, split):
            words = " or ".join(map(repr, SPLIT_WORDS.get(split, (split,))))
            raise ValueError(
                f"{str(file)!r} is one file, and without {words} in its name it is not taken for split {split!r}: all "
                "splits would be the same rows. Cut it with slices ('train[:70%]', 'train[70%:85%]', 'train[85%:]'), "
                "give a folder with one file per split, or rename it."
            )
        rows = list(super().rows(split, path, revision, seed))
        _refuse_whole_floats([row for _, row in rows if isinstance(row, dict)], path)
        if self.shuffle_seed is not None:
            empty = [row for row in rows if row[1] is None]
            rows = [row for row in rows if row[1] is not None]
            order = np.random.default_rng(self.shuffle_seed).permutation(len(rows))
            rows = [*(rows[i] for i in order), *empty]
        return rows

    def hint(self, rows: Sequence[dict[str, Any]]) -> str:
        numbers = [number for row in rows if (number := _whole(row.get("answer"))) is not None]
        if self.answers_from is not None or not numbers or len(numbers) < len(rows):
            return ""
        low, high = min(numbers), max(numbers)
        try:
            reaches = any(number == len(_choices(row)) for row, number in zip(rows, numbers, strict=True))
        except ValueError:
            return ""
        if low == 0 and not reaches:
            return "The answers are numbers that count from 0: give the option answers_from=0."
        if low > 0 and reaches:
            return "The answers are numbers that count from 1: give the option answers_from=1."
        return (
            f"The answers are the numbers {low} to {high}, which may count from 0 or from 1: say which with the option "
            "answers_from=0 or answers_from=1."
        )

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        texts = _choices(row)
        gold, soft = -1, _soft_labels(row, len(texts))
        if soft is not None and row.get("answer") is None:
            gold = int(np.argmax(soft))
        elif split not in self.unlabelled_splits:
            if row.get("answer") is None or is_nan(row["answer"]):
                raise ValueError(
                    "field 'answer' is missing. Fill it in, or put questions without an answer into the split "
                    f"'unlabelled' (the row has: {', '.join(row)})"
                )
            gold = _gold(row["answer"], texts, self.answers_from)
        question = required(row, "question")
        if not isinstance(question, str):
            raise ValueError(f"the question is {question!r}, not a text")
        example = self.fill(question, texts, gold, group=optional_text(row, "group"))
        return replace(example, target_probs=soft)

    def fill(self, question: str, texts: list[str], gold: int, group: str = "") -> Example:
        # pandas writes 1.0 for 1 where other rows leave the column empty, and in another file the group is 1. Here, so that
        # a template with {group} makes the same prompt of a row that is asked later
        return super().fill(question, texts, gold, re.sub(r"^(-?\d+)\.0$", r"\1", group))


def _refuse_whole_floats(rows: list[dict[str, Any]], path: str | None) -> None:
    """As pandas makes them of a column of whole numbers that some rows leave empty: "3.0" stands in no question."""
    for letter in LETTERS:
        cells = [row[letter] for row in rows if row.get(letter) is not None]
        numbers = [cell for cell in cells if isinstance(cell, float) and not is_nan(cell)]
        if numbers and len(numbers) == sum(not is_nan(cell) for cell in cells) and not any(n % 1 for n in numbers):
            raise ValueError(
                f"{path}: the column {letter!r} holds whole numbers as floats, such as {numbers[0]!s}: pandas makes them of "
                f"integers beside an empty cell. Write it as texts or as integers, so that it is clear whether {numbers[0]!s} "
                f"or {numbers[0]:.0f} is meant."
            )


def _choices(row: dict[str, Any]) -> list[str]:
    letters = [letter for letter in LETTERS if letter in row]
    if row.get("choices") is not None and any(row[letter] is not None for letter in letters):
        raise ValueError(
            f"the choices stand in 'choices' and in the columns {', '.join(letters)}; keep one of the two"
        )
    if row.get("choices") is not None:
        choices = _list(row, "choices", '["pocket", "blotter"]')
    elif letters:
        if letters != list(LETTERS[: len(letters)]):
            raise ValueError(f"the columns of the choices are {', '.join(letters)}; they must be A, B, C and so on")
        choices = [row[letter] for letter in letters]
        # Rows with fewer choices leave the last cells empty
        while choices and choices[-1] is None:
            choices.pop()
    else:
        raise ValueError(f"there are no choices: give 'choices', or columns A, B, ... (the row has: {', '.join(row)})")
    texts = [text.strip() for text in cell_texts(choices)]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise ValueError(f"choices {LETTERS[texts.index(text)]} and {_name(i)} are both {text!r}")
    return texts


def _list(row: dict[str, Any], field: str, example: str) -> list[Any]:
    """A cell that holds a list, or the text of one."""
    value = row[field]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{field}` {value!r} is not the text of a JSON list such as {example} ({error})"
            ) from None
    if not isinstance(value, list):
        raise ValueError(f"`{field}` must be a list, got {value!r}")
    return value


def _soft_labels(row: dict[str, Any], n_choices: int) -> tuple[float, ...] | None:
    """The distribution over the choices that a row brings."""
    given = [field for field in (TARGET_PROBS, TARGET_VOTES) if row.get(field) is not None]
    if not given:
        return None
    if len(given) == 2:
        raise ValueError(f"`{TARGET_PROBS}` and `{TARGET_VOTES}` are both there; keep one of the two")
    values = _list(row, given[0], "[3, 1]")
    return tuple(soft_label(given[0], values, n_choices).tolist())


def _name(i: int) -> str:
    return LETTERS[i] if i < len(LETTERS) else f"number {i + 1}"


def _whole(answer: Any) -> int | None:
    """An answer as a whole number, `None` when it is none."""
    if isinstance(answer, str):
        return int(answer) if re.fullmatch(r"\s*\d{1,9}\s*", answer) else None
    if isinstance(answer, bool) or not isinstance(answer, int | float) or answer != answer // 1:
        return None
    return int(answer)


def _gold(answer: Any, texts: list[str], answers_from: int | None) -> int:
    """Index of the right choice, from its letter, its text, or its number where that is said to be one."""
    letters = LETTERS[: len(texts)]
    number = _whole(answer)
    if answers_from is not None and number is not None:
        if not 0 <= number - answers_from < len(texts):
            raise ValueError(
                f"the answer {answer!r} is no number from {answers_from} to {len(texts) - 1 + answers_from}, as "
                f"{len(texts)} choices counted from {answers_from} have"
            )
        return number - answers_from
    key = as_text(answer).strip()
    by_text = texts.index(key) if key in texts else None
    # Only a text can be written like a letter and mean itself, so "b" is a letter where no choice is called so
    written = re.fullmatch(r"\(?([A-Z])[).:]?" if by_text is not None else r"\(?([A-Za-z])[).:]?", key)
    letter = written[1].upper() if written else ""
    by_letter = letters.index(letter) if letter and letter in letters else None
    if by_letter is not None and by_text is not None and by_letter != by_text:
        raise ValueError(
            f"the answer {key!r} is the letter of choice {letter} and the text of choice {letters[by_text]}; reorder or "
            "reword the choices"
        )
    found = by_letter if by_letter is not None else by_text
    if found is None:
        raise ValueError(
            f"the answer {answer!r} is neither a letter from A to {letters[-1:] or 'A'} nor the text of a choice"
            + (
                ". Numbers of choices are read only where the option `answers_from` says whether they count from 0 or "
                "from 1"
                if number is not None
                else ". Write one letter"
            )
        )
    return found
