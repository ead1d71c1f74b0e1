"""
Alpaca (Taori et al., 2023): 52,002 instructions with written answers, for instruction tuning.

Template of our own, shorter than the one the data was released with; the completion is the output:

```text
Instruction:
Name the capital of the country.

Input:
Peru

Response:
```

The `Input:` part stands only where a row has an input. Rows whose output is empty teach nothing and are dropped and
counted. There are no choices (`gold == -1`) and no groups. The release has one split: slice it for validation, as in
`"train[:90%]"` and `"train[90%:]"`. The data is licensed for non-commercial use (CC BY-NC 4.0).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import DropRow, Example, Task
from .multiple_choice import optional_text, required_text
from .sizes import SplitSize
from .template import check_template


@dataclass(frozen=True)
class Alpaca(Task):
    """
    Alpaca from the Hub (`tatsu-lab/alpaca`) or the original `.json` file.

    Attributes:
        template (`str`): The prompt; fields `{request}` (the instruction and, where there is one, the input),
            `{instruction}` and `{input}`.
        completion (`str`): The answer; field `{output}`.
    """

    template: str = "Instruction:\n{request}\n\nResponse:\n"
    completion: str = "{output}"

    name = "alpaca"
    hub_id = "tatsu-lab/alpaca"
    splits = {"train": "train"}
    # Lengths are those of a random-looking tenth of the release.
    published: ClassVar[dict[str, SplitSize]] = {
        "train": SplitSize(52002, 110.5, 276.0, 28.5, 58.6, 692),
    }

    def __post_init__(self) -> None:
        check_template("template", self.template, ("request", "instruction", "input"), ())
        if "{request}" not in self.template and "{instruction}" not in self.template:
            raise ValueError("`template` lacks the instruction: use {request}, or {instruction} and {input}.")
        check_template("completion", self.completion, ("output",), ("output",))

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        instruction, output = required_text(row, "instruction").strip(), required_text(row, "output")
        given = optional_text(row, "input").strip()
        if not instruction:
            raise ValueError("the instruction is empty")
        if not output.strip():
            raise DropRow("empty output")
        request = f"{instruction}\n\nInput:\n{given}" if given else instruction
        return Example(
            prompt=self.template.format(request=request, instruction=instruction, input=given),
            completion=self.completion.format(output=output),
            question=request,
        )
