"""Where the highlighted arms of a study win and lose, over all cells in one place."""

from collections.abc import Sequence

from ...calibration.intervals import holds_zero
from ...vocabulary import HIGHER_IS_BETTER, METRICS, Metric
from .document import Heading, Paragraph, Part, Table, Value
from .merged import MergedCell, MergedReport
from .tables import NOTHING, difference_value


# On other data the ranks of accuracies say less than whether a model knows what it does not know
_WANTED = {"in-domain": ("nll", "accuracy", "ece"), "out-of-domain": ("ece", "nll")}
_METRICS = {metric.key: metric for metric in METRICS}


def highlight_parts(merged: MergedReport) -> list[Part]:
    """The highlighted arms against every baseline, one table a cell; nothing when the recipe highlights none."""
    parts: list[Part] = []
    for name in merged.highlight:
        cells = [cell for cell in merged.cells if name in cell.arms and _baselines(cell, name)]
        if not cells:
            continue
        label = cells[0].arms[name]["label"]
        parts.append(Heading(2, f"{label}: wins and losses"))
        parts.append(
            Paragraph(
                f"`{name}` minus each baseline, as in the tables of paired differences above. Lower is better for NLL "
                "and ECE, higher for accuracy."
            )
        )
        if len(cells) > 1 and any(len(cell.runs) > 1 for cell in cells):
            parts.append(_counts(cells, name, label))
        parts += [_differences(cell, name, label) for cell in cells]
    return parts


def _baselines(cell: MergedCell, name: str) -> list[str]:
    return [other for other, arm in cell.arms.items() if arm["baseline"] and other != name]


def _columns(cell: MergedCell) -> list[tuple[str, Metric]]:
    return [(role, _METRICS[key]) for role, about in cell.roles.items() for key in _WANTED.get(about["domain"], ())]


def _heading(role: str, metric: Metric) -> str:
    return f"`{role}` {metric.title}"


def _differences(cell: MergedCell, name: str, label: str) -> Table:
    columns = _columns(cell)
    rows: list[list[Value | str]] = []
    for other in _baselines(cell, name):
        cells = [difference_value(cell.difference(name, other, role, metric.key), metric) for role, metric in columns]
        rows.append([cell.arms[other]["label"], *cells])
    caption = f"{cell.title + ': ' if cell.title else ''}{label} minus each baseline, paired by seed."
    return Table(caption, ["baseline", *(_heading(role, metric) for role, metric in columns)], rows)


def _counts(cells: Sequence[MergedCell], name: str, label: str) -> Table:
    columns = list(dict.fromkeys(column for cell in cells for column in _columns(cell)))
    rows: list[list[Value | str]] = [
        [cell.title or "as written", *(_count(cell, name, role, metric) for role, metric in columns)] for cell in cells
    ]
    caption = (
        f"Number of baselines that {label} is better than / not told apart from / worse than, by 95 % intervals of the "
        "paired differences, which are not corrected for the number of comparisons."
    )
    return Table(caption, ["cell", *(_heading(role, metric) for role, metric in columns)], rows)


def _count(cell: MergedCell, name: str, role: str, metric: Metric) -> str:
    found = [cell.difference(name, other, role, metric.key) for other in _baselines(cell, name)]
    given = [one for one in found if one is not None and one["low"] is not None]
    if not given or (role, metric) not in _columns(cell):
        return NOTHING
    told = [one for one in given if not holds_zero(one)]
    better = sum((one["mean"] > 0) == (metric.key in HIGHER_IS_BETTER) for one in told)
    return f"{better} / {len(given) - len(told)} / {len(told) - better}"
