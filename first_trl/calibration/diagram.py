"""Reliability diagrams of one or several reports, and the same data for other plotting tools."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Layout = Literal["panels", "overlay"]

# Okabe-Ito colours: told apart in print and by colour-blind readers.
_BAR, _OVER, _UNDER, _BAND = "#9CCBEB", "#E8A06B", "#66BFA3", "#6E6E6E"
_LEGEND = (
    "accuracy of the bin",
    "over-confident",
    "under-confident",
    "95 % if calibrated",
    "overall accuracy",
    "mean confidence",
)
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#6A3D9A")
# Inches around and between panels, and a title's height: its caption of two lines, and each line of its own
_LEFT, _RIGHT, _BETWEEN, _BELOW, _CAPTION, _LINE, _LEGEND_LINE = 0.65, 0.2, 0.5, 0.55, 0.5, 0.18, 0.2
# Characters that fit on a line: above the only panel, above a panel of a grid, in the legend of an overlay
_WIDE, _NARROW, _ENTRY = 46, 32, 40
_COLUMNS = ("lower", "upper", "count", "confidence", "accuracy", "gap", "null_low", "null_high")


def reliability_data(
    reports: Mapping[str, Any], *, titles: Sequence[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """
    What [`reliability_diagram`] draws, ready for `json.dump`.

    Args:
        reports (`dict`):
            One report of [`calibration_report`], or a mapping from a model's name to its report.
        titles (`list[str]`, *optional*):
            Names to show instead.

    Returns:
        `dict`: `{"panels": [...]}`, one entry per report with `title`, `ece`, `ci_low`, `ci_high`, `accuracy`,
        `mean_confidence`, `n` and `bins` (lists as in the report; `None` in empty bins).

    Raises:
        `ValueError`: if a report has no bins or the titles do not match in number.
    """
    named = {name: _calibration(name, report) for name, report in _named(reports).items()}
    if titles is not None and len(titles) != len(named):
        raise ValueError(f"{len(titles)} titles for {len(named)} reports: give one title per report.")
    panels = []
    for position, (name, report) in enumerate(named.items()):
        bins = report.get("bins")
        if not isinstance(bins, Mapping) or any(column not in bins for column in _COLUMNS):
            hint = (
                ' Class-wise reports hold one entry per class under "classes": pass {"class 0": report["classes"][0]}.'
                if "classes" in report
                else " Compute it with return_bins=True."
            )
            raise ValueError(f"Report {name or position!r} has no per-bin data.{hint}")
        panel: dict[str, Any] = {"title": name if titles is None else str(titles[position])}
        panel |= {key: report.get(key) for key in ("ece", "ci_low", "ci_high", "accuracy", "mean_confidence")}
        panel |= {"n": sum(bins["count"]), "bins": {column: list(bins[column]) for column in _COLUMNS}}
        panels.append(panel)
    return {"panels": panels}


def reliability_diagram(
    reports: Mapping[str, Any],
    *,
    axes: "Axes | Sequence[Axes] | None" = None,
    titles: Sequence[str] | None = None,
    layout: Layout = "panels",
    columns: int | None = None,
    null_band: bool = True,
    counts: bool = True,
    suptitle: str | None = None,
    min_count: int = 0,
) -> "Figure":
    """
    Draw accuracy against confidence.

    A panel marks the accuracy of each bin with a black line and colours the gap to the mean confidence of that bin
    orange (over-confident) or green (under-confident). The grey span shows where 95 % of the accuracies of a perfectly
    calibrated model would lie: an accuracy inside it is no evidence. Empty bins stay blank. The strip below shows the
    share of examples per bin, overall accuracy and mean confidence. An overlay draws one line per model.

    Args:
        reports (`dict`):
            One report of [`calibration_report`], or a mapping from a model's name to its report. A reading of an
            evaluation's report, such as `result.report["full_vocab"]`, is taken as it is.
        axes (`matplotlib.axes.Axes` or a sequence of them, *optional*):
            Draw into these, one per panel (one for an overlay), without the strip of counts.
        titles (`list[str]`, *optional*):
            Panel titles, or legend entries of an overlay.
        layout (`str`, defaults to `"panels"`):
            `"panels"`: one panel per report, in a grid. `"overlay"`: all in one.
        columns (`int`, *optional*):
            Panels per row; up to 5 by default.
        null_band (`bool`, defaults to `True`):
            Whether to draw the grey spans (an overlay has none).
        counts (`bool`, defaults to `True`):
            Whether to draw the strip of counts.
        suptitle (`str`, *optional*):
            Title of the figure.
        min_count (`int`, defaults to 0):
            Bins of a panel with fewer examples are hatched in grey: neither their accuracy nor their gap is shown.

    Returns:
        `matplotlib.figure.Figure`: save it with [`save_figure`], or `figure.savefig("reliability.png", dpi=150)`.

    Raises:
        `ValueError`: if a report has no bins, or axes or titles do not match in number.
    """
    if layout not in ("panels", "overlay"):
        raise ValueError(f"layout={layout!r} is unknown: choose 'panels' or 'overlay'.")
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise ValueError(f"columns={columns!r} must be a positive integer.")
    panels = reliability_data(reports, titles=titles)["panels"]
    n_plots = 1 if layout == "overlay" else len(panels)
    if axes is not None:
        given: list[Any] = [axes] if hasattr(axes, "plot") else list(axes)
        if len(given) != n_plots:
            raise ValueError(f"{len(given)} axes for {n_plots} panels: give one per panel.")
        figure = given[0].figure
        pairs = [(axis, None) for axis in given]
    else:
        if layout == "panels":
            for panel in panels:
                panel["title"] = _wrap(panel["title"], _WIDE if n_plots == 1 else _NARROW)
        shown = [""] if layout == "overlay" else [panel["title"] for panel in panels]
        figure, pairs = _grid(shown, columns, counts, layout, suptitle)
    if layout == "overlay":
        _draw_overlay(*pairs[0], panels)
    else:
        for panel, (axis, strip) in zip(panels, pairs, strict=True):
            _draw_panel(axis, strip, panel, null_band, min_count)
        # Panels are compared: their shares are drawn on one scale
        strips: list[Any] = [strip for _, strip in pairs if strip is not None]
        top = max((strip.get_ylim()[1] for strip in strips), default=1.0)
        for strip in strips:
            strip.set_ylim(0, top)
        if axes is None:
            _add_legend(figure)
    return figure


def save_figure(
    figure: "Figure", path: str | Path | BinaryIO, *, formats: Sequence[str] = (), dpi: int = 150
) -> list[Path]:
    """
    Write a figure; the bytes depend on nothing but what is drawn: no date, no version.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure.
        path (`str`, `Path` or binary file):
            File to write, for example `reliability.png`; its suffix is the format. An open file gets a PNG.
        formats (`Sequence[str]`, *optional*):
            Further formats, each in a file of the same name: `"png"`, `"pdf"` or `"svg"`. Text in a PDF is in TrueType
            fonts (Type 42), since many journals refuse Type 3.
        dpi (`int`, *optional*, defaults to 150):
            Resolution of a PNG.

    Returns:
        `list[Path]`: the files written.
    """
    from matplotlib import rc_context

    if not isinstance(path, (str, Path)):
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
        return []
    path = Path(path)
    files = [path, *(path.with_suffix(f".{name}") for name in formats if path.suffix != f".{name}")]
    nothing: dict[str, dict[str, Any]] = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        ".svg": {"Date": None, "Creator": None},
    }
    with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.hashsalt": "first_trl"}):
        for file in files:
            figure.savefig(file, dpi=dpi, metadata=nothing.get(file.suffix))
    return files


def _named(reports: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(reports, Mapping) or not reports:
        raise ValueError("reports must be a report of calibration_report or a non-empty mapping of names to reports.")
    readings = any(isinstance(part, Mapping) and "calibration" in part for part in reports.values())
    # A whole evaluation has counts beside its readings; a mapping of names to readings has readings only
    if "bins" in reports or "ece" in reports or (readings and "n" in reports):
        return {"": reports}
    for name, report in reports.items():
        if not isinstance(report, Mapping):
            raise ValueError(f"reports[{name!r}] is a {type(report).__name__}, not a report of calibration_report.")
    return {str(name): report for name, report in reports.items()}


def _calibration(name: str, report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report of the confidences, taken out of the report of an evaluation that it was given with."""
    inner = report.get("calibration")
    if "bins" not in report and isinstance(inner, Mapping):
        return inner
    readings = [key for key, part in report.items() if isinstance(part, Mapping) and "calibration" in part]
    if "bins" not in report and readings:
        raise ValueError(
            f"Report {name!r} is that of a whole evaluation: pass one of its readings, "
            f"{' or '.join(f'report[{key!r}]' for key in readings)}."
        )
    return report


