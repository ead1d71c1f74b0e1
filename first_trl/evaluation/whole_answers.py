"""Evaluation of answers of any number of tokens: predictions and report, as those of one-token answers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from .choice_scoring import check_length, score_choices
from .predictions import MultipleChoiceResult, fill_rows, multiple_choice_report


def evaluate_whole_answers(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    length: str = "none",
    batch_size: int = 32,
    temperature: float = 1.0,
    max_length: int | None = None,
    n_bins: int = 10,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> MultipleChoiceResult:
    """
    Evaluate a causal language model on multiple choice, by the probability of each choice's whole text.

    The counterpart of [`evaluate_multiple_choice`] for choices of several tokens. The answer is the choice with the
    highest score under `length`; two readings of it are reported:

    | reading | confidence | NLL | Brier |
    | --- | --- | --- | --- |
    | `full_vocab` | probability of the answer's text among all texts | of the gold text | over the choices and one class for every other text |
    | `options` | softmax of the scores over the choices | of the same | over the choices |

    A choice that another one begins with (`" cat"`, `" cat fish"`) is never less likely than that one, and the two together
    may have a mass above 1: end such choices with a mark (`" cat."`).

    Args:
        model, processing_class, dataset, batch_size, max_length, chat_template_kwargs, disable_tqdm, distributed:
            As in [`~first_trl.evaluation.choice_scoring.score_choices`].
        length (`str`, *optional*, defaults to `"none"`):
            `"none"`: the probability of the text as it is, which is what a model trained on the answers predicts.
            `"tokens"`, `"characters"`, `"bytes"`: its logarithm divided by the length, which does not favour short choices.
            `"unconditional"`: minus the log-probability without the question (behind the begin-of-sequence token alone).
        temperature (`float`, *optional*, defaults to `1.0`):
            The logits of every token are divided by it.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.

    Returns:
        [`MultipleChoiceResult`]: its predictions hold `choice_scores`, whose softmax are the options' probabilities, and
        no `choice_tokens`, `top_token` and `topk_mass`.

    Raises:
        `ValueError`: see [`~first_trl.evaluation.choice_scoring.score_choices`]; or no row has an answer.

    Example:

    ```python
    >>> from first_trl.evaluation.whole_answers import evaluate_whole_answers
    >>> rows = get_task("openbook_qa", completion=" {text}").load("test").dataset
    >>> evaluate_whole_answers(model, tokenizer, rows, length="tokens").report["options"]["ece"]
    ```
    """
    check_length(length)
    found = score_choices(
        model,
        processing_class,
        dataset,
        unconditional_prompt="" if length == "unconditional" else None,
        batch_size=batch_size,
        temperature=temperature,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        disable_tqdm=disable_tqdm,
        distributed=distributed,
    )
    logprobs = fill_rows(found.logprobs, -np.inf, np.float64)
    scores = fill_rows(found.scores(length), -np.inf, np.float64)
    every, labelled = np.arange(len(found.gold)), found.gold >= 0
    answer, mass = scores.argmax(axis=1), np.exp(logprobs).sum(axis=1)
    predictions = {
        "id": np.array(found.ids),
        "gold": found.gold,
        "n_choices": np.array([len(row) for row in found.logprobs]),
        "choice_logprobs": logprobs,
        "choice_scores": scores,
        "option_mass": mass,
        "answer": answer,
        "top_prob": np.exp(logprobs[every, answer]),
        "top_is_gold": labelled & (answer == found.gold),
        "gold_logprob": np.where(labelled, logprobs[every, np.maximum(found.gold, 0)], np.nan),
        "sum_squares": np.exp(2.0 * logprobs).sum(axis=1) + np.square(np.maximum(1.0 - mass, 0.0)),
        "truncated": found.truncated,
    }
    return MultipleChoiceResult(predictions, multiple_choice_report(predictions, n_bins=n_bins) | {"length": length})
