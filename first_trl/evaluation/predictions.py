"""Predictions of a multiple-choice evaluation and the report made from them; needs neither model nor torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration import calibration_report
from ..calibration.scores import brier_of
from ..plugins import METRICS
from .confidence import Confidences


# Predictions with one entry per choice
_RAGGED = frozenset({"choice_tokens", "choice_logprobs", "choice_scores"})


@dataclass(frozen=True)
class MultipleChoiceResult:
    """
    Predictions of [`evaluate_multiple_choice`], one entry per row in the order of the dataset, and their report.

    Attributes:
        predictions (`dict[str, np.ndarray]`):
            `id` (`str`), `gold` (index of the right choice, -1 = hidden), `n_choices`, `choice_tokens` and
            `choice_logprobs` `[N, C]` (full-vocabulary log-probability of each choice; rows with fewer choices are filled
            with -1 and `-inf`), `option_mass` (probability of all choices together), `answer` (index of the most likely
            choice), `top_token` and `top_prob` (most likely token of the whole vocabulary), `topk_mass` (probability of the k
            most likely tokens), `top_is_gold` (`bool`),
            `gold_logprob` (NaN where hidden), `sum_squares` (sum of p² over the vocabulary, for the Brier score) and
            `truncated` (`bool`). Of answers scored by their whole text see [`evaluate_whole_answers`].
        report (`dict`): see [`multiple_choice_report`].
    """

    predictions: dict[str, np.ndarray]
    report: dict[str, Any]

    def to_rows(self) -> list[dict[str, Any]]:
        """Predictions as one plain dictionary per row, ready for JSON lines; the filling of short rows is left out."""
        rows = []
        for i in range(len(self.predictions["id"])):
            row = {name: values[i].tolist() for name, values in self.predictions.items() if name != "id"}
            for name in _RAGGED & set(row):
                row[name] = row[name][: row["n_choices"]]
            row["gold_logprob"] = None if row["gold"] < 0 else row["gold_logprob"]
            rows.append({"id": str(self.predictions["id"][i]), **row})
        return rows

    def confidences(self, definition: str = "full_vocab", *, name: str = "multiple choice") -> Confidences:
        """
        Confidences of the rows with an answer, under one definition.

        | definition | answer | confidence |
        | --- | --- | --- |
        | `"full_vocab"` | most likely of all tokens | its probability (FIRST as its authors evaluate) |
        | `"choice"` | most likely choice | its probability among all tokens |
        | `"renormalized"` | most likely choice | its share of the choices' probability |
        | `"topk"` | most likely of all tokens | its share of the k most likely tokens' probability |

        Definitions that need whole strings or the choices without the question are in
        [`~first_trl.evaluation.choice_scoring.score_choices`].

        Args:
            definition (`str`, *optional*, defaults to `"full_vocab"`):
                One of the above.
            name (`str`, *optional*, defaults to `"multiple choice"`):
                Name of the result.
        """
        labelled = self.predictions["gold"] >= 0
        p = {key: values[labelled] for key, values in self.predictions.items()}
        extras = {"option_mass": float(p["option_mass"].mean())}
        if definition in ("choice", "renormalized"):
            scores = p.get("choice_scores", p["choice_logprobs"])
            answer = scores.argmax(axis=1)
            confidence, correct = np.exp(p["choice_logprobs"][np.arange(len(answer)), answer]), answer == p["gold"]
            if definition == "renormalized":
                confidence = np.exp(scores.max(axis=1) - np.logaddexp.reduce(scores, axis=1))
                extras |= {key: self.report["options"][key] for key in ("nll", "brier")}
        elif definition in ("full_vocab", "topk"):
            confidence, correct = p["top_prob"], p["top_is_gold"].astype(bool)
            if definition == "full_vocab":
                extras |= {key: self.report["full_vocab"][key] for key in ("nll", "brier")}
            elif "topk_mass" in p:
                confidence = np.minimum(confidence / p["topk_mass"], 1.0)
            else:
                raise ValueError(
                    "These predictions hold no 'topk_mass'; evaluate again with `evaluate_multiple_choice`."
                )
        else:
            raise ValueError(
                f"Unknown definition {definition!r} of a one-token answer: choose 'full_vocab', 'choice', 'renormalized' or "
                "'topk'."
            )
        hidden = int((~labelled).sum())
        dropped = {"without a gold answer": hidden} if hidden else {}
        return Confidences(name, confidence, correct, definition, extras, dropped)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], *, n_bins: int = 10) -> "MultipleChoiceResult":
        """Inverse of [`~MultipleChoiceResult.to_rows`]; the report is made again from the predictions."""
        if not rows:
            raise ValueError("There are no predictions.")
        for i, row in enumerate(rows):
            gold, n = row["gold"], len(row["choice_logprobs"])
            if isinstance(gold, bool) or not isinstance(gold, int | np.integer) or not -1 <= gold < n:
                raise ValueError(
                    f"Prediction {i}: gold is {gold!r}: it must be the index of the right one of {n} choices, counted from 0, "
                    "or -1 where none is known."
                )
        predictions = {name: [row[name] for row in rows] for name in rows[0]}
        arrays = {name: np.array(values) for name, values in predictions.items() if name not in _RAGGED}
        arrays["gold_logprob"] = np.array(predictions["gold_logprob"], dtype=np.float64)
        for name in _RAGGED & set(predictions):
            tokens = name == "choice_tokens"
            arrays[name] = fill_rows(predictions[name], *((-1, np.int64) if tokens else (-np.inf, np.float64)))
        return cls(arrays, multiple_choice_report(arrays, n_bins=n_bins))


def multiple_choice_report(predictions: Mapping[str, np.ndarray], *, n_bins: int = 10) -> dict[str, Any]:
    """
    Scores of stored predictions, over the rows whose answer is known.

    Args:
        predictions (`Mapping[str, np.ndarray]`):
            As in [`MultipleChoiceResult`].
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.

    Returns:
        `dict`: `n` (rows scored), `n_rows`, `n_unlabelled`, `n_truncated`, `option_mass` (mean), and for each of
        `full_vocab` and `options`: `accuracy`, `mean_confidence`, `ece` (top label), `trust` (accuracy - ECE), `nll` (nats,
        of the gold answer), `brier` (summed over the vocabulary, or the options) and `calibration`, the
        [`calibration_report`] of the confidences with its bins and options; and `scoring`, `"choices"` where answers were
        scored by their whole text (see [`evaluate_whole_answers`]), else `"token"`. Plain Python values.

    Raises:
        `ValueError`: when no row has an answer.
    """
    gold = np.asarray(predictions["gold"])
    labelled = gold >= 0
    if not labelled.any():
        raise ValueError("No row has a gold answer (all are -1): there is nothing to score. Use a labelled split.")
    p = {name: np.asarray(values)[labelled] for name, values in predictions.items()}
    gold = p["gold"]
    every = np.arange(len(gold))
    scores = p.get("choice_scores", p["choice_logprobs"])
    log_mass = np.logaddexp.reduce(scores, axis=1)
    options = np.exp(scores - log_mass[:, None])
    answer = options.argmax(axis=1)
    correct = answer == gold
    probabilities = np.exp(p["choice_logprobs"])
    return {
        "n": len(gold),
        "n_rows": len(labelled),
        "n_unlabelled": int((~labelled).sum()),
        "n_truncated": int(np.asarray(predictions["truncated"]).sum()),
        "option_mass": float(p["option_mass"].mean()),
        "scoring": "choices" if "choice_scores" in p else "token",
        "full_vocab": mean_scores(
            p["top_prob"],
            p["top_is_gold"],
            -p["gold_logprob"],
            brier_scores(p),
            n_bins,
        )
        | plugin_scores(p["top_prob"], p["top_is_gold"], probabilities, gold),
        "options": mean_scores(
            options[every, answer],
            correct,
            log_mass - scores[every, gold],
            brier_of(np.square(options).sum(axis=1), options[every, gold]),
            n_bins,
        )
        | plugin_scores(options[every, answer], correct, options, gold),
    }


def brier_scores(predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Brier score of each prediction over the whole vocabulary: the sum of (p - y)² with y the one-hot reference."""
    return brier_of(predictions["sum_squares"], np.exp(predictions["gold_logprob"]))


