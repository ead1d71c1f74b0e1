"""What relates several keys of a recipe: roles that exist, arms that make sense, training arguments that are known."""

import dataclasses
import re
from collections.abc import Iterator

from ...plugins import BACKENDS, TASKS, estimator_target
from ...training.options import DistillOptions, For, marks
from ...utils.names import nearest
from ...vocabulary import BAYES, POST_HOC, THRESHOLD_ROLE
from .arguments import config_problems, init_problems, lora_problems, training_problems
from .models import ArmSpec, Recipe, TeacherSpec
from .parse import refuse


# Fields that would share things behind the recipe's back, or put a secret where it is printed
_REFUSED = ("hub_token", "push_to_hub", "hub_model_id")
# What an arm trains with belongs to the arm itself, where the run, the report and the card look for it
_ARM_KEYS = tuple(f.name for f in dataclasses.fields(DistillOptions))


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises `ValueError` with every combination that has no meaning; the message starts with `where`."""
    refuse(_problems(recipe), where)


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _task(recipe)
    yield from _roles(recipe)
    yield from _backend(recipe)
    yield from _capture(recipe)
    yield from _models(recipe)
    for name, arm in recipe.arms.items():
        yield from _arm(recipe, name, arm)
    yield from _named_arms(recipe)
    yield from _arguments(recipe)


def _roles(recipe: Recipe) -> Iterator[str]:
    splits = recipe.task.splits
    for role in ("train", "validation"):
        if role not in splits:
            yield f"task.splits must name the rows for {role!r}."
    for role in recipe.evaluation.splits:
        if role not in splits:
            yield f"evaluation.splits names {role!r}, which task.splits does not hold ({', '.join(splits)})."
    if THRESHOLD_ROLE in recipe.evaluation.splits:
        yield f"evaluation.splits names {THRESHOLD_ROLE!r}: thresholds are fitted on its rows, nothing is reported on them."
    if not recipe.evaluation.splits:
        yield "evaluation.splits is empty; name at least one role to evaluate on."
    if recipe.evaluation.permutations == 1:
        yield "evaluation.permutations must be 0 or at least 2: the order of the rows is one of them."
    if recipe.evaluation.length != "none" and recipe.evaluation.scoring != "choices":
        yield "evaluation.length is about whole texts: set evaluation.scoring to choices, or leave it out."
    for role, split in splits.items():
        if split.unseen is not None and role not in recipe.evaluation.splits:
            yield f"task.splits.{role}.unseen only belongs to roles of evaluation.splits."


def _task(recipe: Recipe) -> Iterator[str]:
    names = {"task.name": recipe.task.name}
    names |= {f"task.splits.{role}.task": split.task for role, split in recipe.task.splits.items() if split.task}
    for place, name in names.items():
        if name not in TASKS:
            yield f"{place}: there is no task {name!r}.{nearest(name, TASKS)}"


def _backend(recipe: Recipe) -> Iterator[str]:
    capture = recipe.capture
    own = "transformers" if capture.vllm_url is None else "vllm"
    if capture.backend is not None and capture.backend not in BACKENDS:
        yield f"capture.backend: there is no teacher backend {capture.backend!r}.{nearest(capture.backend, BACKENDS)}"
    elif capture.backend == "vllm" and capture.vllm_url is None:
        yield "capture.backend 'vllm' needs the address of the server: give capture.vllm_url."
    elif capture.vllm_url is not None and capture.backend not in (None, "vllm"):
        yield f"capture.vllm_url has no meaning for the backend {capture.backend!r}; leave one of the two out."
    elif capture.backend in (None, own) and capture.backend_options:
        yield f"capture.backend_options belong to a plugin's engine; {own!r} takes none."


def _capture(recipe: Recipe) -> Iterator[str]:
    if recipe.capture.target == "options":
        capture, teacher = recipe.capture, recipe.teacher
        if capture.vllm_url is not None or capture.backend not in (None, "transformers") or capture.num_draws:
            yield "capture.target 'options' needs the teacher in this process and no draws: leave vllm_url, backend and num_draws out."
        if teacher.sft is not None or teacher.pretrain is not None:
            yield (
                "capture.target 'options' takes a teacher as it is, with its own tokenizer: fine-tune it in a recipe of its own "
                "(an arm of kind sft), name that model, and leave teacher.sft and teacher.pretrain out."
            )
        if recipe.teachers:
            yield "capture.target 'options' is for one teacher, and `teachers` names more. Leave one of the two out."
        if recipe.evaluation.scoring != "token":
            yield "capture.target 'options' is for students that answer with one token: set evaluation.scoring to token."
    if recipe.capture.vllm_url is None:
        return
    if recipe.teachers:
        yield "capture.vllm_url serves one teacher, and `teachers` names more. Leave one of the two out."
    if recipe.capture.num_draws:
        yield "capture.num_draws needs the teacher in this process; leave vllm_url out."


def _models(recipe: Recipe) -> Iterator[str]:
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if model.name_or_path is None and model.architecture is None:
            yield f"{role} needs `name_or_path` (a pretrained model) or `architecture` (made from scratch)."
        if model.name_or_path is None and model.keep_layers is not None:
            yield f"{role}.keep_layers cuts a pretrained model: give {role}.name_or_path, or fewer layers in its config."
        if model.pretrain is not None and "pretrain" not in recipe.task.splits:
            yield f"{role}.pretrain needs rows: name task.splits.pretrain."
    for key in ("sft", "lora", "select"):
        if getattr(recipe.student, key) is not None:
            yield f"student.{key} has no meaning; students are arms with their own training."
        if key != "sft" and getattr(recipe.teacher, key) is not None and recipe.teacher.sft is None:
            yield f"teacher.{key} belongs to a fine-tuning: give teacher.sft."
    for name in recipe.teachers:
        yield from _name(name, f"teachers.{name}")
        if recipe.teacher.sft is None:
            yield f"teachers.{name}: the teacher is not fine-tuned here; give teacher.sft."
        yield from _committee(recipe, name)


def _committee(recipe: Recipe, name: str) -> Iterator[str]:
    variant, place = recipe.teachers[name], f"teachers.{name}.committee"
    if variant.committee is None:
        return
    if len(set(variant.committee)) < max(2, len(variant.committee)):
        yield f"{place} must name two or more teachers, each once, got {variant.committee}."
    if variant.sft or variant.select is not None or variant.folds is not None:
        yield f"{place}: its members are fine-tuned as they say; leave out sft, select and folds here."
    if recipe.capture.backend not in (None, "transformers"):
        yield f"{place} needs the members' whole distributions; leave out capture.backend."
    own = {"teacher": TeacherSpec(), **recipe.teachers}
    for member in variant.committee:
        if member not in own:
            yield f"{place}: no teacher {member!r}.{nearest(member, own)}"
        elif own[member].committee is not None:
            yield f"{place}: {member!r} is a committee itself; name its members."
    folds = {
        (own[member].folds, own[member].folds and own[member].fold_by) for member in variant.committee if member in own
    }
    if len(folds) > 1:
        yield f"{place}: the members must all be made of the same folds, or of none."


def _name(name: str, place: str) -> Iterator[str]:
    # Names become folders and repositories
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        yield f"{place}: use letters, digits, '_', '-' and '.' in names, got {name!r}."
    if name == BAYES:
        yield f"{place}: {name!r} is the row of the true posterior; choose another name."


def _of_committee(recipe: Recipe, arm: ArmSpec) -> bool:
    return arm.teacher in recipe.teachers and recipe.teachers[str(arm.teacher)].committee is not None


def _arm(recipe: Recipe, name: str, arm: ArmSpec) -> Iterator[str]:
    place = f"arms.{name}"
    if not arm.swept:
        yield from _name(name, place)
    if arm.kind in POST_HOC and (arm.of not in recipe.arms or recipe.arms[str(arm.of)].kind in POST_HOC):
        yield f"{place}.of must name a trained arm, got {arm.of!r}.{nearest(str(arm.of), recipe.arms)}"
    spec = arm.novelty
    if spec is not None and spec.fit == "cross_group" and spec.feature in ("hidden_state", "disagreement"):
        yield f"{place}.novelty: the feature {spec.feature} is fitted on validation rows; cross_group fits one slope."
    of = recipe.arms.get(str(arm.of))
    if spec is not None and spec.feature == "disagreement" and of is not None and not _of_committee(recipe, of):
        yield (
            f"{place}.novelty: the feature disagreement is that of a committee, and {arm.of!r} is not distilled from one. Give it "
            "a `teacher` with a `committee`."
        )
    if arm.disagreement_weight and not _of_committee(recipe, arm):
        yield f"{place}.disagreement_weight needs a `teacher` with a `committee`: a single teacher does not disagree."
    if spec is not None and spec.fit == "steepest" and spec.feature not in ("distance", "max_probability"):
        yield f"{place}.novelty: the fit 'steepest' is for one feature, distance or max_probability."
    if spec is not None and spec.fit == "steepest" and spec.at_least_scalar:
        yield f"{place}.novelty: with at_least_scalar there is no steepest slope. Leave one of the two out."
    if arm.kind in ("novelty_scaling", "agreement_scaling") and recipe.evaluation.scoring != "token":
        yield f"{place}: {arm.kind} reads answers of one token, and evaluation.scoring is {recipe.evaluation.scoring!r}."
    if arm.kind == "agreement_scaling" and arm.prompts not in ("validation", *recipe.evaluation.splits):
        yield f"{place}.prompts must name 'validation' or a role of evaluation.splits, got {arm.prompts!r}."
    misplaced = list(_misplaced(arm))
    for key in misplaced:
        kinds = " and ".join(_kinds_of(key) or ())
        yield f"{place}.{key} has no meaning for kind {arm.kind}, only for {kinds}."
    if arm.teacher is not None and "teacher" not in misplaced:
        if arm.teacher not in recipe.teachers:
            yield f"{place}.teacher: no teacher {arm.teacher!r}.{nearest(arm.teacher, recipe.teachers)}"
        elif arm.kind == "teacher" and recipe.teachers[arm.teacher].folds is not None:
            yield f"{place}: teacher {arm.teacher!r} is made of folds; there is no single one to evaluate."
        elif arm.kind == "teacher" and recipe.teachers[arm.teacher].committee is not None:
            yield f"{place}: teacher {arm.teacher!r} is a committee; evaluate its members, or its students."
    if not arm.data:
        yield f"{place}.data is empty; name at least one role to train on."
    for role in arm.data:
        if role not in recipe.task.splits or role in recipe.evaluation.splits:
            yield f"{place}.data names {role!r}; choose roles of task.splits that nothing is evaluated on."
    for key in ("brier_weight", "rps_weight"):
        if getattr(arm, key) and arm.target == "vocabulary" and key not in misplaced:
            yield f"{place}.{key} is a score among the choices: set {place}.restrict_to_choices or soft_label_weight."
    for key, text in arm.problems():
        if key not in misplaced:
            yield f"{place}.{key} {text}"
    if arm.kind == "distill":
        yield from _target(recipe, arm, place)


def _kinds_of(key: str) -> tuple[str, ...] | None:
    """The kinds of arm that a key means something for; `None` for all of them."""
    found = next((mark.kinds for mark in marks(ArmSpec)[key] if isinstance(mark, For)), None)
    return ("distill",) if found is None and key in _ARM_KEYS else found


def _misplaced(arm: ArmSpec) -> Iterator[str]:
    defaults = ArmSpec(kind=arm.kind)
    for f in dataclasses.fields(ArmSpec):
        kinds = _kinds_of(f.name)
        if kinds is not None and arm.kind not in kinds and getattr(arm, f.name) != getattr(defaults, f.name):
            yield f.name


def _target(recipe: Recipe, arm: ArmSpec, place: str) -> Iterator[str]:
    """What a distilled arm needs of the rest of the recipe, and of the fit of its value."""
    if arm.top_k is not None and arm.top_k > recipe.capture.k:
        yield f"{place}.top_k must be from 1 to capture.k = {recipe.capture.k}, got {arm.top_k}."
    if estimator_target(arm.estimator) == "draws" and not recipe.capture.num_draws:
        yield f"{place}: the estimator {arm.estimator!r} needs draws: set capture.num_draws, e.g. 50."
    for key in ("objective", "min_value"):
        if getattr(arm, key) is None:
            continue
        if arm.recalibration == "none":
            yield f"{place}.{key} has no effect without `recalibration`: name the method it belongs to."
        elif arm.recalibration_value is not None:
            yield f"{place}.{key} is about a fit, and recalibration_value is given. Leave one out."


def _named_arms(recipe: Recipe) -> Iterator[str]:
    for name in recipe.hub.arms if recipe.hub is not None else []:
        if name not in recipe.arms or recipe.arms[name].kind not in ("sft", "distill"):
            yield f"hub.arms names {name!r}, which trains no student.{nearest(name, recipe.arms)}"
    for key in ("baselines", "highlight"):
        for name in getattr(recipe.report, key):
            if name not in recipe.arms:
                yield f"report.{key}: no arm {name!r}.{nearest(name, recipe.arms)}"


def _arguments(recipe: Recipe) -> Iterator[str]:
    """Names and values that only a library judges, hours later."""
    trainings = {"training": recipe.training}
    trainings |= {f"arms.{name}.training": arm.training for name, arm in recipe.arms.items()}
    trainings |= {f"teachers.{name}.sft": variant.sft for name, variant in recipe.teachers.items()}
    adapters = {f"arms.{name}.lora": arm.lora for name, arm in recipe.arms.items()} | {
        "teacher.lora": recipe.teacher.lora
    }
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        trainings |= {f"{role}.{part}": getattr(model, part) or {} for part in ("pretrain", "sft")}
        yield from init_problems(model.init_kwargs, f"{role}.init_kwargs")
        if model.name_or_path is None and model.architecture is not None:
            yield from config_problems(model.architecture, model.config, f"{role}.config")
    for place, training in trainings.items():
        yield from training_problems(training, place)
        for key in _REFUSED:
            if key in training:
                yield f"{place}.{key}: log in with `hf auth login`; what is shared is named in the recipe's `hub`."
    for place, adapter in adapters.items():
        yield from lora_problems(adapter or {}, place)
