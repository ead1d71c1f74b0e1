"""The best any model could do, where the true answer distribution is known."""

from typing import Any

import numpy as np
from datasets import Dataset

from ...evaluation.multiple_choice import MultipleChoiceResult, multiple_choice_report
from ...tasks import answer_token_ids_of_rows


def true_posterior(rows: Dataset, tokenizer: Any, *, n_bins: int = 10) -> MultipleChoiceResult:
    """Predictions of a model that knows the `posterior` of every row."""
    probabilities = np.array(rows["posterior"])
    gold = np.array(rows["gold"])
    tokens = np.array(answer_token_ids_of_rows(tokenizer, rows))
    answer = probabilities.argmax(axis=1)
    every = np.arange(len(gold))
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities)
    predictions = {
        "id": np.array(rows["id"]),
        "gold": gold,
        "n_choices": np.full(len(gold), probabilities.shape[1]),
        "choice_tokens": tokens,
        "choice_logprobs": logprobs,
        "option_mass": probabilities.sum(axis=1),
        "answer": answer,
        "top_token": tokens[every, answer],
        "top_prob": probabilities[every, answer],
        "top_is_gold": answer == gold,
        "gold_logprob": logprobs[every, gold],
        "sum_squares": (probabilities**2).sum(axis=1),
        "truncated": np.zeros(len(gold), bool),
    }
    return MultipleChoiceResult(predictions, multiple_choice_report(predictions, n_bins=n_bins))
