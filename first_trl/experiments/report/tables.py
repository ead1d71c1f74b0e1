"""The tables of the cells of a merged report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...calibration.intervals import holds_zero
from ...plugins import report_metrics
from ...vocabulary import BAYES, Metric, number
from .arms import key_title
from .document import Table, Value
from .merged import MergedCell, MergedReport


NOTHING = "–"
LEVEL_MARK = "†"
FLIPS = "Flips %"
_ACROSS = ("accuracy", "ece", "nll")
_COSTS = {
    "teacher_steps": ("Teacher steps", 1),
    "teacher_rows": ("Teacher rows", 1),
    "cache_rows": ("Cache rows", 1),
    "cache_bytes": ("Cache MB", 1e6),
    "student_steps": ("Student steps", 1),
}


def spread(summary: Mapping[str, Any] | None, metric: Metric) -> str:
    """Mean and standard deviation."""
    if summary is None:
        return NOTHING
    text = number(summary["mean"], metric)
    return text if summary["sd"] is None else f"{text} ± {number(summary['sd'], metric)}"


def score_table(cell: MergedCell, role: str, reading: str, title: str) -> Table | None:
    """One row an arm; the points of sweeps have tables of their own."""
    over_options = reading == "options"
    names = [
        name for name in cell.arms if not cell.arms[name]["swept"] and reading in cell.results[name].get(role, {})
    ]
    if not names:
        return None
    floor = not over_options and any("null_ece" in cell.results[name][role] for name in names)
    last = ["Mass on the options %"] if over_options else ["ECE if calibrated %"] if floor else []
    flips = not over_options and any("flip_rate" in cell.results[name][role] for name in names)
    last += [FLIPS] if flips else []
    rows = []
    for name in names:
        scores = cell.results[name][role]
        row: list[Value | str] = [cell.arms[name]["label"]]
        row += [_score(cell, name, role, reading, metric) for metric in report_metrics()]
        if over_options:
            row.append(_percent(scores.get("option_mass")))
        elif floor:
            row.append(_floor(scores.get("null_ece")))
        if flips:
            row.append(_percent(scores.get("flip_rate")))
        rows.append([*row, _seeds(cell, scores[reading])])
    how = " over the answer options" if over_options else ""
    caption = f"{title}{how}: {_over(cell)}."
    return Table(caption, ["arm", *(metric.title for metric in report_metrics()), *last, "seeds"], rows)


def difference_table(cell: MergedCell, baseline: str, role: str, title: str) -> Table | None:
    """Every arm minus one baseline; the points of sweeps are in the JSON file only."""
    names = list(
        dict.fromkeys(
            one["arm"]
            for one in cell.differences
            if one["baseline"] == baseline and one["role"] == role and not cell.arms[one["arm"]]["swept"]
        )
    )
    if not names:
        return None
    rows: list[list[Value | str]] = []
    for name in names:
        found = [cell.difference(name, baseline, role, metric.key) for metric in report_metrics()]
        cells = [difference_value(one, metric) for one, metric in zip(found, report_metrics(), strict=True)]
        rows.append([cell.arms[name]["label"], *cells])
    label = cell.arms[baseline]["label"]
    return Table(f"{title}: arm minus {label}, paired by seed.", ["arm", *(m.title for m in report_metrics())], rows)


def sweep_table(cell: MergedCell, sweep: Mapping[str, Any], role: str, title: str) -> Table | None:
    """One row a value."""
    points = [point for point in sweep["points"] if "full_vocab" in cell.results[point["arm"]].get(role, {})]
    if not points:
        return None
    rows: list[list[Value | str]] = []
    for point in points:
        scores = cell.results[point["arm"]][role]["full_vocab"]
        row: list[Value | str] = [f"{point['value']:g}", *(spread(scores.get(m.key), m) for m in report_metrics())]
        rows.append([*row, _seeds(cell, scores)])
    symbol = key_title(sweep["key"], sweep["method"])
    caption = f"{sweep['label']}, {title}: {_over(cell)} for each {symbol}."
    return Table(caption, [symbol, *(metric.title for metric in report_metrics()), "seeds"], rows)


def seed_table(cell: MergedCell, role: str, title: str) -> Table:
    """Every single number, in the order of the seeds."""
    rows: list[list[Value | str]] = []
    for name, arm in cell.arms.items():
        scores = cell.results[name].get(role, {}).get("full_vocab", {})
        texts = []
        for metric in report_metrics():
            values = scores.get(metric.key, {}).get("values", {})
            texts.append(" / ".join(number(values[run], metric) if run in values else NOTHING for run in cell.runs))
        rows.append([arm["label"], *texts])
    seeds = ", ".join(str(seed) for seed in cell.seeds)
    return Table(
        f"{title}, seeds {seeds} in this order.", ["arm", *(metric.title for metric in report_metrics())], rows
    )


def fit_table(cell: MergedCell) -> Table | None:
    """What was fitted on validation: rescales of the teacher and temperatures of students."""
    if not cell.fits:
        return None
    metrics = {metric.key: metric for metric in report_metrics()}
    columns = (("raw_ece", "ece"), ("ece", "ece"), ("raw_nll", "nll"), ("nll", "nll"))
    rows: list[list[Value | str]] = []
    for name, fit in cell.fits.items():
        value = fit["value"]
        chosen = f"{fit['symbol']} = {value['mean']:.3g}" + (
            f" ± {value['sd']:.2g}" if value["sd"] is not None else ""
        )
        numbers = [spread(fit.get(key), metrics[of]) for key, of in columns]
        rows.append([f"`{name}`", chosen, *numbers, f"{value['n']}"])
    header = ["rescale", "chosen", "ECE % raw", "after", "NLL raw", "after", "seeds"]
    return Table("Rescale of the teacher, fitted on `validation`.", header, rows)


def novelty_table(cell: MergedCell) -> Table | None:
    """How new the rows of each role are to the arms with temperatures by novelty, and what temperature they get."""
    rows: list[list[Value | str]] = []
    for name, found in cell.novelty.items():
        if name not in cell.arms:
            continue
        for i, role in enumerate(role for role in cell.roles if f"{role}.temperature" in found):
            keys = (f"{role}.temperature", f"{role}.feature", f"{role}.max_probability")
            first = [cell.arms[name]["label"], _plain_spread(found.get("slope"))] if i == 0 else ["", ""]
            rows.append([*first, role, *(_plain_spread(found.get(key)) for key in keys)])
    if not rows:
        return None
    caption = (
        "Temperatures by novelty, fitted on `validation`. AUROC: how often a row of the role is newer by the feature than one "
        "of the first role, and how often the model is less sure of it."
    )
    return Table(caption, ["arm", "slope", "role", "mean temperature", "AUROC", "of the largest probability"], rows)


def _plain_spread(summary: Mapping[str, Any] | None) -> str:
    if not summary:
        return NOTHING
    return f"{summary['mean']:.2f}" + (f" ± {summary['sd']:.2f}" if summary["sd"] is not None else "")


def cost_table(cell: MergedCell) -> Table | None:
    """What every arm takes; arms that a sweep made cost the same as the others of their kind."""
    names = [name for name in cell.costs if name in cell.arms and not cell.arms[name]["swept"]]
    keys = [key for key in _COSTS if any(key in cell.costs[name] for name in names)]
    if not names or not keys:
        return None
    rows: list[list[Value | str]] = [
        [cell.arms[name]["label"], *(_cost(cell.costs[name].get(key), key) for key in keys)] for name in names
    ]
    return Table("Costs, mean over the seeds.", ["arm", *(_COSTS[key][0] for key in keys)], rows)


def cells_tables(merged: MergedReport) -> list[Table]:
    """The cells side by side, one table a role and metric."""
    tables = []
    labels: dict[str, str] = {}
    # The cell with most arms gives their order
    for cell in sorted(merged.cells, key=lambda cell: -len(cell.arms)):
        labels |= {name: arm["label"] for name, arm in cell.arms.items() if not arm["swept"] and name not in labels}
    for role in dict.fromkeys(role for cell in merged.cells for role in cell.roles):
        cells = [cell for cell in merged.cells if role in cell.roles]
        for metric in report_metrics():
            if metric.key not in _ACROSS:
                continue
            rows: list[list[Value | str]] = []
            for name, label in sorted(labels.items(), key=lambda item: item[0] == BAYES):
                if any(role in cell.results.get(name, {}) for cell in cells):
                    rows.append([label, *(_score(cell, name, role, "full_vocab", metric) for cell in cells)])
            header = ["arm", *(cell.title or "as written" for cell in cells)]
            tables.append(Table(f"{metric.title}, `{role}`, mean over the seeds ± standard deviation.", header, rows))
    return tables


def run_table(merged: MergedReport) -> Table:
    """Where the numbers come from."""
    titles = {run: cell.title for cell in merged.cells for run in cell.runs}
    several = len(merged.cells) > 1
    rows: list[list[Value | str]] = [
        [
            f"`{run['run']}`",
            *([titles[run["run"]]] if several else []),
            str(run["seed"]),
            f"`{run['recipe_key'][:16]}`" if run["recipe_key"] else NOTHING,
        ]
        for run in merged.runs
    ]
    header = ["folder", *(["cell"] if several else []), "seed", "recipe key"]
    return Table("Runs behind the numbers. The recipe key is a hash of all settings of a run.", header, rows)


def _over(cell: MergedCell) -> str:
    n = len(cell.runs)
    return f"mean over {n} seeds ± standard deviation" if n > 1 else f"seed {cell.seeds[0]} only"


def _score(cell: MergedCell, name: str, role: str, reading: str, metric: Metric) -> Value:
    summary = cell.results.get(name, {}).get(role, {}).get(reading, {}).get(metric.key)
    best = cell.best.get(role, {}).get(reading, {}).get(metric.key, {"arms": [], "level": []})
    return Value(spread(summary, metric), name in best["arms"], LEVEL_MARK if name in best["level"] else "")


def difference_value(found: Mapping[str, Any] | None, metric: Metric) -> Value:
    """A paired difference with its interval, bold where that leaves out 0."""
    if found is None:
        return Value(NOTHING)
    text = number(found["mean"], metric, sign=True)
    if found["low"] is None:
        return Value(text)
    low, high = (number(found[key], metric, sign=True) for key in ("low", "high"))
    return Value(f"{text} [{low}, {high}] {found['better']}/{found['n']}", bold=not holds_zero(found))


def _seeds(cell: MergedCell, scores: Mapping[str, Any]) -> str:
    n, total = min(summary["n"] for summary in scores.values()), len(cell.runs)
    return str(n) if n == total else f"{n} of {total}"


def _percent(summary: Mapping[str, Any] | None) -> str:
    return NOTHING if summary is None else f"{100 * summary['mean']:.1f}"


def _floor(summary: Mapping[str, Any] | None) -> str:
    return NOTHING if summary is None else f"{_percent(summary)} ({summary['within']}/{summary['n']})"


def _cost(summary: Mapping[str, Any] | None, key: str) -> str:
    if summary is None:
        return NOTHING
    divisor = _COSTS[key][1]
    return f"{summary['mean'] / divisor:,.{0 if divisor == 1 else 2}f}"


def missing_lines(cell: MergedCell) -> Sequence[str]:
    """Which arms some seeds lack."""
    return [
        f"{arm['label']} is missing in {', '.join(f'`{run}`' for run in arm['missing'])}: its means are over "
        f"{len(cell.runs) - len(arm['missing'])} of {len(cell.runs)} seeds, and it is not marked as best."
        for arm in cell.arms.values()
        if arm["missing"]
    ]
