"""From any dataset SFTTrainer accepts to the token rows the teacher scores."""

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .schema import INPUT_IDS, LABELS


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

    Args:
        dataset ([`~datasets.Dataset`]):
            Language-modelling, prompt-completion or conversational rows, or tokenised rows.
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
    if INPUT_IDS not in columns and getattr(processing_class, "eos_token", None) is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which ends every training row. Set `tokenizer.eos_token`, or "
            "give tokenised rows with `input_ids` and `labels`."
        )
    chat_template = None
    if assistant_only_loss and not has_generation_markers(processing_class.chat_template):
        chat_template = get_training_chat_template(processing_class)
    if completion_only_loss is None:
        completion_only_loss = "prompt" in columns and "completion" in columns
    # The method is borrowed instead of rewritten: a second tokenisation path would sooner or later differ from the
    # trainer's, and the difference would be silent. It reads these attributes of its trainer and nothing else.
    trainer: Any = SimpleNamespace(
        _tokenizer=getattr(processing_class, "tokenizer", processing_class),
        completion_only_loss=completion_only_loss,
        chat_template=chat_template,
    )
    args: Any = SimpleNamespace(
        dataset_num_proc=num_proc,
        dataset_text_field=dataset_text_field,
        assistant_only_loss=assistant_only_loss,
        max_length=max_length,
        truncation_mode=truncation_mode,
        shuffle_dataset=False,
    )
    return SFTTrainer._prepare_dataset(
        trainer, dataset, processing_class, args, packing=False, formatting_func=None, dataset_name="teacher"
    )
