"""Stages `pretrain` and `teacher`: the models that students and teachers start from, and the teachers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from ...utils.files import write_json
from ..recipe import ArmSpec, ModelSpec, Recipe, TeacherSpec
from ..run_folder import TrainingFolder, base_unit, teacher_unit
from .context import RunContext, run_commit
from .probe import probe_rows, token_logprobs, write_probe
from .training import load_trained, make_model, place, train_sft
from .units import Unit, path_fingerprint


@dataclass(frozen=True)
class Teacher:
    """
    One teacher of a recipe: the plain one (`name` is empty), or one of `teachers`. A committee has `members`, and no
    fine-tuning of its own.
    """

    name: str
    sft: dict[str, Any] | None
    select: str | None
    folds: int | None
    fold_by: str
    members: tuple["Teacher", ...] = ()

    @property
    def suffix(self) -> str:
        return f"-{self.name}" if self.name else ""

    @property
    def parts(self) -> list[int | None]:
        """Its models and caches: one, or one a fold."""
        return [None] if self.folds is None else list(range(self.folds))


def teachers(recipe: Recipe) -> list[Teacher]:
    """The recipe's teacher and the further ones that an arm names, or a committee that an arm names; committees last."""
    spec = recipe.teacher
    plain = Teacher("", spec.sft, spec.select, None, "group")
    named = {arm.teacher for arm in recipe.arms.values()}
    committees = {
        name: variant.committee for name, variant in recipe.teachers.items() if variant.committee and name in named
    }
    named |= {member for members in committees.values() for member in members}
    single = {
        name: _variant(name, spec, variant)
        for name, variant in recipe.teachers.items()
        if name in named and name not in committees
    }
    known = {"teacher": plain, **single}
    return [plain, *single.values(), *(_committee(name, [known[m] for m in ms]) for name, ms in committees.items())]


def teacher_of(recipe: Recipe, arm: ArmSpec) -> Teacher:
    return next(teacher for teacher in teachers(recipe) if teacher.name == (arm.teacher or ""))


def _variant(name: str, spec: ModelSpec, variant: TeacherSpec) -> Teacher:
    return Teacher(name, {**(spec.sft or {}), **variant.sft}, variant.select, variant.folds, variant.fold_by)


def _committee(name: str, members: list[Teacher]) -> Teacher:
    return Teacher(name, None, None, members[0].folds, members[0].fold_by, tuple(members))


# models before fine-tuning


def base_units(run: RunContext) -> Iterator[Unit]:
    """Teacher and student before fine-tuning, as far as the run makes them."""
    for role in ("teacher", "student"):
        spec = getattr(run.recipe, role)
        inputs = {
            "model": [
                spec.architecture if spec.from_scratch else None,
                spec.config,
                spec.init_kwargs,
                path_fingerprint(spec.name_or_path),
                # Left out where there is none, so that runs from before it could be given go on
                *([spec.keep_layers] if spec.keep_layers is not None else []),
            ],
            "pretrain": spec.pretrain,
            "seed": run.recipe.seed,
            # The tokenizer, of which a model from scratch has as many rows, is part of every role's key
            "data": [run.role_keys[role] for role in ("train", *(["pretrain"] if spec.pretrain else []))],
        }
        if spec.used_as_it_is:
            run.keys[base_unit(role)] = json.dumps(inputs["model"])  # used where it is, nothing to make
        else:
            yield Unit(base_unit(role), inputs, partial(_make_base, run, role))


def _make_base(run: RunContext, role: str, path: Path) -> None:
    folder = run.folder.base(role)
    spec, tokenizer = _pinned(run, role), run.tokenizer()
    model = make_model(spec, tokenizer, run.recipe.seed, role)
    if spec.pretrain is not None:
        train_sft(run.recipe, model, tokenizer, run.folder.load_tokens("pretrain"), spec.pretrain, folder)
    elif run.is_main:
        model.save_pretrained(folder.model)
        tokenizer.save_pretrained(folder.model)


def _pinned(run: RunContext, role: str) -> ModelSpec:
    """A model with the commit that its name stands for in this run, as its tokenizer has."""
    spec: ModelSpec = getattr(run.recipe, role)
    asked = {"revision": None, **spec.init_kwargs}
    if spec.name_or_path is not None and (commit := run_commit(run, spec.name_or_path, **asked)):
        return replace(spec, init_kwargs={**spec.init_kwargs, "revision": commit})
    return spec


def base_model(run: RunContext, role: str) -> Any:
    """Teacher or student before fine-tuning."""
    spec = getattr(run.recipe, role)
    if spec.used_as_it_is:
        return make_model(_pinned(run, role), None, run.recipe.seed, role)
    # By its whole path: adapters keep it, and are loaded from other working folders too
    return load_trained(TrainingFolder(run.folder.base(role).path.resolve()), spec, lambda: None)


