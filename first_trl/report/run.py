"""The report of one run: Markdown, JSON and figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration import reliability_diagram
from ..files import write_json
from .figures import mass_figure, save_figure
from .metrics import BAYES, BAYES_LABEL, METHOD_SYMBOLS, METRICS, role_title, score_meaning


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..recipe import Recipe
    from ..teacher.manifest import Manifest


_DEFAULT_LABELS = {BAYES: BAYES_LABEL}


def write_report(
    folder: Path,
    *,
    recipe: "Recipe",
    arms: list[str],
    results: dict[str, dict[str, dict[str, Any]]],
    temperatures: dict[str, float],
    fits: dict[str, dict[str, Any]],
    manifest: "Manifest",
    counts: dict[str, Any],
    timings: list[dict[str, Any]],
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
        fits (`dict`): Fit -> `RecalibrationFit.to_dict()`.
        manifest ([`Manifest`]): Of the training cache.
        counts (`dict`): Role -> rows read, dropped and cut.
        timings (`list`): Units with their seconds.
        extra (`dict`, *optional*): Further entries of `report.json`, for merged reports and cards.
    """
    labels = {name: _label(recipe, name) for name in arms}
    figures: dict[str, str] = {}

    def save(name: str, caption: str, figure: "Figure") -> None:
        save_figure(figure, folder / f"{name}.png")
        figures[f"{name}.png"] = caption

    for role in recipe.evaluation.splits:
        panels = {labels[name]: results[name][role]["full_vocab"]["calibration"] for name in arms}
        save(
            f"reliability_{role}",
            f"Reliability of every arm on `{role}`.",
            reliability_diagram(panels, suptitle=f"{recipe.name}, {role}: accuracy against confidence"),
        )
    save(
        "topk_mass",
        "Teacher mass kept by the most likely k tokens, mean over the cache.",
        mass_figure(np.array(manifest.kept_mass)),
    )
    for name, fit in fits.items():
        save(f"recalibration_{name}", f"Choice of {_symbol(fit)} on validation.", _curve_figure(name, fit))

    write_json(
        folder / "report.json",
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
            "recalibration": fits,
            "kept_mass": manifest.kept_mass,
            "cache_id": manifest.cache_id,
            "rows": counts,
            "seconds": {entry["unit"]: entry["seconds"] for entry in timings},
            **(extra or {}),
        },
    )
    text = _markdown(recipe, arms, labels, results, temperatures, fits, manifest, counts, timings, figures)
    (folder / "report.md").write_text(text, encoding="utf-8")


def _label(recipe: "Recipe", name: str) -> str:
    arm = recipe.arms.get(name)
    return (arm.label if arm is not None and arm.label else None) or _DEFAULT_LABELS.get(name, name)


