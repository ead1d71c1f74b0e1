"""Arms with temperatures by novelty: one forward of a model for all of them, then fits and scores without it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...calibration.agreement import fit_agreement_temperature
from ...calibration.scores import auroc_between
from ...evaluation.answer_states import AnswerStates, candidate_layers, collect_answer_states, layer_count
from ...evaluation.cross_group import cluster_groups, cross_group_slopes
from ...evaluation.multiple_choice import MultipleChoiceResult
from ...evaluation.novelty import file_digest
from ...evaluation.novelty_scaling import NOVELTY_NAME, NoveltyScaling, fit_novelty_scaling
from ...tasks.decision_extras import write_decision_extras
from ...utils.files import write_json
from ..recipe import ArmSpec, NoveltySpec
from ..run_folder import read_json
from .capture import disagreement_of
from .context import RunContext
from .teachers import base_model, teacher_of
from .training import place


# More training rows than these say little more about distances, and a slope needs no more
_MAX_TRAIN_ROWS = 20_000


def states_inputs(run: RunContext, of: str) -> dict[str, Any]:
    """What is read of an arm's model, by the arms behind it."""
    specs = [
        _spec(run, name) for name, arm in run.recipe.arms.items() if arm.kind == "novelty_scaling" and arm.of == of
    ]
    return {
        "roles": _roles(run),
        "layers": sorted({layer for spec in specs for layer in spec.layers or ()}),
        "own_choice": any(spec.layers is None for spec in specs),
        "seed": run.recipe.seed,
    }


def _roles(run: RunContext) -> list[str]:
    return list(dict.fromkeys(["validation", *run.recipe.evaluation.splits]))


def _spec(run: RunContext, name: str) -> NoveltySpec:
    return run.recipe.arms[name].novelty or NoveltySpec()


def _train_rows(run: RunContext) -> Any:
    rows = run.folder.load_tokens("train")
    if len(rows) <= _MAX_TRAIN_ROWS:
        return rows
    kept = np.random.default_rng(run.recipe.seed).permutation(len(rows))[:_MAX_TRAIN_ROWS]
    return rows.select(np.sort(kept))


def read_states(run: RunContext, of: str, model: Any) -> None:
    """
    One pass of an arm's model over the training rows, the validation rows and those that are evaluated.

    Raises:
        `ValueError`: A role is free text, or a layer is named that the model does not have.
    """
    free = [role for role in _roles(run) if not run.has_choices(role)]
    if free:
        raise ValueError(
            f"Arms of kind novelty_scaling read the answer position of multiple choice, and the rows of {', '.join(free)} are "
            "free text. Leave these arms or these roles out."
        )
    wanted = states_inputs(run, of)
    tried = candidate_layers(layer_count(model))
    layers = sorted({*wanted["layers"], *(tried if wanted["own_choice"] else ())})
    options: dict[str, Any] = {
        "batch_size": run.recipe.evaluation.batch_size,
        "disable_tqdm": True,
        "distributed": True,
    }
    tokenizer = run.tokenizer(base_role(run, of))
    for role in ("train", *_roles(run)):
        rows = _train_rows(run) if role == "train" else run.folder.load_rows(role)
        states = collect_answer_states(
            model, tokenizer, rows, layers, max_length=run.recipe.task.max_length, **options
        )
        if run.is_main:
            states.save(run.folder.states(of, role))
    if run.is_main:
        write_json(run.folder.layers(of), {"read": layers, "tried": tried})


def base_role(run: RunContext, of: str) -> str:
    """Whether an arm's model began as the recipe's teacher or its student."""
    return "teacher" if run.recipe.arms[of].kind == "teacher" else "student"


def base_rows(arm: ArmSpec) -> str | None:
    """The role that an arm needs the model before fine-tuning on, where it does."""
    if arm.novelty is not None and arm.novelty.fit == "cross_group":
        return "train"
    return arm.prompts


def read_base_states(run: RunContext, which: str, role: str, folder: Path) -> None:
    """One pass of the model before fine-tuning over the rows of a role."""
    model = place(base_model(run, which))
    rows = _train_rows(run) if role == "train" else run.folder.load_rows(role)
    states = collect_answer_states(
        model, run.tokenizer(which), rows, candidate_layers(layer_count(model)), max_length=run.recipe.task.max_length,
        batch_size=run.recipe.evaluation.batch_size, disable_tqdm=True, distributed=True,
    )  # fmt: skip
    if run.is_main:
        states.save(run.folder.base_states(which, role))


def agreement_results(run: RunContext, name: str) -> Iterator[tuple[str, MultipleChoiceResult]]:
    """Fit the one temperature of an arm by agreement, write it, and give the predictions of each role that is evaluated."""
    arm = run.recipe.arms[name]
    of, prompts = str(arm.of), str(arm.prompts)
    own = AnswerStates.load(run.folder.states(of, prompts))
    before = AnswerStates.load(run.folder.base_states(base_role(run, of), prompts))
    try:
        fitted = fit_agreement_temperature(own.choice_logits, before.choice_logits)
    except ValueError as error:
        raise ValueError(f"arms.{name}: {error}") from None
    write_json(run.folder.agreement(name), {"prompts": prompts, **fitted.to_dict()})
    for role in run.recipe.evaluation.splits:
        ids = np.array([str(each) for each in run.folder.load_rows(role)["id"]])
        rows = AnswerStates.load(run.folder.states(of, role))
        yield role, rows.result(ids, fitted.temperature, n_bins=run.recipe.evaluation.n_bins)


