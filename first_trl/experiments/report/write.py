"""Writing a merged report: figures, Markdown, JSON, LaTeX tables and one HTML page."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...calibration import calibration_report, reliability_diagram
from ...utils.files import write_atomically, write_json
from ...vocabulary import FEW_ROWS
from ..run_folder import ReportFolder, RunFolder
from .arms import key_title
from .collect import MERGED_FORMAT, default_parent, find_runs
from .content import prefix, slug, sweep_figure, table_parts, write_parts
from .figures import mass_figure, save_figure
from .figures import sweep_figure as draw_sweep
from .html import to_html
from .latex import to_latex
from .markdown import to_markdown
from .merge import merge_runs
from .merged import MergedCell, MergedReport
from .results import write_results
from .scatter import scatter_figure


def write_merged_report(
    folders: Sequence[Path | str],
    output_dir: Path | str | None = None,
    *,
    baselines: Sequence[str] = (),
    formats: Sequence[str] = (),
) -> Path:
    """
    Merge the reports of the runs of one recipe and write `report.md`, `report.json`, `report.tex`, `report.html`,
    `results.csv.gz` and the figures. The same runs give the same bytes: nothing in them depends on when, where or in which order runs were
    made.

    Args:
        folders (`Sequence[Path]`):
            Folders of runs, or folders that hold runs at any depth.
        output_dir (`Path`, *optional*):
            Where to. Default: `report` in the folder that holds all runs.
        baselines (`Sequence[str]`, *optional*):
            As in [`merge_runs`].
        formats (`Sequence[str]`, *optional*):
            Formats of the figures beside PNG: `"pdf"`, `"svg"`.

    Returns:
        `Path`: the Markdown file.

    Raises:
        `ValueError`: As [`merge_runs`] does, and when `output_dir` holds the report of a single run.
    """
    runs = find_runs(folders)
    output = Path(output_dir) if output_dir is not None else RunFolder(default_parent(runs)).report.path
    old = _old_report(output)
    merged = merge_runs(runs, baselines=baselines, relative_to=output.resolve().parent)
    output.mkdir(parents=True, exist_ok=True)
    merged = replace(merged, figures=_draw(merged, output, formats))
    parts = write_parts(merged)
    report = ReportFolder(output)
    write_atomically(report.markdown, to_markdown(parts))
    write_atomically(report.latex, to_latex(table_parts(parts), merged.title))
    write_atomically(report.html, to_html(parts, merged.title, output))
    write_results(merged, report.results)
    # Last, since it is what tells the folder of a merged report from that of a run
    write_json(report.json, merged.to_dict())
    for name in set(old.get("figures", {})) - set(merged.figures):
        for suffix in (".png", ".pdf", ".svg"):
            (output / Path(name).name).with_suffix(suffix).unlink(missing_ok=True)
    return report.markdown


def _old_report(output: Path) -> dict[str, Any]:
    file = ReportFolder(output).json
    if not file.is_file():
        return {}
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        old = None
    if not isinstance(old, dict) or old.get("format") != MERGED_FORMAT:
        raise ValueError(
            f"{file} is the report of a single run and would be overwritten: name another folder with `--output-dir`."
        )
    return old


def _draw(merged: MergedReport, output: Path, formats: Sequence[str]) -> dict[str, str]:
    """Draw everything; file -> caption."""
    figures: dict[str, str] = {}

    def save(name: str, caption: str, figure: Any) -> None:
        save_figure(figure, output / name, formats)
        figures[name] = caption

    for cell in merged.cells:
        start = prefix(merged, cell)
        over = f"mean ± standard deviation over {len(cell.runs)} seeds" if len(cell.runs) > 1 else "one seed"
        for role in cell.roles:
            caption = f"Accuracy against ECE on `{role}`, {over}. Arms set the scale: curves may leave the picture."
            save(f"{start}accuracy_ece_{slug(role)}.png", caption, scatter_figure(cell, role))
            panels, left_out = _pooled(merged, cell, role, output.resolve().parent)
            if panels:
                caption = f"Reliability on `{role}`."
                if len(cell.runs) > 1:
                    caption = (
                        f"Reliability on `{role}`, rows of all seeds pooled. The ECE of a panel is that of the pooled "
                        "rows. It is not the mean of the table, and mostly lower: deviations of single seeds cancel."
                    )
                caption += f" Hatched: fewer than {FEW_ROWS} rows."
                if left_out:
                    caption += f" Without predictions and left out: {', '.join(left_out)}."
                title = f"{merged.recipe}, {role}: accuracy against confidence"
                diagram = reliability_diagram(panels, suptitle=title, min_count=FEW_ROWS)
                save(f"{start}reliability_{slug(role)}.png", caption, diagram)
        for key, method in dict.fromkeys((sweep["key"], sweep["method"]) for sweep in cell.sweeps):
            sweeps = [sweep for sweep in cell.sweeps if (sweep["key"], sweep["method"]) == (key, method)]
            # Six curves with their bands are what one can tell apart; the tables have them all
            for role in cell.roles:
                figure = draw_sweep(cell, sweeps[:6], role)
                if figure is not None:
                    caption = f"ECE and accuracy on `{role}` against {key_title(key, method)}, {over}."
                    save(start + sweep_figure(key, method, role), caption, figure)
        if cell.kept_mass:
            means = np.array([one["mean"] for one in cell.kept_mass])
            sds = [one["sd"] for one in cell.kept_mass]
            caption = f"Teacher mass kept by the most likely k tokens of the training rows, {over}."
            figure = mass_figure(means, None if None in sds else np.array(sds))
            save(f"{start}kept_mass.png", caption, figure)
    return figures


def _pooled(
    merged: MergedReport, cell: MergedCell, role: str, parent: Path
) -> tuple[Mapping[str, dict[str, Any]], list[str]]:
    """Label -> calibration report over the rows of all seeds, and the labels of arms without predictions."""
    panels: dict[str, dict[str, Any]] = {}
    left_out = []
    for name, arm in cell.arms.items():
        if arm["swept"] or role not in cell.results[name]:
            continue
        files = [RunFolder(parent / run).predictions(name, role) for run in cell.runs if run not in arm["missing"]]
        found = [pair for file in files if file.is_file() and (pair := _confidences(file)) is not None]
        if len(found) < len(files):
            left_out.append(arm["label"])
            continue
        confidence, right = (np.concatenate(columns) for columns in zip(*found, strict=True))
        with warnings.catch_warnings():
            # What it warns of is said about the single runs
            warnings.simplefilter("ignore")
            panels[arm["label"]] = calibration_report(confidence, right, n_bins=merged.n_bins)
    return panels, left_out


def _confidences(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Confidence and correctness of the scored rows, or `None` for predictions of another kind."""
    import pyarrow.parquet as pq

    names = pq.read_schema(file).names
    if not {"top_prob", "top_is_gold"} <= set(names):
        return None
    columns = [name for name in ("top_prob", "top_is_gold", "gold") if name in names]
    table = pq.read_table(file, columns=columns).to_pydict()
    confidence, right = np.array(table["top_prob"], float), np.array(table["top_is_gold"], int)
    scored = np.array(table["gold"]) >= 0 if "gold" in table else np.ones(len(right), bool)
    return confidence[scored], right[scored]
