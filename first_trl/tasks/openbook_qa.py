"""
OpenBookQA (Mihaylov et al., EMNLP 2018): 4 choices, elementary science.

Template, see [`~first_trl.tasks.multiple_choice.MultipleChoice`]: stem, `Answer Choices:`, one `(A) text` line each,
`Answer:`; the completion is `" A"` to `" D"`. The open-book fact is not shown. Rows have no group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Example
from .multiple_choice import MultipleChoice, labelled_choices, required
from .sizes import SplitSize


@dataclass(frozen=True)
class OpenBookQA(MultipleChoice):
    """OpenBookQA from the Hub (`allenai/openbookqa`) or the original `.jsonl` files."""

    name = "openbook_qa"
    hub_id = "allenai/openbookqa"
    splits = {"train": "train", "validation": "validation", "test": "test"}
    n_choices = (4, 4)
    published: ClassVar[dict[str, SplitSize]] = {
        "train": SplitSize(4957, 161.9, 2, 48.5, 1, 122),
        "validation": SplitSize(500),
        "test": SplitSize(500, 166.1, 2, 49.3, 1, 115),
    }

    @property
    def hub_config(self) -> str:
        return "main"

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        if isinstance(row.get("question"), dict):  # original release
            stem, choices = required(row["question"], "stem"), row["question"].get("choices")
        else:  # the Hub's layout
            stem, choices = required(row, "question_stem"), row.get("choices")
        texts, gold = labelled_choices(choices, row.get("answerKey"))
        return self.fill(stem, texts, gold)
