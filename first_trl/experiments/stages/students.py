"""Stage `students`: every arm that is trained."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets

from ..recipe import ArmSpec
from .context import RunContext
from .recalibrate import fitted
from .teachers import base_model, load_cache, teacher_of
from .training import train_distill, train_sft


def run_students(run: RunContext) -> None:
    for name, arm in run.recipe.arms.items():
        if arm.kind not in ("sft", "distill"):
            continue
        training = {**run.recipe.training, **arm.training}
        inputs: dict[str, Any] = {
            "arm": {**asdict(arm), "label": None, "swept": None},
            "training": training,
            "seed": run.recipe.seed,
            "base": run.keys["base/student"],
            "data": [run.keys[f"data/{role}"] for role in (*arm.data, *(["validation"] if arm.select else []))],
        }
        value = arm.recalibration_value
        if arm.kind == "distill":
            teacher = teacher_of(run, arm)
            inputs["cache"] = [run.keys[f"cache{teacher.suffix}{part}"] for part in teacher.parts]
            fit = fitted(run, arm)
            if fit is not None:
                # The value, not the fit: another arm's fit beside it changes nothing here
                value = inputs["fitted"] = fit["recalibration"]["value"]
        run.keys[name] = run.workspace.run(
            "students", f"students/{name}", inputs, partial(_train, run, arm, value, training)
        )


def _train(run: RunContext, arm: ArmSpec, value: float | None, training: dict[str, Any], folder: Path) -> None:
    student, tokenizer = base_model(run, "student"), run.tokenizer()
    validation = run.tokens("validation") if arm.select else None
    if arm.kind == "sft":
        train_sft(
            run.recipe, student, tokenizer, run.tokens("train"), training, folder,
            lora=arm.lora, validation=validation, token_dropout=arm.token_dropout,
        )  # fmt: skip
        return
    teacher = teacher_of(run, arm)
    caches = [load_cache(run, teacher, role) for role in arm.data]
    cache = caches[0] if len(caches) == 1 else concatenate_datasets(caches)
    train_distill(run.recipe, student, tokenizer, cache, arm, value, training, folder, validation=validation)
