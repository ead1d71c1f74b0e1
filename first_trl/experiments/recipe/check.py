"""What a recipe must hold beyond its types: roles that exist, arms that make sense, training arguments that are known."""

import dataclasses
import re
from collections.abc import Iterable

from ...recalibration import ESTIMATORS, METHODS, Recalibration
from ...utils.names import nearest
from ...vocabulary import BAYES
from .schema import ARM_KINDS, ArmSpec, Recipe


_OBJECTIVES = ("ece", "nll")
# Keys of an arm that have a meaning for some kinds only
_DISTILL_ONLY = (
    "recalibration", "recalibration_value", "estimator", "ce_weight", "top_k", "student_temperature", "objective",
    "min_value", "data",
)  # fmt: skip
_STUDENT_ONLY = ("training", "token_dropout", "select", "lora")
# Fields of the trainer's configuration that are keys of the arm, where the run, the report and the card look for them
_ARM_KEYS = (
    "recalibration", "recalibration_value", "estimator", "ce_weight", "top_k", "student_temperature", "token_dropout",
)  # fmt: skip
# Fields that would share things behind the recipe's back, or put a secret where it is printed
_REFUSED = ("hub_token", "push_to_hub", "hub_model_id")


def check_recipe(recipe: Recipe, where: str) -> None:
    """
    Raises `ValueError` for a combination without a meaning; the message starts with `where`.
    """
    _check_roles(recipe, where)
    _check_settings(recipe, where)
    _check_models(recipe, where)
    for name, arm in recipe.arms.items():
        _check_arm(recipe, name, arm, f"{where}: arms.{name}")
    for name in recipe.hub.arms if recipe.hub is not None else []:
        if name not in recipe.arms or recipe.arms[name].kind not in ("sft", "distill"):
            raise ValueError(f"{where}: hub.arms names {name!r}, which trains no student.{nearest(name, recipe.arms)}")
    for key in ("baselines", "highlight"):
        for name in getattr(recipe.report, key):
            if name not in recipe.arms:
                raise ValueError(f"{where}: report.{key}: no arm {name!r}.{nearest(name, recipe.arms)}")
    _check_training(recipe, where)


def _check_choice(value: str, known: Iterable[str], place: str) -> None:
    if value not in known:
        raise ValueError(f"{place}: unknown value {value!r}.{nearest(value, known)}")


def _check_positive(value: int, place: str) -> None:
    if value < 1:
        raise ValueError(f"{place} must be at least 1, got {value}.")


def _check_settings(recipe: Recipe, where: str) -> None:
    """Values that only a late stage reads: a typo is answered before the teacher is trained."""
    _check_choice(recipe.recalibration.objective, _OBJECTIVES, f"{where}: recalibration.objective")
    _check_choice(recipe.recalibration.positions, ("first", "all"), f"{where}: recalibration.positions")
    for method in recipe.recalibration.methods:
        _check_choice(method, METHODS[1:], f"{where}: recalibration.methods")
    _check_choice(recipe.capture.logprob_dtype, ("float16", "float32"), f"{where}: capture.logprob_dtype")
    _check_choice(
        recipe.task.on_overflow,
        ("error", "drop", "truncate_prompt_left", "truncate_right"),
        f"{where}: task.on_overflow",
    )
    for place, value in (
        ("capture.k", recipe.capture.k),
        ("capture.max_tokens_per_batch", recipe.capture.max_tokens_per_batch),
        ("capture.shard_size", recipe.capture.shard_size),
        ("recalibration.n_bins", recipe.recalibration.n_bins),
        ("evaluation.n_bins", recipe.evaluation.n_bins),
        ("evaluation.batch_size", recipe.evaluation.batch_size),
    ):
        _check_positive(value, f"{where}: {place}")
    if recipe.capture.vllm_url is not None:
        if recipe.teachers:
            raise ValueError(
                f"{where}: capture.vllm_url serves one teacher, and `teachers` names more. Leave one of the two out."
            )
        if recipe.capture.num_draws:
            raise ValueError(f"{where}: capture.num_draws needs the teacher in this process; leave vllm_url out.")


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
    if name == BAYES:
        raise ValueError(f"{place}: {name!r} is the row of the true posterior; choose another name.")


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
    if arm.objective is not None:
        _check_choice(arm.objective, _OBJECTIVES, f"{place}.objective")
    if arm.kind == "distill":
        _check_target(recipe, arm, place)
    if not 0.0 <= arm.token_dropout < 1.0:
        raise ValueError(f"{place}.token_dropout must be in [0, 1), got {arm.token_dropout}.")
    _check_select(arm.select, place)


def _check_target(recipe: Recipe, arm: ArmSpec, place: str) -> None:
    _check_choice(arm.recalibration, METHODS, f"{place}.recalibration")
    _check_choice(arm.estimator, (*ESTIMATORS, "sampled"), f"{place}.estimator")
    if not 0.0 <= arm.ce_weight <= 1.0:
        raise ValueError(f"{place}.ce_weight must be in [0, 1], got {arm.ce_weight}.")
    for key in ("recalibration_value", "objective", "min_value"):
        if arm.recalibration == "none" and getattr(arm, key) is not None:
            raise ValueError(f"{place}.{key} has no effect without `recalibration`: name the method it belongs to.")
    if arm.recalibration_value is not None:
        for key in ("objective", "min_value"):
            if getattr(arm, key) is not None:
                raise ValueError(f"{place}.{key} is about a fit, and recalibration_value is given. Leave one out.")
        try:
            Recalibration(arm.recalibration, arm.recalibration_value)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if arm.student_temperature is not None and arm.estimator != "probability_softmax":
        raise ValueError(f"{place}.student_temperature belongs to the estimator probability_softmax.")
    if arm.estimator == "sampled" and not recipe.capture.num_draws:
        raise ValueError(f"{place}: the estimator 'sampled' needs draws: set capture.num_draws, e.g. 50.")
    if arm.estimator == "sampled" and (arm.recalibration != "none" or arm.top_k is not None):
        raise ValueError(f"{place}: draws can be neither rescaled nor cut; leave recalibration and top_k out.")


def _check_training(recipe: Recipe, where: str) -> None:
    from ...training.config import FirstDistillConfig

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
            if key in _ARM_KEYS:
                raise ValueError(f"{where}: {place}.{key} is a key of the arm itself: arms.NAME.{key}.")
            if key in _REFUSED:
                raise ValueError(
                    f"{where}: {place}.{key}: log in with `hf auth login`; what is shared is named in the recipe's `hub`."
                )
