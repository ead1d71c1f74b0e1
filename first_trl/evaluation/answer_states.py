"""
What a model says and how it got there, at the answer position of each row: enough to score it at any temperature, one a
row, and to measure how new the row is, without another forward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from ..calibration.partition import LOG_BETAS, PartitionTable
from ..utils.processes import Share
from ..vocabulary import IGNORE_INDEX
from .multiple_choice import MultipleChoiceRows, read_multiple_choice_rows
from .next_token import next_token_states
from .posthoc import partition_table
from .predictions import MultipleChoiceResult, fill_rows, multiple_choice_report
from .supervised import answered


# Entries of which the predictions hold the mass
_TOP_K = 5


def candidate_layers(n_layers: int) -> list[int]:
    """Layers that a distance is tried on where none are named: a quarter, half, three quarters and all of the depth."""
    return sorted({math.ceil(n_layers * quarter / 4) for quarter in range(1, 5)})


@dataclass(frozen=True)
class AnswerStates:
    """
    Logits and hidden states at the answer position of `N` rows. The largest logit of a row counts as 0.

    Attributes:
        gold (`np.ndarray`): Index of the right choice, -1 = hidden.
        n_choices, choice_tokens `[N, C]`, choice_logits `[N, C]` (`np.ndarray`): Rows with fewer are filled with -1 and
            `-inf`.
        top_token (`np.ndarray`), top_logits `[N, 5]` (`np.ndarray`): Most likely tokens of the whole vocabulary.
        partition, slope (`np.ndarray` of shape `[N, 33]`): The [`~first_trl.calibration.partition.PartitionTable`].
        truncated (`np.ndarray`): Whether the prompt was cut.
        states (`dict[int, np.ndarray]`): Layer -> hidden states `[N, H]`, of one length, float16.
    """

    gold: np.ndarray
    n_choices: np.ndarray
    choice_tokens: np.ndarray
    choice_logits: np.ndarray
    top_token: np.ndarray
    top_logits: np.ndarray
    partition: np.ndarray
    slope: np.ndarray
    truncated: np.ndarray
    states: dict[int, np.ndarray]

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def table(self) -> PartitionTable:
        """Log-partition functions of the whole vocabulary."""
        return PartitionTable(self.partition.astype(np.float64), self.slope.astype(np.float64))

    def labelled(self) -> "AnswerStates":
        """The rows with an answer."""
        return self.rows(np.flatnonzero(self.gold >= 0))

    def rows(self, index: np.ndarray) -> "AnswerStates":
        """Some of the rows."""
        values = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "states"}
        return AnswerStates(**values, states={layer: states[index] for layer, states in self.states.items()})

    @property
    def right(self) -> np.ndarray:
        """Logit of the right answer; all rows must have one."""
        return self.choice_logits[np.arange(len(self)), self.gold].astype(np.float64)

    @property
    def right_token(self) -> np.ndarray:
        """Token of the right answer; all rows must have one."""
        return self.choice_tokens[np.arange(len(self)), self.gold]

    def max_probability(self) -> np.ndarray:
        """Probability of the most likely token at T = 1."""
        return np.exp(-self.table.at(1.0))

    def result(self, ids: np.ndarray, temperature: float | np.ndarray, *, n_bins: int = 10) -> MultipleChoiceResult:
        """
        Predictions and scores at one temperature, or one a row, as
        [`~first_trl.evaluation.multiple_choice.evaluate_multiple_choice`] gives them (the logarithms to about four digits).

        Args:
            ids (`np.ndarray` of shape `[N]`): Names of the rows.
            temperature (`float` or `np.ndarray` of shape `[N]`): Divides the logits.
            n_bins (`int`, *optional*, defaults to 10): Equal-width bins of the ECE.
        """
        beta = np.broadcast_to(1.0 / np.asarray(temperature, np.float64), len(self))
        log_z = self.table.at(beta)
        with np.errstate(invalid="ignore"):
            choice_logprobs = beta[:, None] * self.choice_logits - log_z[:, None]
        labelled = self.gold >= 0
        every, gold = np.arange(len(self)), np.where(labelled, self.gold, 0)
        predictions = {
            "id": ids,
            "gold": self.gold,
            "n_choices": self.n_choices,
            "choice_tokens": self.choice_tokens,
            "choice_logprobs": choice_logprobs,
            "option_mass": np.exp(choice_logprobs).sum(1),
            "answer": choice_logprobs.argmax(1),
            "top_token": self.top_token,
            "top_prob": np.exp(-log_z),
            "topk_mass": np.exp(beta[:, None] * self.top_logits - log_z[:, None]).sum(1),
            "top_is_gold": labelled & (self.top_token == self.choice_tokens[every, gold]),
            "gold_logprob": np.where(labelled, choice_logprobs[every, gold], np.nan),
            "sum_squares": np.exp(self.table.at(2.0 * beta) - 2.0 * log_z),
            "truncated": self.truncated,
        }
        return MultipleChoiceResult(predictions, multiple_choice_report(predictions, n_bins=n_bins))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self) if f.name != "states"}
        save_file(tensors | {f"states.{layer}": states for layer, states in self.states.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "AnswerStates":
        """The inverse of [`save`]."""
        tensors = load_file(path)
        states = {int(name.split(".")[1]): tensors.pop(name) for name in list(tensors) if name.startswith("states.")}
        return cls(**tensors, states=states)


def collect_answer_states(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> AnswerStates:
    """
    One pass of a model over multiple-choice rows, or over tokenised rows (`input_ids`, `labels`), whose one choice is the
    first supervised token.

    Args:
        model, processing_class, dataset, batch_size, max_length, disable_tqdm, distributed:
            As in [`~first_trl.evaluation.multiple_choice.evaluate_multiple_choice`].
        layers (`Sequence[int]`):
            Transformer blocks behind which states are read, from 1.

    Raises:
        `ValueError`: as there, and for a layer that the model does not have.
    """
    if {"input_ids", "labels"} <= set(dataset.column_names):
        rows = _tokenised_rows(dataset)
    else:
        rows = read_multiple_choice_rows(model, processing_class, dataset, max_length=max_length)
    n = len(rows.gold)
    choice_tokens = fill_rows(rows.choice_tokens, -1, np.int64)
    choice_logits = np.full(choice_tokens.shape, -np.inf, np.float32)
    top_token, top_logits = np.zeros(n, np.int64), np.full((n, _TOP_K), -np.inf, np.float32)
    partition, slope = np.zeros((n, len(LOG_BETAS)), np.float32), np.zeros((n, len(LOG_BETAS)), np.float32)
    states: list[Any] = [None for _ in layers]
    share, done = Share.of(distributed), np.zeros(n, dtype=bool)
    batches = next_token_states(
        model,
        rows.prompt_ids,
        layers,
        batch_size=batch_size,
        disable_tqdm=disable_tqdm,
        desc="Reading states",
        share=share,
    )
    for index, logits, hidden in batches:
        done[index] = True
        best = logits.topk(min(_TOP_K, logits.shape[-1]), dim=-1)
        z = logits - best.values[:, :1]
        tokens = choice_tokens[index]
        gathered = z.gather(-1, torch.from_numpy(np.maximum(tokens, 0)).to(z.device)).cpu().numpy()
        choice_logits[index] = np.where(tokens >= 0, gathered, -np.inf)
        top_token[index] = best.indices[:, 0].cpu().numpy()
        top_logits[index, : best.values.shape[1]] = (best.values - best.values[:, :1]).cpu().numpy()
        partition[index], slope[index] = partition_table(z)
        for i, state in enumerate(hidden):
            if states[i] is None:
                states[i] = np.zeros((n, state.shape[-1]), np.float16)
            # Of one length, since a few channels of some models are beyond 16 bits
            unit = state.float() / state.float().norm(dim=-1, keepdim=True).clamp_min(1e-30)
            states[i][index] = (unit * math.sqrt(state.shape[-1])).half().cpu().numpy()
    width = _width(model)
    states = [np.zeros((n, width), np.float16) if state is None else state for state in states]
    share.merge(done, [choice_logits, top_token, top_logits, partition, slope, *states])
    return AnswerStates(
        rows.gold, np.array([len(tokens) for tokens in rows.choice_tokens]), choice_tokens, choice_logits, top_token,
        top_logits, partition, slope, rows.truncated, dict(zip(layers, states, strict=True)),
    )  # fmt: skip


def layer_count(model: Any) -> int:
    """Transformer blocks of a model."""
    return int(model.config.get_text_config().num_hidden_layers)


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _tokenised_rows(dataset: Dataset) -> MultipleChoiceRows:
    prompts, tokens = [], []
    for i, (ids, labels) in enumerate(zip(dataset["input_ids"], dataset["labels"], strict=True)):
        first = next((at for at, label in enumerate(labels) if label != IGNORE_INDEX and at > 0), None)
        if first is None:
            raise ValueError(
                f"Row {i} has no supervised token behind its first one: there is no answer position to read."
            )
        prompts.append(list(ids[:first]))
        tokens.append([int(labels[first])])
    gold = np.where(answered(dataset), 0, -1)
    names = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
    ids = np.array([str(name) for name in names])
    return MultipleChoiceRows(ids, gold, prompts, tokens, np.zeros(len(dataset), bool))
