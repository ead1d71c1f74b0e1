"""Models and trainings of a recipe: from scratch or loaded, fine-tuned with TRL, distilled with this package."""

import dataclasses
import gc
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from ..processes import process_state
from ..recipe import ArmSpec, ModelSpec, Recipe
from ..training.config import FirstDistillConfig
from ..training.trainer import FirstDistillTrainer


def make_model(spec: ModelSpec, tokenizer: Any, seed: int, role: str) -> Any:
    """A model from scratch (seeded by recipe and role) or from its name."""
    if spec.name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(spec.name_or_path, **spec.config, **spec.init_kwargs)
    set_seed(seed + zlib.crc32(role.encode()) % 2**16)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    config = AutoConfig.for_model(str(spec.architecture), **{"vocab_size": len(tokenizer), **special, **spec.config})
    return AutoModelForCausalLM.from_config(config)


def load_trained(folder: Path, **init_kwargs: Any) -> Any:
    """A trained model of a run, adapter or full, on this process's device and ready for inference."""
    loader = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return loader.from_pretrained(folder, **init_kwargs).to(process_state().device).eval()


def train_sft(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    training: dict[str, Any],
    folder: Path,
    lora: dict[str, Any] | None = None,
) -> None:
    """Next-token training on labelled rows with TRL's SFTTrainer; the result goes to `folder/model`."""
    args = training_arguments(SFTConfig, recipe, training, folder)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=_lora(lora))
    _train_and_save(trainer, folder)


def train_distill(
    recipe: Recipe, model: Any, tokenizer: Any, cache: Dataset, arm: ArmSpec, training: dict[str, Any], folder: Path
) -> None:
    """Distillation from a cache; the result goes to `folder/model`."""
    args = training_arguments(
        FirstDistillConfig,
        recipe,
        {
            **training,
            "recalibration": arm.recalibration,
            "recalibration_value": arm.recalibration_value,
            "estimator": arm.estimator,
            "ce_weight": arm.ce_weight,
        },
        folder,
    )
    trainer = FirstDistillTrainer(
        model, args, train_dataset=cache, processing_class=tokenizer, peft_config=_lora(arm.lora)
    )
    _train_and_save(trainer, folder)


def training_arguments(cls: type, recipe: Recipe, training: dict[str, Any], folder: Path) -> Any:
    """`SFTConfig` or `FirstDistillConfig` from a recipe's mapping; keys were checked when the recipe was read."""
    training = dict(training)
    on_gpu = torch.cuda.is_available()
    known = {f.name for f in dataclasses.fields(cls)}
    global_batch = training.pop("global_batch_size", None)
    if global_batch is not None:
        parts = process_state().num_processes * training.get("gradient_accumulation_steps", 1)
        if global_batch % parts:
            raise ValueError(
                f"global_batch_size={global_batch} does not divide by {parts} (processes x accumulation steps). "
                "Choose a multiple, or another number of processes."
            )
        training["per_device_train_batch_size"] = global_batch // parts
    values = {
        "output_dir": str(folder / "checkpoints"),
        "run_name": f"{recipe.name}/{folder.name}/seed-{recipe.seed}",
        "report_to": recipe.report_to,
        "seed": recipe.seed,
        # Rows were cut when they were tokenised, and counted there
        "max_length": None,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        **{key: value for key, value in training.items() if key in known},
    }
    return cls(**values)


def _lora(options: dict[str, Any] | None) -> LoraConfig | None:
    return None if options is None else LoraConfig(**{"task_type": "CAUSAL_LM", **options})


def _train_and_save(trainer: Any, folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    # The trainer's state is the last file of a checkpoint: one without it was cut off while it was written
    whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        history = json.dumps(trainer.state.log_history, indent=2)
        (folder / "training_log.json").write_text(history, encoding="utf-8")
        # Checkpoints serve resuming; the model is saved
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.free_memory()
    trainer.accelerator.wait_for_everyone()
    # Many trainings run in one process: a model referenced by a dead trainer's cycles would stay on the device
    del trainer
    gc.collect()
