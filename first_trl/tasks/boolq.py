"""
BoolQ (Clark et al., NAACL 2019): yes/no questions about a passage.

Template, with the completions `" yes"` and `" no"`:

```text
The sky scatters short wavelengths most.
Question: is the sky blue because of scattering?
Answer:
```

The group of a row is the title of its passage where the file gives one. Questions stand in lower case and without a
question mark in the release; the template adds the mark.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Example, Task
from .multiple_choice import optional_text, required, required_text
from .sizes import SplitSize
from .template import check_template


@dataclass(frozen=True)
class BoolQ(Task):
    """
    BoolQ from the Hub (`google/boolq`) or the original `.jsonl` files.

    Attributes:
        template (`str` or `None`): The prompt; fields `{passage}` and `{question}`. `None` takes
            `"{passage}\\nQuestion: {question}?\\nAnswer:"`, without its first line when `with_passage=False`.
        completion (`str`): What is appended for an answer; field `{answer}` ("yes" or "no").
        with_passage (`bool`): Whether the passage is shown. A file without passages needs `False`: such questions
            measure what the model remembers, not what it reads.
    """

    template: str | None = None
    completion: str = " {answer}"
    with_passage: bool = True

    name = "boolq"
    hub_id = "google/boolq"
    splits = {"train": "train", "validation": "validation"}
    # Questions were measured. Passages are what the 1,998,182 bytes of a Hub copy of `validation` leave for them.
    published: ClassVar[dict[str, SplitSize]] = {
        "train": SplitSize(9427, 624, 3.6, completion_tokens=1),
        "validation": SplitSize(3270, 624, 3.6, completion_tokens=1),
    }

    decision_kinds = ("noul", "choice")

    def decision_fields(self) -> dict[str, str]:
        if self.with_passage:
            return {"passage": "state", "question": "instructions"}
        return {"question": "question"}

    def __post_init__(self) -> None:
        fields = ("passage", "question") if self.with_passage else ("question",)
        check_template("template", self.prompt_template, fields, fields)
        check_template("completion", self.completion, ("answer",), ("answer",))

    @property
    def prompt_template(self) -> str:
        if self.template is not None:
            return self.template
        return "{passage}\nQuestion: {question}?\nAnswer:" if self.with_passage else "Question: {question}?\nAnswer:"

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        values = {"question": required_text(row, "question").strip().rstrip("?")}
        if self.with_passage:
            if row.get("passage") is None:
                raise ValueError(
                    "field 'passage' is missing. Give a file that has it, or ask for questions without passages with "
                    "with_passage=False"
                )
            values["passage"] = required_text(row, "passage").strip()
        for field, value in values.items():
            if not value:
                raise ValueError(f"the {field} is empty")
        answer = required(row, "answer")
        if not isinstance(answer, bool):
            raise ValueError(f"the answer must be true or false, got {answer!r}")
        choices = tuple(self.completion.format(answer=word) for word in ("yes", "no"))
        gold = 0 if answer else 1
        return Example(
            self.prompt_template.format(**values),
            choices[gold],
            choices,
            gold,
            group=optional_text(row, "title"),
            question=values["question"],
        )
