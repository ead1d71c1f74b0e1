"""From any dataset SFTTrainer accepts, and from prompts alone, to the token rows the teacher scores."""

import json
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .._trl_compat import get_training_chat_template, has_generation_markers, prepare_as_sft_trainer
from ..cache.schema import INPUT_IDS, LABELS, refuse_transform
from ..tasks.tokenize import encode_prompts, filler_token_id
from ..vocabulary import IGNORE_INDEX, TEACHER_HAS_GOLD
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
    num_proc: int | None = None,
) -> Dataset:
    """
    Tokenise and label rows exactly as [`~trl.SFTTrainer`] would, so that the cached text is the text a student would
    be fine-tuned on: chat templates, end-of-sequence token, completion-only and assistant-only masks, truncation.
    Rows that already have `input_ids` (and `labels`) pass through.

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
            As in [`~trl.SFTConfig`].
        num_proc (`int`, *optional*):
            Processes of the `map` calls.

    Returns:
        [`~datasets.Dataset`] with `input_ids` and `labels` and the other columns as they were.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Expected a `datasets.Dataset`, got {type(dataset).__name__}. Pick a split of a `DatasetDict`, and load "
            "without `streaming=True`: the capture reads rows by number to divide and resume the work."
        )
    refuse_transform(dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no row to score. Check the path, split and filters.")
    columns = dataset.column_names
    if INPUT_IDS in columns and LABELS in columns and max_length is None:
        return dataset
    if INPUT_IDS not in columns and not {"prompt", "messages", "conversations", dataset_text_field} & set(columns):
        raise ValueError(
            f"Cannot tokenise a dataset with columns {columns}: give `input_ids` and `labels`, `prompt` and "
            f"`completion`, `messages`, or a text column `{dataset_text_field}`."
        )
    if INPUT_IDS not in columns:
        required = ["prompt"] if "prompt" in columns else [dataset_text_field] if dataset_text_field in columns else []
        dataset = text_columns(dataset, required, ["completion"])
    if INPUT_IDS not in columns and "prompt" in columns:
        other = sorted({"messages", "conversations", dataset_text_field} & set(columns))
        if "completion" not in columns and other:
            raise ValueError(
                f"The dataset has `prompt` without `completion`, and {other}: remove the column that is not to be "
                "scored."
            )
        answered = _answered(dataset)
        if len(answered) < len(dataset):
            return _prepare_prompts(
                dataset,
                answered,
                processing_class,
                completion_only_loss=completion_only_loss,
                assistant_only_loss=assistant_only_loss,
                max_length=max_length,
                truncation_mode=truncation_mode,
                dataset_text_field=dataset_text_field,
                num_proc=num_proc,
            )
    if INPUT_IDS not in columns and getattr(processing_class, "eos_token", None) is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which ends every training row. Set `tokenizer.eos_token`, or "
            "give tokenised rows with `input_ids` and `labels`."
        )
    chat_template = None
    template = getattr(processing_class, "chat_template", None)
    if assistant_only_loss and (template is None or not has_generation_markers(template)):
        chat_template = _marked_template(processing_class)
    if completion_only_loss is None:
        completion_only_loss = "prompt" in columns and "completion" in columns
    return prepare_as_sft_trainer(
        dataset,
        processing_class,
        completion_only_loss=completion_only_loss,
        chat_template=chat_template,
        dataset_num_proc=num_proc,
        dataset_text_field=dataset_text_field,
        assistant_only_loss=assistant_only_loss,
        max_length=max_length,
        truncation_mode=truncation_mode,
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


def _prepare_prompts(dataset: Dataset, answered: list[int], processing_class: Any, **options: Any) -> Dataset:
    """Rows of which some have no answer, in the order they came in."""
    order = np.concatenate([answered, np.setdiff1d(np.arange(len(dataset)), answered)]).astype(np.int64)
    prompts = dataset.select(order[len(answered) :])
    ids = List(Value("int64"))
    rows = prompts.map(
        _tokenize_prompts,
        batched=True,
        with_indices=True,
        num_proc=options["num_proc"],
        features=Features({**prompts.features, INPUT_IDS: ids, LABELS: ids, TEACHER_HAS_GOLD: Value("bool")}),
        fn_kwargs={"processing_class": processing_class, "numbers": order[len(answered) :]},
        desc="Tokenizing prompts without an answer",
    )
    if answered:
        with_answer = prepare_rows(dataset.select(answered), processing_class, **{**options, "max_length": None})
        shared = with_answer.select_columns([name for name in with_answer.column_names if name in rows.column_names])
        types = Features({**rows.features, **{name: shared.features[name] for name in (INPUT_IDS, LABELS)}})
        rows = concatenate_datasets([shared, rows.cast(types)])
        rows = rows.select(np.argsort(order))
    return rows if options["max_length"] is None else prepare_rows(rows, processing_class, **options)


def _tokenize_prompts(
    batch: dict[str, list[Any]], indices: list[int], *, processing_class: Any, numbers: np.ndarray
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
        prompts = [_apply_chat_template(tokenizer, batch, row) for row in range(len(indices))]
    filler = filler_token_id(tokenizer)
    return {
        INPUT_IDS: [[*prompt, filler] for prompt in prompts],
        LABELS: [[IGNORE_INDEX] * len(prompt) + [filler] for prompt in prompts],
        TEACHER_HAS_GOLD: [False] * len(prompts),
    }


def _apply_chat_template(tokenizer: Any, batch: dict[str, list[Any]], row: int) -> list[int]:
    tools = batch["tools"][row] if "tools" in batch else None
    options = batch["chat_template_kwargs"][row] if "chat_template_kwargs" in batch else None
    encoded = tokenizer.apply_chat_template(
        batch["prompt"][row],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(options or {}),
    )
    return list(encoded["input_ids"])
