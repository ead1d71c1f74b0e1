"""Stage `recalibrate`: the rescale of the teacher, fitted on `validation` for every target that an arm trains on."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...cache.folder import store_recalibration
from ...recalibration import fit_recalibration
from ...utils.files import write_json
from ..recipe import ArmSpec
from .context import RunContext
from .teachers import Teacher, load_cache, teacher_of, teachers


@dataclass(frozen=True)
class Fit:
    """One fit: what is rescaled how, and by which measure."""

    method: str
    estimator: str = "topk"
    top_k: int | None = None
    objective: str = "ece"
    min_value: float | None = None

    def name(self, default_objective: str) -> str:
        """File name; the plain fit of a method has the method's name."""
        parts = [self.method]
        parts += [self.estimator] if self.estimator != "topk" else []
        parts += [f"k{self.top_k}"] if self.top_k is not None else []
        parts += [self.objective] if self.objective != default_objective else []
        parts += [f"min{self.min_value:g}"] if self.min_value is not None else []
        return "-".join(parts)


def fit_of(run: RunContext, arm: ArmSpec) -> Fit | None:
    """The fit an arm needs, `None` where its value is given or nothing is rescaled."""
    if arm.kind != "distill" or arm.recalibration == "none" or arm.recalibration_value is not None:
        return None
    top_k = None if arm.top_k == run.recipe.capture.k else arm.top_k
    objective = arm.objective or run.recipe.recalibration.objective
    return Fit(arm.recalibration, arm.estimator, top_k, objective, arm.min_value)


def fits(run: RunContext, teacher: Teacher) -> list[Fit]:
    """Fits of one teacher, without repeats."""
    spec = run.recipe.recalibration
    wanted = [] if teacher.name else [Fit(method, objective=spec.objective) for method in spec.methods]
    wanted += [
        fit
        for arm in run.recipe.arms.values()
        if (arm.teacher or "") == teacher.name and (fit := fit_of(run, arm)) is not None
    ]
    return list(dict.fromkeys(wanted))


def fit_path(run: RunContext, teacher: Teacher, fit: Fit) -> Path:
    name = fit.name(run.recipe.recalibration.objective)
    return run.folder / f"recalibration{teacher.suffix}" / f"{name}.json"


def run_recalibrate(run: RunContext) -> None:
    spec = run.recipe.recalibration
    for teacher in teachers(run):
        inputs = {
            "fits": fits(run, teacher),
            "recalibration": [spec.positions, spec.n_bins],
            "cache": [run.keys.get(f"cache{teacher.suffix}{part}") for part in teacher.parts],
            "seed": run.recipe.seed,
        }
        if not inputs["fits"]:
            continue
        unit = f"recalibration{teacher.suffix}"
        run.keys[unit] = run.workspace.run("recalibrate", unit, inputs, partial(_fit, run, teacher))


def _fit(run: RunContext, teacher: Teacher, folder: Path) -> None:
    if not run.is_main:
        return
    spec = run.recipe.recalibration
    validation = load_cache(run, teacher, "validation")
    for fit in fits(run, teacher):
        found = fit_recalibration(
            validation,
            method=fit.method,
            objective=fit.objective,
            estimator=fit.estimator,
            top_k=fit.top_k,
            min_value=fit.min_value,
            positions=spec.positions,
            n_bins=spec.n_bins,
            seed=run.recipe.seed,
        )
        plain = fit == Fit(fit.method, objective=spec.objective)
        # Where `recalibration_value=None` finds it, for whoever trains from the cache alone
        if plain and teacher.folds is None and (run.folder / f"cache{teacher.suffix}/manifest/train.json").is_file():
            store_recalibration(run.folder / f"cache{teacher.suffix}", "train", fit.method, found.to_dict())
        path = fit_path(run, teacher, fit)
        write_json(path, found.to_dict())
        run.workspace.say(
            f"    {path.stem}: {found.recalibration.value:g}, teacher's validation ECE "
            f"{100 * found.raw.ece:.1f} -> {100 * found.chosen.ece:.1f}"
        )


def fitted(run: RunContext, arm: ArmSpec) -> dict[str, Any] | None:
    """The fit behind an arm, whole; `None` where it has none."""
    fit = fit_of(run, arm)
    if fit is None:
        return None
    found: dict[str, Any] = json.loads(fit_path(run, teacher_of(run, arm), fit).read_text(encoding="utf-8"))
    return found
