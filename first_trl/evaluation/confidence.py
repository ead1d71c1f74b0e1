"""
What "confidence" means: the definitions behind numbers that are all printed as "ECE", and a container for the outcome.

The distributions differ by more than any calibration method moves them: four letters that hold .30, .10, .06 and .04 of a
vocabulary are a confidence of .30 or of .60, and log-likelihoods of -2 and -3 over 4 and 10 characters change their order
when divided by the length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from ..calibration import calibration_report
from ..calibration.arrays import first_boolean
from ..calibration.notebook import CalibrationReport


DEFINITIONS = {
    "full_vocab": "probability of the most likely of all tokens; right when it is the answer's",
    "choice": "probability of the most likely choice itself, not renormalised",
    "renormalized": "softmax over the (summed) log-probabilities of the choices",
    "length_normalized": "softmax over log-probabilities divided by the length of the choice",
    "unconditional": "softmax over log-probabilities minus those without the question",
    "topk": "first entry of the k captured probabilities, renormalised over the k",
}
REDUCTIONS = {
    "product": "probability of the whole answer",
    "geometric_mean": "mean token log-probability, exponentiated",
    "min": "probability of the least likely token",
}


def choice_scores(
    logprobs: Any, *, definition: str = "renormalized", lengths: Any = None, unconditional: Any = None
) -> np.ndarray:
    """
    Confidence in each choice of one question.

    | definition | elsewhere |
    | --- | --- |
    | `"choice"` | p(letter): the probability of the letter among all tokens |
    | `"renormalized"` | over letters: Kadavath et al. 2022; over answer strings: `prob_norm` and `acc` of lm-evaluation-harness |
    | `"length_normalized"` | `acc_norm` (characters), `acc_bytes` (bytes), HELM (tokens) |
    | `"unconditional"` | `acc_mutual_info`, HELM's calibrated form |
    | `"topk"` | users of an API's top logprobs; the cached teacher of FIRST |

    Args:
        logprobs (`array-like` of shape `[C]`):
            Log-probability of each choice (summed over its tokens), in nats.
        definition (`str`, *optional*, defaults to `"renormalized"`):
            One of the above.
        lengths (`array-like` of shape `[C]`, *optional*):
            Length of each choice in the unit wanted; for `"length_normalized"`.
        unconditional (`array-like` of shape `[C]`, *optional*):
            Log-probability of each choice without the question; for `"unconditional"`.

    Returns:
        `np.ndarray` of shape `[C]`: confidences. They sum to 1, except for `"choice"`.

    Raises:
        `ValueError`: for an unknown definition, a missing argument, or log-probabilities that are none.

    Example:

    ```python
    >>> from first_trl.evaluation.confidence import choice_scores
    >>> choice_scores([-2.0, -3.0]).round(3).tolist()
    [0.731, 0.269]
    >>> choice_scores([-2.0, -3.0], definition="length_normalized", lengths=[4, 10]).round(3).tolist()
    [0.45, 0.55]

    ```
    """
    known = [name for name in DEFINITIONS if name != "full_vocab"]
    if definition not in known:
        raise ValueError(f"Unknown confidence definition {definition!r} of a choice, choose one of {known}.")
    lp = _logprobs(logprobs, "logprobs")
    if definition == "choice":
        return np.exp(lp)
    if definition == "length_normalized":
        if lengths is None:
            raise ValueError("'length_normalized' needs `lengths`: characters, bytes or tokens of each choice.")
        divisor = np.asarray(lengths, dtype=np.float64)
        if divisor.shape != lp.shape or not (divisor > 0).all():
            raise ValueError(f"`lengths` must be one number above 0 for each of the {len(lp)} choices, got {lengths}.")
        lp = lp / divisor
    elif definition == "unconditional":
        if unconditional is None:
            raise ValueError("'unconditional' needs `unconditional`: the log-probabilities without the question.")
        without = _logprobs(unconditional, "unconditional")
        if without.shape != lp.shape:
            raise ValueError(f"`unconditional` has {len(without)} entries for {len(lp)} choices.")
        with np.errstate(invalid="ignore"):
            lp = lp - without
        if np.isnan(lp).any():
            raise ValueError("A choice is impossible with and without the question: their ratio is undefined.")
    elif definition == "topk" and (np.diff(lp) > 0).any():
        raise ValueError("'topk' needs log-probabilities sorted to fall: the first entry is the answer.")
    if not np.isfinite(lp).any():
        raise ValueError("Every choice has the probability 0: there is nothing to renormalise.")
    shifted = np.exp(lp - lp.max())
    return shifted / shifted.sum()


def sequence_confidence(token_logprobs: Sequence[Any], *, reduction: str = "product") -> np.ndarray:
    """
    One confidence per generated answer, from the log-probabilities of its tokens.

    Args:
        token_logprobs (`Sequence` of `array-like`):
            For each answer the log-probability of every token it consists of, the end token included if it belongs.
        reduction (`str`, *optional*, defaults to `"product"`):
            `"product"`, `"geometric_mean"` or `"min"`. They are different questions; the first is the only probability.

    Returns:
        `np.ndarray` of shape `[N]`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"Unknown reduction {reduction!r}, choose one of {list(REDUCTIONS)}.")
    values = []
    for number, row in enumerate(token_logprobs):
        lp = _logprobs(row, f"token_logprobs[{number}]")
        total = {"product": lp.sum(), "geometric_mean": lp.mean(), "min": lp.min()}[reduction]
        values.append(math.exp(total))
    if not values:
        raise ValueError("There is no answer to score.")
    return np.array(values)


