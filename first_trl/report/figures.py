"""Figures of the reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import METHOD_SYMBOLS


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .merged import MergedCell


# Okabe-Ito colours: told apart in print and by colour-blind readers
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^v<>ph"
_REFERENCE_STYLES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG whose bytes depend on nothing but what is drawn: no date, no version."""
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


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

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    values: list[float] = []
    for index, sweep in enumerate(sweeps):
        colour = _COLOURS[index % len(_COLOURS)]
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
    key, method = sweeps[0]["key"], sweeps[0]["method"]
    symbol = METHOD_SYMBOLS.get(method, key) if key == "recalibration_value" else key
    for axes, title in zip(panels, ("ECE, %", "accuracy, %"), strict=True):
        axes.set(xlabel=symbol, ylabel=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if min(values) > 0 and max(values) / min(values) > 20:
            axes.set_xscale("log")
            ticks = sorted(set(values))
            axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axes.minorticks_off()
    panels[0].set_ylim(bottom=0)
    figure.suptitle(f"{role}: {key}", fontsize=12)
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
    for index, (name, arm) in enumerate(plain[: len(_REFERENCE_STYLES)]):
        for axes, metric in zip(panels, ("ece", "accuracy"), strict=True):
            summary = cell.results[name].get(role, {}).get("full_vocab", {}).get(metric)
            if summary:
                axes.axhline(
                    100 * summary["mean"],
                    color="#555555",
                    linestyle=_REFERENCE_STYLES[index],
                    linewidth=1.1,
                    label=arm["label"],
                )


def _chosen(cell: "MergedCell", panels: Sequence["Axes"], sweeps: Sequence[Mapping[str, Any]]) -> None:
    """Where validation put the value that is swept here."""
    fit = cell.fits.get(str(sweeps[0]["method"]))
    if fit is None or sweeps[0]["key"] != "recalibration_value":
        return
    value = fit["value"]
    text = f"fitted on validation, {fit['symbol']} = {value['mean']:.3g}"
    for axes in panels:
        axes.axvline(value["mean"], color="#B22222", linewidth=1, label=text)
        if value["sd"]:
            axes.axvspan(value["mean"] - value["sd"], value["mean"] + value["sd"], color="#B22222", alpha=0.1, lw=0)


def scatter_figure(cell: "MergedCell", role: str) -> "Figure":
    """Accuracy against ECE, one point an arm and its spread; the points of a sweep are small and joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    names = [name for name in cell.arms if not cell.arms[name]["swept"] and _position(cell, name, role)]
    for index, name in enumerate(names):
        x, y, x_sd, y_sd = _position(cell, name, role) or (0.0, 0.0, 0.0, 0.0)
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[(index // len(_COLOURS) + index) % len(_MARKERS)]
        bars = axes.errorbar(
            x,
            y,
            xerr=x_sd or None,
            yerr=y_sd or None,
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            elinewidth=0.9,
            linestyle="none",
            label=cell.arms[name]["label"],
            zorder=3,
        )
        handles.append(bars)
    for index, sweep in enumerate(cell.sweeps):
        places = [place for point in sweep["points"] if (place := _position(cell, point["arm"], role))]
        if places:
            handles += axes.plot(
                [place[0] for place in places],
                [place[1] for place in places],
                color="#888888",
                linestyle=_REFERENCE_STYLES[index % len(_REFERENCE_STYLES)],
                marker=".",
                markersize=4,
                linewidth=0.8,
                label=f"{sweep['label']}: sweep of {sweep['key']}",
                zorder=2,
            )
    axes.set(xlabel="ECE, %  (left is better)", ylabel="accuracy, %  (up is better)", title=role)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def _position(cell: "MergedCell", name: str, role: str) -> tuple[float, float, float, float] | None:
    scores = cell.results[name].get(role, {}).get("full_vocab", {})
    if not scores.get("ece") or not scores.get("accuracy"):
        return None
    ece, accuracy = scores["ece"], scores["accuracy"]
    return 100 * ece["mean"], 100 * accuracy["mean"], 100 * (ece["sd"] or 0), 100 * (accuracy["sd"] or 0)
