"""Logits at the supervised positions of tokenised rows, for any causal language model and rows of any length."""

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..utils.processes import ALL, Share
from ..vocabulary import HAS_GOLD, IGNORE_INDEX, TEACHER_HAS_GOLD
from .next_token import context_length, evaluation_mode


# Logits held at a time; a chunk of positions has this many, 128 MiB in float32.
_MAX_LOGITS = 2**25


@dataclass(frozen=True)
class SupervisedRows:
    """
    Tokenised rows, and their supervised positions in the order of the dataset.

    Attributes:
        ids (`np.ndarray` of shape `[R]`): name of each row.
        input_ids (`list[list[int]]`): tokens of each row, cut to the longest length allowed.
        truncated (`np.ndarray` of shape `[R]`): whether the row was cut.
        n_cut (`int`): supervised positions that were cut off with the ends of those rows.
        row, position, token (`np.ndarray` of shape `[N]`): row of each supervised position, where in the row, and the
            reference token there. The distribution over it comes from the tokens before it.
    """

    ids: np.ndarray
    input_ids: list[list[int]]
    truncated: np.ndarray
    n_cut: int
    row: np.ndarray
    position: np.ndarray
    token: np.ndarray


def read_supervised_rows(
    model: Any, processing_class: Any, dataset: Dataset, *, max_length: int | None = None
) -> SupervisedRows:
    """
    Check the rows of a tokenised dataset and find their supervised positions.

    The first token of a row is never scored: nothing predicts it. Nor are the labels of prompts without an answer.

    Args:
        model, processing_class, dataset, max_length:
            As in [`evaluate_token_level`].

    Raises:
        `ValueError`: for missing columns, labels that do not belong to their tokens, tokens of another tokenizer, or no
            supervised position at all.
    """
    missing = [name for name in ("input_ids", "labels") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset lacks the columns {missing}; it has {dataset.column_names}. Tokenise it with `tokenize_rows`."
        )
    limit = context_length(model) if max_length is None else max_length
    if limit is not None and limit < 2:
        raise ValueError(f"`max_length` must be at least 2 (one token to read, one to predict), got {limit}.")
    n_tokens = min(model.get_output_embeddings().weight.shape[0], len(processing_class))
    names = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
    has_gold = answered(dataset)
    input_ids, rows, positions, tokens, truncated = [], [], [], [], []
    n_cut = 0
    for i, (ids, labels) in enumerate(zip(dataset["input_ids"], dataset["labels"], strict=True)):
        ids, labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        where = np.flatnonzero(labels != IGNORE_INDEX)
        if len(ids) != len(labels) or (labels[where] != ids[where]).any():
            raise ValueError(
                f"Row {i}: `labels` must be -100 or the token of `input_ids` at the same place, as `tokenize_rows` makes "
                "them; the model shifts them itself."
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_tokens:
            raise ValueError(
                f"Row {i} has the token {ids.max()}, but the model and tokenizer have {n_tokens}: the rows were "
                "tokenised with another model's tokenizer."
            )
        where = where[where >= 1] if has_gold[i] else where[:0]
        inside = where if limit is None else where[where < limit]
        n_cut += len(where) - len(inside)
        truncated.append(limit is not None and len(ids) > limit)
        input_ids.append(ids[:limit].tolist())
        rows.append(np.full(len(inside), i))
        positions.append(inside)
        tokens.append(ids[inside])
    if sum(map(len, rows)) == 0:
        raise ValueError(
            "No row has a supervised position behind its first token: there is nothing to score. Use a labelled split"
            + (f", or raise `max_length` (now {limit})." if n_cut else ".")
        )
    if any(truncated):
        warnings.warn(
            f"{sum(truncated)} of {len(truncated)} rows are longer than {limit} tokens and lose their end, {n_cut} "
            "supervised tokens in all. Use a model with a longer context or shorter rows.",
            UserWarning,
            stacklevel=3,
        )
    return SupervisedRows(
        np.array([str(name) for name in names]),
        input_ids,
        np.array(truncated),
        n_cut,
        np.concatenate(rows),
        np.concatenate(positions),
        np.concatenate(tokens),
    )


def answered(dataset: Dataset) -> np.ndarray:
    """Whether the label of each row is an answer, of tokenised rows and of a teacher cache; null means that it is."""
    found = np.ones(len(dataset), bool)
    for name in (HAS_GOLD, TEACHER_HAS_GOLD):
        if name in dataset.column_names:
            flags = dataset.with_format(None)[name]
            found &= np.array([flag is None or bool(flag) for flag in flags], bool)
    return found


def supervised_logits(
    model: Any,
    rows: SupervisedRows,
    *,
    batch_size: int,
    disable_tqdm: bool,
    desc: str,
    chunk_size: int | None = None,
    share: Share = ALL,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """
    Chunks of logits at the supervised positions, longest rows first.

    The backbone runs on batches of rows; only the hidden states of supervised positions go through the output head, a
    chunk at a time, so that neither `[B, T, V]` nor the logits `[N, V]` of the split are ever held.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model.
        rows ([`SupervisedRows`]):
            From [`read_supervised_rows`].
        chunk_size (`int`, *optional*):
            Positions whose logits are held at a time. Defaults to as many as fill 128 MiB in float32.
        share ([`~first_trl.utils.processes.Share`], *optional*):
            The batches of this process; all by default.

    Yields:
        `tuple`: indices into the positions, int64 `[C]`, and logits, float32 `[C, V]` on the head's device.

    Raises:
        `ValueError`: when logits are not finite, or when the model's own logits are not those of its backbone and head.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = _Head(base)
    device = model.get_input_embeddings().weight.device
    chunk_size = chunk_size or max(1, _MAX_LOGITS // head.module.weight.shape[0])
    scored, first, counts = np.unique(rows.row, return_index=True, return_counts=True)
    lengths = np.array([len(rows.input_ids[row]) for row in scored])
    order = np.argsort(-lengths, kind="stable")
    with evaluation_mode(model), torch.no_grad():
        shortest = order[-1]
        _check_head(model, head, rows.input_ids[scored[shortest]], int(rows.position[first[shortest]]) - 1, device)
        starts = share.part(range(0, len(order), batch_size))
        for start in tqdm(starts, desc=desc, disable=disable_tqdm):
            batch = order[start : start + batch_size]
            # A row is read up to the token before its last supervised one
            last = rows.position[first[batch] + counts[batch] - 1]
            input_ids = torch.zeros(len(batch), int(last.max()), dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for i, entry in enumerate(batch):
                input_ids[i, : last[i]] = torch.tensor(rows.input_ids[scored[entry]][: last[i]])
                attention_mask[i, : last[i]] = 1
            hidden = head.backbone(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
            ).last_hidden_state
            index = np.concatenate([np.arange(first[entry], first[entry] + counts[entry]) for entry in batch])
            line = torch.from_numpy(np.repeat(np.arange(len(batch)), counts[batch])).to(hidden.device)
            column = torch.from_numpy(rows.position[index] - 1).to(hidden.device)
            for at in range(0, len(index), chunk_size):
                part = slice(at, at + chunk_size)
                logits = head(hidden[line[part], column[part]])
                finite = torch.isfinite(logits.logsumexp(-1))
                if not finite.all():
                    row = rows.row[index[part][int((~finite).nonzero()[0])]]
                    raise ValueError(
                        f"The model's logits in row {row} are NaN or infinite. Load it in bfloat16 or float32, and check "
                        "its weights."
                    )
                yield index[part], logits


class _Head:
    """Output head of a model with what the model does to its logits; the module is called, so adapters on it count."""

    def __init__(self, model: Any) -> None:
        # Imported here: TRL, which the training package needs, is not needed by the other evaluations
        from ..losses.head import backbone, head_transform

        self.backbone, self.module = backbone(model), model.get_output_embeddings()
        self.scale, self.softcap = head_transform(model.config)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.module(hidden.to(self.module.weight.device)).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _check_head(model: Any, head: _Head, tokens: list[int], position: int, device: torch.device) -> None:
    """Some models do more behind their backbone, and prompt-learning adapters before it: better no number than a wrong one."""
    input_ids = torch.tensor([tokens[: position + 1]], device=device)
    options: dict[str, Any] = {"use_cache": False}
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(own.forward).parameters:
        options["logits_to_keep"] = 1
    expected = model(input_ids=input_ids, **options).logits[0, -1].float().log_softmax(-1)
    found = head(head.backbone(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1]).log_softmax(-1)
    # Rounding of a 16-bit head reaches a few hundredths
    tolerance = 1e-3 if head.module.weight.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((expected - found.to(expected.device)).exp().sub(1).abs().nan_to_num().max())
    if difference > tolerance:
        raise ValueError(
            f"{type(own).__name__}: the logits of the model and of its backbone and output head alone differ (by a factor "
            f"of {1 + difference:.3g}). Its head does something this evaluation does not know; evaluate it on multiple "
            "choice, and please report the architecture."
        )
