"""
Scores of predicted distributions over options, against gold answers that may be distributions themselves.

"Calibrated to what?" has two answers when annotators disagree, and both are given. Against *drawn* labels: of the
questions answered with confidence .8, labels drawn from the gold should agree with the answer 80 % of the time. Against
the *argmax*: the answer should be the gold's most likely option 80 % of the time. A model that matches unsure gold exactly
has a drawn ECE of 0 and a large argmax ECE.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..calibration import expected_calibration_error
from ..calibration.distribution import check_distribution


# Questions with the same names of options from which on these have a prior of their own
_LEAST_SHARED = 10


@dataclass(frozen=True)
class OptionPredictions:
    """
    Distributions over the options of questions, and what they are scored against.

    Attributes:
        ids (`list[str]`): One a question.
        kinds (`list[str]`): `choice`, `score` (ordered options) or `noul` (yes or no).
        probabilities (`list[np.ndarray]`): Predicted, each of shape `(n_options,)`.
        gold (`list[np.ndarray]`): Gold distribution of each question; one-hot where the answer is one option.
        options (`list[tuple[str, ...]]`): Names of the options, for the prior; may be empty.
    """

    ids: list[str]
    kinds: list[str]
    probabilities: list[np.ndarray]
    gold: list[np.ndarray]
    options: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not n:
            raise ValueError("There is no question to score.")
        if not len(self.kinds) == len(self.probabilities) == len(self.gold) == n:
            raise ValueError(
                f"{n} ids, {len(self.kinds)} kinds, {len(self.probabilities)} predictions and {len(self.gold)} gold "
                "answers: there must be one of each for every question."
            )
        for name, p, q in zip(self.ids, self.probabilities, self.gold, strict=True):
            check_distribution(p, f"Question {name!r}: the prediction")
            check_distribution(q, f"Question {name!r}: the gold")
            if len(p) != len(q):
                raise ValueError(f"Question {name!r}: {len(p)} predicted probabilities for {len(q)} gold ones.")


def distribution_scores(predictions: OptionPredictions, *, n_bins: int = 10) -> dict[str, Any]:
    """
    Mean scores over all questions.

    Args:
        predictions ([`OptionPredictions`]): What is scored.
        n_bins (`int`, *optional*, defaults to `10`): Equal-width bins of both ECEs.

    Returns:
        `dict`:
        - `n`: questions; `mean_confidence`: mean of the largest probability.
        - `accuracy`: share of questions whose most likely option is the gold's most likely one (the first of equals).
        - `accuracy_drawn`: the gold probability of the answer, that is the accuracy for a label drawn from the gold.
        - `nll`: `-Σ q log p`, nats. `kl`: `Σ q log(q / p)`, nats. Infinite where the gold has an option of probability 0.
        - `brier`: `Σ (p - q)²`, which is the usual Brier score where the gold is one option.
        - `ece_argmax`, `ece_drawn`: the calibration error of the largest probability against `accuracy` and against
          `accuracy_drawn` (its expectation over draws, so there is no noise of drawing).
        - `rps`: ranked probability score of the `score` questions, `Σ (P - Q)² / (n_options - 1)` with cumulative sums
          `P`, `Q` (Epstein 1969; 0 is best, 1 the worst); `None` when there is none.
    """
    p = [check_distribution(values, "p") for values in predictions.probabilities]
    q = [check_distribution(values, "q") for values in predictions.gold]
    answer = np.array([values.argmax() for values in p])
    confidence = np.minimum([values.max() for values in p], 1.0)
    right = np.array([values.argmax() == a for values, a in zip(q, answer, strict=True)])
    drawn = np.array([values[a] for values, a in zip(q, answer, strict=True)])
    cross = np.array([_cross_entropy(b, a) for a, b in zip(p, q, strict=True)])
    entropy = np.array([_cross_entropy(b, b) for b in q])
    ranked = [
        float(np.square(a.cumsum() - b.cumsum())[:-1].sum() / max(len(a) - 1, 1))
        for kind, a, b in zip(predictions.kinds, p, q, strict=True)
        if kind == "score"
    ]
    return {
        "n": len(p),
        "accuracy": float(right.mean()),
        "accuracy_drawn": float(drawn.mean()),
        "mean_confidence": float(confidence.mean()),
        "nll": float(cross.mean()),
        "kl": float((cross - entropy).mean()),
        "brier": float(np.mean([np.square(a - b).sum() for a, b in zip(p, q, strict=True)])),
        "ece_argmax": float(expected_calibration_error(confidence, right, n_bins=n_bins)),
        "ece_drawn": _drawn_ece(confidence, drawn, n_bins),
        "rps": float(np.mean(ranked)) if ranked else None,
    }


def _cross_entropy(q: np.ndarray, p: np.ndarray) -> float:
    held = q > 0
    with np.errstate(divide="ignore"):
        return float(-(q[held] * np.log(p[held])).sum())


def _drawn_ece(confidence: np.ndarray, drawn: np.ndarray, n_bins: int) -> float:
    """Calibration error against outcomes that are probabilities: each row counts as right by a share, wrong by the rest."""
    both = np.concatenate([np.ones_like(drawn), np.zeros_like(drawn)])
    weights = np.concatenate([drawn, 1.0 - drawn])
    held = weights > 0
    twice = np.concatenate([confidence, confidence])
    return float(
        expected_calibration_error(twice[held], both[held].astype(int), n_bins=n_bins, sample_weight=weights[held])
    )


def baselines(predictions: OptionPredictions) -> dict[str, OptionPredictions]:
    """
    What answers without reading the question score, to stand beside every model.

    Returns:
        `dict`: `uniform`, the same probability for every option; `prior`, the mean gold distribution of the questions with
        the same type and options: by name where 10 questions or more have the same names, else by number and place. The
        prior is that of the scored questions themselves, so it is a little better than a prior could be that had not seen
        them.
    """
    named: list[Hashable] = [
        (kind, predictions.options[i] if predictions.options else len(predictions.gold[i]))
        for i, kind in enumerate(predictions.kinds)
    ]
    # The prior of a question of its own would be its answer
    often = {name for name, count in Counter(named).items() if count >= _LEAST_SHARED}
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, (kind, q) in enumerate(zip(predictions.kinds, predictions.gold, strict=True)):
        groups[named[i] if named[i] in often else (kind, len(q))].append(i)
    prior: list[np.ndarray] = [np.empty(0)] * len(predictions.ids)
    for rows in groups.values():
        mean = np.mean([predictions.gold[i] for i in rows], axis=0)
        for i in rows:
            prior[i] = mean
    uniform = [np.full(len(q), 1.0 / len(q)) for q in predictions.gold]
    return {
        name: OptionPredictions(predictions.ids, predictions.kinds, values, predictions.gold, predictions.options)
        for name, values in (("uniform", uniform), ("prior", prior))
    }
