"""Models and trainings of a recipe: from scratch or loaded, fine-tuned with TRL, distilled with this package."""

import dataclasses
import gc
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.integrations import deepspeed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from ...training.config import FirstDistillConfig
from ...training.keep_layers import load_first_layers
from ...training.options import DistillOptions
from ...training.sft import label_trainer
from ...training.trainer import FirstDistillTrainer
from ...utils.files import write_atomically, write_json
from ...utils.names import nearest
from ...utils.processes import on_accelerator, process_state
from ...utils.versions import training_versions
from ..recipe import ArmSpec, ModelSpec, Recipe
from ..run_folder import TrainingFolder


def make_model(spec: ModelSpec, tokenizer: Any, seed: int, role: str) -> Any:
    """A model from scratch (seeded by recipe and role) or from its name, whole on every process."""
    with whole_models():
        return _make_model(spec, tokenizer, seed, role)


def _make_model(spec: ModelSpec, tokenizer: Any, seed: int, role: str) -> Any:
    if not spec.from_scratch:
        name = str(spec.name_or_path)
        if spec.keep_layers is not None:
            return load_first_layers(name, spec.keep_layers, config=spec.config, **spec.init_kwargs)
        return AutoModelForCausalLM.from_pretrained(name, **spec.config, **spec.init_kwargs)
    set_seed(seed + zlib.crc32(role.encode()) % 2**16)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    config = AutoConfig.for_model(str(spec.architecture), **{"vocab_size": len(tokenizer), **special, **spec.config})
    return AutoModelForCausalLM.from_config(config)


def load_trained(folder: TrainingFolder, spec: ModelSpec, base: Callable[[], Any]) -> Any:
    """
    The model that was trained into a unit's folder, on this process's device and ready for inference.

    Args:
        folder ([`TrainingFolder`]): Folder of the unit.
        spec ([`ModelSpec`]): What it was trained from; its `init_kwargs` serve again.
        base (`Callable`): Makes the model an adapter belongs to: the very one it was trained on, whatever revision and
            settings that was loaded with.
    """
    with whole_models():
        if folder.is_adapter:
            return place(PeftModel.from_pretrained(base(), folder.model))
        options = {key: value for key, value in spec.init_kwargs.items() if key != "revision"}
        return place(AutoModelForCausalLM.from_pretrained(folder.model, **options))


@contextmanager
def whole_models() -> Iterator[None]:
    """
    Models are loaded whole on each process, and DeepSpeed splits a student when its training starts. A training under
    ZeRO-3 leaves its settings behind, by which `from_pretrained` would give each process a share of the weights: no
    use for a model that is run on one process, or saved.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def place(model: Any) -> Any:
    """On this process's device and in evaluation mode; a model that was loaded onto devices stays where it is."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return (model if placed else model.to(process_state().device)).eval()


def train_sft(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    training: dict[str, Any],
    folder: TrainingFolder,
    *,
    lora: dict[str, Any] | None = None,
    validation: Dataset | None = None,
    options: DistillOptions | None = None,
) -> None:
    """
    Next-token training on labelled rows with [`FirstSFTTrainer`]; the result goes to `folder.model`. With `validation`
    rows it is the epoch with the lowest negative log-likelihood on them, and `folder.selection` says which.
    """
    args = training_arguments(SFTConfig, recipe, training, folder, select=validation is not None)
    given: dict[str, Any] = {
        "args": args,
        "train_dataset": rows,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "peft_config": _lora(lora),
    }
    own = {} if options is None else options.options()
    _train_and_save(label_trainer({**training, **own}, model, **given), folder)


def train_distill(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    cache: Dataset,
    arm: ArmSpec,
    value: float | None,
    training: dict[str, Any],
    folder: TrainingFolder,
    *,
    validation: Dataset | None = None,
) -> None:
    """
    Distillation from a cache with `value` as the rescale's; the result goes to `folder.model`. `validation` as in
    [`train_sft`].
    """
    own = {**arm.options(), "recalibration_value": value}
    args = training_arguments(FirstDistillConfig, recipe, {**training, **own}, folder, select=validation is not None)
    trainer = FirstDistillTrainer(
        model,
        args,
        train_dataset=cache,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=_lora(arm.lora),
    )
    _train_and_save(trainer, folder)


