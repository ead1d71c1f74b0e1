"""Figures of the reports."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import calibration
from ...calibration.novelty import NoveltyTemperature
from ...plugins import method_symbol
from .arms import key_title


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .merged import MergedCell


# Okabe-Ito colours: told apart in print and by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))


def save_figure(figure: "Figure", path: Path, formats: Sequence[str] = ()) -> None:
    """Write the figure of a report as PNG, and in further formats beside it."""
    calibration.save_figure(figure, path, formats=formats, dpi=110)


def mass_figure(means: np.ndarray, sds: np.ndarray | None = None) -> "Figure":
    """Teacher mass in its k most likely tokens, with a band when there are several seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.subplots()
    ranks = np.arange(1, len(means) + 1)
    axes.plot(ranks, 100 * means, marker="o")
    if sds is not None:
        axes.fill_between(ranks, 100 * (means - sds), 100 * np.minimum(means + sds, 1), alpha=0.25, linewidth=0)
    axes.set(xlabel="k", ylabel="teacher mass kept, %", title="Top-k mass of the teacher", ylim=(None, 101))
    axes.set_xticks(ranks if len(ranks) <= 12 else ranks[:: len(ranks) // 10])
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    return figure


def sweep_figure(cell: "MergedCell", sweeps: Sequence[Mapping[str, Any]], role: str) -> "Figure | None":
    """
    ECE and accuracy against the swept value, one curve a base; dashed: the plain arms that were not swept.

    Returns:
        `Figure`, or `None` when no point has a score on the role.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    values: list[float] = []
    for index, sweep in enumerate(sweeps):
        colour = COLOURS[index % len(COLOURS)]
        points = [point for point in sweep["points"] if "full_vocab" in cell.results[point["arm"]].get(role, {})]
        values += [point["value"] for point in points]
        for axes, metric in zip(panels, ("ece", "accuracy"), strict=True):
            columns = [cell.results[point["arm"]][role]["full_vocab"].get(metric) for point in points]
            kept = [
                (point["value"], one["mean"], one["sd"] or 0.0)
                for point, one in zip(points, columns, strict=True)
                if one
            ]
            if kept:
                x, means, sds = np.array(kept).T
                axes.plot(x, 100 * means, color=colour, marker="o", markersize=4, label=sweep["label"])
                axes.fill_between(x, 100 * (means - sds), 100 * (means + sds), color=colour, alpha=0.18, linewidth=0)
    if not values:
        return None
    _references(cell, panels, role)
    _chosen(cell, panels, sweeps)
    symbol = key_title(sweeps[0]["key"], sweeps[0]["method"])
    for axes, title in zip(panels, ("ECE, %", "accuracy, %"), strict=True):
        axes.set(xlabel=symbol, ylabel=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if all(float(value).is_integer() for value in values):
            # A k of 1.5 does not exist
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if min(values) > 0 and max(values) / min(values) > 20:
            axes.set_xscale("log")
            ticks = sorted(set(values))
            axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axes.minorticks_off()
    panels[0].set_ylim(bottom=0)
    one = f"{sweeps[0]['label']}, " if len(sweeps) == 1 else ""
    figure.suptitle(f"{role}: {one}ECE and accuracy over {symbol}", fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=1 if len(labels) == 1 else 3, fontsize=9, frameon=False
    )
    return figure


def _references(cell: "MergedCell", panels: Sequence["Axes"], role: str) -> None:
    plain = [
        (name, arm)
        for name, arm in cell.arms.items()
        if arm["baseline"] and not arm["swept"] and arm["kind"] in ("sft", "distill")
    ]
    curves = panels[0].get_legend_handles_labels()[1]
    for index, (name, arm) in enumerate(plain[: len(LINE_STYLES)]):
        label = f"{arm['label']}, not swept" if arm["label"] in curves else arm["label"]
        for axes, metric in zip(panels, ("ece", "accuracy"), strict=True):
            summary = cell.results[name].get(role, {}).get("full_vocab", {}).get(metric)
            if summary:
                axes.axhline(
                    100 * summary["mean"],
                    color="#555555",
                    linestyle=LINE_STYLES[index],
                    linewidth=1.1,
                    label=label,
                )


def _chosen(cell: "MergedCell", panels: Sequence["Axes"], sweeps: Sequence[Mapping[str, Any]]) -> None:
    """Where validation put the values that are swept here: mean and range over the seeds."""
    several = len({sweep.get("fit") for sweep in sweeps}) > 1
    drawn: set[str] = set()
    for index, sweep in enumerate(sweeps):
        name = sweep.get("fit")
        if name is None or name in drawn or name not in cell.fits:
            continue
        drawn.add(name)
        fit = cell.fits[name]
        value, given = fit["value"]["mean"], fit["value"]["values"].values()
        low, high = min(given), max(given)
        text = f"fitted on validation, {fit['symbol']} = {value:.3g}"
        text += f" ({low:.3g} to {high:.3g} over the seeds)" if high > low else ""
        text += f": {sweep['label']}" if several else ""
        # One line belongs to all curves; of several, each has the colour of its curve
        colour = COLOURS[index % len(COLOURS)] if several else "#B22222"
        for axes in panels:
            axes.axvline(value, color=colour, linewidth=1, linestyle="--" if several else "-", label=text)
            if high > low:
                axes.axvspan(low, high, color=colour, alpha=0.1, linewidth=0)


def curve_figure(name: str, fit: Mapping[str, Any]) -> "Figure":
    """The teacher's validation ECE and NLL over the values that a fit chose from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    points = sorted(fit["curve"], key=lambda point: point["value"])
    values = [point["value"] for point in points]
    symbol = method_symbol(fit["recalibration"]["method"])
    chosen = fit["recalibration"]["value"]
    axes.plot(values, [100 * point["ece"] for point in points], marker=".", color=COLOURS[0], label="ECE (left)")
    axes.axhline(100 * fit["raw"]["ece"], color=COLOURS[0], linestyle=":", label="ECE without rescale")
    axes.axvline(
        chosen, color="#B22222", linewidth=1, label=f"chosen {symbol} = {chosen:.3g} (by {fit['objective'].upper()})"
    )
    axes.set(xlabel=symbol, ylabel="teacher's validation ECE, %", title=f"Choice of {symbol}: {name}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    second = axes.twinx()
    # No label among the kept tokens, or one with the probability 0, leaves the NLL open
    likelihoods = [np.nan if point["nll"] is None else point["nll"] for point in points]
    second.plot(values, likelihoods, color=COLOURS[2], linewidth=1.2, linestyle="--", label="NLL (right)")
    second.set_ylabel("teacher's validation NLL", color=COLOURS[2])
    handles = [*axes.get_lines(), *second.get_lines()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def risk_coverage_figure(decisions: Mapping[str, Mapping[str, Any]], role: str) -> "Figure":
    """Error rate among the surest answers against the share of rows that they are, one curve a student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, found) in enumerate(decisions.items()):
        scores = found["roles"][role]
        coverage, error = np.array(scores["curve"]).T
        colour, line = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
        axes.plot(100 * coverage, 100 * error, label=label, linewidth=1.4, color=colour, linestyle=line)
        if scores["error"] is not None:
            axes.plot(100 * scores["coverage"], 100 * scores["error"], marker="o", color=colour)
    promise = next(iter(decisions.values()))["threshold"]["max_error"]
    axes.axhline(100 * promise, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="rows answered, %", ylabel="wrong among them, %", title=f"{role}: risk against coverage")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def novelty_figure(fits: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Temperature over the distance for each arm (label -> what was fitted), and where the rows of the roles lie."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # As many as there are colours
    fits = dict(list(fits.items())[: len(COLOURS)])
    roles = list(next(iter(fits.values()))["roles"])
    spread = [fit["roles"][role]["feature"]["tenths"] for fit in fits.values() for role in roles]
    x = np.linspace(min(tenths[1] for tenths in spread) - 1.0, max(tenths[9] for tenths in spread) + 1.0, 200)
    for i, (label, fit) in enumerate(fits.items()):
        colour = COLOURS[i % len(COLOURS)]
        given = NoveltyTemperature.from_dict({f.name: fit[f.name] for f in fields(NoveltyTemperature)})
        top.plot(x, given.temperature(x), color=colour, label=label)
        top.axhline(fit["scalar"], color=colour, linestyle=":", linewidth=0.9)
        for row, role in enumerate(roles):
            tenths = fit["roles"][role]["feature"]["tenths"]
            place = -row - i / (2 * len(fits))
            bottom.plot([tenths[1], tenths[9]], [place, place], color=colour)
            bottom.plot([tenths[5]], [place], color=colour, marker="o", markersize=4)
    top.set(ylabel="temperature", title="Temperature over the distance to training rows (dotted: the one temperature)")
    top.title.set_fontsize(10)
    bottom.set_yticks([-row - 0.25 for row in range(len(roles))], roles)
    bottom.set_xlabel("distance (standardised logarithm); line: 10 to 90 % of the rows")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure
