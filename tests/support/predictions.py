"""Made-up predictions with a known gap between confidence and accuracy."""

import numpy as np

from first_trl.evaluation.multiple_choice import MultipleChoiceResult, multiple_choice_report


def predictions(n: int, gap: float = 0.0, seed: int = 0) -> MultipleChoiceResult:
    """Confidences that are `gap` too high on average, over four choices that hold all the mass."""
    rng = np.random.default_rng(seed)
    top = rng.uniform(0.3, 0.9, n)
    right = rng.random(n) < top - gap
    rest = (1 - top) / 3
    logprobs = np.log(np.stack([top, rest, rest, rest], 1))
    gold = np.where(right, 0, rng.integers(1, 4, n))
    values = {
        "id": np.array([str(i) for i in range(n)]),
        "gold": gold,
        "n_choices": np.full(n, 4),
        "choice_tokens": np.tile(np.arange(3, 7), (n, 1)),
        "choice_logprobs": logprobs,
        "option_mass": np.ones(n),
        "answer": np.zeros(n, int),
        "top_token": np.full(n, 3),
        "top_prob": top,
        "topk_mass": np.ones(n),
        "top_is_gold": right,
        "gold_logprob": logprobs[np.arange(n), gold],
        "sum_squares": np.exp(2 * logprobs).sum(1),
        "truncated": np.zeros(n, bool),
    }
    return MultipleChoiceResult(values, multiple_choice_report(values))
