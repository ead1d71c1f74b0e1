"""
CommonsenseQA (Talmor et al., NAACL 2019): 5 choices, about everyday concepts.

Template, see [`~first_trl.tasks.multiple_choice.MultipleChoice`]: stem, `Answer Choices:`, one `(A) text` line each,
`Answer:`; the completion is `" A"` to `" E"`. The group of a row is its concept. The test split is published without
answers: its rows have `gold == -1` and no completion.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Example
from .multiple_choice import MultipleChoice, labelled_choices, required
from .sizes import SplitSize


@dataclass(frozen=True)
class CommonsenseQA(MultipleChoice):
    """CommonsenseQA from the Hub (`tau/commonsense_qa`) or the original `.jsonl` files."""

    name = "commonsense_qa"
    hub_id = "tau/commonsense_qa"
    splits = {"train": "train", "validation": "validation", "test": "test"}
    unlabelled_splits = ("test",)
    n_choices = (5, 5)
    published: ClassVar[dict[str, SplitSize]] = {
        "train": SplitSize(9741, 165.2, 2, 52.0, 1, 106, key_bytes=25.5),
        "validation": SplitSize(1221, 163.1, 2, 51.7, 1, 102, key_bytes=25.5),
        "test": SplitSize(1140, 165.9, key_bytes=25.5),
    }

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        question = required(row, "question")
        if isinstance(question, dict):  # original release
            stem, choices, concept = (
                required(question, "stem"),
                question.get("choices"),
                question.get("question_concept"),
            )
        else:  # the Hub's layout
            stem, choices, concept = question, row.get("choices"), row.get("question_concept")
        texts, gold = labelled_choices(
            choices, row.get("answerKey"), gold_required=split not in self.unlabelled_splits
        )
        return self.fill(stem, texts, gold, group=concept or "")