def fit_arm(run: RunContext, name: str) -> NoveltyScaling:
    """
    The temperature by novelty of an arm.

    Raises:
        `ValueError`: `cross_group` without groups, or with too few rows.
    """
    arm, spec = run.recipe.arms[name], _spec(run, name)
    of = str(arm.of)
    train = AnswerStates.load(run.folder.states(of, "train"))
    layers = spec.layers or read_json(run.folder.layers(of))["tried"]
    common: dict[str, Any] = {
        "feature": spec.feature,
        "metric": spec.metric,
        "k": spec.k,
        "components": spec.components,
        "layers": layers,
        "seed": run.recipe.seed,
    }
    slopes = disagreement = None
    if spec.feature == "disagreement":
        teacher = teacher_of(run.recipe, run.recipe.arms[of])
        disagreement = disagreement_of(run, teacher, "train", _train_rows(run))
    if spec.fit == "cross_group":
        rows = _train_rows(run)
        groups = rows["group"] if "group" in rows.column_names else [""] * len(rows)
        heads = AnswerStates.load(run.folder.base_states(base_role(run, of)))
        try:
            if spec.groups == "cluster":
                groups = cluster_groups(heads, spec.clusters, seed=run.recipe.seed)
            slopes = cross_group_slopes(train, groups, heads, folds=spec.folds, **common)
        except ValueError as error:
            raise ValueError(f"arms.{name}.novelty.fit: {error}") from None
    fitted = fit_novelty_scaling(
        train,
        AnswerStates.load(run.folder.states(of, "validation")),
        at_least_scalar=spec.at_least_scalar,
        reference_rows=spec.reference_rows,
        slopes=slopes,
        steepest=spec.fit == "steepest",
        max_nll_increase=spec.max_nll_increase,
        disagreement=disagreement,
        **common,
    )
    if slopes is not None:
        fitted.choice["cross_group"] = slopes
    return fitted


def novelty_results(run: RunContext, name: str) -> Iterator[tuple[str, MultipleChoiceResult]]:
    """Fit an arm, write what was fitted, and give the predictions of each role that is evaluated."""
    arm, fitted = run.recipe.arms[name], fit_arm(run, name)
    roles = run.recipe.evaluation.splits
    states = {role: AnswerStates.load(run.folder.states(str(arm.of), role)) for role in roles}
    features = {role: fitted.features(rows.states, rows.max_probability()) for role, rows in states.items()}
    temperatures = {role: fitted.temperature.temperature(x) for role, x in features.items()}
    newness = {
        role: x[:, 0] if fitted.feature != "hidden_state" else np.log(temperatures[role])
        for role, x in features.items()
    }
    write_json(
        run.folder.novelty(name),
        {
            "feature": fitted.feature,
            "layer": next(iter(fitted.layers), None),
            **fitted.temperature.to_dict(),
            "settings": asdict(_spec(run, name)),
            "choice": json.loads(json.dumps(fitted.choice)),
            "roles": {role: _summary(temperatures[role], newness[role]) for role in roles},
            "auroc": {
                role: {
                    "feature": auroc_between(newness[roles[0]], newness[role]),
                    "max_probability": auroc_between(
                        -states[roles[0]].max_probability(), -states[role].max_probability()
                    ),
                }
                for role in roles[1:]
            },
        },
    )
    if fitted.reference is not None:
        fitted.save(run.folder.novelty(name).parent)
    for role, rows in states.items():
        ids = np.array([str(each) for each in run.folder.load_rows(role)["id"]])
        result = rows.result(ids, temperatures[role], n_bins=run.recipe.evaluation.n_bins)
        result.predictions.update(temperature=temperatures[role], novelty=newness[role])
        yield role, result


def exported_novelty(run: RunContext) -> dict[str, str]:
    """Student -> the arm whose temperature is saved with it: its first one with a distance that is no point of a sweep."""
    chosen: dict[str, str] = {}
    for name, arm in run.recipe.arms.items():
        if arm.kind != "novelty_scaling" or not run.folder.novelty_reference(name).is_file():
            continue
        of = str(arm.of)
        if run.folder.student(of).has_model and (not arm.swept or run.recipe.arms[of].swept):
            chosen.setdefault(of, name)
    return chosen


def export_novelty(run: RunContext) -> None:
    """Put what was fitted beside the weights of each student, and take away what an earlier recipe put there."""
    chosen = exported_novelty(run)
    for student in run.recipe.arms:
        model = run.folder.student(student).model
        if student in chosen:
            source = run.folder.novelty_reference(chosen[student])
            shutil.copyfile(source, model / NOVELTY_NAME)
            write_decision_extras(model, novelty={"file": NOVELTY_NAME, "sha256": file_digest(source)})
        elif (model / NOVELTY_NAME).is_file():
            (model / NOVELTY_NAME).unlink()
            write_decision_extras(model, novelty=None)


def _summary(temperature: np.ndarray, newness: np.ndarray) -> dict[str, Any]:
    """Where temperatures and feature lie: the tenths."""
    tenths = np.linspace(0.0, 1.0, 11)
    return {
        "n": len(temperature),
        "temperature": {"mean": float(temperature.mean()), "tenths": np.quantile(temperature, tenths).tolist()},
        "feature": {"mean": float(newness.mean()), "tenths": np.quantile(newness, tenths).tolist()},
    }