def mean_scores(
    confidence: np.ndarray, correct: np.ndarray, nll: np.ndarray, brier: np.ndarray, n_bins: int
) -> dict[str, Any]:
    """What a report says of one reading of the predictions."""
    calibration = calibration_report(confidence, correct.astype(np.int64), n_bins=n_bins)
    accuracy = float(correct.mean())
    return {
        "accuracy": accuracy,
        "mean_confidence": float(confidence.mean()),
        "ece": calibration["ece"],
        "trust": accuracy - calibration["ece"],
        "nll": float(nll.mean()),
        "brier": float(brier.mean()),
        "calibration": calibration,
    }


def plugin_scores(
    confidence: np.ndarray, correct: np.ndarray, probabilities: np.ndarray | None, gold: np.ndarray | None
) -> dict[str, float]:
    """
    Scores that plugins add, see [`register_metric`].

    Raises:
        `ValueError`: One of them is no finite number.
    """
    scores = {}
    for name, metric in METRICS.items():
        value = metric(confidence=confidence, correct=correct.astype(bool), probabilities=probabilities, gold=gold)
        if not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise ValueError(f"The report metric {name!r} gave {value!r}: it must return a finite number.")
        scores[name] = float(value)
    return scores


def fill_rows(rows: Sequence[Any], value: float, dtype: Any) -> np.ndarray:
    """Rows of different lengths as one array, short ones filled with `value`."""
    filled = np.full((len(rows), max(len(row) for row in rows)), value, dtype=dtype)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled
