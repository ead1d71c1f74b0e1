"""Batches of tokens with the teacher's recalibrated targets."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..recalibration import Recalibration
from ..teacher.schema import IGNORE_INDEX, TAIL_LOGPROB, TOPK_IDS, TOPK_LOGPROBS


@dataclass
class DataCollatorForDistillation(DataCollatorForLanguageModeling):
    """
    [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`] that also returns the teacher's targets, flat over
    the supervised positions of the batch in row-major order:

    - `"teacher_ids"`: int64 of shape `(N, k)`.
    - `"teacher_log_target"`: float32 of shape `(N, k)`, recalibrated and normalised for the estimator.
    - `"teacher_tail_log_target"`: float32 of shape `(N,)`, for the `"bucket"` estimator only.

    N is the number of labels other than -100, the first token of each document aside. Examples without teacher
    columns (a plain evaluation set) give a plain batch.

    Args:
        recalibration ([`Recalibration`]):
            Rescale of the raw cached probabilities.
        estimator (`str`, *optional*, defaults to `"topk"`):
            Estimator the targets are made for.
        top_k (`int`, *optional*):
            Number of cached entries to use.
    """

    recalibration: Recalibration = field(default_factory=Recalibration)
    estimator: str = "topk"
    top_k: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        # Nothing predicts the first token; with it masked, what is counted, scored and cached is the same set
        batch["labels"][:, 0] = IGNORE_INDEX
        if TOPK_IDS not in examples[0]:
            return batch
        expected = int((batch["labels"] != IGNORE_INDEX).sum())
        counts = {
            name: sum(len(example[name]) for example in examples) for name in (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB)
        }
        if any(count != expected for count in counts.values()):
            raise ValueError(
                f"A batch has {expected} supervised positions but teacher entries {counts}: labels and teacher columns "
                "no longer belong together. Run `verify_teacher_cache` on the dataset, and do not edit `labels` after "
                "the capture."
            )
        ids = np.concatenate([np.asarray(example[TOPK_IDS], np.int64) for example in examples if example[TOPK_IDS]])
        logprobs = np.concatenate([np.asarray(e[TOPK_LOGPROBS], np.float64) for e in examples if e[TOPK_LOGPROBS]])
        tail = np.concatenate([np.asarray(example[TAIL_LOGPROB], np.float64) for example in examples])
        log_target, tail_log_target = self.recalibration.apply(
            logprobs, tail, estimator=self.estimator, top_k=self.top_k
        )
        batch["teacher_ids"] = torch.from_numpy(ids[:, : log_target.shape[1]].copy())
        batch["teacher_log_target"] = torch.from_numpy(log_target).float()
        if tail_log_target is not None:
            batch["teacher_tail_log_target"] = torch.from_numpy(tail_log_target).float()
        return batch
