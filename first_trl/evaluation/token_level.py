"""Calibration of next tokens: every supervised token of free text, as in the Alpaca experiment of FIRST."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..calibration.intervals import clustered_intervals
from ..calibration.temperature import check_temperature
from ..utils.processes import Share
from .confidence import Confidences
from .predictions import brier_scores, mean_scores, plugin_scores
from .supervised import read_supervised_rows, supervised_logits


@dataclass(frozen=True)
class TokenLevelResult:
    """
    Predictions of [`evaluate_token_level`], one entry per scored token in the order of the dataset, and their report.

    Attributes:
        predictions (`dict[str, np.ndarray]`):
            `id` (of the row), `row` (its index in the dataset), `position` (of the token in the row), `gold_token` (the
            reference), `top_token` and `top_prob` (most likely token of the whole vocabulary), `top_is_gold` (`bool`),
            `gold_logprob` and `sum_squares` (sum of p² over the vocabulary, for the Brier score).
        report (`dict`): see [`token_level_report`].
    """

    predictions: dict[str, np.ndarray]
    report: dict[str, Any]

    def to_rows(self) -> list[dict[str, Any]]:
        """Predictions as one plain dictionary per scored token; `id` and `row` say which tokens belong together."""
        names = list(self.predictions)
        columns = [values.tolist() for values in self.predictions.values()]
        return [dict(zip(names, entry, strict=True)) for entry in zip(*columns, strict=True)]

    def confidences(self, definition: str = "full_vocab", *, name: str = "token level") -> Confidences:
        """
        Confidences in the most likely of all tokens, and whether they are the reference.

        Args:
            definition (`str`, *optional*, defaults to `"full_vocab"`):
                The only one there is: free text has no choices.
            name (`str`, *optional*, defaults to `"token level"`):
                Name of the result.
        """
        if definition != "full_vocab":
            raise ValueError(f"Token-level predictions have no definition {definition!r}, only 'full_vocab'.")
        extras = {key: self.report["full_vocab"][key] for key in ("nll", "brier")}
        p = self.predictions
        return Confidences(name, p["top_prob"], p["top_is_gold"], "full_vocab", extras)


def evaluate_token_level(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    temperature: float = 1.0,
    max_length: int | None = None,
    n_bins: int = 10,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> TokenLevelResult:
    """
    Evaluate a causal language model on every supervised token of tokenised rows, given the reference text before it.

    Right = the most likely of all tokens is the reference token, confidence = its probability. There are no options, so
    the report has the full-vocabulary reading only. Tokens of one row are not independent: intervals that treat them so
    are too narrow, take [`row_intervals`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, used where it is and in its dtype; the softmax is in float32. Its train/eval mode is
            given back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, the one the rows were tokenised with.
        dataset ([`~datasets.Dataset`]):
            Rows as [`~first_trl.tasks.tokenize_rows`] makes them: `input_ids`, `labels` (-100 where not scored) and, where
            there is one, `id`.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward; rows of like length go together.
        temperature (`float`, *optional*, defaults to `1.0`):
            Logits are divided by it (see [`fit_posthoc_temperature`]).
        max_length (`int`, *optional*):
            Longer rows lose tokens at the end. Defaults to the context length of the model. Cut rows are counted and
            reported in a warning.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the batches over the processes of the launch. Every process must call, and every one gets the whole
            result, the same as of one process.

    Returns:
        [`TokenLevelResult`]

    Raises:
        `ValueError`: for missing columns, labels that do not belong to their tokens, no supervised token, or logits that
            are not finite.

    Example:

    ```python
    >>> from first_trl.evaluation.token_level import evaluate_token_level
    >>> from first_trl.tasks import get_task, tokenize_rows
    >>> rows = tokenize_rows(get_task("alpaca").load("train[95%:]").dataset, tokenizer).dataset
    >>> evaluate_token_level(model, tokenizer, rows).report["full_vocab"]["ece"]
    ```
    """
    temperature = check_temperature(temperature)
    rows = read_supervised_rows(model, processing_class, dataset, max_length=max_length)
    n = len(rows.row)
    top_token = np.empty(n, np.int64)
    top_logprob, gold_logprob, sum_squares = np.empty(n), np.empty(n), np.empty(n)
    share, done = Share.of(distributed), np.zeros(n, dtype=bool)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "disable_tqdm": disable_tqdm,
        "desc": "Evaluating",
        "share": share,
    }
    for index, logits in supervised_logits(model, rows, **options):
        done[index] = True
        lp = torch.log_softmax(logits / temperature, dim=-1)
        gold = torch.from_numpy(rows.token[index]).to(lp.device)
        best = lp.max(dim=-1)
        top_token[index] = best.indices.cpu().numpy()
        top_logprob[index] = best.values.cpu().double().numpy()
        gold_logprob[index] = lp.gather(-1, gold[:, None])[:, 0].cpu().double().numpy()
        sum_squares[index] = (2.0 * lp).exp().sum(dim=-1).cpu().double().numpy()
    share.merge(done, [top_token, top_logprob, gold_logprob, sum_squares])
    predictions = {
        "id": rows.ids[rows.row],
        "row": rows.row,
        "position": rows.position,
        "gold_token": rows.token,
        "top_token": top_token,
        "top_prob": np.exp(top_logprob),
        "top_is_gold": top_token == rows.token,
        "gold_logprob": gold_logprob,
        "sum_squares": sum_squares,
    }
    report = token_level_report(
        predictions,
        n_rows=len(rows.input_ids),
        n_truncated=int(rows.truncated.sum()),
        n_cut=rows.n_cut,
        n_bins=n_bins,
    )
    return TokenLevelResult(predictions, report)


def token_level_report(
    predictions: Mapping[str, np.ndarray], *, n_rows: int, n_truncated: int = 0, n_cut: int = 0, n_bins: int = 10
) -> dict[str, Any]:
    """
    Scores of stored predictions.

    Args:
        predictions (`Mapping[str, np.ndarray]`):
            As in [`TokenLevelResult`].
        n_rows (`int`), n_truncated (`int`), n_cut (`int`):
            Rows of the dataset, those of them that were cut, and the supervised tokens lost with that.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.

    Returns:
        `dict`: `unit` (`"token"`), `n` (tokens scored), `n_rows`, `n_unlabelled` (rows without a scored token),
        `n_truncated`, `n_cut`, and `full_vocab` with `accuracy`, `mean_confidence`, `ece` (top label), `trust`
        (accuracy - ECE), `nll` (nats, of the reference token), `brier` (summed over the vocabulary) and `calibration`, the
        [`calibration_report`] of the confidences. Plain Python values.
    """
    p = {name: np.asarray(values) for name, values in predictions.items()}
    return {
        "unit": "token",
        "n": len(p["row"]),
        "n_rows": n_rows,
        "n_unlabelled": n_rows - len(np.unique(p["row"])),
        "n_truncated": n_truncated,
        "n_cut": n_cut,
        "full_vocab": mean_scores(p["top_prob"], p["top_is_gold"], -p["gold_logprob"], brier_scores(p), n_bins)
        | plugin_scores(p["top_prob"], p["top_is_gold"], None, None),
    }


def row_intervals(
    predictions: Mapping[str, np.ndarray],
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    n_bins: int = 10,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    Intervals of token-level scores over whole rows, since tokens of one row are not independent: those of
    [`~first_trl.calibration.intervals.clustered_intervals`]. Of a single row there are none.

    Args:
        predictions (`Mapping[str, np.ndarray]`):
            As in [`TokenLevelResult`]; `row` says what belongs together.
        level (`float`, *optional*, defaults to `0.95`):
            Level of the intervals.
        n_resamples (`int`, *optional*, defaults to `1000`):
            Draws for the interval of the ECE.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Returns:
        `dict`: lower and upper limit of `accuracy`, `mean_confidence`, `ece`, `trust`, and, where three rows or more have right
            and wrong tokens, `nll` and `brier`.
    """
    p = {name: np.asarray(values) for name, values in predictions.items()}
    found = clustered_intervals(
        p["row"],
        np.minimum(p["top_prob"], 1.0),
        p["top_is_gold"].astype(np.float64),
        {"nll": -p["gold_logprob"], "brier": brier_scores(p)},
        level=level,
        n_resamples=n_resamples,
        n_bins=n_bins,
        seed=seed,
    )
    return found | {name: (max(found[name][0], 0.0), found[name][1]) for name in ("nll", "brier") if name in found}
