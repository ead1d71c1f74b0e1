"""A small training from end to end: capture, distil, and the student comes close to its teacher, the same twice."""

import tempfile
from pathlib import Path
from typing import Any

import torch


def run(device: str) -> dict[str, Any]:
    """KL before and after, and whether two runs give the same weights."""
    from first_trl import FirstDistillConfig, FirstDistillTrainer, add_teacher_topk
    from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    from datasets import Dataset

    teacher = tiny_llama(seed=0).to(device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Dataset.from_list(tiny_rows(256))
        cache = add_teacher_topk(rows, teacher, tokenizer, k=5, output_dir=Path(folder, "cache"))
        for attempt in ("one", "two"):
            trainer = FirstDistillTrainer(
                tiny_llama(seed=1),
                FirstDistillConfig(
                    output_dir=str(Path(folder, attempt)), estimator="bucket", max_steps=60, learning_rate=1e-2,
                    per_device_train_batch_size=32, logging_steps=20, report_to="none", save_strategy="no", seed=0,
                    bf16=device == "cuda", use_cpu=device == "cpu", max_length=None, eval_strategy="no",
                ),
                train_dataset=cache,
                eval_dataset=cache,
                processing_class=tokenizer,
            )  # fmt: skip
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            after = trainer.evaluate()["eval_loss"]
            weights = torch.cat([value.detach().float().cpu().flatten() for value in trainer.model.parameters()])
            results.append((before, after, weights))
    (before, after, first), (_, _, second) = results
    return {
        "loss_before": before,
        "loss_after": after,
        "largest_difference_of_two_runs": float((first - second).abs().max()),
        "ok": after < 0.8 * before,
    }
