"""The transformation of a recipe into its smoke run."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import ENDPOINT

from ...utils.processes import process_state
from ..recipe import ModelSpec, Recipe, cells
from .models import tiny_model
from .rows import has_rows, small_limit, smoke_task
from .tokenizer import smoke_tokenizer


_NOTE = (
    "SMOKE RUN: tiny random models, a few rows of our own, two steps a training. It shows that every stage works on this "
    "machine; the numbers mean nothing."
)
_PUBLIC_HUB = "https://huggingface.co"
_MAX_STEPS = 2
_MAX_RUNS = 4
_MAX_CASES = 2
_MAX_EVALUATIONS = 100
_FAMILY = ("name_or_path", "architecture", "config", "init_kwargs")
# Whatever the recipe says about these
_TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "max_steps": _MAX_STEPS,
    "global_batch_size": 8,
    "gradient_checkpointing": False,
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "dataloader_num_workers": 0,
}
# The teacher has to learn which tokens are answers, or they are not among its top k and a fit by NLL has nothing to go by
_TEACHER_TRAINING: dict[str, Any] = {
    **_TRAINING,
    "max_steps": 3,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
# Need a GPU, another process or the network, or speak of steps that are not made
_NOT_HERE = (
    "activation_offloading", "bf16_full_eval", "dataloader_persistent_workers", "dataloader_prefetch_factor", "deepspeed",
    "eval_steps", "fp16_full_eval", "fsdp", "fsdp_config", "load_best_model_at_end", "model_init_kwargs", "optim",
    "optim_args", "padding_free", "per_device_eval_batch_size", "per_device_train_batch_size", "push_to_hub", "report_to",
    "save_steps", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
)  # fmt: skip


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """
    The same experiment, small enough to run to the end on a CPU in under a minute, for a look at whether all of it works.

    Every stage, arm, teacher and fit of the recipe stays and takes the same code path. Models become tiny random ones of
    the same family, rows are 24 of our own in the benchmark's format (or as many that the task generates), trainings take
    two steps, and of a grid's values, of cases and of seeds the first two are kept, of very many evaluations the first two
    roles. The folder and the repositories are not those of the real run.

    Args:
        recipe ([`~first_trl.experiments.recipe.Recipe`]):
            From [`~first_trl.experiments.recipe.load_recipe`].
        folder (`Path`):
            Folder of the run; the tokenizer is written into it.

    Returns:
        [`~first_trl.experiments.recipe.Recipe`]

    Raises:
        `ValueError`: when a model is named by a repository that is not on this machine, and the recipe does not say its
            `architecture`.
    """
    with process_state().main_process_first():
        return _smoke(recipe, folder)


def _smoke(recipe: Recipe, folder: Path) -> Recipe:
    cases = list(recipe.cases)[:_MAX_CASES]
    grid = _grid(recipe, _MAX_RUNS // max(len(cases), 1))
    n_cells = max(len(cases), 1) * _number_of_runs(grid)
    small = _small(recipe, folder)
    notes = [_NOTE]
    if recipe.capture.vllm_url is not None:
        notes.append("The recipe's teacher is scored by a vLLM server; here it was run in this process.")
    if recipe.hub is not None and small.hub is None:
        notes.append("Nothing was pushed; with HF_ENDPOINT set to a Hub of your own, the push is tried there.")
    if len(cases) < len(recipe.cases):
        notes.append(f"Cases that were not run: {', '.join(list(recipe.cases)[_MAX_CASES:])}.")
    small = replace(
        small,
        # Two, so that there is something to merge; a grid gives that already
        seeds=recipe.seeds[: 1 if n_cells > 1 else 2],
        grid=grid,
        cases={name: _case(recipe, name, small, folder) for name in cases},
    )
    roles = small.evaluation.splits
    kept = [role for i, role in enumerate(roles) if i < 2 or small.task.splits[role].unseen is not None]
    # Most of the time goes into figures, one panel an evaluation
    if len(kept) < len(roles) and len(roles) * sum(len(run.arms) for run in cells(small)) > _MAX_EVALUATIONS:
        notes.append(f"Roles that were not evaluated: {', '.join(role for role in roles if role not in kept)}.")
        roles = kept
    return replace(
        small,
        evaluation=replace(small.evaluation, splits=roles),
        report=replace(recipe.report, notes=[*notes, *recipe.report.notes]),
    )


def _small(recipe: Recipe, folder: Path) -> Recipe:
    return replace(
        recipe,
        # Repositories are named after the recipe: a smoke run must not overwrite real ones
        name=f"{recipe.name}-smoke",
        task=smoke_task(recipe.task, folder / "rows"),
        teacher=_model(recipe.teacher, "teacher"),
        student=_model(recipe.student, "student"),
        arms={
            name: replace(arm, training=_overrides(arm.training), lora=_lora(arm.lora))
            for name, arm in recipe.arms.items()
        },
        teachers={
            name: replace(variant, sft=_overrides(variant.sft, _TEACHER_TRAINING), folds=2 if variant.folds else None)
            for name, variant in recipe.teachers.items()
        },
        training=_training(recipe.training),
        capture=replace(
            recipe.capture,
            vllm_url=None,
            vllm_model=None,
            max_tokens_per_batch=min(recipe.capture.max_tokens_per_batch, 4096),
        ),
        evaluation=replace(recipe.evaluation, batch_size=min(recipe.evaluation.batch_size, 32)),
        # Random models are pushed to a Hub of one's own, for a test of the push, and never to the public one
        hub=None if recipe.hub is None or ENDPOINT == _PUBLIC_HUB else replace(recipe.hub, private=True),
        # A task that makes its rows brings a tokenizer of its own
        tokenizer=str(smoke_tokenizer(folder / "tokenizer")) if has_rows(recipe.task.name) else None,
        output_dir=str(folder),
        num_threads=1,
        report_to="none",
    )


def _case(recipe: Recipe, name: str, small: Recipe, folder: Path) -> dict[str, Any]:
    """What a case changes, taken from the smoke run of the recipe with that case."""
    changes = recipe.cases[name]
    (whole,) = cells(replace(recipe, seeds=[], grid={}, cases={name: changes}))
    ours, theirs = asdict(small), asdict(_small(whole, folder))
    # Follow from the task and the models, and are not among the changes of a recipe that needs no small models
    derived = ["tokenizer", *(f"{role}.{key}" for role in ("teacher", "student") for key in _FAMILY)]
    changed = {key: _value(theirs, key) for key in derived if _value(theirs, key) != _value(ours, key)}
    return changed | {key: _value(theirs, key) for key in changes}


def _value(data: dict[str, Any], key: str) -> Any:
    """Value at a dotted key; `None` where there is nothing, as for an arm that a case leaves out."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None  # type: ignore[assignment]
    return data


