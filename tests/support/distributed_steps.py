"""
Optimizer steps of the trainer on this process group, for comparison with one process.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.support.distributed_steps OUTPUT
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import SFTConfig

from first_trl import FirstDistillTrainer
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import GradientRecorder, tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


# Batch shapes of 8 rows on two processes
SHAPES: dict[str, dict[str, Any]] = {
    "4 x 1": {"per_device_train_batch_size": 4},
    "2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
DDP_ESTIMATORS = ("topk", "sampled")
# Layers and root are sharded as accelerate does it; accelerate itself refuses to shard on CPUs
SHARDED = {"untied": (False, False), "tied": (True, False), "head apart": (False, True)}
# Held-out rows whose number fits no batch, in every way they can be read
HELD_OUT: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding free": {"padding_free": True, "max_length": None},
    "streamed": {"streaming": True},
    "streamed in shards": {"streaming": True, "shards": 2},
    "streamed, padding free": {"streaming": True, "padding_free": True, "max_length": None},
    "streamed by a worker": {"streaming": True, "dataloader_num_workers": 1},
}


def trainer_of(
    folder: Path, estimator: str = "topk", tied: bool = False, **options: Any
) -> tuple[FirstDistillTrainer, GradientRecorder]:
    tokenizer, teacher = tiny_tokenizer(), tiny_llama()
    draws = 9 if estimator == "sampled" else 0
    # Rows of very different numbers of labels: a mean of per-rank means would differ
    cache = tiny_cache(teacher, tokenizer, tiny_rows(8, longest=20), k=5, num_draws=draws)
    recorder = GradientRecorder()
    if "WORLD_SIZE" in os.environ:
        options["ddp_backend"] = "gloo"
    trainer = FirstDistillTrainer(
        tiny_llama(seed=1, tie_word_embeddings=tied),
        tiny_config(folder, estimator=estimator, **options),
        cache,
        eval_dataset=cache.select(range(7)),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    return trainer, recorder


def step(folder: Path, **options: Any) -> dict[str, Any]:
    trainer, recorder = trainer_of(folder, **options)
    before = trainer.evaluate()
    trainer.train()
    gradients = {name.removeprefix("module."): tensor for name, tensor in recorder.gradients[0].items()}
    return {"gradients": gradients, "log": next(log for log in recorder.logs if "loss" in log), "eval": before}


def held_out(folder: Path, streaming: bool = False, shards: int = 1, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of both trainers on 11 rows, and what `predict` says of them."""
    if "WORLD_SIZE" in os.environ:
        options["ddp_backend"] = "gloo"
    tokenizer, found = tiny_tokenizer(), {}
    cache = tiny_cache(tiny_llama(), tokenizer, tiny_rows(11, longest=30), k=5)
    rows = cache.to_iterable_dataset(num_shards=shards) if streaming else cache
    args = tiny_config(folder, per_device_eval_batch_size=2, **options)
    trainer = FirstDistillTrainer(
        tiny_llama(seed=1), args, cache, eval_dataset=rows, processing_class=tokenizer
    )  # fmt: skip
    found["distill"] = trainer.evaluate()
    if not streaming and not args.padding_free:
        predicted = trainer.predict(cache)
        found["predict"] = {**predicted.metrics, "rows": len(predicted.predictions)}
    labelled = Dataset.from_list(tiny_rows(11, longest=30))
    sft = SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, per_device_eval_batch_size=2,
        **options,
    )  # fmt: skip
    found["sft"] = FirstSFTTrainer(
        tiny_llama(seed=1),
        args=sft,
        train_dataset=labelled,
        eval_dataset=labelled.to_iterable_dataset(num_shards=shards) if streaming else labelled,
        processing_class=tokenizer,
    ).evaluate()
    return found


def sharded_step(folder: Path, tied: bool, head_apart: bool) -> dict[str, Any]:
    trainer, _ = trainer_of(folder, tied=tied, per_device_train_batch_size=4)
    model: Any = trainer.model
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_apart:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.train()
    [batch] = list(trainer.get_train_dataloader())
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, batch, num_items_in_batch=count).backward()
    return {"gradients": {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}}


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for estimator in DDP_ESTIMATORS:
        for name, shape in SHAPES.items():
            results[f"ddp {estimator} {name}"] = step(
                output.parent, estimator=estimator, per_device_eval_batch_size=3, **shape
            )
    for name, options in HELD_OUT.items():
        results[f"held out {name}"] = held_out(output.parent, **options)
    for name, (tied, head_apart) in SHARDED.items():
        results[f"fsdp2 {name}"] = sharded_step(output.parent, tied, head_apart)
    if dist.get_rank() == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main()
