"""Runs of lm-evaluation-harness on tasks of a folder."""

from pathlib import Path
from typing import Any


def run_harness(folder: Path, model: Any, tasks: list[str]) -> dict[str, Any]:
    """Results with all samples, of a Hugging Face model in float32 on the CPU."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=16,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found
