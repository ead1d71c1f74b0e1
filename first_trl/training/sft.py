"""Fine-tuning on labels: what the teacher and the baselines of a study are trained with."""

import warnings
from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTTrainer

from .._trl_compat import get_dataset_column_names, prepare_as_sft_trainer
from ..cache.schema import INPUT_IDS, LABELS
from ..evaluation.supervised import answered
from ..losses.head import check_causal
from ..tasks.conversation import CHAT_TEMPLATE_KWARGS, answered_text, render, row_arguments
from ..tasks.encode import encode_texts
from ..vocabulary import HAS_GOLD, IGNORE_INDEX, TEACHER_HAS_GOLD
from .collator import LabelTargetCollator, label_targets
from .fused_head import FusedHeadMixin, head_size, refuse_resized
from .options import TrainerOptions, check_options
from .precision import MasterWeightsMixin
from .saved_weights import SavedWeightsMixin
from .token_dropout import TokenDropoutMixin
from .token_means import TokenMeansMixin


class TokenDropoutSFTTrainer(TokenDropoutMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with token dropout: the baseline that trains on labels alone what [`FirstDistillTrainer`]
    trains on a teacher.

    Args:
        *args, **kwargs:
            As in [`~trl.SFTTrainer`].
        token_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that a token of the input is replaced in training.
        token_dropout_id (`int`, *optional*):
            Token put in place, see [`replacement_token`].

    Raises:
        `ValueError`: A text would be read with a doubled begin token, or the label of tokenised rows is no answer.

    Warns:
        When conversations are trained on as another text, or with other labels, than a teacher is captured on.
    """

    def __init__(
        self, *args: Any, token_dropout: float = 0.0, token_dropout_id: int | None = None, **kwargs: Any
    ) -> None:
        check_options(TrainerOptions(token_dropout=token_dropout, token_dropout_id=token_dropout_id))
        super().__init__(*args, **kwargs)
        self.set_token_dropout(token_dropout, token_dropout_id)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        _refuse_fillers(dataset, dataset_name)
        if formatting_func is None:
            _check_front(dataset, getattr(processing_class, "tokenizer", processing_class), args, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if formatting_func is None and not hasattr(processing_class, "tokenizer"):
            _check_conversations(dataset, processing_class, args, self.chat_template, dataset_name)
        return prepared


def _check_front(dataset: Any, tokenizer: Any, args: Any, dataset_name: str) -> None:
    """
    Raises `ValueError` where a text would be read with other special tokens in front than the capture, evaluation and
    inference read it with. Some rows are looked at: texts of one source begin alike.
    """
    columns = get_dataset_column_names(dataset)
    name = next((name for name in ("prompt", args.dataset_text_field) if name in columns), None)
    if name is None or INPUT_IDS in columns:
        return
    for number, row in enumerate(dataset.take(100)):
        text = row[name]
        if not isinstance(text, str) or not text:
            continue
        (expected,), read = encode_texts(tokenizer, [text]), tokenizer(text)["input_ids"]
        if list(read[: len(expected)]) != expected:
            raise ValueError(
                f"Row {number} of the {dataset_name} dataset would be read as {_start(tokenizer, read)}, and is read as "
                f"{_start(tokenizer, expected)} when a teacher is captured or a student asked. Tokenise the rows with "
                f"`tokenize_rows`, or leave special tokens that the tokenizer adds out of the texts."
            )


def _check_conversations(
    dataset: Any, tokenizer: Any, args: Any, chat_template: str | None, dataset_name: str
) -> None:
    """Warns where conversations are not read as a capture reads them. Some rows are looked at: one template wrote all."""
    columns = get_dataset_column_names(dataset)
    name = next((name for name in ("prompt", "messages", "conversations") if name in columns), None)
    some = dataset.take(20)
    if name is None or INPUT_IDS in columns or isinstance(next(iter(some))[name], str):
        return
    trained = prepare_as_sft_trainer(
        some,
        tokenizer,
        completion_only_loss=args.completion_only_loss is not False and "completion" in columns,
        chat_template=chat_template,
        dataset_num_proc=None,
        dataset_text_field=args.dataset_text_field,
        assistant_only_loss=args.assistant_only_loss,
        max_length=None,
        truncation_mode=args.truncation_mode,
    )
    for number, (row, read) in enumerate(zip(some, trained, strict=True)):
        try:
            own = row_arguments(None, row.get(CHAT_TEMPLATE_KWARGS))
            options = {"tools": row.get("tools"), "chat_template": chat_template, "chat_template_kwargs": own}
            if name == "prompt":
                head, tail, _ = answered_text(tokenizer, row["prompt"], row["completion"], **options)
            else:
                head, tail = render(tokenizer, row[name], **options), ""
        except ValueError:  # a capture refuses the row
            continue
        (expected,), start = encode_texts(tokenizer, [head + tail]), 0
        if name == "prompt" and args.completion_only_loss is not False:
            start = len(encode_texts(tokenizer, [head])[0])
        labels = list(read[LABELS])
        if list(read[INPUT_IDS]) != expected:
            what, here, there = "is trained on as the text", tokenizer.decode(read[INPUT_IDS]), str(head + tail)
        elif not args.assistant_only_loss and labels != [IGNORE_INDEX] * start + expected[start:]:
            what, here, there = "has the labels", tokenizer.decode([t for t in labels if t != IGNORE_INDEX]), tail
        else:
            continue
        warnings.warn(
            f"Row {number} of the {dataset_name} dataset {what} {here!r}, and where a teacher is captured, {there!r}. Train on "
            "the rows that `first_trl.teacher.prepare.prepare_rows(dataset, tokenizer)` makes of them, as the capture does."
        )
        return


def _start(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids[:4])) + " ..."


def _refuse_fillers(dataset: Any, dataset_name: str) -> None:
    """Raises `ValueError` for tokenised rows, such as those of a teacher cache, of which some have no answer."""
    columns = get_dataset_column_names(dataset)
    flags = [name for name in (HAS_GOLD, TEACHER_HAS_GOLD) if name in columns]
    if LABELS not in columns or not flags:
        return
    # The rows of a stream are not counted, as those of a teacher cache with hard labels are not
    lacking = int((~answered(dataset)).sum()) if isinstance(dataset, Dataset) else None
    if lacking != 0:
        count = "some" if lacking is None else f"{lacking} of {len(dataset)}"
        raise ValueError(
            f"Fine-tuning needs an answer in every row, and {count} rows of the {dataset_name} dataset have none "
            f"(`{flags[0]}` is false): their label is a filler. Leave them out: "
            f"`dataset.filter(lambda answered: answered is not False, input_columns=[{flags[0]!r}])`, and of a stream "
            f"`.remove_columns({flags!r})` too."
        )


class FirstSFTTrainer(MasterWeightsMixin, SavedWeightsMixin, FusedHeadMixin, TokenMeansMixin, TokenDropoutSFTTrainer):
    """
    [`~trl.SFTTrainer`] under the conditions of [`FirstDistillTrainer`]: float32 master weights, held-out means over
    tokens, token dropout, and on request the same fused loss. A step makes the gradient that `SFTTrainer` makes.

    Args:
        *args:
            As in [`~trl.SFTTrainer`].
        fused_loss (`bool`, *optional*, defaults to `False`):
            Project the supervised positions alone onto the vocabulary. On a CPU, `SFTTrainer` projects all of them,
            which takes most of a step where prompts are long and the vocabulary is large.
        **kwargs:
            As in [`~trl.SFTTrainer`], and `token_dropout` and `token_dropout_id`, see [`TokenDropoutSFTTrainer`].

    Raises:
        `ValueError`: `fused_loss` with another loss than the negative log-likelihood, or with a model whose head it
            does not know.
    """

    def __init__(self, *args: Any, fused_loss: bool = False, **kwargs: Any) -> None:
        model = args[0] if args else kwargs.get("model")
        if hasattr(model, "config"):
            check_causal(model)
            refuse_resized(model, kwargs.get("peft_config"))
        super().__init__(*args, **kwargs)
        self.fused = fused_loss
        if not fused_loss:
            return
        settings: Any = self.args
        if settings.loss_type != "nll" or settings.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "`fused_loss=True` is the negative log-likelihood of the labels, and the arguments ask for another "
                f"loss (loss_type={settings.loss_type!r}, label_smoothing_factor={settings.label_smoothing_factor}, "
                "compute_loss_func). Leave `fused_loss` out."
            )
        student: Any = self.model
        base = student.get_base_model() if is_peft_model(student) else student
        self._head_size = head_size(base)
        self.add_fused_head("topk", ce_weight=0.0, chunk_size=None)

    def get_train_dataloader(self) -> DataLoader:
        if not self.fused:
            return super().get_train_dataloader()
        plain: Any = self.data_collator
        self.data_collator = LabelTargetCollator(plain, self._head_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        student: Any = self.model
        if self.padding_free and student.training:
            self.check_student(model, inputs["input_ids"], fused=self.fused)
        if not self.fused or return_outputs or not student.training or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "teacher_ids" not in inputs:  # of a loader that a subclass made
            inputs = {**inputs, **label_targets(inputs["labels"])}
        return self.fused_loss(model, inputs, num_items_in_batch)[0]


def label_trainer(options: Mapping[str, Any], model: Any, **kwargs: Any) -> FirstSFTTrainer:
    """[`FirstSFTTrainer`] with those of the options of a recipe that mean something without a teacher."""
    own = {name: options[name] for name in ("token_dropout", "fused_loss") if name in options}
    if own.get("token_dropout"):
        own["token_dropout_id"] = options.get("token_dropout_id")
    return FirstSFTTrainer(model, **own, **kwargs)
