"""Stage `students`: every arm that is trained."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets

from ...plugins import ESTIMATORS, RECALIBRATIONS
from ..run_folder import base_unit, cache_unit, student_unit
from .capture import load_cache
from .context import RunContext
from .recalibrate import fitted_value
from .teachers import base_model, teacher_of
from .training import train_distill, train_sft
from .units import Unit


def student_units(run: RunContext) -> Iterator[Unit]:
    """One an arm that is trained."""
    for name, arm in run.recipe.arms.items():
        if arm.kind not in ("sft", "distill"):
            continue
        inputs: dict[str, Any] = {
            "arm": {
                key: value
                for key, value in asdict(arm).items()
                if key not in ("novelty", "prompts") and (key, value) != ("soft_label_weight", None)
            }
            | {"label": None, "swept": None},
            "training": {**run.recipe.training, **arm.training},
            "seed": run.recipe.seed,
            "base": run.keys[base_unit("student")],
            "data": [run.role_keys[role] for role in (*arm.data, *(["validation"] if arm.select else []))],
        }
        if arm.kind == "distill":
            teacher = teacher_of(run.recipe, arm)
            code = [ESTIMATORS.code(arm.estimator), RECALIBRATIONS.code(arm.recalibration)]
            if any(code):
                inputs["code"] = code
            inputs["cache"] = [run.keys[cache_unit(teacher.name, fold)] for fold in teacher.parts]
            value = fitted_value(run, arm)
            if value is not None:
                # The value, not the fit: another arm's fit beside it changes nothing here
                inputs["fitted"] = value
        yield Unit(
            student_unit(name), inputs, partial(_train, run, name, inputs.get("fitted", arm.recalibration_value))
        )


def _train(run: RunContext, name: str, value: float | None, path: Path) -> None:
    arm, folder = run.recipe.arms[name], run.folder.student(name)
    training = {**run.recipe.training, **arm.training}
    student, tokenizer = base_model(run, "student"), run.tokenizer()
    validation = run.folder.load_tokens("validation") if arm.select else None
    if arm.kind == "sft":
        train_sft(
            run.recipe, student, tokenizer, run.folder.load_tokens("train"), training, folder,
            lora=arm.lora, validation=validation, options=arm,
        )  # fmt: skip
        return
    teacher = teacher_of(run.recipe, arm)
    caches = [load_cache(run, teacher, role, arm.target) for role in arm.data]
    if arm.target == "soft_labels":
        arm = replace(arm, soft_label_weight=None)  # nothing is mixed
    cache = caches[0] if len(caches) == 1 else concatenate_datasets(caches)
    train_distill(run.recipe, student, tokenizer, cache, arm, value, training, folder, validation=validation)
