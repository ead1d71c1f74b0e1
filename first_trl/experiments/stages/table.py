"""
The stages of a run, in order. A stage says which units a run has, what each is made from and how it is made. The run does
them, the plan asks which are done: both read this table.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .capture import capture_units
from .context import RunContext
from .data import data_units
from .evaluate import evaluation_units
from .recalibrate import recalibration_units
from .reporting import print_report, report_units, share_units
from .students import student_units
from .teachers import base_units, teacher_units
from .units import Unit


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        name (`str`): As `--stage` takes it.
        units (`Callable`): The units of a run, in order. It writes nothing and runs nothing.
        after (`Callable`, *optional*): Called when all units are done.
    """

    name: str
    units: Callable[[RunContext], Iterable[Unit]]
    after: Callable[[RunContext], None] | None = None

    def run(self, run: RunContext) -> None:
        """Do the units that are not done."""
        for unit in self.units(run):
            run.workspace.run(self.name, unit)
            run.add(unit, done=True)
        if self.after is not None:
            self.after(run)

    def check(self, run: RunContext) -> Iterator[tuple[Unit, str]]:
        """The units with their status; nothing is done."""
        for unit in self.units(run):
            status = run.workspace.status(unit)
            run.add(unit, done=status == "done")
            yield unit, status


STAGE_TABLE = (
    Stage("data", data_units),
    Stage("pretrain", base_units),
    Stage("teacher", teacher_units),
    Stage("capture", capture_units),
    Stage("recalibrate", recalibration_units),
    Stage("students", student_units),
    Stage("evaluate", evaluation_units),
    Stage("report", report_units, after=print_report),
    Stage("share", share_units),
)
