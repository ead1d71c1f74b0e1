"""Stages `report` and `share`: the report of one run, the cards of its students, and what is shared."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...cache.folder import cache_size, load_manifest
from ...utils.files import write_json
from ...vocabulary import BAYES
from ..report import write_report
from ..run_folder import DATA, REPORT, SHARE, evaluation_unit, read_json, recalibration_unit
from ..share.push import push_run, write_student_cards
from .capture import captured_roles
from .context import RunContext
from .decisions import decision_scores
from .novelty import export_novelty, exported_novelty
from .recalibrate import fit_of, fit_path, fits
from .teachers import teacher_of, teachers
from .units import Unit, Unknown, content_key


def report_units(run: RunContext) -> Iterator[Unit]:
    """The report."""
    recipe = run.recipe
    arms = [*recipe.arms, *([BAYES] if run.has_posterior else [])]
    results = {name: run.keys[evaluation_unit(name)] for name in arms}
    fitted = [teacher for teacher in teachers(recipe) if fits(recipe, teacher)]
    recipe_key = content_key(asdict(recipe) | {"output_dir": None, "hub": None, "merge": None})
    inputs = {
        "recipe": recipe_key,
        # Whether the true answer distribution has a row is known from the rows alone
        "results": Unknown(DATA) if run.has_posterior is None else results,
        "recalibration": [run.keys[recalibration_unit(teacher.name)] for teacher in fitted],
    }
    yield Unit(REPORT, inputs, partial(_write, run, arms, recipe_key))


def print_report(run: RunContext) -> None:
    """The report on the screen."""
    report = run.folder.report.markdown
    run.workspace.say("")
    run.workspace.say(report.read_text(encoding="utf-8") if report.is_file() else "")
    run.workspace.say(f"Report: {report}")


def _write(run: RunContext, arms: list[str], recipe_key: str, folder: Path) -> None:
    if not run.is_main:
        return
    recipe = run.recipe
    write_report(
        folder,
        recipe=recipe,
        arms=arms,
        results={
            name: {role: read_json(run.folder.scores(name, role)) for role in recipe.evaluation.splits}
            for name in arms
        },
        temperatures={
            name: read_json(path)["temperature"] for name in arms if (path := run.folder.temperature(name)).is_file()
        },
        decisions={name: scores for name in arms if (scores := decision_scores(run, name)) is not None},
        fits={
            f"{path.stem}{teacher.suffix}": read_json(path)
            for teacher in teachers(recipe)
            for fit in fits(recipe, teacher)
            for path in [fit_path(run, teacher, fit)]
        },
        manifest=load_manifest(run.folder.cache(), "train"),
        counts=read_json(run.folder.counts),
        novelty={name: read_json(path) for name in arms if (path := run.folder.novelty(name)).is_file()},
        timings=run.workspace.log,
        extra={
            "cell": recipe.cell,
            "arms": {name: _describe_arm(run, name) for name in recipe.arms},
            "costs": {name: _cost(run, name) for name in recipe.arms},
            "models": {"teacher": _model(recipe.teacher), "student": _model(recipe.student)},
            "novelty_of": exported_novelty(run),
            "recipe_key": recipe_key,
            "highlight": recipe.report.highlight,
        },
    )
    export_novelty(run)
    write_student_cards(run.folder.root)


def share_units(run: RunContext) -> Iterator[Unit]:
    """What is shared on the Hub, where the recipe says so."""
    hub = run.recipe.hub
    if hub is None:
        return
    inputs = {"hub": hub, "report": run.keys[REPORT], "run": [run.recipe.name, run.recipe.cell, run.recipe.seed]}

    def work(folder: Path) -> None:
        if run.is_main:
            shared = push_run(
                run.folder.root,
                hub.namespace,
                arms=hub.arms or None,
                cache=hub.cache,
                private=hub.private,
                license=hub.license,
            )
            write_json(run.folder.repositories, shared)
            for name, place in shared.items():
                run.workspace.say(f"    {name}: {place['repo_id']} at {place['commit']}")

    yield Unit(SHARE, inputs, work)


def _model(spec: Any) -> dict[str, Any]:
    keys = ("name_or_path", "architecture", "config", "keep_layers")
    return {key: getattr(spec, key) for key in keys if key != "keep_layers" or spec.keep_layers is not None}


def _describe_arm(run: RunContext, name: str) -> dict[str, Any]:
    arm = asdict(run.recipe.arms[name])
    fit = fit_of(run.recipe, run.recipe.arms[name])
    teacher = teacher_of(run.recipe, run.recipe.arms[name])
    return {
        **arm,
        "base": name.split("@")[0],
        "values": arm["swept"],
        "fit": None if fit is None else f"{fit_path(run, teacher, fit).stem}{teacher.suffix}",
    }


def _cost(run: RunContext, name: str) -> dict[str, int]:
    """What an arm takes: optimiser steps of its teachers, rows and bytes of its cache, steps of its own."""
    arm = run.recipe.arms[name]
    of = arm.of or name
    source = run.recipe.arms[of]
    cost = {
        "teacher_steps": 0,
        "cache_rows": 0,
        "cache_bytes": 0,
        "student_steps": run.folder.student(of).steps(),
    }
    if source.kind in ("teacher", "distill"):
        teacher = teacher_of(run.recipe, source)
        roles = source.data if source.kind == "distill" else []
        cost["teacher_steps"] = sum(run.folder.teacher(teacher.name, fold).steps() for fold in teacher.parts)
        for role in set(roles) & set(captured_roles(run.recipe, teacher)):
            for cache in run.folder.caches(teacher.name, teacher.folds, role):
                cost["cache_rows"] += load_manifest(cache, role).counts["rows"]
                cost["cache_bytes"] += int(cache_size(cache, role)["bytes"])
    return cost