def _logprobs(values: Any, name: str) -> np.ndarray:
    lp = np.asarray(values, dtype=np.float64)
    if lp.ndim != 1 or lp.size == 0:
        raise ValueError(f"`{name}` must be a non-empty list of numbers, got the shape {lp.shape}.")
    bad = np.flatnonzero(np.isnan(lp) | (lp > 1e-6))
    if bad.size:
        raise ValueError(f"`{name}` entry {bad[0]} is {lp[bad[0]]}: a log-probability is a number <= 0.")
    return np.minimum(lp, 0.0)


@dataclass(frozen=True)
class Confidences:
    """
    Confidences and outcomes of one model on one set of questions (or tokens), ready to be scored.

    Attributes:
        name (`str`): what to call it in a report.
        confidence (`np.ndarray` of shape `[N]`): in [0, 1].
        correct (`np.ndarray` of shape `[N]`): bool.
        definition (`str`): what the confidence is.
        extras (`dict`): other scores that need more than confidences, such as `nll` and `brier` over the choices.
        dropped (`dict[str, int]`): rows left out, by reason.
    """

    name: str
    confidence: np.ndarray
    correct: np.ndarray
    definition: str
    extras: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.confidence.shape != self.correct.shape or self.confidence.ndim != 1:
            raise ValueError(
                f"{self.name}: {self.confidence.shape} confidences and {self.correct.shape} outcomes do not fit together."
            )
        if len(self.confidence) == 0:
            raise ValueError(
                f"{self.name}: there is no row to score{f' (dropped: {dict(self.dropped)})' if self.dropped else ''}."
            )

    def report(self, **options: Any) -> dict[str, Any]:
        """[`calibration_report`] with `definition`, `extras` and `dropped` beside it."""
        report = calibration_report(self.confidence, self.correct.astype(np.int64), **options)
        return CalibrationReport(
            {"definition": self.definition, **report, "extras": dict(self.extras), "dropped": dict(self.dropped)}
        )


def gold_indices(gold: Sequence[int | None]) -> np.ndarray:
    """
    The column `gold` of a multiple-choice dataset as int64: index of the right choice, -1 where hidden (also for null).

    Raises:
        `ValueError`: for a boolean, which would be read as the first or second choice; for a text or a fraction.
    """
    if (row := first_boolean(gold)) is not None:
        raise ValueError(
            f"Row {row} has a boolean as `gold`: it must be the index of the right choice, -1 where hidden."
        )
    known = [-1 if index is None else index for index in gold]
    for row, index in enumerate(known):
        if not isinstance(index, Real) or not float(index).is_integer():
            raise ValueError(
                f"Row {row} has {index!r} as `gold`: it must be the index of the right choice, counted from 0, -1 where hidden."
            )
    return np.array(known, dtype=np.int64)


def answers_to_confidences(
    name: str,
    scores: Sequence[np.ndarray],
    gold: Sequence[int | Sequence[int]],
    *,
    definition: str,
    dropped: Mapping[str, int] | None = None,
) -> Confidences:
    """
    Top-label confidences from the confidence in each choice, with NLL and Brier score over the choices where they are a
    distribution and every question has one right answer.

    Args:
        name (`str`):
            Name of the result.
        scores (`Sequence[np.ndarray]`):
            Confidence in each choice, one array per question; lengths may differ.
        gold (`Sequence`):
            Index of the right choice, or a list of indices where several count.
        definition (`str`):
            The definition the scores follow.
        dropped (`Mapping[str, int]`, *optional*):
            Rows left out before, by reason.
    """
    for row, g in enumerate(gold):
        if first_boolean(np.reshape(np.asarray(g, dtype=object), -1)) is not None:
            raise ValueError(
                f"{name}: gold of row {row} is {g!r}: it must be the index of the right choice, no boolean."
            )
    answer = np.array([int(np.argmax(row)) for row in scores], dtype=np.int64)
    confidence = np.array([float(row[i]) for row, i in zip(scores, answer, strict=True)])
    right = [{g} if isinstance(g, int | np.integer) else set(g) for g in gold]
    correct = np.array([int(i) in g for i, g in zip(answer, right, strict=True)], dtype=bool)
    extras: dict[str, float] = {}
    if definition != "choice" and scores and all(len(g) == 1 for g in right):
        targets = [next(iter(g)) for g in right]
        p_gold = np.array([row[g] for row, g in zip(scores, targets, strict=True)])
        squares = np.array([float(np.square(row).sum()) for row in scores])
        if (p_gold > 0).all():
            extras["nll"] = float(-np.log(p_gold).mean())
        extras["brier"] = float((squares - 2.0 * p_gold + 1.0).mean())
    return Confidences(name, confidence, correct, definition, extras, dropped or {})
