"""
ARC (Clark et al., 2018): 3 to 5 choices, grade-school science, in an easy and a challenge set.

Template, see [`~first_trl.tasks.multiple_choice.MultipleChoice`]: stem, `Answer Choices:`, one `(A) text` line each,
`Answer:`; the completion is `" A"` to `" E"`. Some rows label their choices 1 to 4: letters are given by position
and the answer key follows. Rows have no group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Example
from .multiple_choice import MultipleChoice, labelled_choices, required
from .sizes import SplitSize


_CONFIGS = {"easy": "ARC-Easy", "challenge": "ARC-Challenge"}


@dataclass(frozen=True)
class Arc(MultipleChoice):
    """
    ARC from the Hub (`allenai/ai2_arc`) or the original `.jsonl` files.

    Attributes:
        subset (`str`): `"easy"` or `"challenge"`. With a local file as `path`, the file decides.
    """

    subset: str = "easy"

    name = "arc"
    hub_id = "allenai/ai2_arc"
    splits = {"train": "train", "validation": "validation", "test": "test"}
    n_choices = (3, 5)
    published: ClassVar[dict[str, SplitSize]] = {
        "ARC-Easy/train": SplitSize(2251, 246.1, 2, 64.1, 1, 201),
        "ARC-Easy/validation": SplitSize(570),
        "ARC-Easy/test": SplitSize(2376, 247.9, 2, 64.6, 1, 205),
        "ARC-Challenge/train": SplitSize(1119),
        "ARC-Challenge/validation": SplitSize(299),
        "ARC-Challenge/test": SplitSize(1172),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in _CONFIGS:
            raise ValueError(f"`subset` must be one of {', '.join(_CONFIGS)}; got {self.subset!r}.")

    @property
    def hub_config(self) -> str:
        return _CONFIGS[self.subset]

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        question = required(row, "question")
        if isinstance(question, dict):  # original release
            stem, choices = required(question, "stem"), question.get("choices")
        else:  # the Hub's layout
            stem, choices = question, row.get("choices")
        texts, gold = labelled_choices(choices, row.get("answerKey"))
        return self.fill(stem, texts, gold)
