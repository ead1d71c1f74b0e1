"""Assembles the plan of a recipe."""

import json
import os
from pathlib import Path
from typing import Any

from ..recipe import ArmSpec, ModelSpec, Recipe, cells, merged_folder
from ..run_folder import RunFolder, base_unit, cache_unit, student_unit, teacher_unit
from ..share.push import repo_name, repo_prefix
from ..stages.capture import captured_roles
from ..stages.teachers import teachers
from .cache_size import cache_bytes
from .data import find_tokenizer, plan_splits
from .memory import SHARDINGS, capture_memory, training_memory
from .models import Shape, UnknownModel, config_of, lora_parameters, shape_of
from .probe import measure_times
from .progress import plan_units
from .schema import CachePlan, MemoryPlan, ModelPlan, Plan, RunPlan, SettingPlan, SplitPlan, TrainingPlan
from .steps import defaults, device_batch, optimizer_steps


# Rows of a teacher's forward, see `add_teacher_topk`
_CAPTURE_ROWS = 64


def plan_recipe(
    recipe: Recipe,
    *,
    processes: int | None = None,
    sharding: str | None = None,
    configs: str | Path | None = None,
    probe: bool = False,
) -> Plan:
    """
    The plan of a recipe: what its runs need and make, and what is finished. Reads configurations, local rows and
    published sizes; loads no weights and downloads no dataset.

    Args:
        recipe ([`Recipe`]):
            From [`load_recipe`].
        processes (`int`, *optional*):
            Processes, one a GPU. Those of the launch by default.
        sharding (`str`, *optional*):
            `none`, `fsdp2` or `zero3`. What `accelerate launch` was told by default.
        configs (`str` or `Path`, *optional*):
            Folder of model configurations, `<organisation>--<name>/config.json`, looked into before the Hub.
        probe (`bool`, *optional*, defaults to `False`):
            Time a few steps of models of these shapes on this machine, see [`measure_times`].

    Returns:
        [`Plan`]: Print it with [`format_plan`]. What cannot be known is `None`, with the reason beside it.

    Raises:
        `ValueError`: An unknown `sharding`, or a grid that makes no valid recipe.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    sharding = sharding or _launched_sharding()
    if sharding not in SHARDINGS:
        raise ValueError(f"`sharding` must be one of {', '.join(SHARDINGS)}, got {sharding!r}.")
    folder = None if configs is None else Path(configs)
    settings: dict[str, SettingPlan] = {}
    runs = []
    for run in cells(recipe):
        key = json.dumps(run.cell, sort_keys=True, default=str)
        if key not in settings:
            settings[key] = _setting(run, processes, sharding, folder)
        runs.append(RunPlan(run.seed, run.cell, str(run.folder), plan_units(run), _pushes(run, settings[key])))
    merged = merged_folder(recipe) if len(runs) > 1 else None
    times = measure_times(cells(recipe)[0], next(iter(settings.values())), folder) if probe else []
    return Plan(
        recipe.name,
        recipe.description.strip(),
        processes,
        sharding,
        list(settings.values()),
        runs,
        None if merged is None else str(RunFolder(merged).report.path),
        times,
    )


def _launched_sharding() -> str:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "none"
    return "none"


def _setting(recipe: Recipe, processes: int, sharding: str, configs: Path | None) -> SettingPlan:
    tokenizer = find_tokenizer(recipe)
    splits = plan_splits(recipe, tokenizer)
    sizer = _Sizer(recipe, {split.role: split for split in splits}, processes, sharding)
    models = [
        sizer.model(role, None if tokenizer is None else len(tokenizer), configs) for role in ("teacher", "student")
    ]
    return SettingPlan(recipe.cell, splits, models, sizer.memory(), sizer.caches(), sizer.trainings())


class _Sizer:
    """The parts of a setting, which share rows and models."""

    def __init__(self, recipe: Recipe, splits: dict[str, SplitPlan], processes: int, sharding: str) -> None:
        self.recipe, self.splits = recipe, splits
        self.processes, self.sharding = processes, sharding
        self.shapes: dict[str, Shape] = {}
        self.trainable: dict[str, int] = {}

    # models

    def model(self, role: str, vocabulary: int | None, configs: Path | None) -> ModelPlan:
        spec: ModelSpec = getattr(self.recipe, role)
        plan = ModelPlan(role, spec.name_or_path or f"{spec.architecture}, made from scratch")
        try:
            config = config_of(spec, role, vocabulary, configs)
        except UnknownModel as error:
            plan.problem = str(error)
            return plan
        shape = self.shapes[role] = shape_of(spec, config)
        plan.parameters, plan.dtype = shape.parameters, shape.dtype
        if role == "teacher":
            loras = {"teacher": spec.lora} if spec.lora is not None else {}
        else:
            loras = {name: arm.lora for name, arm in self._students() if arm.lora is not None}
        for name, lora in loras.items():
            try:
                plan.lora[name] = self.trainable[name if role == "student" else ""] = lora_parameters(config, lora)
            except (ValueError, TypeError) as error:
                plan.problem = f"{name}: PEFT refuses this LoRA: {error}"
        return plan

    def _students(self) -> list[tuple[str, ArmSpec]]:
        return [(name, arm) for name, arm in self.recipe.arms.items() if arm.kind in ("sft", "distill")]

    # memory

    def memory(self) -> list[MemoryPlan]:
        recipe, plans = self.recipe, []
        for role in ("teacher", "student"):
            pretrain = getattr(recipe, role).pretrain
            if pretrain is not None:
                plans.append(self._training(f"{role}, pretraining", role, pretrain, ["pretrain"]))
        for name, sft in self._fine_tunings():
            plans.append(self._training(f"{name}, fine-tuning", "teacher", sft, ["train"], recipe.teacher.lora, ""))
        plans.append(self._capture_memory())
        kinds: dict[str, tuple[list[str], ArmSpec, dict[str, Any]]] = {}
        for name, arm in self._students():
            training = {**recipe.training, **arm.training}
            key = json.dumps([arm.kind, arm.lora, arm.data, self._shape_of_training(training)], sort_keys=True)
            kinds.setdefault(key, ([], arm, training))[0].append(name)
        for names, arm, training in kinds.values():
            kind = "student, fine-tuning" if arm.kind == "sft" else "student, distillation"
            plan = self._training(kind, "student", training, arm.data, arm.lora, names[0])
            plan.note = "; ".join(filter(None, [plan.note, _shorten(names)]))
            plans.append(plan)
        return plans

    def _shape_of_training(self, training: dict[str, Any]) -> list[Any]:
        keys = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        return [training.get(key) for key in (*keys, "gradient_checkpointing", "optim", "bf16", "fp16")]

    def _fine_tunings(self) -> list[tuple[str, dict[str, Any]]]:
        found = {
            teacher_unit(teacher.name): teacher.sft for teacher in teachers(self.recipe) if teacher.sft is not None
        }
        distinct: dict[str, tuple[str, dict[str, Any]]] = {}
        for unit, sft in found.items():
            distinct.setdefault(json.dumps(self._shape_of_training(sft)), (unit, sft))
        return list(distinct.values())

    def _training(
        self,
        activity: str,
        role: str,
        training: dict[str, Any],
        roles: list[str],
        lora: dict[str, Any] | None = None,
        name: str = "",
    ) -> MemoryPlan:
        shape = self.shapes.get(role)
        if shape is None:
            return MemoryPlan(activity, note=f"{role} unknown")
        trainable = self.trainable.get(name) if lora is not None else None
        if lora is not None and trainable is None:
            return MemoryPlan(activity, note="LoRA unknown")
        longest = [self.splits[r].longest for r in roles]
        try:
            batch = device_batch(training, self.processes)
        except ValueError as error:
            return MemoryPlan(activity, note=str(error))
        known = [length for length in longest if length is not None]
        tokens = batch * max(known) if len(known) == len(longest) else None
        parts = training_memory(
            shape, training, tokens=tokens, trainable=trainable, processes=self.processes, sharding=self.sharding
        )
        rows = (
            f"{batch} row{'s' if batch > 1 else ''} of up to {max(known)} tokens"
            if tokens is not None
            else "activations unknown"
        )
        how = "" if lora is None else f"LoRA r={lora.get('r', 8)}, "
        return MemoryPlan(activity, parts, how + rows)

    def _capture_memory(self) -> MemoryPlan:
        shape, spec = self.shapes.get("teacher"), self.recipe.capture
        if spec.vllm_url is not None:
            return MemoryPlan("teacher, capture", note=f"served at {spec.vllm_url}, outside these processes")
        if shape is None:
            return MemoryPlan("teacher, capture", note="teacher unknown")
        longest = [self.splits[role].longest for role in ("train", "validation")]
        tokens = spec.max_tokens_per_batch
        if None not in longest:
            tokens = min(tokens, _CAPTURE_ROWS * max(length for length in longest if length is not None))
        note = f"up to {tokens:,} tokens"
        if "device_map" in self.recipe.teacher.init_kwargs:
            note += ", over all GPUs of the device_map"
        return MemoryPlan("teacher, capture", capture_memory(shape, tokens, self.trainable.get("", 0)), note)

    # caches

    def caches(self) -> list[CachePlan]:
        spec, plans = self.recipe.capture, []
        for teacher in teachers(self.recipe):
            roles = captured_roles(self.recipe, teacher)
            if not roles:
                continue  # evaluated only
            splits = [self.splits[role] for role in roles]
            note = f"{teacher.folds} folds, each by the teacher that did not see it" if teacher.folds else ""
            sizes = [
                cache_bytes(
                    split.rows,
                    split.all_tokens,
                    split.all_positions,
                    k=spec.k,
                    logprob_dtype=spec.logprob_dtype,
                    num_draws=spec.num_draws,
                    shard_size=spec.shard_size,
                    key_bytes=split.key_bytes,
                )
                if split.rows is not None and split.all_tokens is not None and split.all_positions is not None
                else None
                for split in splits
            ]
            plans.append(
                CachePlan(
                    cache_unit(teacher.name),
                    roles,
                    _total([split.rows for split in splits]),
                    _total([split.all_tokens for split in splits]),
                    _total([split.all_positions for split in splits]),
                    _total(sizes),
                    note,
                )
            )
        return plans

    # trainings

    def trainings(self) -> list[TrainingPlan]:
        recipe, plans = self.recipe, []
        for role in ("teacher", "student"):
            pretrain = getattr(recipe, role).pretrain
            if pretrain is not None:
                plans.append(self._steps(base_unit(role), pretrain, ["pretrain"]))
        for teacher in teachers(self.recipe):
            if teacher.sft is None:
                continue
            how = _how(recipe.teacher.lora, teacher.select)
            seen = 1.0 if teacher.folds is None else 1 - 1 / teacher.folds
            for fold in teacher.parts:
                plans.append(self._steps(teacher_unit(teacher.name, fold), teacher.sft, ["train"], how, seen))
        for name, arm in self._students():
            how = _how(arm.lora, arm.select)
            if arm.data != ["train"]:
                how = ", ".join(filter(None, [how, f"on {' + '.join(arm.data)}"]))
            plans.append(self._steps(student_unit(name), {**recipe.training, **arm.training}, arm.data, how))
        return plans

    def _steps(
        self, unit: str, training: dict[str, Any], roles: list[str], note: str = "", share: float = 1.0
    ) -> TrainingPlan:
        values = {**defaults(), **training}
        accumulation = values["gradient_accumulation_steps"]
        rows = _total([self.splits[role].rows for role in roles])
        tokens = _total([self.splits[role].all_tokens for role in roles])
        rows = None if rows is None else round(rows * share)
        epochs = float(values["num_train_epochs"])
        batch = steps = None
        try:
            batch = device_batch(training, self.processes) * self.processes * accumulation
            steps = None if rows is None else optimizer_steps(rows, training, self.processes)
        except ValueError as error:
            note = "; ".join(filter(None, [note, str(error)]))
        if values["max_steps"] > 0 and rows and batch:
            epochs = values["max_steps"] * batch / rows
        seen = None if tokens is None else round(tokens * share * epochs)
        return TrainingPlan(unit, rows, epochs, batch, steps, seen, note)


def _how(lora: dict[str, Any] | None, select: str | None) -> str:
    parts = [] if lora is None else [f"LoRA r={lora.get('r', 8)}"]
    if select is not None:
        parts.append(f"best epoch by {select}")
    return ", ".join(parts)


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _pushes(recipe: Recipe, setting: SettingPlan) -> list[dict[str, Any]]:
    """Repositories of the last stage: what, where, how many bytes."""
    hub = recipe.hub
    if hub is None:
        return []
    prefix = repo_prefix(recipe.name, recipe.cell, recipe.seed)
    student = setting.models[1]
    pushes: list[dict[str, Any]] = []

    def add(kind: str, what: str, size: int | None) -> None:
        name = f"{hub.namespace}/{repo_name(prefix, what)}"
        pushes.append({"kind": kind, "repo_id": name, "private": hub.private, "bytes": size})

    if hub.cache:
        add("dataset", "cache", setting.caches[0].bytes)
    trained = [name for name, arm in recipe.arms.items() if arm.kind in ("sft", "distill")]
    names = hub.arms or [name for name in trained if not recipe.arms[name].swept]
    adapters = [name for name in names if recipe.arms[name].lora is not None]
    width = 4 if student.dtype == "float32" else 2
    full = None if student.parameters is None else student.parameters * width
    if adapters and not recipe.student.used_as_it_is:
        add("model", "base", full)
    for name in names:
        add("model", name, student.lora.get(name, 0) * 4 or None if name in adapters else full)
    return pushes