def _grid(
    titles: Sequence[str], columns: int | None, counts: bool, layout: str, suptitle: str | None
) -> tuple["Figure", list[tuple[Any, Any]]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A reliability diagram needs matplotlib: `pip install 'first_trl[plots]'`.") from error

    n_plots = len(titles)
    if columns is None:
        # As even as possible: 6 panels are 3 x 2, 10 are 5 x 2.
        columns = n_plots if n_plots <= 4 else min(5, math.ceil(n_plots / math.ceil(n_plots / 5)))
    columns = min(columns, n_plots)
    rows = math.ceil(n_plots / columns)
    side = 4.2 if n_plots == 1 else 2.7
    cell = side * 1.29 if counts else side
    above = _CAPTION + _LINE * max(1 + title.count("\n") for title in titles)
    width = _LEFT + side * columns + _BETWEEN * (columns - 1) + _RIGHT
    legend = (
        0.0 if layout == "overlay" else 0.1 + _LEGEND_LINE * math.ceil((len(_LEGEND) + 1) / _legend_columns(width))
    )
    suptitle = _wrap(suptitle or "", int(9 * width))
    head = 0.15 + 0.25 * (1 + suptitle.count("\n")) if suptitle else 0.1
    height = head + (above + cell + _BELOW) * rows + legend
    # Fixed places: a layout engine measures every label of every panel, which takes longer than to draw them
    figure = Figure(figsize=(width, height))
    if suptitle:
        figure.suptitle(suptitle, fontsize=13, y=1 - 0.1 / height, va="top")
    outer = figure.add_gridspec(
        rows,
        columns,
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - (head + above) / height,
        bottom=(legend + _BELOW) / height,
        wspace=_BETWEEN / side,
        hspace=(above + _BELOW) / cell,
    )
    pairs = []
    for index in range(n_plots):
        row, column = divmod(index, columns)
        if counts:
            inner = outer[row, column].subgridspec(2, 1, height_ratios=(4, 1), hspace=0.06)
            axis = figure.add_subplot(inner[0])
            strip = figure.add_subplot(inner[1], sharex=axis)
            axis.tick_params(labelbottom=False)
        else:
            axis, strip = figure.add_subplot(outer[row, column]), None
        (axis if strip is None else strip).set_xlabel("confidence")
        if column == 0:
            axis.set_ylabel("accuracy")
            if strip is not None:
                strip.set_ylabel("share")
        else:
            axis.tick_params(labelleft=False)
        pairs.append((axis, strip))
    return figure, pairs


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def _legend_columns(width: float) -> int:
    return 2 if width < 6 else 3 if width < 12 else len(_LEGEND) + 1


def _add_legend(figure: "Figure") -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [*(label for label in _LEGEND if label in handles), *(label for label in handles if label not in _LEGEND)]
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="lower center",
        ncols=min(_legend_columns(figure.get_figwidth()), len(order)),
        fontsize=9,
        frameon=False,
    )