def _model(spec: ModelSpec, place: str) -> ModelSpec:
    return replace(
        tiny_model(spec, place),
        pretrain=None if spec.pretrain is None else _training(spec.pretrain),
        sft=None if spec.sft is None else _training(spec.sft, _TEACHER_TRAINING),
        lora=_lora(spec.lora),
        select=spec.select,
    )


def _training(training: dict[str, Any], fixed: dict[str, Any] = _TRAINING) -> dict[str, Any]:
    """A whole mapping of training arguments."""
    return {**_overrides(training), **fixed}


def _overrides(training: dict[str, Any], fixed: dict[str, Any] = _TRAINING) -> dict[str, Any]:
    """Arguments on top of others: what they set stays set."""
    kept = {key: fixed.get(key, value) for key, value in training.items() if key not in _NOT_HERE}
    if "gradient_accumulation_steps" in kept:
        kept["gradient_accumulation_steps"] = min(kept["gradient_accumulation_steps"], 2)
    return kept


def _lora(options: dict[str, Any] | None) -> dict[str, Any] | None:
    if options is None:
        return None
    # The layers that a recipe picks by number are not all there
    kept = {key: value for key, value in options.items() if key not in ("layers_to_transform", "layers_pattern")}
    return {**kept, "r": min(kept.get("r", 4), 4)}


def _grid(recipe: Recipe, max_runs: int) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for key, values in recipe.grid.items():
        short = [_grid_value(key, value) for value in values[:2]]
        # Values that became the same would be the same run twice
        short = short[:1] if short[1:] == short[:1] else short
        if not key.startswith("arms.") and _number_of_runs({**grid, key: short}) > max_runs:
            short = short[:1]
        grid[key] = short
    return grid


def _number_of_runs(grid: dict[str, list[Any]]) -> int:
    return math.prod(len(values) for key, values in grid.items() if not key.startswith("arms."))


def _grid_value(key: str, value: Any) -> Any:
    last = key.rsplit(".", 1)[-1]
    if last == "name_or_path":
        # The tiny model has no name
        return None
    if last == "limit":
        return small_limit(value)
    if last == "max_steps":
        return min(value, _MAX_STEPS)
    return value
