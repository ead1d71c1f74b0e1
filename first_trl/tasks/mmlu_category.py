"""
MMLU questions by field: real text of 57 subjects, and the answer is which of four categories the subject belongs to.

The categories are those that the authors of MMLU (Hendrycks et al., ICLR 2021) report their results by. Rows are the
14,042 questions of MMLU's `test` split, the only large one with a subject on every row. A question is cut to its first
40 words in lower case; numbers are written digit by digit. Template, and a completion of one token such as `" STEM"`:

```text
what is the capital of peru ? category :
```

A quarter of each category's subjects (14 in all), drawn with the seed, occurs in `ood` only, so `ood` asks about
fields that no training row is from. The questions of the other subjects are split at random into 3,000 `train`, 1,000
`validation` and 2,000 `test`; what is left is `unlabelled`, prompts without an answer. A text that occurs twice is
used once (all 895 questions of `moral_scenarios` begin alike and count as one).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .base import Example, Task
from .mmlu import MMLU
from .source import read_rows
from .word_tokenizer import word_tokenizer


SUBJECTS = {
    "STEM": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social-sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
# Capitals keep the answers apart from the words of the questions, which are in lower case.
ANSWERS = ("STEM", "Humanities", "Social-Sciences", "Other")
CATEGORY = {subject: i for i, subjects in enumerate(SUBJECTS.values()) for subject in subjects}

SIZES = {"train": 3000, "validation": 1000, "test": 2000}
HELD_OUT_FRACTION = 0.25
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class MMLUCategory(Task):
    """
    The category of a question, from the Hub (`cais/mmlu`), a folder of the original `.csv` files, or a `.jsonl` file
    in the Hub's layout. `seed` of [`~first_trl.tasks.base.Task.load`] chooses the held-out subjects and the split. The
    group of a row is its subject.

    Attributes:
        max_words (`int`): Longer questions are cut behind this many words (marks and digits count as words).
        vocabulary_size (`int`): Words of the tokenizer: the most frequent ones of the training rows. Others are
            `<unk>`.
        with_choices (`bool`): Whether the four choices of a question follow it, before it is cut.
    """

    max_words: int = 40
    vocabulary_size: int = 3000
    with_choices: bool = False

    name = "mmlu_category"
    hub_id = "cais/mmlu"
    splits = {split: split for split in (*SIZES, "ood", "unlabelled")}
    unlabelled_splits = ("unlabelled",)

    def __post_init__(self) -> None:
        for option in ("max_words", "vocabulary_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"`{option}` must be at least 1, got {getattr(self, option)}.")

    def tokenizer(
        self, path: str | None = None, revision: str | None = None, seed: int = 0
    ) -> PreTrainedTokenizerBase:
        """Word-level tokenizer of `vocabulary_size` words of the training rows and 10 more; `seed` as in `load`."""
        counts = Counter(word for text, _ in self._split(path, revision, seed)["train"] for word in text.split())
        markers = (UNKNOWN, "category", ":", *ANSWERS)
        # Ties in frequency are broken by the alphabet, so that the same rows always give the same tokenizer
        ranked = sorted((word for word in counts if word not in markers), key=lambda word: (-counts[word], word))
        return word_tokenizer([*markers, *ranked[: self.vocabulary_size]], unknown=UNKNOWN)

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterator[tuple[str, dict[str, Any] | Example]]:
        choices = tuple(f" {answer}" for answer in ANSWERS)
        for i, (text, subject) in enumerate(self._split(path, revision, seed)[split]):
            gold = -1 if split in self.unlabelled_splits else CATEGORY[subject]
            completion = None if gold < 0 else choices[gold]
            yield f"row {i}", Example(f"{text} category :", completion, choices, gold, subject, question=text)

    def _split(self, path: str | None, revision: str | None, seed: int) -> dict[str, list[tuple[str, str]]]:
        return split_by_subject(path or self.hub_id, revision, seed, self._text, with_choices=self.with_choices)

    def _text(self, question: str) -> str:
        words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", question.lower())
        return " ".join(words[: self.max_words])


def split_by_subject(
    path: str, revision: str | None, seed: int, text: Callable[[str], str], *, with_choices: bool = False
) -> dict[str, list[tuple[str, str]]]:
    """Split name -> `(text, subject)` of every row, where `text` makes the text that is read of a question."""
    rng = np.random.default_rng(seed)
    held_out = {
        str(subject)
        for subjects in SUBJECTS.values()
        for subject in rng.permutation(subjects)[: round(HELD_OUT_FRACTION * len(subjects))]
    }
    first: dict[str, str] = {}
    for question, subject in _questions(path, revision, with_choices):
        # A text that stands in two subjects keeps the first; a question of marks and digits alone is a text too
        first.setdefault(text(question), subject)
    rows = list(first.items())
    seen = [row for row in rows if row[1] not in held_out]
    n = sum(SIZES.values())
    if len(seen) < n:
        raise ValueError(
            f"{path}: {len(seen)} different questions of subjects that are not held out, {n} are "
            "needed. Give the whole test split of MMLU (14,042 rows)."
        )
    order = rng.permutation(len(seen))
    bounds = np.cumsum(list(SIZES.values()))
    parts = dict(zip((*SIZES, "unlabelled"), np.split(order, bounds), strict=True))
    return {
        **{split: [seen[i] for i in part] for split, part in parts.items()},
        "ood": [row for row in rows if row[1] in held_out],
    }


@lru_cache(maxsize=2)
def _questions(path: str, revision: str | None, with_choices: bool) -> list[tuple[str, str]]:
    """`(question, subject)` of every row of MMLU's test split."""
    mmlu = MMLU(completion="{text}")
    found = []
    for where, row in read_rows(
        path,
        split="test",
        hub_split="test",
        config=mmlu.hub_config,
        revision=revision,
        many_files=True,
        csv_header=False,
    ):
        if row is None:
            continue
        try:
            example = mmlu.example(row, split="test")
            if example.group not in CATEGORY:
                raise ValueError(f"the subject {example.group!r} is not one of MMLU's 57")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found.append(
            (" ".join([example.question, *example.choices]) if with_choices else example.question, example.group)
        )
    return found