def _style(axis: Any) -> None:
    ticks, labels = [0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"]
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_xticks(ticks, labels)
    axis.set_yticks(ticks, labels)
    axis.set_axisbelow(True)
    axis.grid(color="#E6E6E6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color="#444444", linewidth=1, zorder=4)


def _used(bins: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    rows = [dict(zip(_COLUMNS, values, strict=True)) for values in zip(*(bins[c] for c in _COLUMNS), strict=True)]
    return [row for row in rows if row["accuracy"] is not None]


def _draw_panel(axis: Any, strip: Any, panel: Mapping[str, Any], null_band: bool, min_count: int) -> None:
    _style(axis)
    used = _used(panel["bins"])
    few = [row for row in used if row["count"] < min_count]
    shown = [row for row in used if row["count"] >= min_count]
    _bars(axis, few, [0] * len(few), [row["confidence"] for row in few], color="#F4F4F4", edgecolor="#B5B5B5",
          hatch="////", linewidth=0.6, label=f"fewer than {min_count} examples", zorder=2)  # fmt: skip
    lows = [min(row["accuracy"], row["confidence"]) for row in shown]
    _bars(axis, shown, [0] * len(shown), lows, color=_BAR, edgecolor="white", linewidth=0.6, zorder=2)
    for label, colour, over in (("over-confident", _OVER, True), ("under-confident", _UNDER, False)):
        rows = [row for row in shown if (row["gap"] >= 0) == over]
        ends = [sorted((row["accuracy"], row["confidence"])) for row in rows]
        _bars(axis, rows, [low for low, _ in ends], [high for _, high in ends], color=colour, edgecolor="white",
              linewidth=0.6, label=label, zorder=3)  # fmt: skip
    spans = [row for row in shown if null_band and row["null_high"] > row["null_low"]]
    _bars(axis, spans, [row["null_low"] for row in spans], [row["null_high"] for row in spans], share=0.2, color=_BAND,
          alpha=0.75, label="95 % if calibrated", zorder=5)  # fmt: skip
    if shown:
        # One line with gaps: a NaN lifts the pen
        x = [value for row in shown for value in (row["lower"], row["upper"], math.nan)]
        y = [value for row in shown for value in (row["accuracy"], row["accuracy"], math.nan)]
        axis.plot(x, y, color="black", linewidth=2, solid_capstyle="butt", label="accuracy of the bin", zorder=6)
    # The name stands above the two smaller lines of numbers.
    axis.set_title(panel["title"], fontsize=11, pad=34)
    axis.annotate(_caption(panel), (0.5, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
                  ha="center", va="bottom", fontsize=8.5, color="#333333", linespacing=1.25)  # fmt: skip
    if strip is not None:
        _draw_strip(strip, panel, [panel["bins"]], [_BAR])


def _bars(
    axis: Any, rows: Sequence[Mapping[str, Any]], lows: list[float], highs: list[float], share: float = 1, **style: Any
) -> None:
    """Bars from `lows` to `highs` over the middle `share` of their bins."""
    if rows:
        widths = [share * (row["upper"] - row["lower"]) for row in rows]
        lefts = [(row["lower"] + row["upper"] - width) / 2 for row, width in zip(rows, widths, strict=True)]
        heights = [high - low for low, high in zip(lows, highs, strict=True)]
        axis.bar(lefts, heights, widths, bottom=lows, align="edge", **style)


def _draw_overlay(axis: Any, strip: Any, panels: Sequence[Mapping[str, Any]]) -> None:
    _style(axis)
    colours = [_LINES[i % len(_LINES)] for i in range(len(panels))]
    for position, (panel, colour) in enumerate(zip(panels, colours, strict=True)):
        rows = _used(panel["bins"])
        share = [row["count"] / panel["n"] for row in rows]
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        style = "-" if position < len(_LINES) else "--"
        axis.plot(x, y, style, color=colour, linewidth=1.6, zorder=5)
        axis.scatter(x, y, s=[14 + 160 * s for s in share], color=colour, edgecolor="white", linewidth=0.6, zorder=6)
        label = _wrap(panel["title"] or "model", _ENTRY)
        if panel["ece"] is not None:
            label += f" (ECE {panel['ece']:.3f})"
        axis.plot([], [], style, marker="o", color=colour, label=label)
    axis.legend(loc="best", fontsize=8, framealpha=0.85)
    if strip is not None:
        _draw_strip(strip, None, [panel["bins"] for panel in panels], colours)


def _draw_strip(
    strip: Any, panel: Mapping[str, Any] | None, tables: Sequence[Mapping[str, list[Any]]], colours: Sequence[str]
) -> None:
    strip.set_axisbelow(True)
    strip.grid(color="#E6E6E6", linewidth=0.6)
    strip.spines[["top", "right"]].set_visible(False)
    for bins, colour in zip(tables, colours, strict=True):
        total = sum(bins["count"])
        share = [count / total for count in bins["count"]]
        if panel is not None:
            widths = [upper - lower for lower, upper in zip(bins["lower"], bins["upper"], strict=True)]
            strip.bar(bins["lower"], share, widths, align="edge", color=colour, edgecolor="white", linewidth=0.6)
        else:
            strip.stairs(share, [*bins["lower"], bins["upper"][-1]], color=colour, linewidth=1.3)
    if panel is not None and panel["accuracy"] is not None and panel["mean_confidence"] is not None:
        strip.axvline(panel["accuracy"], color="black", linewidth=1.4, label="overall accuracy")
        strip.axvline(
            panel["mean_confidence"], color="#C0561B", linewidth=1.4, linestyle="--", label="mean confidence"
        )
    strip.set_ylim(bottom=0)
    strip.locator_params(axis="y", nbins=3)


def _caption(panel: Mapping[str, Any]) -> str:
    first, second = [], [f"n {panel['n']:,}"]
    if panel["ece"] is not None:
        first.append(f"ECE {panel['ece']:.3f}")
        if panel["ci_low"] is not None:
            first[-1] += f" [{panel['ci_low']:.3f}, {panel['ci_high']:.3f}]"
    if panel["accuracy"] is not None:
        second.append(f"acc. {panel['accuracy']:.3f}")
    if panel["mean_confidence"] is not None:
        second.append(f"conf. {panel['mean_confidence']:.3f}")
    return "\n".join(filter(None, ("  ".join(first), "   ".join(second))))
