"""Post-hoc temperature of a language model, fitted over the whole vocabulary at answers or at every supervised token."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..calibration.errors import equal_width_ece
from ..calibration.partition import HIGHEST, LOG_BETAS, LOWEST, PartitionTable
from ..calibration.scores import brier_of
from ..calibration.temperature import TemperatureFit, search_temperature
from ..utils.processes import Share
from .multiple_choice import read_multiple_choice_rows
from .next_token import next_token_logits
from .supervised import read_supervised_rows, supervised_logits


def fit_posthoc_temperature(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    objective: str = "nll",
    batch_size: int = 32,
    max_length: int | None = None,
    n_bins: int = 10,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> TemperatureFit:
    """
    Temperature scaling of a trained model (Guo et al. 2017), on the full-vocabulary softmax at the answer position of
    multiple choice, or at every supervised token of tokenised rows.

    One pass over the data and 66 numbers an answer are enough: for each the log-partition log Σ exp(z/T) and its slope are
    kept at 33 temperatures and interpolated between them (cubic Hermite in log T), so the logits `[N, V]` are never held.
    The temperature agrees with the one fitted on the logits to about four digits.

    Args:
        model, processing_class, dataset, batch_size, max_length, n_bins, disable_tqdm, distributed:
            As in [`evaluate_multiple_choice`]; rows without an answer are left out. Where the dataset has `input_ids` and
            `labels`, as in [`evaluate_token_level`].
        objective (`str`, *optional*, defaults to `"nll"`):
            `"nll"` or `"ece"` (of the most likely token against the gold answer's).

    Returns:
        [`TemperatureFit`]: pass its `temperature` to the evaluation. T is searched from 1/8 to 16.

    Warns:
        `UserWarning`: below 1000 rows, when the ECE does not improve, when the end of the range is reached.
    """
    share = Share.of(distributed)
    options = {"batch_size": batch_size, "disable_tqdm": disable_tqdm, "share": share}
    gold_token, batches = _gold_and_logits(model, processing_class, dataset, max_length=max_length, **options)
    n = len(gold_token)
    partition, slope = np.empty((n, len(LOG_BETAS))), np.empty((n, len(LOG_BETAS)))
    gold_logit, correct, done = np.empty(n), np.empty(n, dtype=bool), np.zeros(n, dtype=bool)
    for index, logits in batches:
        done[index] = True
        best = logits.max(dim=-1, keepdim=True)
        z = logits - best.values
        gold = torch.from_numpy(gold_token[index]).to(z.device)
        gold_logit[index] = z.gather(-1, gold[:, None])[:, 0].cpu().double().numpy()
        correct[index] = (best.indices[:, 0] == gold).cpu().numpy()
        partition[index], slope[index] = partition_table(z)
    share.merge(done, [partition, slope, gold_logit, correct])
    table = PartitionTable(partition, slope)

    def scores(temperature: float) -> dict[str, float]:
        beta = 1.0 / temperature
        log_z = table.at(beta)
        # The largest logit is 0, so the confidence is 1 / Z.
        confidence = np.exp(-log_z)
        gold_logprob = beta * gold_logit - log_z
        sum_squares = np.exp(table.at(2.0 * beta) - 2.0 * log_z)
        return {
            "temperature": temperature,
            "ece": equal_width_ece(confidence, correct, n_bins),
            "nll": float(-gold_logprob.mean()),
            "brier": float(brier_of(sum_squares, np.exp(gold_logprob)).mean()),
        }

    return search_temperature(scores, n, objective=objective, low=LOWEST, high=HIGHEST)


def _gold_and_logits(
    model: Any, processing_class: Any, dataset: Dataset, *, max_length: int | None, **options: Any
) -> tuple[np.ndarray, Iterator[tuple[np.ndarray, torch.Tensor]]]:
    """The right token of every position to fit on, and batches of the logits there."""
    options["desc"] = "Fitting the temperature"
    if {"input_ids", "labels"} <= set(dataset.column_names):
        tokenised = read_supervised_rows(model, processing_class, dataset, max_length=max_length)
        return tokenised.token, supervised_logits(model, tokenised, **options)
    rows = read_multiple_choice_rows(model, processing_class, dataset, max_length=max_length)
    labelled = np.flatnonzero(rows.gold >= 0)
    gold_token = np.array([rows.choice_tokens[i][rows.gold[i]] for i in labelled])
    return gold_token, next_token_logits(model, [rows.prompt_ids[i] for i in labelled], **options)


def partition_table(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """
    Values and slopes of a [`~first_trl.calibration.partition.PartitionTable`].

    Args:
        logits (`torch.Tensor` of shape `[B, V]`, float32): The largest of a row is 0; `-inf` for what cannot be.
    """
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)
    values, slopes = np.empty((len(logits), len(LOG_BETAS))), np.empty((len(logits), len(LOG_BETAS)))
    for i, log_beta in enumerate(LOG_BETAS):
        beta = float(np.exp(log_beta))
        weights = (logits * beta).exp()
        total = weights.sum(dim=-1)
        values[:, i] = total.cpu().double().log().numpy()
        # d/d(log beta) = beta d/d(beta)
        slopes[:, i] = beta * ((weights * finite).sum(dim=-1) / total).cpu().double().numpy()
    return values, slopes
