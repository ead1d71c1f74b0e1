"""
MMLU questions by field for a pretrained model: raw text, and the answer names the field in one token of its vocabulary.

The rows, the held-out subjects and the splits are those of [`~first_trl.tasks.mmlu_category`]; text and answers are made
for a model that reads English. A question keeps its first 40 words as they stand:

```text
Question: What is the capital of Peru?
Field:
```

and its completion is `" Science"`, `" Humanities"`, `" Society"` or `" Other"`. A model of 135 million parameters does not
yet bind letters to options, and it does read what a question is about: this is multiple choice at its size, with a real
shift (`ood` asks about subjects that no training row is from).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .base import Example, Task
from .mmlu_category import CATEGORY, SIZES, split_by_subject


ANSWERS = (" Science", " Humanities", " Society", " Other")


@dataclass(frozen=True)
class MMLUField(Task):
    """
    The field of a question, from the Hub (`cais/mmlu`), a folder of the original `.csv` files, or a `.jsonl` file in the
    Hub's layout. `seed` of [`~first_trl.tasks.base.Task.load`] chooses the held-out subjects and the split. The group of
    a row is its subject.

    Attributes:
        max_words (`int`): Longer questions are cut behind this many words (what stands between spaces).
    """

    max_words: int = 40

    name = "mmlu_field"
    hub_id = "cais/mmlu"
    splits = {split: split for split in (*SIZES, "ood", "unlabelled")}
    unlabelled_splits = ("unlabelled",)
    prompt_template = "Question: {question}\nField:"

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise ValueError(f"`max_words` must be at least 1, got {self.max_words}.")

    def decision_fields(self) -> dict[str, str]:
        return {"question": "question"}

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterator[tuple[str, dict[str, Any] | Example]]:
        rows = split_by_subject(path or self.hub_id, revision, seed, self._text)[split]
        for i, (text, subject) in enumerate(rows):
            gold = -1 if split in self.unlabelled_splits else CATEGORY[subject]
            prompt = self.prompt_template.format(question=text)
            completion = None if gold < 0 else ANSWERS[gold]
            yield f"row {i}", Example(prompt, completion, ANSWERS, gold, subject, question=text)

    def _text(self, question: str) -> str:
        return " ".join(question.split()[: self.max_words])
