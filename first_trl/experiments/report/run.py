"""The report of one run: Markdown, JSON and figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...calibration import reliability_diagram
from ...plugins import method_symbol
from ...utils.files import write_json
from ...vocabulary import BAYES, BAYES_LABEL, FEW_ROWS
from ..run_folder import ReportFolder
from .arms import distinct_labels, find_sweeps
from .figures import curve_figure, mass_figure, novelty_figure, risk_coverage_figure, save_figure
from .markdown import to_markdown
from .run_content import RunContent, write_run_parts


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...cache.manifest import Manifest
    from ..recipe import Recipe


_DEFAULT_LABELS = {BAYES: BAYES_LABEL}


def write_report(
    folder: Path,
    *,
    recipe: "Recipe",
    arms: list[str],
    results: dict[str, dict[str, dict[str, Any]]],
    temperatures: dict[str, float],
    decisions: dict[str, dict[str, Any]],
    fits: dict[str, dict[str, Any]],
    manifest: "Manifest",
    counts: dict[str, Any],
    timings: list[dict[str, Any]],
    novelty: dict[str, dict[str, Any]] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """
    Write `report.md`, `report.json` and the figures into `folder`.

    Args:
        folder (`Path`): Where to.
        recipe ([`Recipe`]): The experiment.
        arms (`list[str]`): Rows of the tables, in order.
        results (`dict`): Arm -> role -> report of [`evaluate_multiple_choice`].
        temperatures (`dict`): Arm -> fitted post-hoc temperature.
        decisions (`dict`): Arm -> what its answers as a decision model are worth, see
            [`~first_trl.experiments.stages.decisions.decision_scores`].
        fits (`dict`): Fit -> `RecalibrationFit.to_dict()`.
        manifest ([`Manifest`]): Of the training cache.
        counts (`dict`): Role -> rows read, dropped and cut.
        timings (`list`): Units with their seconds.
        novelty (`dict`, *optional*): Arm -> its fitted temperature by novelty, and how new the evaluated rows are.
        extra (`dict`, *optional*): Further entries of `report.json`, for merged reports and cards.
    """
    labels = distinct_labels({name: _label(recipe, name) for name in arms})
    figures: dict[str, str] = {}
    report = ReportFolder(folder)

    def save(name: str, caption: str, figure: "Figure") -> None:
        save_figure(figure, report.figure(name))
        figures[f"{name}.png"] = caption

    swept = _swept(recipe)
    shown = [name for name in arms if name not in swept] or arms
    for role in recipe.evaluation.splits:
        panels = {labels[name]: results[name][role]["full_vocab"]["calibration"] for name in shown}
        caption = f"Reliability on `{role}`. Hatched: fewer than {FEW_ROWS} rows."
        if len(shown) < len(arms):
            caption += " The points of sweeps are left out."
        title = f"{recipe.name}, {role}: accuracy against confidence"
        save(f"reliability_{role}", caption, reliability_diagram(panels, suptitle=title, min_count=FEW_ROWS))
    save(
        "topk_mass",
        "Teacher mass kept by the most likely k tokens, mean over the cache.",
        mass_figure(np.array(manifest.kept_mass)),
    )
    for role in recipe.evaluation.splits:
        curves = {labels[name]: decisions[name] for name in shown if role in decisions.get(name, {}).get("roles", {})}
        if curves:
            caption = (
                f"Risk against coverage on `{role}`: wrong answers among the surest ones, by the probability of the options at "
                "the fitted temperature."
            )
            if any(found["roles"][role]["error"] is not None for found in curves.values()):
                caption += " Dots: the thresholds of the table, fitted on other rows."
            save(f"risk_coverage_{role}", caption, risk_coverage_figure(curves, role))
    for name, fit in fits.items():
        symbol = method_symbol(fit["recalibration"]["method"])
        caption = f"Choice of {symbol} on validation (`{name}`): the teacher's ECE and NLL over {symbol}."
        save(f"recalibration_{name}", caption, curve_figure(name, fit))

    drawn = {
        labels[name]: fit for name, fit in (novelty or {}).items() if fit["feature"] == "distance" and name in shown
    }
    if drawn:
        save("novelty", "What a row's temperature is by its distance to the training rows.", novelty_figure(drawn))

    write_json(
        report.json,
        {
            "recipe": recipe.name,
            "title": recipe.report.title,
            "description": recipe.description.strip(),
            "notes": recipe.report.notes,
            "baselines": recipe.report.baselines,
            "seed": recipe.seed,
            "n_bins": recipe.evaluation.n_bins,
            "labels": labels,
            "results": results,
            "posthoc_temperatures": temperatures,
            "decisions": decisions,
            "novelty": novelty or {},
            "recalibration": fits,
            "kept_mass": manifest.kept_mass,
            "cache_id": manifest.cache_id,
            "rows": counts,
            "seconds": {entry["unit"]: entry["seconds"] for entry in timings},
            **(extra or {}),
        },
    )
    content = RunContent(
        recipe, labels, results, temperatures, decisions, fits, manifest, counts, timings, figures, novelty or {}
    )
    report.markdown.write_text(to_markdown(write_run_parts(content)), encoding="utf-8")


def _label(recipe: "Recipe", name: str) -> str:
    arm = recipe.arms.get(name)
    return (arm.label if arm is not None and arm.label else None) or _DEFAULT_LABELS.get(name, name)


def _swept(recipe: "Recipe") -> set[str]:
    """Points of sweeps, as merged reports tell them."""
    arms = {
        name: {"base": name.split("@")[0], "values": arm.swept, "label": name, "recalibration": arm.recalibration}
        for name, arm in recipe.arms.items()
    }
    return {point["arm"] for sweep in find_sweeps(arms) for point in sweep["points"]}
