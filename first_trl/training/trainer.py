"""[`FirstDistillTrainer`]: TRL's SFTTrainer with a cached, recalibrated teacher as the target."""

import warnings
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from .._trl_compat import fingerprint, get_dataset_column_names, global_then_local_main_first
from ..cache.choices import add_soft_labels, has_soft_labels, restrict_to_choices
from ..cache.manifest import read_manifests
from ..cache.schema import (
    CHOICE_INDEX,
    DRAW_COLUMNS,
    INPUT_IDS,
    MUTUAL_INFORMATION,
    SOFT_LABELS,
    TEACHER_COLUMNS,
    count_of_one_teacher,
    count_without_gold,
    refuse_transform,
)
from ..cache.verify import verify_teacher_cache
from ..losses.head import SUMS, check_causal
from ..losses.inputs import get_estimator
from ..plugins import estimator_target
from ..recalibration import Recalibration
from ..vocabulary import TEACHER_HAS_GOLD
from .alignment import DRAW_LENGTHS, align, count_cuts, entry_columns
from .card import ModelCardMixin
from .collator import DataCollatorForDistillation
from .config import FirstDistillConfig
from .fused_head import FusedHeadMixin, head_size, refuse_resized
from .precision import MasterWeightsMixin
from .saved_weights import SavedWeightsMixin
from .served_text import check_served_text
from .streaming import verify_stream
from .token_dropout import TokenDropoutMixin
from .token_means import PLAIN_SUMS, TokenMeansMixin


logger = get_logger(__name__)


