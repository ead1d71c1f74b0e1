"""From any dataset SFTTrainer accepts, and from prompts alone, to the token rows the teacher scores."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .._trl_compat import get_training_chat_template, has_generation_markers, prepare_as_sft_trainer
from ..cache.schema import INPUT_IDS, LABELS, refuse_transform
from ..tasks.conversation import CHAT_TEMPLATE_KWARGS, check_template_arguments, reads_documents, writes_the_date
from ..tasks.encode import encode_prompts, filler_token_id
from ..utils.versions import versioned
from ..vocabulary import IGNORE_INDEX, TEACHER_HAS_GOLD
from .conversations import (
    DIVERGED,
    EMPTY,
    MESSAGES,
    is_from_template,
    tokenize_conversations,
    writable_columns,
)
from .padding import COMPLETION_MASK, check_padding, refuse_packed, refuse_unknown_masks, remove_padding
from .text_cells import text_columns


def prepare_rows(
    dataset: Dataset,
    processing_class: Any,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    dataset_text_field: str = "text",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """
    Tokenise and label rows as [`~trl.SFTTrainer`] would, so that the cached text is the text a student would be
    fine-tuned on: chat templates, end-of-sequence token, completion-only and assistant-only masks, truncation. Where
    SFTTrainer would train on a text that no model is asked with, the prompt is read as
    [`~first_trl.tasks.encode.encode_prompts`] reads it: special tokens once, the thinking block of a template before
    the answer. Rows that already have `input_ids` (and `labels`) pass through, without their padding.

    A row with a `prompt` and no `completion`, or a null one, is a prompt without an answer. It becomes the prompt's
    tokens, as a model reads them when it answers, and a filler token, whose position is the only one supervised;
    `teacher_has_gold` is false.

    Args:
        dataset ([`~datasets.Dataset`]):
            Language-modelling, prompt-completion or conversational rows, prompts, or tokenised rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        completion_only_loss (`bool`, *optional*), assistant_only_loss (`bool`), max_length (`int`, *optional*),
        truncation_mode (`str`), dataset_text_field (`str`):
            As in [`~trl.SFTConfig`]. A `completion_mask` of tokenised rows is honoured unless `completion_only_loss` is
            `False`.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template, such as `enable_thinking`; a column of that name goes before them.
        num_proc (`int`, *optional*):
            Processes of the `map` calls.

    Returns:
        [`~datasets.Dataset`] with `input_ids` and `labels` and the other columns as they were; tools, and
        columns with objects without a key, as JSON text. Such objects of a conversation get a key that is null.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Expected a `datasets.Dataset`, got {type(dataset).__name__}. Pick a split of a `DatasetDict`, and load "
            "without `streaming=True`: the capture reads rows by number to divide and resume the work."
        )
    refuse_transform(dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no row to score. Check the path, split and filters.")
    arguments = check_template_arguments(chat_template_kwargs)
    columns = dataset.column_names
    if completion_only_loss is None:
        completion_only_loss = ("prompt" in columns and "completion" in columns) or (
            INPUT_IDS in columns and COMPLETION_MASK in columns
        )
    if INPUT_IDS in columns:
        refuse_unknown_masks(dataset)
        refuse_packed(dataset)
        dataset = remove_padding(dataset, num_proc)
        if LABELS in columns:
            check_padding(dataset, processing_class)
        if LABELS not in columns or max_length is not None:
            dataset = prepare_as_sft_trainer(
                dataset,
                processing_class,
                completion_only_loss=completion_only_loss,
                chat_template=None,
                dataset_num_proc=num_proc,
                dataset_text_field=dataset_text_field,
                assistant_only_loss=assistant_only_loss,
                max_length=max_length,
                truncation_mode=truncation_mode,
            )
            if LABELS not in columns:
                check_padding(dataset, processing_class)
        return writable_columns(dataset, num_proc)
    if not {"prompt", *MESSAGES, dataset_text_field} & set(columns):
        raise ValueError(
            f"Cannot tokenise a dataset with columns {columns}: give `input_ids` and `labels`, `prompt` and "
            f"`completion`, `messages`, or a text column `{dataset_text_field}`."
        )
    from_template = is_from_template(dataset, dataset_text_field)
    if from_template and "documents" in columns and reads_documents(processing_class, arguments):
        warnings.warn(
            "The column `documents` is not read, and the chat template has a place for documents: the teacher answers without "
            "them. Put them into the column `chat_template_kwargs`, as `{'documents': [...]}` in each row, or remove the column."
        )
    if from_template and writes_the_date(processing_class, arguments):
        warnings.warn(
            "The chat template writes the date of the day into every conversation: a student is asked on other days than its "
            "teacher was, and an interrupted capture cannot go on tomorrow. Set the date in `chat_template_kwargs`, by the "
            "argument that the template has for it (often `date_string`), here and wherever the student is asked."
        )
    required = ["prompt"] if "prompt" in columns else [dataset_text_field] if dataset_text_field in columns else []
    dataset = writable_columns(text_columns(dataset, required, ["completion"]), num_proc)
    options: dict[str, Any] = {
        "completion_only_loss": completion_only_loss,
        "assistant_only_loss": assistant_only_loss,
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "dataset_text_field": dataset_text_field,
        "chat_template_kwargs": arguments,
        "num_proc": num_proc,
    }
    if "prompt" in columns:
        other = sorted({*MESSAGES, dataset_text_field} & set(columns))
        if "completion" not in columns and other:
            raise ValueError(
                f"The dataset has `prompt` without `completion`, and {other}: remove the column that is not to be "
                "scored."
            )
        answered = _answered(dataset)
        if len(answered) < len(dataset):
            return _prepare_prompts(dataset, answered, processing_class, options)
    if getattr(processing_class, "eos_token", None) is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which ends every training row. Set `tokenizer.eos_token`, or "
            "give tokenised rows with `input_ids` and `labels`."
        )
    return _prepare_answered(dataset, processing_class, options)


