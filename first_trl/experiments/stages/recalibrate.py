"""Stage `recalibrate`: the rescale of the teacher, fitted on `validation` for every target that an arm trains on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ...cache.folder import forget_recalibrations, load_manifest, store_recalibration
from ...plugins import RECALIBRATIONS
from ...recalibration import RecalibrationFit, fit_recalibration
from ...utils.files import write_json
from ...utils.processes import Share
from ..recipe import ArmSpec, Recipe
from ..run_folder import cache_unit, read_json, recalibration_unit
from .capture import load_cache
from .context import RunContext
from .teachers import Teacher, teacher_of, teachers
from .units import Unit, Unknown


@dataclass(frozen=True)
class Fit:
    """One fit: what is rescaled how, and by which measure."""

    method: str
    estimator: str = "topk"
    top_k: int | None = None
    objective: str = "ece"
    min_value: float | None = None
    target: str = "vocabulary"

    def name(self, default_objective: str) -> str:
        """File name; the plain fit of a method has the method's name."""
        parts = [self.method]
        parts += [self.estimator] if self.estimator != "topk" else []
        parts += [f"k{self.top_k}"] if self.top_k is not None else []
        parts += [self.objective] if self.objective != default_objective else []
        parts += [f"min{self.min_value:g}"] if self.min_value is not None else []
        parts += [self.target] if self.target != "vocabulary" else []
        return "-".join(parts)


def fit_of(recipe: Recipe, arm: ArmSpec) -> Fit | None:
    """The fit an arm needs, `None` where its value is given or nothing is rescaled."""
    if arm.kind != "distill" or arm.recalibration == "none" or arm.recalibration_value is not None:
        return None
    top_k = None if arm.top_k == recipe.capture.k else arm.top_k
    objective = arm.objective or recipe.recalibration.objective
    # Beside a teacher, soft labels are taken as they are
    target = "choices" if arm.target == "both" else arm.target
    return Fit(arm.recalibration, arm.estimator, top_k, objective, arm.min_value, target)


def fits(recipe: Recipe, teacher: Teacher) -> list[Fit]:
    """Fits of one teacher, without repeats."""
    spec = recipe.recalibration
    wanted = [] if teacher.name else [Fit(method, objective=spec.objective) for method in spec.methods]
    wanted += [
        fit
        for arm in recipe.arms.values()
        if (arm.teacher or "") == teacher.name and (fit := fit_of(recipe, arm)) is not None
    ]
    return list(dict.fromkeys(wanted))


def fit_path(run: RunContext, teacher: Teacher, fit: Fit) -> Path:
    return run.folder.fit(fit.name(run.recipe.recalibration.objective), teacher.name)


def recalibration_units(run: RunContext) -> Iterator[Unit]:
    """One a teacher that something is fitted for."""
    spec = run.recipe.recalibration
    for teacher in teachers(run.recipe):
        wanted = fits(run.recipe, teacher)
        if not wanted and not _holds_fits(run, teacher):
            continue
        inputs = {
            "fits": wanted,
            "recalibration": [spec.positions, spec.n_bins],
            "cache": [run.keys[cache_unit(teacher.name, fold)] for fold in teacher.parts],
            "seed": run.recipe.seed,
        }
        # A method's values mean what its code makes of them
        code = {fit.method: RECALIBRATIONS.code(fit.method) for fit in wanted}
        if any(code.values()):
            inputs["code"] = code
        yield Unit(recalibration_unit(teacher.name), inputs, partial(_fit, run, teacher))


def _fit(run: RunContext, teacher: Teacher, folder: Path) -> None:
    wanted = fits(run.recipe, teacher)
    if run.is_main:
        # A fit of a method that the recipe no longer names must not travel with the cache
        for cache in [] if teacher.folds is not None else run.folder.caches(teacher.name, None, "train"):
            forget_recalibrations(cache, "train", _stored_methods(run.recipe, wanted))
    # Each fit is one process's, over all rows: the bits do not depend on how many processes there are
    mine = Share.of(True).part(range(len(wanted)))
    given: list[Any] = [(index, _found(run, teacher, wanted[index])) for index in mine]
    every = dict(gather_object(given))
    for index, fit in enumerate(wanted if run.is_main else []):
        found = every[index]
        plain = fit.method in _stored_methods(run.recipe, [fit])
        # Where `recalibration_value=None` finds it, for whoever trains from the cache alone
        if plain and teacher.folds is None:
            for cache in run.folder.caches(teacher.name, None, "train"):
                store_recalibration(cache, "train", fit.method, found.to_dict())
        path = fit_path(run, teacher, fit)
        write_json(path, found.to_dict())
        run.workspace.say(
            f"    {path.stem}: {found.recalibration.value:g}, teacher's validation ECE "
            f"{100 * found.raw.ece:.1f} -> {100 * found.chosen.ece:.1f}"
        )


def _found(run: RunContext, teacher: Teacher, fit: Fit) -> RecalibrationFit:
    spec = run.recipe.recalibration
    return fit_recalibration(
        load_cache(run, teacher, "validation", fit.target),
        method=fit.method,
        objective=fit.objective,
        estimator=fit.estimator,
        top_k=fit.top_k,
        min_value=fit.min_value,
        positions=spec.positions,
        n_bins=spec.n_bins,
        seed=run.recipe.seed,
    )


def _holds_fits(run: RunContext, teacher: Teacher) -> bool:
    caches = [] if teacher.folds is not None else run.folder.caches(teacher.name, None, "train")
    return any(load_manifest(cache, "train").recalibration for cache in caches)


def _stored_methods(recipe: Recipe, wanted: list[Fit]) -> list[str]:
    """Methods whose plain fit is kept with the cache."""
    objective = recipe.recalibration.objective
    return [fit.method for fit in wanted if fit == Fit(fit.method, objective=objective)]


def fitted_value(run: RunContext, arm: ArmSpec) -> float | Unknown | None:
    """The value that was fitted for an arm, `Unknown` before it is; `None` where nothing is fitted for it."""
    fit = fit_of(run.recipe, arm)
    if fit is None:
        return None
    teacher = teacher_of(run.recipe, arm)
    path, unit = fit_path(run, teacher, fit), recalibration_unit(teacher.name)
    if unit not in run.done or not path.is_file():
        return Unknown(unit)
    value: float = read_json(path)["recalibration"]["value"]
    return value
