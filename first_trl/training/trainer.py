"""[`FirstDistillTrainer`]: TRL's SFTTrainer with a cached, recalibrated teacher as the target."""

import logging
import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from ..recalibration import Recalibration
from ..teacher.schema import TEACHER_COLUMNS, TOPK_IDS, read_manifest
from ..teacher.verify import verify_teacher_cache
from .alignment import ENTRY_COLUMNS, pack, truncate
from .collator import DataCollatorForDistillation
from .config import FirstDistillConfig
from .fused_head import SUMS, add_distill_head


logger = logging.getLogger(__name__)


class FirstDistillTrainer(SFTTrainer):
    """
    Trainer for trustworthy distillation from a teacher cache (FIRST, [arXiv
    2408.12168](https://huggingface.co/papers/2408.12168)): no teacher in memory, any student SFTTrainer takes, LoRA
    included.

    Example:

    ```python
    from first_trl import FirstDistillConfig, FirstDistillTrainer, load_teacher_cache
    from peft import LoraConfig

    trainer = FirstDistillTrainer(
        model="Qwen/Qwen2.5-0.5B",
        args=FirstDistillConfig(output_dir="student", recalibration="probability_temperature"),
        train_dataset=load_teacher_cache("my-org/teacher-cache"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student: a name or path, or a causal language model.
        args ([`FirstDistillConfig`], *optional*):
            Configuration. If `None`, a default one is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Teacher cache, from [`add_teacher_topk`] or [`load_teacher_cache`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Held-out cache (distillation loss and its parts), or any dataset SFTTrainer takes (negative
            log-likelihood).
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Student's tokenizer; it must be the one of the cache. If `None`, it is loaded from the model's name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration of the student. Prompt learning and adapters on `lm_head` are refused.
        **kwargs:
            Passed to [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: The cache is missing, damaged, empty or of another tokenizer, or an option does not go with
            cached targets. The message names the row and the mend.
    """

    _tag_names = ["trl", "first_trl", "distillation", "calibration"]
    _name = "FIRST"
    _paper = {
        "title": "FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation",
        "id": "2408.12168",
        # docstyle-ignore
        "citation": """\
@inproceedings{shum2024first,
    title     = {{FIRST}: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation},
    author    = {KaShun Shum and Minrui Xu and Jianshu Zhang and Zixin Chen and Shizhe Diao and Hanze Dong and Jipeng Zhang and Muhammad Omer Raza},
    booktitle = {Proceedings of EMNLP},
    year      = {2024},
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FirstDistillConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = str(model if isinstance(model, str) else model.config.name_or_path)
            args = FirstDistillConfig(f"{name.rsplit('/', 1)[-1]}-FIRST")
        if not isinstance(args, FirstDistillConfig):
            raise TypeError(f"`args` must be a `FirstDistillConfig`, got `{type(args).__name__}`.")
        for unsupported in ("compute_loss_func", "data_collator", "formatting_func"):
            if kwargs.get(unsupported) is not None:
                raise ValueError(
                    f"`{unsupported}` is not supported: the loss, the collator and the tokenised rows come from the "
                    "teacher cache. Leave it out, or use `trl.SFTTrainer`."
                )
        if train_dataset is None:
            raise ValueError(
                "`train_dataset` is required: a teacher cache from `add_teacher_topk` or `load_teacher_cache`."
            )
        prompt_learning = peft_config if peft_config is not None else getattr(model, "active_peft_config", None)
        if getattr(prompt_learning, "is_prompt_learning", False):
            raise ValueError(
                f"Prompt-learning PEFT ({type(prompt_learning).__name__}) puts virtual tokens before the text, which "
                "moves every position away from its cached teacher entry. Use LoRA or another weight adapter."
            )
        if args.estimator == "renormalized":
            warnings.warn(
                "`estimator='renormalized'` constrains only the ratios among the cached ids: the mass of all other "
                "tokens is left to the student. Start from a student that was fine-tuned on the task, or use 'topk' "
                "or 'bucket'."
            )
        self._recalibration = resolve_recalibration(args, train_dataset)
        # Filled by `_prepare_dataset`, which the parent's constructor calls before `self.model` exists
        self._student_head_size = None if isinstance(model, str) else _head_size(model)

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )

        student: Any = self.model
        base = student.get_base_model() if is_peft_model(student) else student
        self._check_head(base)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism split a row over devices, away from its teacher entries. Use data "
                "parallelism, FSDP or ZeRO-3."
            )
        add_distill_head(base, args.estimator, args.ce_weight, args.loss_chunk_size)
        plain: Any = self.data_collator
        self.data_collator = DataCollatorForDistillation(
            pad_token_id=plain.pad_token_id,
            padding_free=plain.padding_free,
            pad_to_multiple_of=plain.pad_to_multiple_of,
            recalibration=self._recalibration,
            estimator=args.estimator,
            top_k=args.top_k,
        )
        self._sums: dict[str, torch.Tensor | None] = {"train": None, "eval": None}
        self._tokens_since_log = 0

    @property
    def _mode(self) -> str:
        model: Any = self.model
        return "train" if model.training else "eval"

    def _check_head(self, base: PreTrainedModel) -> None:
        """With a name instead of a model, the head's size is known only now."""
        if self._student_head_size is not None or not isinstance(self.train_dataset, Dataset):
            return
        head_size = _head_size(base)
        largest = 0
        for batch in self.train_dataset.select_columns([TOPK_IDS]).with_format("arrow").iter(batch_size=1000):
            ids = batch.column(0).combine_chunks().flatten().flatten()
            largest = max(largest, int(ids.to_numpy().max())) if len(ids) else largest
        if largest >= head_size:
            raise ValueError(
                f"Cached id {largest} does not exist in the student's head of {head_size} rows. Resize the student's "
                "embeddings, or use a student of the teacher's family."
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        columns = get_dataset_column_names(dataset)
        if not any(name in columns for name in TEACHER_COLUMNS):
            if dataset_name != "train":
                return super()._prepare_dataset(
                    dataset, processing_class, args, packing, formatting_func, dataset_name
                )
            raise ValueError(
                f"Missing teacher cache columns {list(TEACHER_COLUMNS)}; the train dataset has {columns}. Make them "
                "with `add_teacher_topk(dataset, teacher, processing_class)`."
            )
        if "seq_lengths" in columns:
            return dataset  # packed by an earlier call
        if isinstance(dataset, Dataset):
            verify_teacher_cache(dataset, processing_class, head_size=self._student_head_size)
        map_kwargs: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if args.max_length is not None and (not isinstance(dataset, Dataset) or _longest(dataset) > args.max_length):
            before = len(dataset) if isinstance(dataset, Dataset) else None
            dataset = truncate(dataset, args.max_length, args.truncation_mode, ENTRY_COLUMNS, map_kwargs)
            if before is not None:
                logger.warning(
                    "%s: rows are cut to max_length=%d (%s); %d of %d rows keep no supervised position and are "
                    "dropped.",
                    dataset_name, args.max_length, args.truncation_mode, before - len(dataset), before,
                )  # fmt: skip
                if len(dataset) == 0:
                    raise ValueError(
                        f"No row keeps a supervised position within `max_length={args.max_length}`. Raise it, or set "
                        "it to `None`."
                    )
        if packing:
            if args.max_length is None:
                raise ValueError("Packing needs `max_length`, the length rows are packed to.")
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack(dataset, args.max_length, args.packing_strategy, ENTRY_COLUMNS, map_kwargs)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in ENTRY_COLUMNS if name not in columns)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "teacher_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = self._mode
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        sums = outputs.sums.detach()
        num_tokens = sums[SUMS.index("num_tokens")] if num_items_in_batch is None else num_items_in_batch
        loss = outputs.loss[0] / torch.as_tensor(num_tokens, device=outputs.loss.device).clamp(min=1)
        # `num_items_in_batch` counts the tokens of every rank, and DDP averages the gradients across ranks
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())

        # Kept on the device and reduced when logs are due: a host read per step would stall the GPU
        previous = self._sums[mode]
        self._sums[mode] = sums if previous is None else previous + sums
        if mode == "train":
            tokens = inputs["attention_mask"] if "attention_mask" in inputs else inputs["position_ids"]
            self._tokens_since_log += tokens.sum() if "attention_mask" in inputs else tokens.numel()
        if not return_outputs:
            return loss
        with torch.no_grad():
            plain = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
            plain.pop("labels")
            return loss, model(**plain)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self._mode
        if self._sums[mode] is not None:
            self._metrics[mode].update({name: [value] for name, value in self._reduce_sums(mode).items()})
        super().log(logs, start_time)

    def _reduce_sums(self, mode: str) -> dict[str, float]:
        """Per-token means over all ranks since the last log."""
        sums = self._sums[mode]
        assert sums is not None
        tokens = torch.as_tensor(self._tokens_since_log, dtype=torch.float64, device=sums.device)
        totals = self.accelerator.reduce(torch.cat([sums.double(), tokens.reshape(1)]), reduction="sum").tolist()
        self._sums[mode] = None
        named = dict(zip(SUMS, totals[:-1], strict=True))
        count = max(named.pop("num_tokens"), 1.0)
        if mode == "train":
            self._tokens_since_log = 0
            self._total_train_tokens += int(totals[-1])
        return {
            "kl": named["kl"] / count,
            "cross_entropy": named["cross_entropy"] / count,
            "teacher_entropy": named["teacher_entropy"] / count,
            "entropy": named["student_entropy"] / count,
            "student_mass_outside_top_k": named["mass_outside"] / count,
            "mean_token_accuracy": named["num_correct"] / count,
            "num_tokens": float(self._total_train_tokens),
        }


def resolve_recalibration(args: FirstDistillConfig, train_dataset: Any) -> Recalibration:
    """The rescale named in the config, with the cache's fitted value where the config gives none."""
    if args.recalibration == "none":
        return Recalibration()
    if args.recalibration_value is not None:
        return Recalibration(args.recalibration, args.recalibration_value)
    manifest = read_manifest(train_dataset)
    fitted = manifest.recalibration.get(args.recalibration) if manifest is not None else None
    if fitted is None:
        raise ValueError(
            f"`recalibration={args.recalibration!r}` without `recalibration_value`, and the cache carries no fitted "
            "one. Fit it on a validation cache with `fit_recalibration`, keep it with "
            "`first_trl.teacher.cache.store_recalibration`, or set `recalibration_value`."
        )
    return Recalibration.from_dict(fitted["recalibration"])


def _head_size(model: Any) -> int:
    weight = model.get_output_embeddings().weight
    # Under ZeRO-3 a sharded parameter has shape (0,) and keeps its real one beside it
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _longest(dataset: Dataset) -> int:
    longest = 0
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        longest = max(longest, int(max(len(row) for row in batch.column(0))))
    return longest