# teachers


def teacher_units(run: RunContext) -> Iterator[Unit]:
    """The fine-tuned teachers, one a fold where they are made in folds."""
    spec = run.recipe.teacher
    for teacher in teachers(run.recipe):
        for fold in teacher.parts:
            unit = teacher_unit(teacher.name, fold)
            if teacher.members:
                made = {"committee": [run.keys[teacher_unit(member.name, fold)] for member in teacher.members]}
                yield Unit(unit, made, partial(_convene, run, teacher, fold))
                continue
            if teacher.sft is None:
                run.keys[unit] = run.keys[base_unit("teacher")]
                continue
            inputs = {
                "sft": teacher.sft,
                "lora": spec.lora,
                "select": teacher.select,
                "fold": None if teacher.folds is None else [fold, teacher.folds, teacher.fold_by],
                "seed": run.recipe.seed,
                "base": run.keys[base_unit("teacher")],
                "data": [run.role_keys[role] for role in ("train", *(["validation"] if teacher.select else []))],
            }
            yield Unit(unit, inputs, partial(_fine_tune, run, teacher, fold))


def _convene(run: RunContext, teacher: Teacher, fold: int | None, path: Path) -> None:
    """There is nothing to make: the log says what a committee cost."""
    if run.is_main:
        steps = {member.name or "teacher": run.folder.teacher(member.name, fold).steps() for member in teacher.members}
        write_json(run.folder.teacher(teacher.name, fold).log, [{"members": steps, "step": sum(steps.values())}])


def _fine_tune(run: RunContext, teacher: Teacher, fold: int | None, path: Path) -> None:
    rows = run.folder.load_tokens("train")
    if teacher.folds is not None:
        rows = rows.select(np.flatnonzero(fold_numbers(run, teacher, "train") != fold))
    base = base_model(run, "teacher")
    served = run.recipe.capture.vllm_url is not None
    probe = probe_rows(rows) if served else []
    before = token_logprobs(base, probe)
    train_sft(
        run.recipe,
        base,
        run.tokenizer(),
        rows,
        teacher.sft or {},
        run.folder.teacher(teacher.name, fold),
        lora=run.recipe.teacher.lora,
        validation=run.folder.load_tokens("validation") if teacher.select else None,
    )
    if served:
        run.workspace.state.wait_for_everyone()
        if run.is_main:
            trained = token_logprobs(teacher_model(run, teacher, fold), probe)
            write_probe(run.folder.teacher(teacher.name, fold).probe, probe, before, trained)


def fold_numbers(run: RunContext, teacher: Teacher, role: str) -> np.ndarray:
    """
    Fold of every row of a role: the number of the teacher that did not see its key in training. Keys that no training
    row has were seen by none of them and are dealt out evenly.
    """
    assert teacher.folds is not None
    keys = sorted(set(run.folder.load_tokens("train")[teacher.fold_by]))
    order = np.random.default_rng(run.recipe.seed).permutation(len(keys))
    fold_of = {key: int(place) % teacher.folds for key, place in zip(keys, order, strict=True)}
    if len(keys) < teacher.folds:
        raise ValueError(
            f"teachers.{teacher.name}: {teacher.folds} folds need as many values of {teacher.fold_by!r}, the training "
            f"rows have {len(keys)}. Choose fold_by: id, or fewer folds."
        )
    column = run.folder.load_tokens(role)[teacher.fold_by]
    return np.array([fold_of.get(key, i % teacher.folds) for i, key in enumerate(column)])


def teacher_model(run: RunContext, teacher: Teacher, fold: int | None = None) -> Any:
    """A fine-tuned teacher on this process's device; of a committee, its members as `CommitteeBackend` takes them."""
    if teacher.members:
        return _members(run, teacher, fold)
    if teacher.sft is None:
        return place(base_model(run, "teacher"))
    folder = run.folder.teacher(teacher.name, fold)
    return load_trained(folder, run.recipe.teacher, lambda: base_model(run, "teacher"))


def _members(run: RunContext, teacher: Teacher, fold: int | None) -> list[tuple[Any, str]]:
    """Models and their names; adapters share one base."""
    folders = {member.name or "teacher": run.folder.teacher(member.name, fold) for member in teacher.members}
    if not all(folder.is_adapter for folder in folders.values()):
        return [
            (teacher_model(run, member, fold), name) for member, name in zip(teacher.members, folders, strict=True)
        ]
    model, members = base_model(run, "teacher"), list[str]()
    for name, folder in folders.items():
        adapter = name.replace(".", "-")  # which names of modules cannot hold
        if members:
            model.load_adapter(folder.model, adapter_name=adapter)
        else:
            model = PeftModel.from_pretrained(model, folder.model, adapter_name=adapter)
        members.append(adapter)
    model = place(model)
    return [(model, adapter) for adapter in members]
