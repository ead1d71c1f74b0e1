"""
Your own multiple-choice questions: a CSV, JSON-lines, JSON or Parquet file, or a dataset on the Hub.

Columns: `question`; the choices, either as `choices` (a list, or the text of a JSON list) or one column per choice,
`A`, `B` and so on; `answer`, the letter of the right choice or its exact text; and, where you have them, `id` and
`group` (rows that belong together, such as those of one document). Other columns are left alone. A row may have 2 to
26 choices.

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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import Example
from .multiple_choice import LETTERS, MultipleChoice, required
from .source import SPLIT_WORDS, names_split


@dataclass(frozen=True)
class Custom(MultipleChoice):
    """
    Questions of your own.

    Attributes:
        shuffle_seed (`int` or `None`): Puts the rows of a file in an order drawn with this seed before a slice is
            taken. `None` keeps the order of the file, in which the last rows may be about other things than the first.
    """

    shuffle_seed: int | None = None

    name = "custom"
    splits = {split: split for split in ("train", "validation", "test", "ood", "unlabelled")}
    unlabelled_splits = ("unlabelled",)
    n_choices = (2, len(LETTERS))
    csv_header = True
    needs_path = True

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterable[tuple[str, dict[str, Any] | Example]]:
        file = Path(path or "").expanduser()
        if split != "train" and file.is_file() and not names_split(file, split):
            words = " or ".join(map(repr, SPLIT_WORDS.get(split, (split,))))
            raise ValueError(
                f"{str(file)!r} is one file, and without {words} in its name it is not taken for split {split!r}: all "
                "splits would be the same rows. Cut it with slices ('train[:70%]', 'train[70%:85%]', 'train[85%:]'), "
                "give a folder with one file per split, or rename it."
            )
        rows = list(super().rows(split, path, revision, seed))
        if self.shuffle_seed is not None:
            rows = [rows[i] for i in np.random.default_rng(self.shuffle_seed).permutation(len(rows))]
        return rows

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        texts = _choices(row)
        gold = -1
        if split not in self.unlabelled_splits:
            if row.get("answer") is None:
                raise ValueError(
                    "field 'answer' is missing. Fill it in, or put questions without an answer into the split "
                    f"'unlabelled' (the row has: {', '.join(row)})"
                )
            gold = _gold(row["answer"], texts)
        question = required(row, "question")
        if not isinstance(question, str):
            raise ValueError(f"the question is {question!r}, not a text")
        group = row.get("group")
        return self.fill(question, texts, gold, group="" if group is None else str(group))


def _choices(row: dict[str, Any]) -> list[str]:
    letters = [letter for letter in LETTERS if letter in row]
    if row.get("choices") is not None and any(row[letter] is not None for letter in letters):
        raise ValueError(
            f"the choices stand in 'choices' and in the columns {', '.join(letters)}; keep one of the two"
        )
    if row.get("choices") is not None:
        choices = row["choices"]
        if isinstance(choices, str):
            try:
                choices = json.loads(choices)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'`choices` {choices!r} is not the text of a JSON list such as ["pocket", "blotter"] ({error})'
                ) from None
        if not isinstance(choices, list):
            raise ValueError(f"`choices` must be a list, got {choices!r}")
    elif letters:
        if letters != list(LETTERS[: len(letters)]):
            raise ValueError(f"the columns of the choices are {', '.join(letters)}; they must be A, B, C and so on")
        choices = [row[letter] for letter in letters]
        # Rows with fewer choices leave the last cells empty
        while choices and choices[-1] is None:
            choices.pop()
    else:
        raise ValueError(f"there are no choices: give 'choices', or columns A, B, ... (the row has: {', '.join(row)})")
    texts = []
    for i, choice in enumerate(choices):
        name = LETTERS[i] if i < len(LETTERS) else f"number {i + 1}"
        if choice is None:
            raise ValueError(f"choice {name} is empty")
        if isinstance(choice, bool) or not isinstance(choice, str | int | float):
            raise ValueError(f"choice {name} is {choice!r}, not a text")
        texts.append(str(choice).strip())
        if texts[-1] in texts[:-1]:
            raise ValueError(f"choices {LETTERS[texts.index(texts[-1])]} and {name} are both {texts[-1]!r}")
    return texts


def _gold(answer: Any, texts: list[str]) -> int:
    """Index of the right choice, from its letter or its text."""
    key = str(answer).strip()
    letters = LETTERS[: len(texts)]
    by_letter = letters.index(key) if len(key) == 1 and key in letters else None
    by_text = texts.index(key) if key in texts else None
    if by_letter is not None and by_text is not None and by_letter != by_text:
        raise ValueError(
            f"the answer {key!r} is the letter of choice {key} and the text of choice {letters[by_text]}; reorder or "
            "reword the choices"
        )
    found = by_letter if by_letter is not None else by_text
    if found is None:
        raise ValueError(
            f"the answer {answer!r} is neither a letter from A to {letters[-1:] or 'A'} nor the text of a choice. "
            "Numbers of choices are not read, as they may count from 0 or from 1; write the letter"
        )
    return found