def _prepare_answered(dataset: Dataset, processing_class: Any, options: dict[str, Any]) -> Dataset:
    chat_template = None
    template = getattr(processing_class, "chat_template", None)
    if options["assistant_only_loss"] and (template is None or not has_generation_markers(template)):
        chat_template = _marked_template(processing_class)
    rows = tokenize_conversations(
        dataset,
        getattr(processing_class, "tokenizer", processing_class),
        text_field=options["dataset_text_field"],
        assistant_only_loss=options["assistant_only_loss"],
        chat_template=chat_template,
        chat_template_kwargs=options["chat_template_kwargs"],
        num_proc=options["num_proc"],
    )
    if DIVERGED in rows.column_names:
        diverged = int(np.sum(rows[DIVERGED][:]))
        if diverged:
            warnings.warn(
                f"{diverged} of {len(rows)} rows are read by the teacher, and trained on, behind another text than a "
                "model reads that is asked their prompt: the chat template writes the prompt alone differently (it may "
                "open a thinking block there). Use a template, or `chat_template_kwargs`, that writes it the same way."
            )
        empty = int(np.sum(rows[EMPTY][:]))
        if empty:
            warnings.warn(
                f"{empty} of {len(rows)} rows have an empty completion: their answer is the end token. Leave the completion "
                "null where a prompt has no answer."
            )
        rows = rows.remove_columns([DIVERGED, EMPTY])
    return prepare_as_sft_trainer(
        rows,
        processing_class,
        completion_only_loss=options["completion_only_loss"],
        chat_template=None,
        dataset_num_proc=options["num_proc"],
        dataset_text_field=options["dataset_text_field"],
        assistant_only_loss=options["assistant_only_loss"],
        max_length=options["max_length"],
        truncation_mode=options["truncation_mode"],
    )


