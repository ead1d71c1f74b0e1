"""What of a run is finished already: the pipeline's own stages, walked without doing their work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..stages.context import RunContext
from ..stages.data import run_data
from ..stages.evaluate import run_evaluate
from ..stages.recalibrate import fits, run_recalibrate
from ..stages.reporting import run_report, run_share
from ..stages.students import run_students
from ..stages.teachers import captured_roles, run_capture, run_pretrain, run_teacher, teachers
from ..stages.workspace import Workspace, content_key
from .schema import UnitPlan


_STAGES: tuple[Callable[[RunContext], None], ...] = (
    run_data,
    run_pretrain,
    run_teacher,
    run_capture,
    run_recalibrate,
    run_students,
    run_evaluate,
    run_report,
    run_share,
)


class _Reader(Workspace):
    """Says which units are finished, and does none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.found: dict[str, str] = {}

    def say(self, text: str) -> None:
        """A plan has words of its own."""

    def run(self, stage: str, unit: str, inputs: dict[str, Any], work: Callable[[Path], None]) -> str:
        key = content_key(inputs)
        marker = _marker(self.folder / unit)
        if marker:
            status = {"done": "done", "running": "running"}.get(str(marker.get("status")), "changed")
            self.found[unit] = status if marker.get("key") == key else "changed"
        return key


def plan_units(recipe: Recipe) -> list[UnitPlan]:
    """Every unit of one run, in order, with its status."""
    run = RunContext(recipe)
    reader = _Reader(recipe.folder)
    run.workspace = reader
    for work in _STAGES:
        try:
            work(run)
        except (OSError, KeyError, ValueError):
            # The stage needs files of a unit that is not finished, and so do those behind it
            break
    units = []
    for stage, unit in _units(run):
        # Whether a unit behind the break has changed cannot be told before the ones in front are finished
        left = "unchecked" if _marker(recipe.folder / unit) else "to do"
        units.append(UnitPlan(stage, unit, reader.found.get(unit, left)))
    return units


def _units(run: RunContext) -> list[tuple[str, str]]:
    recipe = run.recipe
    units = [("data", "data")]
    for role in ("teacher", "student"):
        spec = getattr(recipe, role)
        if spec.pretrain is not None or spec.from_scratch:
            units.append(("pretrain", f"base/{role}"))
    everyone = teachers(run)
    parts = [(teacher, part) for teacher in everyone for part in teacher.parts]
    units += [("teacher", f"teacher{who.suffix}{part}") for who, part in parts if who.sft is not None]
    units += [("capture", f"cache{who.suffix}{part}") for who, part in parts if captured_roles(run, who)]
    units += [("recalibrate", f"recalibration{who.suffix}") for who in everyone if fits(run, who)]
    units += [("students", f"students/{name}") for name, arm in recipe.arms.items() if arm.kind in ("sft", "distill")]
    units += [("evaluate", f"evaluate/{name}") for name in recipe.arms]
    units.append(("report", "report"))
    return units + ([("share", "share")] if recipe.hub is not None else [])


def _marker(folder: Path) -> dict[str, Any]:
    try:
        marker: dict[str, Any] = json.loads((folder / "unit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker
