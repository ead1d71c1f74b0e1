"""Stages `report` and `share`: the report of one run, the cards of its students, and what is pushed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...cache.folder import cache_size, load_manifest
from ...utils.files import write_json
from ...vocabulary import BAYES
from ..report import write_report
from ..share.push import push_run, write_student_cards
from .context import RunContext
from .recalibrate import fit_of, fit_path, fits
from .teachers import captured_roles, teacher_of, teachers
from .workspace import content_key


def run_report(run: RunContext) -> None:
    recipe = run.recipe
    arms = [name for name in (*recipe.arms, BAYES) if f"evaluate/{name}" in run.keys]
    recalibrated = [run.keys[key] for key in run.keys if key.startswith("recalibration")]
    recipe_key = content_key(asdict(recipe) | {"output_dir": None, "hub": None, "merge": None})
    inputs = {
        "recipe": recipe_key,
        "results": {name: run.keys[f"evaluate/{name}"] for name in arms},
        "recalibration": recalibrated,
    }
    run.keys["report"] = run.workspace.run(
        "report", "report", inputs, lambda folder: _write(run, arms, recipe_key, folder)
    )
    report = run.folder / "report" / "report.md"
    run.workspace.say("")
    run.workspace.say(report.read_text(encoding="utf-8") if report.is_file() else "")
    run.workspace.say(f"Report: {report}")


def _write(run: RunContext, arms: list[str], recipe_key: str, folder: Path) -> None:
    if not run.is_main:
        return
    root, recipe = run.folder, run.recipe
    write_report(
        folder,
        recipe=recipe,
        arms=arms,
        results={
            name: {role: _read(root / "evaluate" / name / f"{role}.json") for role in recipe.evaluation.splits}
            for name in arms
        },
        temperatures={
            name: _read(path)["temperature"]
            for name in arms
            if (path := root / "evaluate" / name / "temperature.json").is_file()
        },
        fits={
            f"{path.stem}{teacher.suffix}": _read(path)
            for teacher in teachers(run)
            for fit in fits(run, teacher)
            for path in [fit_path(run, teacher, fit)]
        },
        manifest=load_manifest(root / "cache", "train"),
        counts=run.counts(),
        timings=run.workspace.log,
        extra={
            "cell": recipe.cell,
            "arms": {name: _describe_arm(run, name) for name in recipe.arms},
            "costs": {name: _cost(run, name) for name in recipe.arms},
            "models": {"teacher": _model(recipe.teacher), "student": _model(recipe.student)},
            "recipe_key": recipe_key,
            "highlight": recipe.report.highlight,
        },
    )
    write_student_cards(root)


def run_share(run: RunContext) -> None:
    hub = run.recipe.hub
    if hub is None:
        return
    inputs = {"hub": hub, "report": run.keys["report"], "run": [run.recipe.name, run.recipe.cell, run.recipe.seed]}

    def work(folder: Path) -> None:
        if run.is_main:
            shared = push_run(
                run.folder,
                hub.namespace,
                arms=hub.arms or None,
                cache=hub.cache,
                private=hub.private,
                license=hub.license,
            )
            write_json(folder / "repositories.json", shared)
            for name, place in shared.items():
                run.workspace.say(f"    {name}: {place['repo_id']} at {place['commit']}")

    run.keys["share"] = run.workspace.run("share", "share", inputs, work)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _model(spec: Any) -> dict[str, Any]:
    return {"name_or_path": spec.name_or_path, "architecture": spec.architecture, "config": spec.config}


def _describe_arm(run: RunContext, name: str) -> dict[str, Any]:
    arm = asdict(run.recipe.arms[name])
    fit = fit_of(run, run.recipe.arms[name])
    teacher = teacher_of(run, run.recipe.arms[name])
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
        "student_steps": _steps(run.folder / "students" / of),
    }
    if source.kind in ("teacher", "distill"):
        teacher = teacher_of(run, source)
        roles = source.data if source.kind == "distill" else []
        for part in teacher.parts:
            cost["teacher_steps"] += _steps(run.folder / f"teacher{teacher.suffix}{part}")
            folder = run.folder / f"cache{teacher.suffix}{part}"
            for role in set(roles) & set(captured_roles(run, teacher)):
                if (folder / "manifest" / f"{role}.json").is_file():
                    cost["cache_rows"] += load_manifest(folder, role).counts["rows"]
                    cost["cache_bytes"] += int(cache_size(folder, role)["bytes"])
    return cost


def _steps(folder: Path) -> int:
    log = folder / "training_log.json"
    return int(json.loads(log.read_text(encoding="utf-8"))[-1]["step"]) if log.is_file() else 0
