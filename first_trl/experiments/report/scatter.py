"""Accuracy against ECE, one numbered point an arm."""

import math
from typing import TYPE_CHECKING, Any

from ...vocabulary import BAYES
from .arms import key_title
from .figures import COLOURS, LINE_STYLES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .merged import MergedCell


# 7 colours and 9 shapes: no two of 63 arms look the same
_MARKERS = "osD^v<>ph"
# Around the points, in units of the picture's points
_RADII = (9.0, 14.0, 20.0, 27.0, 35.0)
_MARGIN = 0.08


def scatter_figure(cell: "MergedCell", role: str) -> "Figure":
    """
    Accuracy against ECE, one point an arm and its spread, numbered as in the key below; the points of a sweep are
    small and joined. Arms set the scale: a curve may leave the picture, and the true posterior stands in the key.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [name for name in cell.arms if not cell.arms[name]["swept"] and _position(cell, name, role)]
    figure = Figure(figsize=(7.4, 5.2 + 0.1 * len(names)), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    points: list[tuple[float, float]] = []
    corners: list[tuple[float, float]] = []
    outside = [name for name in names if name == BAYES]
    for index, name in enumerate(name for name in names if name not in outside):
        x, y, x_sd, y_sd = _position(cell, name, role) or (0.0, 0.0, 0.0, 0.0)
        points.append((x, y))
        corners += [(x - x_sd, y - y_sd), (x + x_sd, y + y_sd)]
        bars = axes.errorbar(
            x,
            y,
            xerr=x_sd or None,
            yerr=y_sd or None,
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.5,
            elinewidth=0.7,
            linestyle="none",
            label=f"{index + 1}  {cell.arms[name]['label']}",
            zorder=3,
        )
        for bar in bars[2]:
            bar.set_alpha(0.45)
        handles.append(bars)
    for index, sweep in enumerate(cell.sweeps):
        places = [place for point in sweep["points"] if (place := _position(cell, point["arm"], role))]
        if places:
            handles += axes.plot(
                [place[0] for place in places],
                [place[1] for place in places],
                color="#888888",
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                marker=".",
                markersize=4,
                linewidth=0.8,
                label=f"{sweep['label']} over {key_title(sweep['key'], sweep['method'])}",
                zorder=2,
            )
    for name in outside:
        x, y, *_ = _position(cell, name, role) or (0.0, 0.0)
        label = f"{cell.arms[name]['label']}, not drawn: accuracy {y:.1f}, ECE {x:.1f}"
        handles.append(Line2D([], [], linestyle="none", label=label))
    axes.set(xlabel="ECE, %  (left is better)", ylabel="accuracy, %  (up is better)", title=role)
    if corners:
        _scale(axes, corners)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    _number(figure, axes, points)
    return figure


def _scale(axes: "Axes", corners: list[tuple[float, float]]) -> None:
    xs, ys = zip(*corners, strict=True)
    width, height = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    axes.set_xlim(max(0.0, min(xs) - _MARGIN * width), max(xs) + _MARGIN * width)
    axes.set_ylim(min(ys) - _MARGIN * height, max(ys) + _MARGIN * height)


def _number(figure: "Figure", axes: "Axes", points: list[tuple[float, float]]) -> None:
    """Write the number of every point beside it, where it covers neither a point nor another number."""
    # The places on the page are known once the legend has taken its room
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    places = [tuple(place / unit for place in axes.transData.transform(point)) for point in points]
    taken: list[tuple[float, float]] = []
    for index, (x, y) in enumerate(places):
        others = [*places[:index], *places[index + 1 :], *taken]
        spots = [
            (radius * math.cos(turn * math.pi / 4), radius * math.sin(turn * math.pi / 4))
            for radius in _RADII
            for turn in (1, 0, 7, 3, 5, 2, 4, 6)
        ]
        dx, dy = max(spots, key=lambda spot: (_free(x + spot[0], y + spot[1], others), -spots.index(spot)))
        taken.append((x + dx, y + dy))
        axes.annotate(
            str(index + 1),
            points[index],
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            color=COLOURS[index % len(COLOURS)],
            # A number that had to move away shows where it belongs
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 4, "shrinkB": 4}
            if math.hypot(dx, dy) > _RADII[1] + 1
            else None,
            zorder=4,
        )


def _free(x: float, y: float, others: list[tuple[float, float]]) -> float:
    """Distance to the nearest thing; beyond what a number needs, more room is no better."""
    return min(min((math.hypot(x - a, y - b) for a, b in others), default=math.inf), 10.5)


def _position(cell: "MergedCell", name: str, role: str) -> tuple[float, float, float, float] | None:
    scores = cell.results[name].get(role, {}).get("full_vocab", {})
    if not scores.get("ece") or not scores.get("accuracy"):
        return None
    ece, accuracy = scores["ece"], scores["accuracy"]
    return 100 * ece["mean"], 100 * accuracy["mean"], 100 * (ece["sd"] or 0), 100 * (accuracy["sd"] or 0)
