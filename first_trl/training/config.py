"""Configuration of [`FirstDistillTrainer`]."""

from dataclasses import dataclass
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .options import TrainerOptions, check_options


@dataclass
class FirstDistillConfig(TrainerOptions, SFTConfig):
    r"""
    Configuration class for the [`FirstDistillTrainer`].

    The parameters that are specific to distillation from a teacher cache are those of
    [`~first_trl.training.options.DistillOptions`] and [`~first_trl.training.options.TrainerOptions`]. For the others,
    please refer to [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `bf16`: Defaults to `True` only where the device supports it.
    """

    def __post_init__(self) -> None:
        # SFTConfig asks for bf16 everywhere and then refuses machines without it
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False
        super().__post_init__()
        check_options(self)
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
