"""
System One requests with gold answers, as JSON lines: what decision models are asked and compared on.

One request a line, in the format of `pipeline("decision")`, and beside it the gold answer of each question:

```json
{"id": "case-1", "state": "I was charged twice.", "questions": {
    "refund": {"type": "noul", "instructions": "Is a refund requested?"},
    "tone": {"type": "choice", "criteria": {"calm": null, "angry": "Raised voice"}},
    "urgency": {"type": "score", "criteria": ["Can wait", "This week", "Today"]}},
 "gold": {"refund": true, "tone": {"calm": 0.7, "angry": 0.3}, "urgency": 2}}
```

A gold answer is one option (its name; a level's number; `true` or `false`), a distribution (`{option: probability}` or a
list in the order of the options; for `noul` also the probability of yes), or an answer in the format that decision models
give. `answers` may stand for `gold`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.distribution import check_distribution
from .base import Example
from .custom import Custom


KINDS = ("choice", "score", "noul")


@dataclass(frozen=True)
class DecisionQuestion:
    """
    One question of a request.

    Attributes:
        id (`str`): Of the request and the question: `case-1/tone`.
        kind (`str`): `choice`, `score` or `noul`.
        request (`dict`): The request with this question alone.
        name (`str`): Of the question in the request.
        options (`tuple[str, ...]`): Names in order; `0`, `1`, ... for levels, `true` and `false` for `noul`.
        gold (`np.ndarray` of shape `(n_options,)` or `None`): Gold distribution.
    """

    id: str
    kind: str
    request: dict[str, Any]
    name: str
    options: tuple[str, ...]
    gold: np.ndarray | None


def read_requests(path: str | Path, *, gold_required: bool = True) -> list[DecisionQuestion]:
    """
    The questions of a file of System One requests.

    Args:
        path (`str` or `Path`): JSON lines, one request each.
        gold_required (`bool`, *optional*, defaults to `True`): Whether every question must have a gold answer.

    Raises:
        `ValueError`: A line that is no request, a question of an unknown type or without options, a gold answer that is not
            one; the message names the line and the question.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"There is no file {str(path)!r} with System One requests.")
    found: list[DecisionQuestion] = []
    seen: set[str] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}); write one request a line.") from None
        for question in _questions(row, where, str(number), gold_required):
            if question.id in seen:
                raise ValueError(f"{where}: the id {question.id!r} stands twice; give each request its own.")
            seen.add(question.id)
            found.append(question)
    if not found:
        raise ValueError(f"{file.name} has no request.")
    return found


def _questions(row: Any, where: str, number: str, gold_required: bool) -> list[DecisionQuestion]:
    if not isinstance(row, Mapping) or "state" not in row or not isinstance(row.get("questions"), Mapping):
        raise ValueError(f'{where} is no request: it needs "state" and "questions" ({{name: question}}).')
    if not row["questions"]:
        raise ValueError(f"{where} asks no question.")
    answers = row.get("gold", row.get("answers")) or {}
    if not isinstance(answers, Mapping):
        raise ValueError(f'{where}: "gold" maps the names of questions to answers, got {answers!r}.')
    unknown = [name for name in answers if name not in row["questions"]]
    if unknown:
        raise ValueError(f"{where}: gold names {unknown[0]!r}, which is no question ({', '.join(row['questions'])}).")
    found = []
    for name, question in row["questions"].items():
        place = f"{where}, question {name!r}"
        kind = question.get("type") if isinstance(question, Mapping) else None
        if kind not in KINDS:
            raise ValueError(f"{place}: the type must be one of {', '.join(KINDS)}, got {kind!r}.")
        options = _options(kind, question.get("criteria"), place)
        gold = answers.get(name)
        if gold is None and gold_required:
            raise ValueError(f'{place} has no gold answer; add it under "gold".')
        request = {key: value for key, value in row.items() if key in ("state", "assets")}
        found.append(
            DecisionQuestion(
                f"{row.get('id', number)}/{name}",
                kind,
                {**request, "questions": {name: dict(question)}},
                str(name),
                options,
                None if gold is None else _gold(kind, gold, options, place),
            )
        )
    return found


