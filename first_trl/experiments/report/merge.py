"""Merging the reports of runs: means over seeds, paired differences, sweeps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...calibration.intervals import holds_zero, paired_difference, summarize
from ...plugins import higher_is_better, method_symbol, report_metrics
from ...vocabulary import BAYES, READINGS, role_domain
from .arms import check_baselines, default_baselines, describe_arms, find_sweeps, fit_beside
from .collect import FinishedRun, cell_title, default_parent, find_runs, load_runs
from .merged import MergedCell, MergedReport


def merge_runs(
    folders: Sequence[Path | str], *, baselines: Sequence[str] = (), relative_to: Path | str | None = None
) -> MergedReport:
    """
    Merge the reports of the runs of one recipe.

    Args:
        folders (`Sequence[Path]`):
            Folders of runs, or folders that hold runs at any depth.
        baselines (`Sequence[str]`, *optional*):
            Arms that every other arm is compared with. Default: those that the recipe names, else plain fine-tuning
            and plain distillation, each with and without temperature scaling.
        relative_to (`Path`, *optional*):
            Folder that runs are named relative to. Default: the one that holds them all.

    Returns:
        [`MergedReport`]

    Raises:
        `ValueError`: No run, runs that cannot be merged (another recipe, other settings or bins, a cell and seed
            twice), or a baseline that no run has. The message names them.

    Example:

    ```python
    >>> from first_trl.experiments.report import merge_runs
    >>> merged = merge_runs(["outputs/quickstart"])
    >>> merged.cells[0].results["first"]["test"]["full_vocab"]["ece"]["mean"]
    ```
    """
    found = find_runs(folders)
    runs = load_runs(found, Path(relative_to) if relative_to is not None else default_parent(found))
    asked = list(dict.fromkeys(baselines)) or list(runs[0].data.get("baselines") or [])
    check_baselines(asked, runs)
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(cell_title(run.cell), []).append(run)
    first = runs[0]
    return MergedReport(
        recipe=first.data["recipe"],
        title=str(first.data.get("title") or first.data["recipe"]),
        description=str(first.data.get("description") or "").strip(),
        notes=[" ".join(str(note).split()) for note in first.data.get("notes") or []],
        n_bins=int(first.data["n_bins"]),
        seeds=sorted({run.seed for run in runs}),
        runs=[
            {"run": run.name, "seed": run.seed, "cell": run.cell, "recipe_key": run.data.get("recipe_key")}
            for run in runs
        ],
        baselines=list(dict.fromkeys(baselines)),
        models=_shared_models(runs),
        cells=[_merge_cell(group, asked) for group in groups.values()],
        figures={},
        highlight=list(first.data.get("highlight") or []),
    )


def _merge_cell(runs: list[FinishedRun], asked: list[str]) -> MergedCell:
    arms = describe_arms(runs)
    compared = [name for name in asked if name in arms] if asked else default_baselines(arms, runs)
    for name, arm in arms.items():
        arm["baseline"] = name in compared
    roles = list(dict.fromkeys(role for run in runs for arm in run.data["results"].values() for role in arm))
    results = {name: {role: scores for role in roles if (scores := _scores(runs, name, role))} for name in arms}
    first = runs[0]
    return MergedCell(
        cell=first.cell,
        title=cell_title(first.cell),
        seeds=[run.seed for run in runs],
        runs=[run.name for run in runs],
        roles={role: _describe_role(runs, role, index) for index, role in enumerate(roles)},
        arms=arms,
        results=results,
        differences=_differences(arms, results, compared),
        best={role: _best(arms, results, role) for role in roles},
        sweeps=[{**sweep, "fit": fit_beside(sweep, runs)} for sweep in find_sweeps(arms)],
        fits=_fits(runs),
        temperatures=_by_name({run.name: run.data.get("posthoc_temperatures") or {} for run in runs}),
        kept_mass=_kept_mass(runs),
        costs=_costs(runs),
        models=_shared_models(runs),
        novelty=_novelty(runs),
    )


def _novelty(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        for name, fit in (run.data.get("novelty") or {}).items():
            values = {"slope": fit["slopes"][0]} if len(fit["slopes"]) == 1 else {}
            for role, summary in fit["roles"].items():
                values[f"{role}.temperature"] = summary["temperature"]["mean"]
                values |= {f"{role}.{key}": value for key, value in fit["auroc"].get(role, {}).items()}
            found.setdefault(name, {})[run.name] = values
    return {name: _by_name(by_run) for name, by_run in found.items()}


def _describe_role(runs: list[FinishedRun], role: str, index: int) -> dict[str, Any]:
    reports = [arm[role] for run in runs for arm in run.data["results"].values() if role in arm]
    sizes = [report["n"] for report in reports if "n" in report]
    sample = {key: reports[0][key] for key in ("unit", "scoring", "length", "chance_accuracy") if reports[0].get(key)}
    domains = [(run.data.get("rows") or {}).get(role, {}).get("domain") for run in runs]
    domain = role_domain(role, index, next(filter(None, domains), None))
    return {"n": [min(sizes), max(sizes)] if sizes else None, "sample": sample, "domain": domain}


def _scores(runs: list[FinishedRun], arm: str, role: str) -> dict[str, Any]:
    """Summaries of one arm on one role; a number that a run lacks is missing, not zero."""
    reports = {run.name: run.data["results"][arm][role] for run in runs if role in run.data["results"].get(arm, {})}
    scores: dict[str, Any] = {}
    for reading in READINGS:
        summaries = {}
        for metric in report_metrics():
            values = _numbers({name: (report.get(reading) or {}).get(metric.key) for name, report in reports.items()})
            if values:
                summaries[metric.key] = summarize(values)
        if summaries:
            scores[reading] = summaries
    if values := _numbers({name: report.get("option_mass") for name, report in reports.items()}):
        scores["option_mass"] = summarize(values)
    flips = {name: (report.get("option_order") or {}).get("flip_rate") for name, report in reports.items()}
    if values := _numbers(flips):
        scores["flip_rate"] = summarize(values)
    if values := _numbers({name: (report.get("null_ece") or {}).get("mean") for name, report in reports.items()}):
        eces = scores.get("full_vocab", {}).get("ece", {}).get("values", {})
        limits = _numbers({name: reports[name]["null_ece"].get("q95") for name in values})
        within = sum(eces[name] <= limit for name, limit in limits.items() if name in eces)
        scores["null_ece"] = {**summarize(values), "within": within}
    return scores


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are there."""
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _differences(
    arms: Mapping[str, Any], results: Mapping[str, Any], baselines: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for baseline in baselines:
        for role, others in results[baseline].items():
            for arm in arms:
                # The true posterior is no method that could be better or worse than a baseline
                if arm == baseline or arms[arm]["kind"] == BAYES or role not in results[arm]:
                    continue
                for reading in READINGS:
                    for metric in report_metrics():
                        values, against = (
                            scores.get(reading, {}).get(metric.key, {}).get("values", {})
                            for scores in (results[arm][role], others)
                        )
                        found = paired_difference(values, against, higher_is_better=higher_is_better(metric.key))
                        if found is not None:
                            place = {"arm": arm, "baseline": baseline, "role": role}
                            rows.append({**place, "reading": reading, "metric": metric.key, **found})
    return rows


def _best(arms: Mapping[str, Any], results: Mapping[str, Any], role: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for reading in READINGS:
        for metric in report_metrics():
            higher = higher_is_better(metric.key)
            # Swept arms are left out: the best of a sweep is chosen on the very rows that it is reported on
            columns = {
                name: results[name][role][reading][metric.key]
                for name, arm in arms.items()
                if not arm["reference"] and not arm["swept"] and metric.key in _reading(results, name, role, reading)
            }
            # A mean over fewer seeds, or over others, is a mean over other, perhaps easier, worlds
            full = {run for column in columns.values() for run in column["values"]}
            columns = {name: column for name, column in columns.items() if column["values"].keys() == full}
            if len(columns) < 2:
                continue
            top = (max if higher else min)(column["mean"] for column in columns.values())
            winners = [name for name, column in columns.items() if column["mean"] == top]
            level = []
            for name, column in columns.items():
                if name in winners:
                    continue
                difference = paired_difference(
                    column["values"], columns[winners[0]]["values"], higher_is_better=higher
                )
                if difference is not None and holds_zero(difference):
                    level.append(name)
            found.setdefault(reading, {})[metric.key] = {"arms": winners, "level": level}
    return found


def _reading(results: Mapping[str, Any], name: str, role: str, reading: str) -> Mapping[str, Any]:
    scores: Mapping[str, Any] = results[name].get(role, {}).get(reading, {})
    return scores


def _fits(runs: list[FinishedRun]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for run in runs for name in run.data.get("recalibration") or {})
    found = {}
    for name in names:
        fits = {run.name: fit for run in runs if (fit := (run.data.get("recalibration") or {}).get(name))}
        method = next(iter(fits.values()))["recalibration"]["method"]
        numbers = {
            "value": _numbers({run: fit["recalibration"]["value"] for run, fit in fits.items()}),
            "raw_ece": _numbers({run: fit["raw"]["ece"] for run, fit in fits.items()}),
            "ece": _numbers({run: fit["chosen"]["ece"] for run, fit in fits.items()}),
            "raw_nll": _numbers({run: fit["raw"]["nll"] for run, fit in fits.items()}),
            "nll": _numbers({run: fit["chosen"]["nll"] for run, fit in fits.items()}),
        }
        summaries = {key: summarize(values) for key, values in numbers.items() if values}
        found[name] = {"method": method, "symbol": method_symbol(method), **summaries}
    return found


def _by_name(given: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Run -> name -> value, turned into name -> summary."""
    names = dict.fromkeys(name for values in given.values() for name in values)
    columns = {name: _numbers({run: values.get(name) for run, values in given.items()}) for name in names}
    return {name: summarize(column) for name, column in columns.items() if column}


def _kept_mass(runs: list[FinishedRun]) -> list[dict[str, Any]]:
    masses = {run.name: run.data["kept_mass"] for run in runs if run.data.get("kept_mass")}
    ranks = min((len(mass) for mass in masses.values()), default=0)
    return [summarize({name: float(mass[rank]) for name, mass in masses.items()}) for rank in range(ranks)]


def _costs(runs: list[FinishedRun]) -> dict[str, dict[str, Any]]:
    costs = {run.name: run.data.get("costs") or {} for run in runs}
    names = dict.fromkeys(name for given in costs.values() for name in given)
    return {name: _by_name({run: given.get(name) or {} for run, given in costs.items()}) for name in names}


def _shared_models(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    models = [_without_places(run.data.get("models") or {}) for run in runs]
    return models[0] if all(model == models[0] for model in models) else {}


def _without_places(value: Any) -> Any:
    """The folder of a local model says nothing on another machine; its name does."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value
