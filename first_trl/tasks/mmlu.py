"""
MMLU (Hendrycks et al., ICLR 2021): 4 choices, 57 subjects.

Template, see [`~first_trl.tasks.multiple_choice.MultipleChoice`]: question, `Answer Choices:`, one `(A) text` line
each, `Answer:`; the completion is `" A"` to `" D"`. The group of a row is its subject. The original release has one
CSV file per subject and split (question, four choices, letter of the answer) and no header.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import DropRow, Example
from .multiple_choice import LETTERS, MultipleChoice, cell_texts, optional_text, required
from .sizes import SplitSize


@dataclass(frozen=True)
class MMLU(MultipleChoice):
    """
    MMLU from the Hub (`cais/mmlu`), a folder of the original `.csv` files, or a `.jsonl` file in the Hub's layout.

    Attributes:
        subject (`str` or `None`): Read this subject only. `None` reads all.
    """

    subject: str | None = None

    name = "mmlu"
    hub_id = "cais/mmlu"
    splits = {"dev": "dev", "validation": "validation", "test": "test", "auxiliary_train": "auxiliary_train"}
    n_choices = (4, 4)
    many_files = True
    # The original release
    csv_header = False
    published: ClassVar[dict[str, SplitSize]] = {
        "dev": SplitSize(285, 429.9, 2, 107.2, 1, 548),
        "validation": SplitSize(1531),
        "test": SplitSize(14042, 486.1, 2, 116.0, 1, 1004),
        "auxiliary_train": SplitSize(99842),
    }

    @property
    def hub_config(self) -> str:
        return "all"

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        if "cells" in row:  # original release
            cells = [cell or "" for cell in row["cells"]]
            if len(cells) != 6:
                raise ValueError(f"{len(cells)} columns, expected 6: question, four choices, letter of the answer")
            question, *texts, letter = cells
            if letter.strip() not in list("ABCD"):
                raise ValueError(f"the answer {letter!r} is not one of A, B, C, D")
            gold = LETTERS.index(letter.strip())
            subject = re.sub("_(dev|val|test)$", "", row["file"])  # "abstract_algebra_test"
        else:  # the Hub's layout
            question, texts, gold = required(row, "question"), required(row, "choices"), required(row, "answer")
            subject = optional_text(row, "subject")
            if gold in list("ABCD"):  # `datasets` names its class labels so
                gold = LETTERS.index(gold)
            if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(texts):
                raise ValueError(f"the answer {gold!r} is not the number of one of {len(texts)} choices")
        if self.subject is not None and subject != self.subject:
            raise DropRow("other subject")
        return self.fill(question, cell_texts(texts), gold, group=subject)