def _markdown(
    recipe: "Recipe",
    arms: list[str],
    labels: dict[str, str],
    results: dict[str, dict[str, dict[str, Any]]],
    temperatures: dict[str, float],
    fits: dict[str, dict[str, Any]],
    manifest: "Manifest",
    counts: dict[str, Any],
    timings: list[dict[str, Any]],
    figures: dict[str, str],
) -> str:
    lines = [f"# {recipe.report.title or recipe.name}", ""]
    if recipe.description:
        lines += [recipe.description.strip(), ""]
    k, kept = manifest.k, manifest.kept_mass
    lines += [
        f"Seed {recipe.seed}. Teacher: {manifest.teacher['parameters']:,} parameters; its {k} most likely tokens hold "
        f"{100 * kept[-1]:.1f} % of its mass on the training rows. Cache: {manifest.counts['positions']:,} positions "
        f"of {manifest.counts['rows']:,} rows.",
        "",
    ]
    for index, role in enumerate(recipe.evaluation.splits):
        lines += [f"## {role_title(role, index)}", "", *_table(arms, labels, results, role, "full_vocab"), ""]
        sample = results[arms[0]][role]
        lines += [
            score_meaning(sample, sample["full_vocab"]["calibration"]["config"]["n_bins"]),
            "",
            *_left_out(sample),
            f"![Reliability on {role}](reliability_{role}.png)",
            "",
        ]
        # Free text has no options
        if "options" in sample:
            table = _table(arms, labels, results, role, "options")
            lines += [f"Renormalised over the answer options (`{role}`):", "", *table, ""]
    lines += ["## Teacher", "", "![Kept mass](topk_mass.png)", ""]
    if fits:
        lines += [
            "| rescale | chosen | validation ECE % raw | after | NLL raw | after |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, fit in fits.items():
            spread = fit.get("bootstrap")
            around = f" ({spread['low']:.2f} to {spread['high']:.2f})" if spread else ""
            lines.append(
                f"| {name} | {_symbol(fit)} = {fit['recalibration']['value']:.3g}{around} | "
                f"{100 * fit['raw']['ece']:.1f} | {100 * fit['chosen']['ece']:.1f} | {_nll(fit['raw'])} | "
                f"{_nll(fit['chosen'])} |"
            )
        lines += [
            "",
            "In brackets: 95 % of bootstrap choices. Fitted on `validation` only, on the target that is trained on.",
            "",
        ]
        lines += [line for name in fits for line in (f"![Curve](recalibration_{name}.png)", "")]
        lines += [f"- Warning: {message}" for fit in fits.values() for message in fit.get("messages", [])] + [""]
    if temperatures:
        fitted = ", ".join(f"{labels[name]} {value:.2f}" for name, value in temperatures.items())
        lines += [f"Post-hoc temperatures (fitted by NLL on `validation`): {fitted}.", ""]
    if recipe.report.notes:
        lines += ["## What these numbers show, and what they do not", ""]
        lines += [f"- {' '.join(note.split())}" for note in recipe.report.notes] + [""]
    lines += [
        "## Rows",
        "",
        "| role | read | used | left out by limit | cut | dropped |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for role, count in counts.items():
        dropped = ", ".join(f"{number} ({reason})" for reason, number in count["dropped"].items()) or "0"
        numbers = (count["read"], count["rows"], count["not_selected"], count.get("cut", 0))
        lines.append(f"| {role} | {' | '.join(map(str, numbers))} | {dropped} |")
    seconds = sum(entry["seconds"] for entry in timings)
    lines += ["", f"Time of all units, kept ones included: {seconds:.0f} s.", ""]
    return "\n".join(lines)


def _nll(point: dict[str, Any]) -> str:
    # No label is among the kept tokens, or one has the probability 0
    return "–" if point["nll"] is None else f"{point['nll']:.3f}"


def _left_out(sample: dict[str, Any]) -> list[str]:
    """What a reader must know about the rows behind a table."""
    lines = []
    if sample["n_truncated"]:
        lines.append(f"{sample['n_truncated']} of {sample['n_rows']} prompts were cut on the left to `max_length`.")
    if sample["n_unlabelled"]:
        lines.append(f"{sample['n_unlabelled']} of {sample['n_rows']} rows have no answer and are not scored.")
    return [*lines, ""] if lines else []


def _table(
    arms: list[str], labels: dict[str, str], results: dict[str, dict[str, dict[str, Any]]], role: str, reading: str
) -> list[str]:
    """One row an arm; the last column is `n`, or the mass on the options for the reading that divides by it."""
    over_options = reading == "options"
    header = ["arm", *(title for _, title, _, _ in METRICS), "Mass on the options %" if over_options else "n"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name in arms:
        report = results[name][role]
        cells = [f"{scale * report[reading][key]:.{digits}f}" for key, _, scale, digits in METRICS]
        last = f"{100 * report['option_mass']:.1f}" if over_options else str(report["n"])
        lines.append("| " + " | ".join([labels[name], *cells, last]) + " |")
    return lines


def _symbol(fit: dict[str, Any]) -> str:
    return METHOD_SYMBOLS[fit["recalibration"]["method"]]


def _curve_figure(name: str, fit: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    points = sorted(fit["curve"], key=lambda point: point["value"])
    values = [point["value"] for point in points]
    symbol = _symbol(fit)
    chosen = fit["recalibration"]["value"]
    axes.plot(values, [100 * point["ece"] for point in points], marker=".", label="ECE, %")
    axes.axhline(100 * fit["raw"]["ece"], color="grey", linestyle=":", label="ECE without rescale")
    axes.axvline(
        chosen, color="tab:red", linewidth=1, label=f"chosen {symbol} = {chosen:.3g} (by {fit['objective'].upper()})"
    )
    axes.set(xlabel=symbol, ylabel="teacher's validation ECE, %", title=f"Recalibration: {name.replace('_', ' ')}")
    axes.set_ylim(bottom=0)
    second = axes.twinx()
    likelihoods = [np.nan if point["nll"] is None else point["nll"] for point in points]
    second.plot(values, likelihoods, color="tab:green", alpha=0.6, linewidth=1)
    second.set_ylabel("NLL", color="tab:green")
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(alpha=0.3)
    return figure
