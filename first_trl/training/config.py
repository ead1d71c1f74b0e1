"""Configuration of [`FirstDistillTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from ..losses import ESTIMATORS
from ..losses.inputs import check_student_temperature
from ..recalibration import METHODS, Recalibration
from .token_dropout import check_token_dropout


@dataclass
class FirstDistillConfig(SFTConfig):
    r"""
    Configuration class for the [`FirstDistillTrainer`].

    This class includes only the parameters that are specific to distillation from a teacher cache. For the others,
    please refer to [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the loss

        estimator (`str`, *optional*, defaults to `"topk"`):
            How the KL divergence to the teacher is estimated from its cached entries. `"topk"`: target renormalised
            over the k ids, student's full softmax. `"bucket"`: target over the k ids and one entry for all other
            tokens, with the teacher's exact tail mass. `"renormalized"`: teacher and student both renormalised over
            the k ids; constrains ratios only, for students that were fine-tuned before. `"sampled"`: draws from the
            teacher stored at capture; unbiased for the full KL. `"probability_softmax"`: softmax of the student's
            probabilities over `student_temperature`, as in the authors' code; for replication only.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight `w` of the hard-label cross-entropy: the loss is `(1 - w) * KL + w * CE`.
        student_temperature (`float`, *optional*):
            Divides the student's probabilities at the k ids, for `estimator="probability_softmax"` only, where 1 is
            used when not set. Equal to `c` of `recalibration="probability_temperature"`, the optimum is the raw
            teacher up to a constant: nothing is recalibrated.
        top_k (`int`, *optional*):
            Number of cached entries to use, from the most likely. The others move into the tail. When not set, all
            are used.
        loss_chunk_size (`int`, *optional*):
            Supervised tokens per chunk of the fused loss. When not set, chosen from the vocabulary size.

        > Parameters that control the recalibration of the teacher

        recalibration (`str`, *optional*, defaults to `"none"`):
            Rescale of the cached teacher probabilities, never applied to the student. `"probability_temperature"`:
            softmax of probabilities over `c`, as in the paper. `"logit_temperature"`: power `1/T`.
            `"label_smoothing"`: `delta` moved from rank 1 to the others. `"log_label_smoothing"`: the same between
            log-probabilities, as in the authors' code, which is far milder.
        recalibration_value (`float`, *optional*):
            c, T or delta. When not set, the value fitted for this method and stored with the cache is used.

        > Parameters that control what the student reads

        token_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that a token of the student's input is replaced in training, while the teacher's target stays
            that of the whole text (word dropout). Special tokens, padding and supervised tokens are never replaced.
        token_dropout_id (`int`, *optional*):
            Token put in place of dropped ones. When not set, the first that the tokenizer has of unknown, mask,
            padding and end-of-sequence token.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `bf16`: Defaults to `True` only where the device supports it.
    """

    estimator: str = field(
        default="topk",
        metadata={
            "help": "How the KL divergence to the teacher is estimated from its cached entries. `topk`: target "
            "renormalised over the k ids, student's full softmax. `bucket`: target over the k ids and one entry for "
            "all other tokens, with the teacher's exact tail mass. `renormalized`: teacher and student both "
            "renormalised over the k ids; constrains ratios only, for students that were fine-tuned before. "
            "`sampled`: draws from the teacher stored at capture; unbiased for the full KL. `probability_softmax`: "
            "softmax of the student's probabilities over `student_temperature`, as in the authors' code; for "
            "replication only.",
            "choices": list(ESTIMATORS),
        },
    )
    ce_weight: float = field(
        default=0.0,
        metadata={"help": "Weight `w` of the hard-label cross-entropy: the loss is `(1 - w) * KL + w * CE`."},
    )
    student_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Divides the student's probabilities at the k ids, for `estimator='probability_softmax'` only, "
            "where 1 is used when not set. Equal to `c` of `recalibration='probability_temperature'`, the optimum is "
            "the raw teacher up to a constant: nothing is recalibrated."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of cached entries to use, from the most likely. The others move into the tail. When not "
            "set, all are used."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Supervised tokens per chunk of the fused loss. When not set, chosen from the vocabulary size."
        },
    )
    recalibration: str = field(
        default="none",
        metadata={
            "help": "Rescale of the cached teacher probabilities, never applied to the student. "
            "`probability_temperature`: softmax of probabilities over `c`, as in the paper. `logit_temperature`: "
            "power `1/T`. `label_smoothing`: `delta` moved from rank 1 to the others. `log_label_smoothing`: the same "
            "between log-probabilities, as in the authors' code, which is far milder.",
            "choices": list(METHODS),
        },
    )
    recalibration_value: float | None = field(
        default=None,
        metadata={
            "help": "c, T or delta. When not set, the value fitted for this method and stored with the cache is used."
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a token of the student's input is replaced in training, while the teacher's "
            "target stays that of the whole text (word dropout). Special tokens, padding and supervised tokens are "
            "never replaced."
        },
    )
    token_dropout_id: int | None = field(
        default=None,
        metadata={
            "help": "Token put in place of dropped ones. When not set, the first that the tokenizer has of unknown, "
            "mask, padding and end-of-sequence token."
        },
    )

    def __post_init__(self) -> None:
        # SFTConfig asks for bf16 everywhere and then refuses machines without it
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False
        super().__post_init__()
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {list(ESTIMATORS)}, got {self.estimator!r}.")
        if self.recalibration not in METHODS:
            raise ValueError(f"`recalibration` must be one of {list(METHODS)}, got {self.recalibration!r}.")
        if not 0.0 <= self.ce_weight <= 1.0:
            raise ValueError(f"`ce_weight` must be in [0, 1], got {self.ce_weight}.")
        check_student_temperature(self.estimator, self.student_temperature)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"`top_k` must be at least 1, got {self.top_k}. Leave it unset to use all cached entries."
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"`loss_chunk_size` must be at least 1, got {self.loss_chunk_size}.")
        if self.recalibration == "none" and self.recalibration_value is not None:
            raise ValueError(
                f"`recalibration_value={self.recalibration_value}` has no effect with `recalibration='none'`. Name the "
                f"method it belongs to, one of {list(METHODS[1:])}."
            )
        if self.recalibration_value is not None:
            Recalibration(self.recalibration, self.recalibration_value)  # raises outside the method's range
        if self.estimator == "sampled" and self.recalibration != "none":
            raise ValueError(
                "`estimator='sampled'` trains on draws from the raw teacher, which cannot be rescaled afterwards. Set "
                "`recalibration='none'`, or use `estimator='bucket'`."
            )
        if self.estimator == "sampled" and self.top_k is not None:
            raise ValueError(
                f"`top_k={self.top_k}` has no meaning with `estimator='sampled'`: leaving draws out would bias it. "
                "Leave `top_k` unset."
            )
        check_token_dropout(self.token_dropout, self.token_dropout_id)
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` and `label_smoothing_factor={self.label_smoothing_factor}` change a "
                "loss this trainer replaces. Leave them at their defaults; `recalibration='label_smoothing'` smooths "
                "the teacher."
            )
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` would train on a cache nobody verified. Remove it: "
                "rows that are already tokenised are not tokenised again."
            )
        # A batch is cut along its first dimension to share it out, and the teacher's targets have another one
        loading: Any = self.accelerator_config
        if loading.dispatch_batches or loading.split_batches:
            raise ValueError(
                "`dispatch_batches` and `split_batches` cut collated batches between processes, away from their "
                "teacher entries. Leave both unset in `accelerator_config`: each process then loads its own rows."
            )
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError(
                "`packing_strategy='wrapped'` lets documents attend to each other, but the teacher scored each one "
                "alone. Use `packing_strategy='bfd'`."
            )
