"""What an answer owes to the order of the options: flips, the spread of the confidence, and answers averaged over orders."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.decision import DecisionConfig

from ..calibration import CalibrationWarning
from ..tasks.multiple_choice import MultipleChoice
from ..tasks.option_orders import has_free_order, option_orders
from ..tasks.system_one import DecisionQuestion
from .decisions import predict_decisions
from .multiple_choice import evaluate_multiple_choice
from .whole_answers import evaluate_whole_answers


@dataclass(frozen=True)
class OptionOrderResult:
    """
    Answers to the same questions in several orders, from [`evaluate_option_order`] or [`evaluate_decision_order`].

    Attributes:
        ids (`list[str]`): One a question.
        orders (`list[list[tuple[int, ...]]]`): Orders in which each question was asked; the first is that of the rows.
        probabilities (`list[np.ndarray]`): For each question `[orders, options]`, options in the order of the rows.
    """

    ids: list[str]
    orders: list[list[tuple[int, ...]]]
    probabilities: list[np.ndarray]

    @cached_property
    def report(self) -> dict[str, Any]:
        """See [`option_order_scores`]."""
        return option_order_scores(self.probabilities)

    @property
    def averaged(self) -> list[np.ndarray]:
        """Probabilities of the options, averaged over the orders of each question."""
        return [values.mean(axis=0) for values in self.probabilities]


def option_order_scores(probabilities: Sequence[np.ndarray]) -> dict[str, Any]:
    """
    How much answers depend on the order of the options.

    Args:
        probabilities (sequence of `np.ndarray`):
            For each question `[orders, options]`: what the model gives each option, options always in the same order; the
            first row belongs to the order that the others are compared with.

    Returns:
        `dict`:
        - `n`: questions that were asked in two or more orders; `n_orders`: mean number of orders of these.
        - `flip_rate`: share of the other orders in which the answer is another option than in the first order, mean over
          the questions. A model that always answers A has `(n! - (n-1)!) / (n! - 1)` under all orders of `n` options.
        - `any_flip`: share of questions with at least one other answer.
        - `confidence_spread`: standard deviation over the orders of the largest probability, mean over the questions.
    """
    several = [np.asarray(values) for values in probabilities if len(values) > 1]
    if not several:
        raise ValueError("No question was asked in two orders: ask for 2 permutations or more, of 2 options or more.")
    flips = [values.argmax(axis=1)[1:] != values[0].argmax() for values in several]
    return {
        "n": len(several),
        "n_orders": float(np.mean([len(values) for values in several])),
        "flip_rate": float(np.mean([flip.mean() for flip in flips])),
        "any_flip": float(np.mean([flip.any() for flip in flips])),
        "confidence_spread": float(np.mean([values.max(axis=1).std() for values in several])),
    }


def evaluate_option_order(
    model: Any,
    processing_class: Any,
    task: MultipleChoice,
    dataset: Dataset,
    *,
    permutations: int = 4,
    seed: int = 0,
    scoring: str = "token",
    length: str = "none",
    **options: Any,
) -> OptionOrderResult:
    """
    Ask every question with its options in several orders.

    The probabilities are those of the options alone (they sum to 1). A question has as many orders as its options allow,
    `permutations` at most: that of the rows, and others drawn by [`~first_trl.tasks.option_orders.option_orders`].

    Args:
        model, processing_class:
            As in [`evaluate_multiple_choice`].
        task ([`~first_trl.tasks.multiple_choice.MultipleChoice`]):
            What the rows are from; it writes the prompts.
        dataset ([`~datasets.Dataset`]):
            Rows of the task, with their `options`.
        permutations (`int`, *optional*, defaults to `4`):
            Orders a question.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the orders.
        scoring (`str`, *optional*, defaults to `"token"`), length (`str`, *optional*, defaults to `"none"`):
            `"choices"` scores whole texts under `length`, see [`evaluate_whole_answers`].
        options:
            Passed to the evaluation: `batch_size`, `temperature`, `max_length`, `disable_tqdm`, `distributed`.

    Returns:
        [`OptionOrderResult`]

    Raises:
        `ValueError`: rows of a task without lettered options, fewer than 2 permutations, or what the evaluation refuses.

    Example:

    ```python
    >>> from first_trl.evaluation.option_order import evaluate_option_order
    >>> task = get_task("commonsense_qa")
    >>> found = evaluate_option_order(model, tokenizer, task, task.load("validation").dataset, permutations=5)
    >>> found.report["flip_rate"], found.report["confidence_spread"]
    ```
    """
    if not isinstance(task, MultipleChoice) or "options" not in dataset.column_names:
        raise ValueError("Option order needs rows of a task with lettered options, such as commonsense_qa or custom.")
    _check_permutations(permutations)
    orders: list[list[tuple[int, ...]]] = []
    rows: list[dict[str, Any]] = []
    for row in dataset:
        several = permutations if has_free_order(row.get("kind")) else 1
        orders.append(_orders(len(row["options"]), several, seed, row["id"]))
        for number, order in enumerate(orders[-1]):
            example = task.reorder(row, order)
            # Which option is right does not enter, so questions without an answer are asked like all others
            asked = {"prompt": example.prompt, "choices": list(example.choices), "gold": 0}
            asked |= {"kind": row["kind"]} if row.get("kind") else {}
            rows.append({"id": f"{row['id']}-order-{number}", **asked})
    asked_rows = Dataset.from_list(rows)
    with warnings.catch_warnings():
        # About a calibration error of all orders together, which is not reported
        warnings.simplefilter("ignore", CalibrationWarning)
        if scoring == "choices":
            result = evaluate_whole_answers(model, processing_class, asked_rows, length=length, **options)
        else:
            result = evaluate_multiple_choice(model, processing_class, asked_rows, **options)
    scores = result.predictions.get("choice_scores", result.predictions["choice_logprobs"])
    probabilities, start = [], 0
    for own in orders:
        n = len(own[0])
        shown = scores[start : start + len(own), :n]
        shown = np.exp(shown - np.logaddexp.reduce(shown, axis=1, keepdims=True))
        # The option at place j of an order is option order[j] of the row
        probabilities.append(np.take_along_axis(shown, np.argsort(own, axis=1), axis=1))
        start += len(own)
    return OptionOrderResult([str(name) for name in dataset["id"]], orders, probabilities)


def evaluate_decision_order(
    model: Any,
    processing_class: Any,
    questions: Sequence[DecisionQuestion],
    config: DecisionConfig | None = None,
    *,
    permutations: int = 4,
    seed: int = 0,
    **options: Any,
) -> OptionOrderResult:
    """
    Ask System One questions with their options in several orders, of any decision model.

    Options of a `choice` are permuted; a `score` has its levels in order and a `noul` no options to list, so these are asked
    once.

    Args:
        model, processing_class, questions, config:
            As in [`~first_trl.evaluation.decisions.predict_decisions`].
        permutations (`int`, *optional*, defaults to `4`), seed (`int`, *optional*, defaults to `0`):
            As in [`evaluate_option_order`].
        options:
            Passed on: `temperature`, `batch_size`, `disable_tqdm`.

    Returns:
        [`OptionOrderResult`]
    """
    _check_permutations(permutations)
    orders, asked = [], []
    for question in questions:
        several = permutations if has_free_order(question.kind) else 1
        orders.append(_orders(len(question.options), several, seed, question.id))
        for number, order in enumerate(orders[-1]):
            request = question.request
            if question.kind == "choice":
                own = request["questions"][question.name]
                criteria = list(own["criteria"].items())
                shown = {**own, "criteria": dict(criteria[i] for i in order)}
                request = {**request, "questions": {question.name: shown}}
            # The options keep their places, and with them the probabilities that come back
            asked.append(dataclasses.replace(question, id=f"{question.id}-order-{number}", request=request))
    found = predict_decisions(model, processing_class, asked, config, **options)
    several_of = iter(found.probabilities)
    probabilities = [np.array([next(several_of) for _ in own]) for own in orders]
    return OptionOrderResult([question.id for question in questions], orders, probabilities)


def _check_permutations(permutations: int) -> None:
    if permutations < 2:
        raise ValueError(
            f"`permutations` must be at least 2, got {permutations}: the order of the rows is one of them."
        )


def _orders(n_options: int, permutations: int, seed: int, key: Any) -> list[tuple[int, ...]]:
    """The given order, and others."""
    given = tuple(range(n_options))
    drawn = option_orders(n_options, permutations, seed=seed, key=key)
    return [given, *(order for order in drawn if order != given)][:permutations]