def _options(kind: str, criteria: Any, place: str) -> tuple[str, ...]:
    if kind == "noul":
        return ("true", "false")
    if kind == "choice":
        if not isinstance(criteria, Mapping) or not criteria:
            raise ValueError(f"{place}: criteria map options to descriptions or null, got {criteria!r}.")
        return tuple(map(str, criteria))
    if not isinstance(criteria, list) or not criteria:
        raise ValueError(f"{place}: criteria list the levels, lowest first, got {criteria!r}.")
    return tuple(str(level) for level in range(len(criteria)))


def _gold(kind: str, gold: Any, options: tuple[str, ...], place: str) -> np.ndarray:
    if isinstance(gold, Mapping) and gold.get("type") in KINDS:  # as a decision model answers
        if "probabilities" in gold:
            gold = gold["probabilities"]
        else:
            gold = gold.get({"choice": "choice", "noul": "noul", "score": "score"}[kind])
    if isinstance(gold, Mapping):
        # JSON writes the options of a yes-or-no question in two ways
        named = {str(key).lower() if kind == "noul" else str(key): value for key, value in gold.items()}
        strange = [key for key in named if key not in options]
        if strange:
            raise ValueError(f"{place}: gold names {strange[0]!r}, which is none of {', '.join(options)}.")
        return _distribution([named.get(option, 0.0) for option in options], place)
    if isinstance(gold, list):
        if len(gold) != len(options):
            raise ValueError(f"{place}: {len(gold)} gold probabilities for {len(options)} options.")
        return _distribution(gold, place)
    if kind == "noul" and not isinstance(gold, bool) and isinstance(gold, int | float):
        return _distribution([gold, 1 - gold], place)
    key = str(gold).lower() if kind == "noul" else str(gold)
    if kind == "score" and isinstance(gold, float) and gold.is_integer():
        key = str(int(gold))
    if (isinstance(gold, bool) and kind != "noul") or key not in options:
        raise ValueError(f"{place}: the gold {gold!r} is none of {', '.join(options)}.")
    return np.eye(len(options))[options.index(key)]


def _distribution(values: list[Any], place: str) -> np.ndarray:
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"{place}: gold probabilities must be numbers, got {values}.")
    try:
        return check_distribution(values, "it")
    except ValueError as error:
        raise ValueError(f"{place}: the gold {values} is no distribution: {error}") from None


@dataclass(frozen=True)
class SystemOne(Custom):
    """
    The questions of a file of requests as rows that a student is trained and evaluated on, their gold distributions as soft
    labels (`target_probs`). The right answer is the most likely option, of equal ones the first.

    The prompt is the one that the student's `decision_template.jinja` renders for the same request: state and instructions,
    and a lettered line for each option with its description, each level, or `true` and `false`. Files, splits and
    `shuffle_seed` are as in the task `custom`; slices count questions. Questions of one request share its id as `group`, for
    `unseen: group`.
    """

    name = "system_one"
    splits = {split: split for split in ("train", "validation", "test", "ood")}
    unlabelled_splits = ()
    decision_kinds = KINDS

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterable[tuple[str, dict[str, Any] | Example | None]]:
        for number, (where, row) in enumerate(super().rows(split, path, revision, seed)):
            for question in [] if row is None else _questions(row, where, f"{split}-{number}", True):
                yield where, {"id": question.id, "asked": question}

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        asked: DecisionQuestion = row["asked"]
        question = asked.request["questions"][asked.name]
        text = "\n".join(filter(None, map(_text, (asked.request["state"], question.get("instructions")))))
        criteria = question.get("criteria") or {}
        if asked.kind == "score":
            lines = [_text(level) for level in criteria]
        else:
            described = [(option, _text(criteria.get(option))) for option in asked.options]
            lines = [f"{option}: {description}" if description else option for option, description in described]
        assert asked.gold is not None
        example = self.fill(text, lines, int(np.argmax(asked.gold)), group=asked.id.removesuffix(f"/{asked.name}"))
        return replace(example, target_probs=tuple(asked.gold.tolist()), kind=asked.kind)


def _text(value: Any) -> str:
    """As templates of transformers write it."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
