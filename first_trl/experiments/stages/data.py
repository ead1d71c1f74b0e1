"""Stage `data`: rows of every role, checked, tokenised and counted."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from ...plugins import TASKS
from ...tasks import Task, get_task, tokenize_rows
from ...tasks.answers import check_answers
from ...tasks.base import TaskSplit
from ...tasks.copies import CHOSEN_ON, drop_copies, yields_to
from ...tasks.multiple_choice import MultipleChoice
from ...tasks.overlap import drop_overlap
from ...utils.files import write_json
from ...vocabulary import TARGET_PROBS, TARGET_VOTES, THRESHOLD_ROLE
from ..recipe import Recipe, SplitSpec
from ..run_folder import DATA
from .context import RunContext
from .units import Unit, content_key, path_fingerprint


def data_units(run: RunContext) -> list[Unit]:
    """
    Besides the key of the whole unit there is one of each role, which what is made from a role depends on: a further evaluation role rewrites the rows and trains nothing again.
    """
    recipe, task = run.recipe, run.recipe.task
    tokenizer, revision = recipe.tokenizer_source
    # Each is read once: roles are slices of one file as a rule
    files = {
        path: path_fingerprint(path) for path in {task.path, *(_path(run, spec) for spec in task.splits.values())}
    }
    common = {
        "task": [dataclasses.replace(task, splits={}), files[task.path]],
        "seed": recipe.seed,
        "tokenizer": [path_fingerprint(tokenizer), revision],
    }
    keys = {
        role: content_key({**common, "split": spec, "files": files[_path(run, spec)], **_code(spec.task or task.name)})
        for role, spec in task.splits.items()
    }
    used = used_roles(recipe)
    unseen = [key for role, key in keys.items() if task.splits[role].unseen is not None]
    copied = {role: keys[role] for role in honest_roles(recipe) if _drops_copies(recipe, task.splits[role])}
    yielding = yielding_roles(recipe)
    for role in yielding:
        # Which of its rows stay depends on the rows of the roles that it yields to
        later = yields_to(role, list(copied), yielding) if role in copied else []
        others = [key for other, key in copied.items() if other in later]
        depends = [*([unseen] if role in used else []), *([others] if others else [])]
        keys[role] = content_key([keys[role], *depends]) if depends else keys[role]
    run.role_keys = keys
    inputs: dict[str, Any] = {"roles": keys, "evaluated": recipe.evaluation.splits}
    if recipe.evaluation.scoring != "token":  # what the answers are checked for
        inputs["scoring"] = recipe.evaluation.scoring
    if recipe.evaluation.permutations:
        inputs["permuted"] = True
    if _with_choices(recipe):
        inputs["with_choices"] = sorted(_with_choices(recipe))
    return [Unit(DATA, inputs, partial(_write, run))]


def _code(task: str) -> dict[str, Any]:
    code = TASKS.code(task)
    return {} if code is None else {"code": code}


def _with_choices(recipe: Recipe) -> set[str]:
    """Roles whose choices students train on."""
    if recipe.capture.target == "options":
        return {"train", "validation", *(role for arm in recipe.arms.values() for role in arm.data)}
    return {role for arm in recipe.arms.values() if arm.target != "vocabulary" for role in arm.data}


def used_roles(recipe: Recipe) -> list[str]:
    """Roles that students train on, and that temperatures, thresholds and epochs are chosen on."""
    chosen_on = [role for role in ("train", *CHOSEN_ON) if role in recipe.task.splits]
    return list(dict.fromkeys([*chosen_on, *(role for arm in recipe.arms.values() for role in arm.data)]))


def yielding_roles(recipe: Recipe) -> list[str]:
    """Roles that lose the rows of which they hold copies: those that are used, and what models from scratch read first."""
    return list(dict.fromkeys([*used_roles(recipe), *(["pretrain"] if "pretrain" in recipe.task.splits else [])]))


def honest_roles(recipe: Recipe) -> list[str]:
    """
    Roles in which one question must not stand twice: those that are used, and those that are evaluated, except where one
    of these is the rows of `validation` on purpose.
    """
    splits, used = recipe.task.splits, yielding_roles(recipe)
    chosen = dataclasses.replace(splits["validation"], limit=None, unseen=None)
    return [
        role
        for role, spec in splits.items()
        if role in used
        or (role in recipe.evaluation.splits and dataclasses.replace(spec, limit=None, unseen=None) != chosen)
    ]


def task_of(recipe: Recipe, spec: SplitSpec) -> Task:
    """The task that the rows of a role are of."""
    if spec.task is None:
        return get_task(recipe.task.name, **{**recipe.task.options, **(spec.options or {})})
    return get_task(spec.task, **(spec.options or {}))


def _drops_copies(recipe: Recipe, spec: SplitSpec) -> bool:
    try:
        return task_of(recipe, spec).drop_copies
    except ValueError:
        return True  # A wrong option is refused where the rows are read


def _path(run: RunContext, spec: SplitSpec) -> str | None:
    return spec.path or (run.recipe.task.path if spec.task is None else None)


def _load(run: RunContext, spec: SplitSpec) -> TaskSplit:
    task, path = task_of(run.recipe, spec), _path(run, spec)
    return task.load(
        spec.split,
        path=path,
        revision=run.data_revision(task, path, run.recipe.task.revision if spec.task is None else None),
        limit=spec.limit,
        seed=run.recipe.seed,
    )


def _write(run: RunContext, folder: Path) -> None:
    if not run.is_main:
        return
    splits, evaluated = run.recipe.task.splits, run.recipe.evaluation.splits
    loaded = {role: _load(run, spec) for role, spec in splits.items()}
    rows = {role: split.dataset for role, split in loaded.items()}
    check_rows(run.recipe, rows)
    used, yielding = used_roles(run.recipe), yielding_roles(run.recipe)
    overlapping: dict[str, dict[str, int]] = {role: {} for role in yielding}
    for role, spec in splits.items():
        for other in used if spec.unseen is not None else ():
            rows[other], dropped = drop_overlap(rows[other], rows[role], by=str(spec.unseen))
            if dropped:
                overlapping[other][f"shares a {spec.unseen} with {role}"] = dropped
    rows, copies = drop_copies({role: loaded[role] for role in honest_roles(run.recipe)}, rows, yielding)
    for role, dropped_copies in copies.dropped.items():
        overlapping[role] |= dropped_copies
    tokenizer = run.tokenizer()
    evaluates_teacher = any(arm.kind == "teacher" for arm in run.recipe.arms.values())
    teacher = run.tokenizer("teacher") if run.recipe.capture.target == "options" and evaluates_teacher else None
    counts = {}
    for role, split in loaded.items():
        reasons = {**split.reasons, **overlapping.get(role, {})}
        counts[role] = {
            "read": split.n_read,
            "not_selected": split.n_not_selected,
            **({"added": split.n_added} if split.n_added else {}),
            "rows": len(rows[role]),
            "dropped": reasons,
            "shared": copies.shared.get(role, {}),
            "choices": any(rows[role]["choices"]),
            "domain": _domain(run, role),
        }
        # What evaluation or a training would refuse after all trainings before it
        for scoring in scorings(run.recipe, role) if counts[role]["choices"] else ():
            try:
                check_answers(tokenizer, rows[role], scoring)
                if teacher is not None and role in evaluated:
                    check_answers(teacher, rows[role], scoring)
            except ValueError as error:
                raise ValueError(f"Role {role!r}, {error}") from None
        if is_tokenised(run.recipe, role, bool(counts[role]["choices"])):
            counts[role] |= _tokenize(run, role, rows[role], reasons, tokenizer)
        if role not in ("train", "pretrain") or role in _with_choices(run.recipe):
            rows[role].save_to_disk(run.folder.rows(role))
        run.workspace.say(f"    {role}: {_describe(counts[role])}")
    write_json(run.folder.counts, counts)


def check_rows(recipe: Recipe, rows: Mapping[str, Dataset]) -> None:
    """
    Raises `ValueError` where roles, of which some may not be known yet, lack what the recipe needs of them.

    Args:
        recipe ([`Recipe`]): The recipe.
        rows (`dict[str, Dataset]`): Role -> rows.
    """
    evaluated = [recipe.task.splits[role] for role in recipe.evaluation.splits]
    if recipe.evaluation.permutations and not any(
        isinstance(task_of(recipe, one), MultipleChoice) for one in evaluated
    ):
        raise ValueError("evaluation.permutations: none of the evaluated roles has lettered options to permute.")
    for name, arm in recipe.arms.items():
        without = [role for role in arm.data if role in rows and TARGET_PROBS not in rows[role].column_names]
        if arm.soft_label_weight is not None and without:
            raise ValueError(
                f"arms.{name}.soft_label_weight: the rows of {without[0]!r} have no soft labels. Give them a column "
                f"`{TARGET_PROBS}` or `{TARGET_VOTES}` (tasks custom and system_one), or leave the key out."
            )
    for role in ("train", "validation"):
        if role in rows and all(completion is None for completion in rows[role]["completion"]):
            raise ValueError(
                f"The rows of {role!r} have no answers. Train and choose on rows with answers; further prompts go into a "
                "role of their own, which an arm names in `data`."
            )


def scorings(recipe: Recipe, role: str) -> set[str]:
    """How the choices of a role are told apart, in evaluation and training."""
    evaluated = {recipe.evaluation.scoring} if role in recipe.evaluation.splits else set()
    return evaluated | ({"token"} if role in _with_choices(recipe) else set())


def is_tokenised(recipe: Recipe, role: str, choices: bool) -> bool:
    """Multiple choice is evaluated on the text of the rows, everything else works on tokens."""
    return role in ("train", "validation") or role not in recipe.evaluation.splits or not choices


def _domain(run: RunContext, role: str) -> str:
    """What a score on the rows of a role is a score of."""
    spec = run.recipe.task.splits[role]
    if role in ("validation", THRESHOLD_ROLE):
        return "validation"
    shifted = spec.task is not None or spec.unseen == "group" or role not in run.recipe.evaluation.splits[:1]
    return "out-of-domain" if shifted else "in-domain"


def _tokenize(run: RunContext, role: str, rows: Dataset, reasons: dict[str, int], tokenizer: Any) -> dict[str, Any]:
    task = run.recipe.task
    text = role == "pretrain"
    unlabelled = not text and all(completion is None for completion in rows["completion"])
    tokenized = tokenize_rows(
        rows,
        tokenizer,
        max_length=task.max_length,
        append_eos=task.append_eos and not text and not unlabelled,
        supervise="all" if text else "answer_position" if unlabelled else "completion",
        on_overflow="truncate_right" if text else cast(Any, task.on_overflow),
    )
    tokenized.dataset.save_to_disk(run.folder.tokens(role))
    return {
        "rows": tokenized.n_out,
        "cut": tokenized.n_truncated,
        "dropped": {**reasons, **tokenized.reasons},
        "without_answer": len(tokenized.dataset) if unlabelled else 0,
    }


def _describe(count: dict[str, Any]) -> str:
    parts = [f"{count['rows']} rows"]
    if count.get("without_answer"):
        parts.append("prompts without an answer")
    if count["not_selected"]:
        parts.append(f"{count['not_selected']} left out by limit")
    if count.get("added"):
        parts.append(f"{count['added']} of them added in other orders")
    if count.get("cut"):
        parts.append(f"{count['cut']} cut to max_length")
    parts += [f"{number} also in {role}" for role, number in count["shared"].items()]
    parts += [f"{number} dropped ({reason})" for reason, number in count["dropped"].items()]
    return ", ".join(parts)