def training_arguments(
    cls: type, recipe: Recipe, training: dict[str, Any], folder: TrainingFolder, *, select: bool = False
) -> Any:
    """`SFTConfig` or `FirstDistillConfig` from a recipe's mapping; keys were checked when the recipe was read."""
    training = dict(training)
    check_reporting(training.get("report_to", recipe.report_to))
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
        "output_dir": str(folder.checkpoints),
        "run_name": f"{recipe.name}/{folder.path.name}/seed-{recipe.seed}",
        "report_to": recipe.report_to,
        "seed": recipe.seed,
        # Rows were cut when they were tokenised, and counted there
        "max_length": None,
        "use_cpu": not on_accelerator(),
        "bf16": on_accelerator() and is_torch_bf16_gpu_available(),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        **{key: value for key, value in training.items() if key in known},
    }
    if select:
        values |= {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
        # The trainer's default of 8 is for the memory of training; a recipe may say otherwise
        values.setdefault("per_device_eval_batch_size", values.get("per_device_train_batch_size", 8))
    return cls(**values)


def check_reporting(report_to: str) -> None:
    """Raises `ValueError` for a logger that is unknown or not installed, before anything is trained."""
    if report_to in ("none", "all"):
        return
    if report_to not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to: unknown logger {report_to!r}.{nearest(report_to, INTEGRATION_TO_CALLBACK)}")
    try:
        INTEGRATION_TO_CALLBACK[report_to]()
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"report_to: {report_to} is not installed ({str(error).split('.')[0]}). Install it with `pip install "
            f"{report_to.replace('_', '-')}`, or set `report_to: none`."
        ) from None


def _idle_loggers(trainer: Any) -> list[Any]:
    """
    W&B and SwanLab, where nobody has a run open: the training opens one, and both would keep it open for the process and
    write the next training into it.
    """
    found = [
        (getattr(one, "_wandb", None), getattr(one, "_swanlab", None)) for one in trainer.callback_handler.callbacks
    ]
    idle = [wandb for wandb, _ in found if wandb is not None and wandb.run is None]
    return idle + [swanlab for _, swanlab in found if swanlab is not None and swanlab.get_run() is None]


def _keep_reports(folder: TrainingFolder) -> None:
    """Loggers write into the trainer's output folder, which goes."""
    for path in folder.checkpoints.glob("*"):
        # Cards are of a checkpoint, and the model has its own
        if path.name.startswith("checkpoint-") or path.suffix in (".md", ".png"):
            continue
        folder.reports.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, folder.reports / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, folder.reports / path.name)


def _selection(state: Any) -> dict[str, Any]:
    """Which epoch was kept, and the validation curve it was chosen from."""
    curve = [
        {"epoch": entry["epoch"], "step": entry["step"], "nll": entry["eval_loss"]}
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    best = min(curve, key=lambda point: point["nll"])
    return {**best, "epochs": curve[-1]["epoch"], "curve": curve}


def _lora(options: dict[str, Any] | None) -> LoraConfig | None:
    return None if options is None else LoraConfig(**{"task_type": "CAUSAL_LM", **options})


def _train_and_save(trainer: Any, folder: TrainingFolder) -> None:
    checkpoints, log = folder.checkpoints, folder.log
    # The log is written last: with it the model is whole, and what is left of the checkpoints may be anything
    if not log.is_file():
        # The trainer's state is the last file of a checkpoint: one without it was cut off while it was written
        whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
        last = max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
        loggers = _idle_loggers(trainer)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.save_model(str(folder.model))
        if trainer.is_world_process_zero():
            if trainer.args.load_best_model_at_end:
                write_json(folder.selection, _selection(trainer.state))
            write_json(folder.versions, training_versions())
            write_atomically(log, json.dumps(trainer.state.log_history, indent=2))
        for logger in loggers:
            logger.finish()
    if trainer.is_world_process_zero():
        _keep_reports(folder)
        # Checkpoints serve resuming; the model is saved
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.free_memory()
    trainer.accelerator.wait_for_everyone()
    # Many trainings run in one process: a model referenced by a dead trainer's cycles would stay on the device
    del trainer
    gc.collect()