class FirstDistillTrainer(  # type: ignore[misc]  # TRL's signature
    ModelCardMixin,
    TokenDropoutMixin,
    MasterWeightsMixin,
    SavedWeightsMixin,
    FusedHeadMixin,
    TokenMeansMixin,
    SFTTrainer,
):
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
            Teacher cache, from [`add_teacher_topk`] or [`load_teacher_cache`]; several of one teacher can be
            concatenated, caches of prompts without an answer among them. Or rows of questions with soft labels, see
            [`add_soft_labels`], alone or in a cache.
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

    args: FirstDistillConfig

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
        refuse_transform(train_dataset)
        if next(iter(train_dataset), None) is None:
            raise ValueError("The teacher cache is empty: no row to train on. Check the filter or slice that made it.")
        columns = get_dataset_column_names(train_dataset)
        cached = any(name in columns for name in TEACHER_COLUMNS)
        if not cached and not has_soft_labels(columns):
            raise ValueError(
                f"Missing teacher cache columns {list(TEACHER_COLUMNS)}; the train dataset has {columns}. Make them "
                "with `add_teacher_topk(dataset, teacher, processing_class)`, or give soft labels, `target_probs`."
            )
        _check_soft_label_weight(args.soft_label_weight, cached, has_soft_labels(columns) or SOFT_LABELS in columns)
        if args.disagreement_weight and MUTUAL_INFORMATION not in columns:
            raise ValueError(
                f"`disagreement_weight={args.disagreement_weight}` weighs by `{MUTUAL_INFORMATION}`, which only the cache of "
                "several teachers has. Capture with `CommitteeBackend` (`first-trl precompute --teacher A --teacher B`), or "
                "leave it at 0."
            )
        prompt_learning = peft_config if peft_config is not None else getattr(model, "active_peft_config", None)
        if getattr(prompt_learning, "is_prompt_learning", False):
            raise ValueError(
                f"Prompt-learning PEFT ({type(prompt_learning).__name__}) puts virtual tokens before the text, which "
                "moves every position away from its cached teacher entry. Use LoRA or another weight adapter."
            )
        if not isinstance(model, str):
            check_causal(model)
        estimator = get_estimator(args.estimator, args.student_temperature)
        if estimator.warning is not None:
            warnings.warn(estimator.warning)
        self._over_kept = estimator.over_kept
        self._recalibration = resolve_recalibration(args, train_dataset)
        refuse_resized(model, peft_config)
        self._start_card(train_dataset)
        # Filled by `_prepare_dataset`, which the parent's constructor calls before `self.model` exists
        self._student_head_size = None if isinstance(model, str) else head_size(model)
        self._prepared: set[str | None] = set()  # fingerprints; a stream has none and is never added

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
        self.add_fused_head(
            args.estimator,
            args.ce_weight,
            args.loss_chunk_size,
            student_temperature=args.student_temperature,
            brier_weight=args.brier_weight,
            rps_weight=args.rps_weight,
        )
        plain: Any = self.data_collator
        self.data_collator = DataCollatorForDistillation(
            pad_token_id=plain.pad_token_id,
            padding_free=plain.padding_free,
            pad_to_multiple_of=plain.pad_to_multiple_of,
            recalibration=self._recalibration,
            estimator=args.estimator,
            top_k=args.top_k,
            head_size=head_size(base),
            soft_label_weight=args.soft_label_weight,
            disagreement_weight=args.disagreement_weight,
        )
        self.set_token_dropout(args.token_dropout, args.token_dropout_id)
        self._lacks_gold = {"train": False, "eval": False}

    def _check_head(self, base: PreTrainedModel) -> None:
        """With a name instead of a model, the head's size is known only now."""
        if self._student_head_size is not None or not isinstance(self.train_dataset, Dataset):
            return
        name = entry_columns(self.args.estimator)[0]
        largest = 0
        for batch in self.train_dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
            ids = batch.column(0).combine_chunks().flatten()
            largest = max(largest, int(ids.to_numpy().max())) if len(ids) else largest
        if largest >= (rows := head_size(base)):
            raise ValueError(
                f"Cached id {largest} does not exist in the student's head of {rows} rows. Resize the student's "
                "embeddings, or use a student of the teacher's family."
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if fingerprint(dataset) in self._prepared:
            return dataset  # `evaluate` was given a dataset of this trainer
        columns = get_dataset_column_names(dataset)
        cached = any(name in columns for name in TEACHER_COLUMNS)
        over_choices = has_soft_labels(columns) or (
            args.restrict_to_choices and cached and CHOICE_INDEX not in columns
        )
        if over_choices and not isinstance(dataset, Dataset):
            raise ValueError(
                f"The {dataset_name} dataset is a stream, and targets over the choices are made of all rows at once. Load it "
                "without `streaming=True`."
            )
        if over_choices and not cached:
            with global_then_local_main_first():
                dataset = add_soft_labels(dataset, processing_class)
            over_choices, columns = False, dataset.column_names
        elif not cached:  # an evaluation set without a teacher
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if estimator_target(args.estimator) == "draws" and not all(name in columns for name in DRAW_COLUMNS):
            raise ValueError(
                f"`estimator={args.estimator!r}` needs draws from the teacher, and the {dataset_name} dataset has no "
                f"{list(DRAW_COLUMNS)}. Capture the cache with `add_teacher_topk(..., num_draws=50)`, or choose "
                "another estimator."
            )
        refuse_transform(dataset)
        map_style = isinstance(dataset, Dataset)
        lacks_gold = TEACHER_HAS_GOLD in columns and (not map_style or count_without_gold(dataset) > 0)
        if lacks_gold and args.ce_weight > 0:
            raise _hard_labels_without_gold(dataset, dataset_name, args.ce_weight)
        some = dataset.select(range(min(len(dataset), 100))) if map_style else dataset.take(8)
        check_served_text([row[INPUT_IDS] for row in some], read_manifests(dataset), processing_class)
        with global_then_local_main_first():
            if map_style:
                verify_teacher_cache(dataset, processing_class, head_size=self._student_head_size)
                if over_choices:
                    dataset = restrict_to_choices(dataset, processing_class)
                    columns = dataset.column_names
                    verify_teacher_cache(dataset, processing_class, head_size=self._student_head_size)
                _report_cuts(dataset, dataset_name, args, packing)
            else:
                dataset = verify_stream(dataset, processing_class, self._student_head_size)
            extra: tuple[str, ...] = (TEACHER_HAS_GOLD,) if lacks_gold else ()
            extra += tuple(name for name in (CHOICE_INDEX, SOFT_LABELS) if name in columns)
            if args.disagreement_weight and MUTUAL_INFORMATION in columns:
                if map_style and (single := count_of_one_teacher(dataset)):
                    raise ValueError(
                        f"`disagreement_weight={args.disagreement_weight}` weighs by `{MUTUAL_INFORMATION}`, which {single} rows "
                        f"of the {dataset_name} dataset do not have: they are of one teacher. Train on those of a committee "
                        "alone, or leave it at 0."
                    )
                extra += (MUTUAL_INFORMATION,)
            _check_choices(args, extra)
            dataset = align(
                dataset,
                entry_columns(args.estimator) + extra,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                packing_strategy=args.packing_strategy if packing else None,
                shuffle_seed=args.seed if packing and args.shuffle_dataset else None,
                num_proc=args.dataset_num_proc,
            )
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        # Flat Arrow lists become arrays without a Python object per token
        dataset = dataset.with_format("numpy")
        if map_style:
            self._prepared.add(fingerprint(dataset))
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        wanted = (
            *entry_columns(self.args.estimator), DRAW_LENGTHS, TEACHER_HAS_GOLD, CHOICE_INDEX, SOFT_LABELS,
            MUTUAL_INFORMATION,
        )  # fmt: skip
        columns.extend(name for name in wanted if name not in columns)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # They were of another model
        self._evaluations.clear()
        # An evaluation before training marks the model as prepared, and DDP would then never be wrapped around it:
        # every rank would train on its own rows only
        if self.model_wrapped is self.model:
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "teacher_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student: Any = self.model
        training = student.training
        if inputs.pop(TEACHER_HAS_GOLD, None) is not None:
            self._lacks_gold["train" if training else "eval"] = True
        loss, sums = self.fused_loss(model, inputs, num_items_in_batch)
        if not training:
            self.add_held_out(SUMS, sums)
        if not return_outputs:
            return loss
        plain = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
        plain.pop("labels")
        with torch.no_grad():
            return loss, model(**plain, use_cache=False)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._lacks_gold["eval"] = False
        return super().evaluation_loop(*args, **kwargs)

    def held_out_means(self, sums: dict[str, float]) -> dict[str, float]:
        if set(sums) == set(PLAIN_SUMS):
            return super().held_out_means(sums)
        weight, count = self.args.ce_weight, max(sums["num_tokens"], 1.0)
        hard = weight * sums["cross_entropy"] if weight > 0 else 0.0
        loss = (1 - weight) * sums["kl"] + hard + sums["choice_score"]
        return {"loss": loss / count, **self._means(sums, "eval")}

    def train_means(self, sums: dict[str, float]) -> dict[str, float]:
        return self._means(sums, "train")

    def _means(self, sums: dict[str, float], mode: str) -> dict[str, float]:
        """Means per token, from the sums of all ranks."""
        count = max(sums["num_tokens"], 1.0)
        means = {
            "kl": sums["kl"] / count,
            # Unlike the KL of a sample, which lacks entropy, this is unbiased for the `"sampled"` estimator too
            "teacher_cross_entropy": (sums["kl"] + sums["teacher_entropy"]) / count,
            "teacher_entropy": sums["teacher_entropy"] / count,
            "cross_entropy": sums["cross_entropy"] / count,
            "entropy": sums["student_entropy"] / count,
            "student_mass_outside": sums["mass_outside"] / count,
            "mean_token_accuracy": sums["num_correct"] / count,
        }
        if self.args.brier_weight or self.args.rps_weight:
            means["choice_score"] = sums["choice_score"] / count
        if self._over_kept and self.args.ce_weight == 0 and mode == "train":
            # These need the projection on the vocabulary, which this estimator saves while it trains
            for name in ("cross_entropy", "student_mass_outside", "mean_token_accuracy"):
                del means[name]
        if self._lacks_gold[mode]:
            # They compare with the label, and where a row has no answer the label is a filler
            for name in ("cross_entropy", "mean_token_accuracy"):
                means.pop(name, None)
        return means


def resolve_recalibration(args: FirstDistillConfig, train_dataset: Any) -> Recalibration:
    """The rescale named in the config, with the cache's fitted value where the config gives none."""
    if args.recalibration == "none":
        return Recalibration()
    if args.recalibration_value is not None:
        return Recalibration(args.recalibration, args.recalibration_value)
    columns = get_dataset_column_names(train_dataset)
    if args.restrict_to_choices or has_soft_labels(columns) or CHOICE_INDEX in columns:
        raise ValueError(
            f"`recalibration={args.recalibration!r}` of a target over the choices needs `recalibration_value`: what is stored "
            "with a cache was fitted to its top k. Fit it with `fit_recalibration` on validation rows of the same kind, from "
            "`restrict_to_choices` or `add_soft_labels`."
        )
    manifests = read_manifests(train_dataset)
    fitted = [manifest for manifest in manifests if args.recalibration in manifest.recalibration]
    fits = [manifest.recalibration[args.recalibration] for manifest in fitted]
    # A teacher's fit holds for all its caches, that of its unlabelled prompts too, and for no other teacher's
    teachers = [manifest.identity["teacher"] for manifest in fitted]
    others = [manifest for manifest in manifests if manifest.identity["teacher"] not in teachers]
    if fits and (others or len({fit["recalibration"]["value"] for fit in fits}) > 1):
        raise ValueError(
            f"The caches that were put together have different fits of {args.recalibration!r}, or one of them has "
            "another teacher and none. Set `recalibration_value`, or train from caches of one teacher."
        )
    if not fits:
        raise ValueError(
            f"`recalibration={args.recalibration!r}` without `recalibration_value`, and the cache carries no fitted "
            "one. Fit it on a validation cache with `fit_recalibration` and set `recalibration_value`; or keep it with "
            "`store_recalibration` and load the cache again with `load_teacher_cache`: rows that were loaded before do "
            "not know of it."
        )
    manifest, fit = fitted[0], fits[0]
    trained = (args.top_k or manifest.k, estimator_target(args.estimator))
    if trained != (fit.get("top_k") or manifest.k, estimator_target(fit.get("estimator", args.estimator))):
        raise ValueError(
            f"The cache's fit of {args.recalibration!r} is for top_k={fit.get('top_k')} and "
            f"estimator={fit.get('estimator')!r}, this student trains on top_k={trained[0]} and "
            f"estimator={args.estimator!r}. Fit that target with `fit_recalibration` and set `recalibration_value`."
        )
    return Recalibration.from_dict(fit["recalibration"])


def _check_soft_label_weight(weight: float | None, cached: bool, soft: bool) -> None:
    if cached and soft and weight is None:
        raise ValueError(
            "The rows hold soft labels beside a cached teacher: set `soft_label_weight`, their share in the target (1 for soft "
            "labels alone), or remove one of the two."
        )
    if weight is not None and not (cached and soft):
        raise ValueError(
            f"`soft_label_weight={weight}` mixes soft labels and a cached teacher, and the train dataset has "
            f"{'no `target_probs` or `target_votes`' if cached else 'no cached teacher'}. Leave it unset."
        )


def _check_choices(args: FirstDistillConfig, columns: tuple[str, ...]) -> None:
    over_choices = CHOICE_INDEX in columns
    if SOFT_LABELS in columns:
        _check_soft_label_weight(args.soft_label_weight, cached=True, soft=True)
    scores = [name for name in ("brier_weight", "rps_weight") if getattr(args, name)]
    if scores and not over_choices:
        raise ValueError(
            f"`{scores[0]}` is a score among the choices, and the target is over the vocabulary: set "
            "`restrict_to_choices=True`, or give soft labels."
        )
    if over_choices and args.top_k is not None:
        raise ValueError(f"`top_k={args.top_k}` would leave choices out of a target over the choices. Leave it unset.")


def _hard_labels_without_gold(dataset: Dataset | IterableDataset, dataset_name: str, ce_weight: float) -> ValueError:
    count = f"{count_without_gold(dataset)} of {len(dataset)}" if isinstance(dataset, Dataset) else "some"
    return ValueError(
        f"`ce_weight={ce_weight}` needs an answer in every row, and {count} rows of the {dataset_name} dataset have "
        f"none (`{TEACHER_HAS_GOLD}` is false): their label is a filler. Set `ce_weight=0`, or train on the labelled rows alone."
    )


def _report_cuts(dataset: Dataset, dataset_name: str, args: FirstDistillConfig, packing: bool) -> None:
    max_length = None if packing and args.packing_strategy == "bfd_split" else args.max_length
    cut, dropped = count_cuts(dataset, max_length, args.truncation_mode)
    if dropped == len(dataset):
        raise ValueError(
            f"No row of the {dataset_name} dataset keeps a supervised position within `max_length={max_length}`. "
            "Raise it, or set it to `None`."
        )
    if cut or dropped:
        logger.warning(
            "%s dataset: %d of %d rows are cut to max_length=%s (%s); %d keep no supervised position and are dropped.",
            dataset_name, cut, len(dataset), max_length, args.truncation_mode, dropped,
        )  # fmt: skip