def _marked_template(processing_class: Any) -> str:
    """The chat template with marks around what the assistant writes, for the templates that TRL knows."""
    template = processing_class.chat_template
    name = str(getattr(processing_class, "name_or_path", "")) or type(processing_class).__name__
    try:
        marked: str | None = None if template is None else get_training_chat_template(processing_class)
    except ValueError:
        marked = None
    if marked is not None:
        return marked
    which = "has no chat template" if template is None else f"has a chat template (`{template[:40]}...`) without marks"
    raise ValueError(
        f"`assistant_only_loss=True` scores what the assistant writes, and the tokenizer {name} {which} of it. Put "
        "`{% generation %}` before and `{% endgeneration %}` after the assistant's text and its end-of-turn token in "
        "`tokenizer.chat_template`, or score the last answer alone with `prompt` and `completion` columns."
    )


def _answered(dataset: Dataset) -> list[int]:
    """Rows that have a completion."""
    if "completion" not in dataset.column_names:
        return []
    valid = dataset.select_columns(["completion"]).with_format("arrow")[:].column(0).is_valid()
    return np.flatnonzero(valid.to_numpy()).tolist()


def _prepare_prompts(dataset: Dataset, answered: list[int], processing_class: Any, options: dict[str, Any]) -> Dataset:
    """Rows of which some have no answer, in the order they came in."""
    order = np.concatenate([answered, np.setdiff1d(np.arange(len(dataset)), answered)]).astype(np.int64)
    prompts = dataset.select(order[len(answered) :])
    ids = List(Value("int64"))
    rows = prompts.map(
        versioned(_tokenize_prompts, "first_trl.tasks.conversation", "first_trl.tasks.encode"),
        batched=True,
        with_indices=True,
        num_proc=options["num_proc"],
        features=Features({**prompts.features, INPUT_IDS: ids, LABELS: ids, TEACHER_HAS_GOLD: Value("bool")}),
        fn_kwargs={
            "processing_class": processing_class,
            "numbers": order[len(answered) :],
            "arguments": options["chat_template_kwargs"],
        },
        desc="Tokenizing prompts without an answer",
    )
    rows = writable_columns(rows, options["num_proc"])
    if answered:
        with_answer = prepare_rows(dataset.select(answered), processing_class, **{**options, "max_length": None})
        shared = with_answer.select_columns([name for name in with_answer.column_names if name in rows.column_names])
        types = Features({**rows.features, **{name: shared.features[name] for name in (INPUT_IDS, LABELS)}})
        rows = concatenate_datasets([shared, rows.cast(types)])
        rows = rows.select(np.argsort(order))
    return rows if options["max_length"] is None else prepare_rows(rows, processing_class, **options)


def _tokenize_prompts(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    processing_class: Any,
    numbers: np.ndarray,
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for index, prompt in zip(indices, batch["prompt"], strict=True):
        if not prompt:
            raise ValueError(
                f"Row {numbers[index]} of the dataset: the prompt is {'missing' if prompt is None else 'empty'}, so "
                "nothing tells what could follow it. Remove the row."
            )
    if isinstance(batch["prompt"][0], str):
        prompts = encode_prompts(tokenizer, batch["prompt"])
    else:
        prompts = []
        own = batch.get(CHAT_TEMPLATE_KWARGS) or [None] * len(indices)
        tools = batch.get("tools") or [None] * len(indices)
        for index, prompt, row_tools, row_kwargs in zip(indices, batch["prompt"], tools, own, strict=True):
            try:
                prompts += encode_prompts(
                    tokenizer,
                    [prompt],
                    tools=[row_tools],
                    chat_template_kwargs=arguments,
                    row_kwargs=[row_kwargs],
                )
            except ValueError as error:
                raise ValueError(f"Row {numbers[index]} of the dataset: {error}") from None
    filler = filler_token_id(tokenizer)
    return {
        INPUT_IDS: [[*prompt, filler] for prompt in prompts],
        LABELS: [[IGNORE_INDEX] * len(prompt) + [filler] for prompt in prompts],
        TEACHER_HAS_GOLD: [False] * len(prompts),
    }
