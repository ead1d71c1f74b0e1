"""
Optimizer steps of the trainers under DeepSpeed ZeRO-3 or FSDP2 on this process group, for comparison with one process.

    DS_ACCELERATOR=cpu python -m torch.distributed.run --nproc_per_node 2 -m tests.support.sharded_steps OUTPUT
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m tests.support.sharded_steps OUTPUT
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from first_trl import FirstDistillTrainer
from first_trl.experiments.recipe import ModelSpec
from first_trl.experiments.run_folder import TrainingFolder
from first_trl.experiments.stages.training import load_trained, make_model, whole_models
from first_trl.training.sft import FirstSFTTrainer
from tests.support.fsdp2_on_cpu import shard_on_cpu
from tests.support.tiny import tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FSDP2 = "ACCELERATE_USE_FSDP" in os.environ
# Trainer, whether the head is tied, and whether the student is loaded in shares (after the settings are known)
RUNS = {
    "untied": ("distill", False, False),
    "tied": ("distill", True, False),
    "untied, loaded in shares": ("distill", False, True),
    "tied, loaded in shares": ("distill", True, True),
    "labels alone": ("sft", False, False),
    "labels alone, tied": ("sft", True, False),
}


def steps(folder: Path, kind: str, tied: bool, shares: bool) -> dict[str, Any]:
    """Three steps, an evaluation after each; weights as they are saved, and the saved model's own loss."""
    launched = "WORLD_SIZE" in os.environ
    options: dict[str, Any] = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4 if launched else 8,
    }  # fmt: skip
    if launched:
        options |= {"ddp_backend": "gloo", **({} if FSDP2 else {"deepspeed": ZERO3})}
    tokenizer = tiny_tokenizer()
    # Before the settings of ZeRO-3 are known, by which models are split as they are made
    if not launched or os.environ["RANK"] == "0":
        with whole_models():
            tiny_llama(seed=1, tie_word_embeddings=tied).save_pretrained(folder / "base")
    rows = tiny_rows(8, longest=20)
    with whole_models():
        cache, labelled = tiny_cache(tiny_llama(), tokenizer, rows, k=5), Dataset.from_list(rows)
    if kind == "distill":
        args: Any = tiny_config(folder / "checkpoints", **options)
    else:
        args = SFTConfig(
            str(folder / "checkpoints"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            save_strategy="no", learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            gradient_checkpointing=False, **options,
        )  # fmt: skip
    if launched:
        dist.barrier()
    student: Any
    if shares:
        student = AutoModelForCausalLM.from_pretrained(folder / "base")
        assert not launched or student.get_output_embeddings().weight.shape == (0,)
    else:
        student = make_model(ModelSpec(name_or_path=str(folder / "base")), None, 0, "student")
    if kind == "distill":
        trainer: Any = FirstDistillTrainer(student, args, cache, eval_dataset=cache, processing_class=tokenizer)
    else:
        trainer = FirstSFTTrainer(
            student, args=args, train_dataset=labelled, eval_dataset=labelled, processing_class=tokenizer,
            fused_loss=True,
        )  # fmt: skip
    trainer.train()
    if launched and FSDP2:
        # An evaluation leaves the last norm and the head gathered
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.model.layers.parameters())
    trainer.save_model(str(folder / "model"))
    trainer.accelerator.wait_for_everyone()
    # What the pipeline does next, in the same process: the model is read to be run
    again = load_trained(TrainingFolder(folder), ModelSpec(name_or_path="x"), lambda: None)
    history = trainer.state.log_history
    return {
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "eval_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "weights": {name: tensor.clone() for name, tensor in again.state_dict().items()},
    }


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    if FSDP2:
        shard_on_cpu()
    # FSDP2 splits a model that is whole
    runs = {name: run for name, run in RUNS.items() if not (FSDP2 and run[-1])}
    results = {name: steps(output.parent / name.replace(" ", "_"), *run) for name, run in runs.items()}
    if dist.get_rank() == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main()
