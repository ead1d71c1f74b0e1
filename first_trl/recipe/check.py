"""What a recipe must hold beyond its types: roles that exist, arms that make sense, training arguments that are known."""

import dataclasses
import re

from .names import nearest
from .schema import ARM_KINDS, ArmSpec, Recipe


# Keys of an arm that have a meaning for some kinds only
_DISTILL_ONLY = (
    "recalibration", "recalibration_value", "estimator", "ce_weight", "top_k", "student_temperature", "objective",
    "min_value", "data",
)  # fmt: skip
_STUDENT_ONLY = ("training", "token_dropout", "select", "lora")


def check_recipe(recipe: Recipe, where: str) -> None:
    """
    Raises `ValueError` for a combination without a meaning; the message starts with `where`.
    """
    _check_roles(recipe, where)
    _check_models(recipe, where)
    for name, arm in recipe.arms.items():
        _check_arm(recipe, name, arm, f"{where}: arms.{name}")
    for name in recipe.hub.arms if recipe.hub is not None else []:
        if name not in recipe.arms or recipe.arms[name].kind not in ("sft", "distill"):
            raise ValueError(f"{where}: hub.arms names {name!r}, which trains no student.{nearest(name, recipe.arms)}")
    for name in recipe.report.baselines:
        if name not in recipe.arms:
            raise ValueError(f"{where}: report.baselines: no arm {name!r}.{nearest(name, recipe.arms)}")
    _check_training(recipe, where)


def _check_roles(recipe: Recipe, where: str) -> None:
    splits = recipe.task.splits
    for role in ("train", "validation"):
        if role not in splits:
            raise ValueError(f"{where}: task.splits must name the rows for {role!r}.")
    for role in recipe.evaluation.splits:
        if role not in splits:
            raise ValueError(
                f"{where}: evaluation.splits names {role!r}, which task.splits does not hold ({', '.join(splits)})."
            )
    if not recipe.evaluation.splits:
        raise ValueError(f"{where}: evaluation.splits is empty; name at least one role to evaluate on.")
    for role, split in splits.items():
        if split.unseen not in (None, "group", "question"):
            raise ValueError(f"{where}: task.splits.{role}.unseen must be group or question, got {split.unseen!r}.")
        if split.unseen is not None and role not in recipe.evaluation.splits:
            raise ValueError(f"{where}: task.splits.{role}.unseen only belongs to roles of evaluation.splits.")


def _check_models(recipe: Recipe, where: str) -> None:
    for name, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if model.name_or_path is None and model.architecture is None:
            raise ValueError(
                f"{where}: {name} needs `name_or_path` (a pretrained model) or `architecture` (made from scratch)."
            )
        if model.pretrain is not None and "pretrain" not in recipe.task.splits:
            raise ValueError(f"{where}: {name}.pretrain needs rows: name task.splits.pretrain.")
        _check_select(model.select, f"{where}: {name}")
    for key in ("sft", "lora", "select"):
        if getattr(recipe.student, key) is not None:
            raise ValueError(f"{where}: student.{key} has no meaning; students are arms with their own training.")
        if key != "sft" and getattr(recipe.teacher, key) is not None and recipe.teacher.sft is None:
            raise ValueError(f"{where}: teacher.{key} belongs to a fine-tuning: give teacher.sft.")
    for name, variant in recipe.teachers.items():
        place = f"{where}: teachers.{name}"
        _check_name(name, place)
        _check_select(variant.select, place)
        if recipe.teacher.sft is None:
            raise ValueError(f"{place}: the teacher is not fine-tuned here; give teacher.sft.")
        if variant.folds is not None and variant.folds < 2:
            raise ValueError(f"{place}.folds must be at least 2, got {variant.folds}.")
        if variant.fold_by not in ("group", "id"):
            raise ValueError(f"{place}.fold_by must be group or id, got {variant.fold_by!r}.")


def _check_select(select: str | None, place: str) -> None:
    if select not in (None, "nll"):
        raise ValueError(f"{place}.select must be nll, got {select!r}. Leave it out to keep the last epoch.")


def _check_name(name: str, place: str) -> None:
    # Names become folders and repositories
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{place}: use letters, digits, '_', '-' and '.' in names, got {name!r}.")


def _check_arm(recipe: Recipe, name: str, arm: ArmSpec, place: str) -> None:
    if not arm.swept:
        _check_name(name, place)
    if arm.kind not in ARM_KINDS:
        raise ValueError(f"{place}.kind: unknown kind {arm.kind!r}.{nearest(arm.kind, ARM_KINDS)}")
    if arm.kind == "temperature_scaling":
        if arm.of not in recipe.arms or recipe.arms[str(arm.of)].kind == "temperature_scaling":
            raise ValueError(f"{place}.of must name a trained arm, got {arm.of!r}.{nearest(str(arm.of), recipe.arms)}")
    elif arm.of is not None:
        raise ValueError(f"{place}.of only belongs to kind temperature_scaling.")
    defaults = ArmSpec(kind=arm.kind)
    for keys, kinds in ((_DISTILL_ONLY, ("distill",)), (_STUDENT_ONLY, ("sft", "distill"))):
        for key in keys:
            if arm.kind not in kinds and getattr(arm, key) != getattr(defaults, key):
                raise ValueError(f"{place}.{key} has no meaning for kind {arm.kind}, only for {' and '.join(kinds)}.")
    if arm.teacher is not None:
        if arm.kind not in ("teacher", "distill"):
            raise ValueError(f"{place}.teacher has no meaning for kind {arm.kind}.")
        if arm.teacher not in recipe.teachers:
            raise ValueError(f"{place}.teacher: no teacher {arm.teacher!r}.{nearest(arm.teacher, recipe.teachers)}")
        if arm.kind == "teacher" and recipe.teachers[arm.teacher].folds is not None:
            raise ValueError(f"{place}: teacher {arm.teacher!r} is made of folds; there is no single one to evaluate.")
    if not arm.data:
        raise ValueError(f"{place}.data is empty; name at least one role to train on.")
    for role in arm.data:
        if role not in recipe.task.splits or role in recipe.evaluation.splits:
            raise ValueError(f"{place}.data names {role!r}; choose roles of task.splits that nothing is evaluated on.")
    if arm.top_k is not None and not 1 <= arm.top_k <= recipe.capture.k:
        raise ValueError(f"{place}.top_k must be from 1 to capture.k = {recipe.capture.k}, got {arm.top_k}.")
    if arm.objective not in (None, "ece", "nll"):
        raise ValueError(f"{place}.objective must be ece or nll, got {arm.objective!r}.")
    if not 0.0 <= arm.token_dropout < 1.0:
        raise ValueError(f"{place}.token_dropout must be in [0, 1), got {arm.token_dropout}.")
    _check_select(arm.select, place)


def _check_training(recipe: Recipe, where: str) -> None:
    from ..training.config import FirstDistillConfig

    fields = {f.name for f in dataclasses.fields(FirstDistillConfig)} | {"global_batch_size"}
    trainings = {"training": recipe.training}
    trainings |= {f"arms.{name}.training": arm.training for name, arm in recipe.arms.items()}
    trainings |= {f"teachers.{name}.sft": variant.sft for name, variant in recipe.teachers.items()}
    for name, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        trainings |= {f"{name}.{part}": getattr(model, part) or {} for part in ("pretrain", "sft")}
    for place, training in trainings.items():
        for key in training:
            if key not in fields:
                raise ValueError(
                    f"{where}: {place}: unknown training argument {key!r}.{nearest(key, fields, list_known=False)}"
                )
