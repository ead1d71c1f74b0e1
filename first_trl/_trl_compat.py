"""Every name of TRL and datasets that the package uses and that is no public API, in one place.

TRL promises `from trl import ...`; what lies in its submodules, and the methods of `SFTTrainer` with an underscore, may
change with any release. A new TRL that breaks something breaks it here, and `tests/training/test_trl_compat.py` says what.
"""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import SFTTrainer


try:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.data_utils import get_dataset_column_names
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import (
        get_comet_experiment_url,
        get_config_model_id,
        get_trackio_space_url,
        global_then_local_main_first,
        maybe_gather_lm_head_ctx,
    )
except ImportError as error:
    raise ImportError(
        f"first_trl does not work with TRL {version('trl')}: {error}. Install the version it was tested with: "
        "`pip install 'trl>=1.16,<1.17'`."
    ) from error

__all__ = [
    "DataCollatorForLanguageModeling",
    "fingerprint",
    "get_comet_experiment_url",
    "get_config_model_id",
    "get_dataset_column_names",
    "get_trackio_space_url",
    "get_training_chat_template",
    "global_then_local_main_first",
    "has_generation_markers",
    "maybe_gather_lm_head_ctx",
    "prepare_as_sft_trainer",
]

# What the trainers of this package override, call or read of TRL's: method -> its parameters
OVERRIDDEN_METHODS = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    "_set_signature_columns_if_needed": (),
}
# Set by `SFTTrainer.__init__` or the methods above
ATTRIBUTES = ("_metrics", "_signature_columns", "_total_train_tokens")


def fingerprint(dataset: Any) -> str | None:
    """The hash by which datasets tells one state of a dataset from another; `None` for what has none."""
    return getattr(dataset, "_fingerprint", None)


def prepare_as_sft_trainer(
    dataset: Dataset,
    processing_class: Any,
    *,
    completion_only_loss: bool | None,
    chat_template: str | None,
    dataset_num_proc: int | None,
    dataset_text_field: str,
    assistant_only_loss: bool,
    max_length: int | None,
    truncation_mode: str,
) -> Dataset:
    """
    Tokenise and label rows as [`~trl.SFTTrainer`] does, without a trainer and its model. The options are those of
    [`~trl.SFTConfig`].

    The method is borrowed instead of rewritten: a second tokenisation path would sooner or later differ from the
    trainer's, and the difference would be silent. It reads these attributes of its trainer and nothing else.
    """
    trainer: Any = SimpleNamespace(
        _tokenizer=getattr(processing_class, "tokenizer", processing_class),
        completion_only_loss=completion_only_loss,
        chat_template=chat_template,
    )
    args: Any = SimpleNamespace(
        dataset_num_proc=dataset_num_proc,
        dataset_text_field=dataset_text_field,
        assistant_only_loss=assistant_only_loss,
        max_length=max_length,
        truncation_mode=truncation_mode,
        shuffle_dataset=False,
    )
    return SFTTrainer._prepare_dataset(
        trainer, dataset, processing_class, args, packing=False, formatting_func=None, dataset_name="teacher"
    )
