"""Batches of tokens with the teacher's recalibrated targets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .._trl_compat import DataCollatorForLanguageModeling
from ..cache.choices import LOG_ZERO
from ..cache.schema import (
    CHOICE_INDEX,
    DRAW_COUNTS,
    DRAW_IDS,
    MUTUAL_INFORMATION,
    SOFT_LABELS,
    TAIL_LOGPROB,
    TOPK_IDS,
    TOPK_LOGPROBS,
)
from ..losses.inputs import check_targets
from ..plugins import estimator_target
from ..recalibration import Recalibration
from ..vocabulary import IGNORE_INDEX, NO_ENTRY, TEACHER_HAS_GOLD
from .alignment import DRAW_LENGTHS


@dataclass
class DataCollatorForDistillation(DataCollatorForLanguageModeling):
    """
    [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`] that also returns the teacher's targets, flat over
    the supervised positions of the batch in row-major order:

    - `"teacher_ids"`: int64 of shape `(N, k)`.
    - `"teacher_log_target"`: float32 of shape `(N, k)`, recalibrated and normalised for the estimator. For the
      `"sampled"` estimator, the log of each id's share of the draws, and `-inf` where a position has fewer distinct
      draws than `k`.
    - `"teacher_tail_log_target"`: float32 of shape `(N,)`, for the `"bucket"` estimator only.
    - `"teacher_has_gold"`: bool of shape `(N,)`, whether the label is an answer. Where every row of the dataset has
      one, it is left out.
    - `"teacher_weight"`: float32 of shape `(N,)`, with `disagreement_weight` only.
    - `"teacher_positions"`: int64 of shape `(N,)`, with `head_size` only: see [`place_targets`].

    N is the number of labels other than -100, the first token of each document aside. Examples without teacher
    columns (a plain evaluation set) give a plain batch.

    Args:
        recalibration ([`Recalibration`]):
            Rescale of the raw cached probabilities.
        estimator (`str`, *optional*, defaults to `"topk"`):
            Estimator the targets are made for.
        top_k (`int`, *optional*):
            Number of cached entries to use.
        head_size (`int`, *optional*):
            Rows of the student's head: the targets are then checked here, on the CPU and in a worker, and the step of
            training checks nothing.
        soft_label_weight (`float`, *optional*):
            Share of the soft labels in the target, where rows hold them beside a teacher.
        disagreement_weight (`float`, *optional*, defaults to 0):
            Positions count `exp(-disagreement_weight * I)`, with `I` the disagreement of a committee of teachers in nats.

    Raises:
        `ValueError`: The teacher columns do not belong to the labels, hold what is no log-probability, or an id that
            the head does not have.
    """

    recalibration: Recalibration = field(default_factory=Recalibration)
    estimator: str = "topk"
    top_k: int | None = None
    head_size: int | None = None
    soft_label_weight: float | None = None
    disagreement_weight: float = 0.0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        # Nothing predicts the first token; with it masked, what is counted, scored and cached is the same set
        batch["labels"][:, 0] = IGNORE_INDEX
        if TOPK_IDS in examples[0] and estimator_target(self.estimator) != "draws":
            self._add_top_k(batch, examples)
        elif DRAW_IDS in examples[0] and estimator_target(self.estimator) == "draws":
            self._add_draws(batch, examples)
        if self.disagreement_weight and MUTUAL_INFORMATION in examples[0] and "teacher_ids" in batch:
            information = _flat(examples, MUTUAL_INFORMATION, np.float64)
            if len(information) != len(batch["teacher_ids"]):
                raise _misaligned(len(batch["teacher_ids"]), {MUTUAL_INFORMATION: len(information)})
            batch["teacher_weight"] = torch.from_numpy(np.exp(-self.disagreement_weight * information)).float()
        if self.head_size is not None and "teacher_ids" in batch:
            place_targets(batch, self.head_size)
        if TEACHER_HAS_GOLD in examples[0]:
            batch[TEACHER_HAS_GOLD] = torch.from_numpy(_flat(examples, TEACHER_HAS_GOLD, np.bool_))
        return batch

    def _add_top_k(self, batch: dict[str, Any], examples: list[dict[str, Any]]) -> None:
        ids = _flat(examples, TOPK_IDS, np.int64)
        logprobs = _flat(examples, TOPK_LOGPROBS, np.float64)
        tail = _flat(examples, TAIL_LOGPROB, np.float64)
        positions = _count_supervised(batch)
        k = len(ids) // max(positions, 1)
        if len(ids) != positions * k or len(logprobs) != positions * k or len(tail) != positions:
            raise _misaligned(positions, {TOPK_IDS: len(ids), TOPK_LOGPROBS: len(logprobs), TAIL_LOGPROB: len(tail)})
        if positions == 0:
            log_target, tail_log_target = (
                np.empty((0, 1)),
                np.empty(0) if estimator_target(self.estimator) == "tail" else None,
            )
        else:
            log_target, tail_log_target = self.recalibration.apply(
                logprobs.reshape(positions, k), tail, estimator=self.estimator, top_k=self.top_k
            )
            # Smoothing can take all that rank 1 has: an entry of probability 0 is no padding
            filled = logprobs.reshape(positions, k)[:, : log_target.shape[1]] == NO_ENTRY
            log_target = np.where(filled, log_target, np.maximum(log_target, LOG_ZERO))
        ids = ids.reshape(positions, -1 if k else 1)[:, : log_target.shape[1]]
        if CHOICE_INDEX in examples[0] and positions:
            ids, log_target, tail_log_target = self._over_choices(examples, ids, log_target, tail_log_target)
        batch["teacher_ids"] = torch.from_numpy(np.ascontiguousarray(ids))
        batch["teacher_log_target"] = torch.from_numpy(log_target).float()
        if tail_log_target is not None:
            batch["teacher_tail_log_target"] = torch.from_numpy(tail_log_target).float()

    def _over_choices(
        self, examples: list[dict[str, Any]], ids: np.ndarray, log_target: np.ndarray, tail: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Entries in the order of the choices, padding last, with the share of the soft labels."""
        index = _flat(examples, CHOICE_INDEX, np.int64).reshape(ids.shape)
        with np.errstate(divide="ignore"):
            if SOFT_LABELS in examples[0]:
                soft = np.log(_flat(examples, SOFT_LABELS, np.float64).reshape(ids.shape))
                own, others = np.log(self.soft_label_weight or 0.0), np.log1p(-(self.soft_label_weight or 0.0))
                log_target = np.logaddexp(others + log_target, own + soft)
                tail = None if tail is None else others + tail
        # A choice of probability 0 is no padding
        log_target = np.where(index < 0, -np.inf, np.maximum(log_target, LOG_ZERO))
        order = np.argsort(np.where(index < 0, ids.shape[1], index), axis=1, kind="stable")
        return np.take_along_axis(ids, order, 1), np.take_along_axis(log_target, order, 1), tail

    def _add_draws(self, batch: dict[str, Any], examples: list[dict[str, Any]]) -> None:
        if DRAW_LENGTHS in examples[0]:
            lengths = _flat(examples, DRAW_LENGTHS, np.int64)
        else:
            lengths = np.array([len(entry) for example in examples for entry in example[DRAW_IDS]], np.int64)
        ids, counts = _flat(examples, DRAW_IDS, np.int64), _flat(examples, DRAW_COUNTS, np.float64)
        positions = _count_supervised(batch)
        if len(lengths) != positions or not len(ids) == len(counts) == lengths.sum():
            raise _misaligned(positions, {DRAW_IDS: len(lengths)})
        if positions and (lengths.min() < 1 or counts.min() < 1):
            raise ValueError(
                f"A supervised position has no teacher draw, or one that was drawn 0 times (`{DRAW_COUNTS}`). Capture "
                "the cache again with `num_draws`."
            )
        width = int(lengths.max()) if positions else 1
        row = np.repeat(np.arange(positions), lengths)
        slot = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        padded_ids = np.zeros((positions, width), np.int64)
        padded_ids[row, slot] = ids
        log_target = np.full((positions, width), -np.inf)
        log_target[row, slot] = np.log(counts) - np.log(np.bincount(row, counts, positions))[row]
        batch["teacher_ids"] = torch.from_numpy(padded_ids)
        batch["teacher_log_target"] = torch.from_numpy(log_target).float()


@dataclass
class LabelTargetCollator:
    """
    A collator whose batches also hold their labels as targets, see [`label_targets`].

    Args:
        collator (`Callable`):
            Makes the batch.
        head_size (`int`):
            Rows of the model's head.
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    head_size: int

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.collator(examples)
        batch |= label_targets(batch["labels"])
        place_targets(batch, self.head_size)
        return batch


def label_targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Labels as targets, named as by [`DataCollatorForDistillation`]: the KL divergence from a target that is one at the
    label is the label's negative log-likelihood.

    Args:
        labels (`torch.Tensor` of shape `(batch, seq_len)`, int64):
            -100 where unsupervised.
    """
    following = labels[:, 1:]
    ids = following[following != IGNORE_INDEX][:, None]
    return {"teacher_ids": ids, "teacher_log_target": torch.zeros_like(ids, dtype=torch.float32)}


def place_targets(batch: dict[str, Any], head_size: int) -> None:
    """
    Adds `"teacher_positions"` to a batch: where the hidden states of its targets are when batch and sequence are one
    dimension. Found here, they cost the device no wait for their number.

    Args:
        batch (`dict`):
            Labels, of shape `(batch, seq_len)`, and targets.
        head_size (`int`):
            Rows of the model's head.

    Raises:
        `ValueError`: What [`~first_trl.losses.inputs.check_targets`] refuses.
    """
    labels = batch["labels"]
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    check_targets(
        batch["teacher_ids"],
        batch["teacher_log_target"],
        head_size,
        tail_log_target=batch.get("teacher_tail_log_target"),
        labels=labels[rows, columns + 1],
        position_weight=batch.get("teacher_weight"),
    )
    batch["teacher_positions"] = rows * labels.shape[1] + columns


def _count_supervised(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum())


def _misaligned(positions: int, entries: dict[str, int]) -> ValueError:
    return ValueError(
        f"A batch has {positions} supervised positions, which the lengths of its teacher columns do not fit "
        f"({entries}): labels and teacher columns no longer belong together. Run `verify_teacher_cache` on the "
        "dataset, and do not edit `labels` after the capture."
    )


def _flat(examples: list[dict[str, Any]], name: str, dtype: type) -> np.ndarray:
    """One column of all examples as one flat array, whether its inner lists are flattened already or not."""
    parts: list[np.ndarray] = []
    for example in examples:
        values = example[name]
        if len(values) and isinstance(values[0], list | np.ndarray):
            values = np.concatenate([np.asarray(value) for value in values])
        parts.append(np.asarray(values, dtype).reshape(-1))
    return np.concatenate(parts)
