"""
Decision models: a student's prompt, answers and temperature in the files that stock transformers reads.

`pipeline("decision")` and the endpoint `/v1/systemone` of `transformers serve` answer typed questions about a state with
a probability for every option. A causal language model takes part through two files beside its weights, `decision.json`
(the token of each option, a temperature) and `decision_template.jinja` (the prompt), see
[`~transformers.decision.DecisionConfig`]. [`save_decision_config`] writes them so that the template renders the prompt
that the student was trained on, and refuses where it would not.
"""

import copy
import json
import string
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.decision import DecisionConfig
from transformers.decision.configuration_utils import DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME

from ..calibration.conditional import OptionTemperature
from ..calibration.temperature import check_temperature
from .answers import answer_token_ids_of_rows
from .base import Task
from .decision_extras import DECISION_EXTRAS_NAME, write_decision_extras
from .encode import encode_prompts, front_tokens


# Question of a request that is made from a row of a task
QUESTION = "answer"
# What a row of a task becomes: its prompt as it stands, past the template
PROMPT = "prompt"
_CHECKED_ROWS = 64
# Expressions of Jinja for the fields of a task's `str.format` template. A state that is a mapping may name fields itself.
_STATE = (
    "{%- macro text(value) %}{{ '' if value is none else value if value is string else value|tojson }}{% endmacro -%}\n"
    "{%- set named = state is mapping and (state|select('in', NAMES)|list) -%}\n"
    "{%- set fields = state if named else {} -%}\n"
    "{%- set given = '' if named else text(state) -%}\n"
    "{%- set asked = text(question.instructions) -%}\n"
)
_CHOICES = (
    "{%- set lines = namespace(all=[]) -%}\n"
    "{%- for option in question.options -%}\n"
    "{%- set description = text(question.descriptions[loop.index0]) -%}\n"
    "{%- set shown = description if question.type == 'score' else option ~ ': ' ~ description if description else option -%}\n"
    "{%- set lines.all = lines.all + ['(' ~ 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[loop.index0] ~ ') ' ~ shown|trim] -%}\n"
    "{%- endfor -%}\n"
)


def decision_template(task: Task, front: str = "") -> str:
    """
    The prompt of a task as the template of a decision model.

    A task with a template of its own takes the question from `state` and `instructions` (joined where both are given)
    and the choices from `criteria`; a task that makes its prompts itself takes `state` as the whole prompt. A state that
    is a mapping may give the template's fields by name, or the whole prompt as `{"prompt": ...}`; any other one is text, as
    JSON.

    Args:
        task ([`Task`]): As the student was trained with, options included.
        front (`str`): Special tokens in front of every prompt.

    Returns:
        `str`: a Jinja template.
    """
    fields = task.decision_fields()
    if fields is None:
        body = "{{- fields.prompt if 'prompt' in fields else given -}}"
    else:
        body = "{%- if 'prompt' in fields -%}\n{{- fields.prompt -}}\n{%- else -%}\n"
        if "choices" in fields.values():
            body += _CHOICES
        template = task.prompt_template
        for literal, name, _, _ in string.Formatter().parse(template):
            if literal:
                body += "{{- " + json.dumps(literal, ensure_ascii=False) + " -}}\n"
            if name is not None:
                body += "{{- " + _expression(name, fields[name]) + " -}}\n"
        body += "{%- endif -%}"
    names = json.dumps([PROMPT, *(fields or ())])
    return "{{- " + json.dumps(front, ensure_ascii=False) + " -}}\n" + _STATE.replace("NAMES", names) + body


def _expression(name: str, source: str) -> str:
    """Where a field of the template comes from in a request."""
    given = {
        "question": "([given, asked]|select|join('\\n')|trim)",
        "state": "given",
        "instructions": "asked",
        "choices": "(lines.all|join('\\n'))",
        "nothing": "''",
    }[source]
    return f"(text(fields['{name}']) if '{name}' in fields else {given})"


