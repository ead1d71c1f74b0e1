"""What of a run is finished already."""

from ..recipe import Recipe
from ..stages.context import RunContext
from ..stages.table import STAGE_TABLE
from .schema import UnitPlan


def plan_units(recipe: Recipe) -> list[UnitPlan]:
    """Every unit of one run, in order, with its status."""
    run = RunContext(recipe)
    return [UnitPlan(stage.name, unit.name, status) for stage in STAGE_TABLE for unit, status in stage.check(run)]