def decision_request(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    The System One request whose prompt is that of a task's row and whose options are its choices, in order.

    Args:
        row (`dict`): With `prompt` and `choices`.

    Example:

    ```python
    >>> decide = pipeline("decision", model="my-name/my-student")
    >>> decide(decision_request(row))["answer"]["probabilities"]
    {'A': 0.9, 'B': 0.1}
    ```
    """
    options = [choice.strip() or choice for choice in row["choices"]]
    if len(set(options)) != len(options):
        options = list(row["choices"])
    question = {"type": "choice", "criteria": dict.fromkeys(options)}
    return {"state": {PROMPT: row["prompt"]}, "questions": {QUESTION: question}}


def decision_config(
    task: Task,
    processing_class: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    temperature: float | OptionTemperature = 1.0,
    adapter: str | None = None,
) -> DecisionConfig:
    """
    The decision config of a student, checked on rows of its task.

    Args:
        task ([`Task`]):
            As the student was trained with.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        rows ([`~datasets.Dataset`]):
            Rows of the task, which say what the answers are. Every position of a choice must have one and the same
            text in all rows (letters have), since a label belongs to a position.
        temperature (`float` or [`~first_trl.calibration.conditional.OptionTemperature`], *optional*, defaults to `1.0`):
            Post-hoc temperature that was fitted for this student; of one by type and number of options, the one of each
            type.
        adapter (`str`, *optional*):
            Subfolder of a LoRA adapter, where the config stands with the weights of its base. Stock transformers then
            needs one name only, and `transformers serve` answers with the adapter.

    Returns:
        [`~transformers.decision.DecisionConfig`]

    Raises:
        `ValueError`: where stock transformers would read another prompt or other tokens than the student was trained
            with; the message says which, and what can be done.
    """
    if not isinstance(temperature, OptionTemperature):
        temperature = OptionTemperature(check_temperature(temperature), {})
    if len(rows) == 0 or not any(rows["choices"]):
        raise ValueError("A decision model chooses among options; these rows have no choices.")
    labels, ids = _labels(rows, answer_token_ids_of_rows(processing_class, rows))
    texts = [_label_text(processing_class, text, token) for text, token in zip(labels, ids, strict=True)]
    kinds = task.decision_kinds
    front = processing_class.convert_ids_to_tokens(front_tokens(processing_class, [rows[0]["prompt"]]))
    config = DecisionConfig(
        labels={kind: texts[:2] if kind == "noul" else texts for kind in kinds},
        temperature={kind: temperature.scalars().get(kind, temperature.common) for kind in kinds},
        chat_template=decision_template(task, "".join(front)),
        # User text is read as it was in training: the template is the student's own and marks no borders in it
        sanitize_control_tokens=False,
        adapter=adapter,
    )
    _check_prompts(config, processing_class, rows)
    return config


def save_decision_config(
    folder: str | Path,
    task: Task,
    processing_class: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    temperature: float | OptionTemperature = 1.0,
    adapter: str | None = None,
) -> DecisionConfig:
    """
    Make a saved student a decision model: writes `decision.json` and `decision_template.jinja` beside its weights. A
    temperature that depends on the number of options goes into `first_trl_decision.json`, which
    [`~first_trl.answer_pipeline`] reads.

    Args:
        folder (`str` or `Path`):
            Where the student, or its LoRA adapter, was saved.
        task, processing_class, rows, temperature, adapter:
            As in [`decision_config`].

    Returns:
        [`~transformers.decision.DecisionConfig`]

    Raises:
        `ValueError`: as [`decision_config`].

    Warns:
        `UserWarning`: the temperature depends on the number of options, and says what stock transformers ignores of it.

    Example:

    ```python
    >>> from first_trl import get_task, save_decision_config
    >>> task = get_task("commonsense_qa")
    >>> save_decision_config("my-student", task, tokenizer, task.load("validation").dataset, temperature=1.4)
    >>> decide = pipeline("decision", model="my-student", tokenizer="my-student", decision_config="my-student")
    >>> decide({"state": "What absorbs ink?", "questions": {"answer": {
    ...     "type": "choice", "criteria": {"shirt pocket": None, "blotter": None}}}})["answer"]["choice"]
    'blotter'
    ```
    """
    config = decision_config(task, processing_class, rows, temperature=temperature, adapter=adapter)
    config.save_pretrained(folder)
    by_options = temperature if isinstance(temperature, OptionTemperature) else None
    write_decision_extras(
        folder, temperature=None, option_temperature=None if by_options is None else by_options.to_dict()
    )
    if by_options is not None and by_options.depends_on_options:
        given = ", ".join(f"{value:.3g} for {kind}" for kind, value in config.temperature.items())
        warnings.warn(
            "The temperature depends on the number of options, which decision.json cannot express: stock transformers "
            f"divides by {given}, whatever the number of options. answer_pipeline and first-trl evaluate read the rest "
            f"from {DECISION_EXTRAS_NAME}.",
            UserWarning,
            stacklevel=2,
        )
    return config


def remove_decision_config(folder: str | Path) -> None:
    """Take away what [`save_decision_config`] wrote for stock transformers, where it no longer holds."""
    for name in (DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def _labels(rows: Dataset, token_ids: Sequence[Sequence[int]]) -> tuple[list[str], list[int]]:
    """Text and token of the answer at each position, the same in all rows."""
    texts: dict[int, str] = {}
    tokens: dict[int, int] = {}
    for row, (choices, ids) in enumerate(zip(rows["choices"], token_ids, strict=True)):
        for place, (choice, token) in enumerate(zip(choices, ids, strict=True)):
            if texts.setdefault(place, choice) != choice or tokens.setdefault(place, token) != token:
                raise ValueError(
                    f"Row {row} answers {choice!r} at place {place + 1} where earlier rows answer {texts[place]!r}: a "
                    "decision model has one label for each place. Train with letters as answers "
                    "(completion=' {letter}'), or with one fixed list of choices."
                )
    return [texts[place] for place in sorted(texts)], [tokens[place] for place in sorted(tokens)]


def _label_text(processing_class: PreTrainedTokenizerBase, choice: str, token: int) -> str:
    """A text that stock transformers, which reads labels without a prompt before them, turns into the token."""
    for text in dict.fromkeys([choice, choice.strip(), str(processing_class.decode([token]))]):
        if text and processing_class(text, add_special_tokens=False)["input_ids"] == [token]:
            return text
    raise ValueError(
        f"The answer {choice!r} is the token {processing_class.convert_ids_to_tokens(token)!r} behind the prompt, and no "
        "text is this token alone: transformers reads labels without a prompt. Move the space: completion ' {letter}' "
        "and a prompt that ends without one, or the other way round."
    )


def _check_prompts(config: DecisionConfig, processing_class: PreTrainedTokenizerBase, rows: Dataset) -> None:
    checked = rows.select(range(min(len(rows), _CHECKED_ROWS)))
    wanted = encode_prompts(processing_class, checked["prompt"])
    # Preparing inputs adds sentinels to the tokenizer
    tokenizer = copy.deepcopy(processing_class)
    for number, (row, ids) in enumerate(zip(checked, wanted, strict=True)):
        ((inputs, _),) = config.prepare_inputs(decision_request(row), tokenizer)
        found = inputs["input_ids"][0].tolist()
        if found != ids:
            place = next(
                (i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids))
            )
            raise ValueError(
                f"Row {number}: as a decision model the student would read other tokens than in training, from token "
                f"{place} on ({processing_class.convert_ids_to_tokens(found[place : place + 3])} instead of "
                f"{processing_class.convert_ids_to_tokens(ids[place : place + 3])}). This tokenizer reads a text "
                "differently behind its special tokens; share the student without a decision config."
            )
