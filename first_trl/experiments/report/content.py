"""What a merged report says, part by part."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ...utils.resources import recipe_names
from ...vocabulary import role_title, score_meaning
from . import tables
from .arms import key_title
from .document import Fold, Heading, Items, Paragraph, Part, Picture, Table
from .highlight import highlight_parts
from .merged import MergedCell, MergedReport


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")


def prefix(merged: MergedReport, cell: MergedCell) -> str:
    """Start of the figure names of a cell."""
    return f"cell{merged.cells.index(cell) + 1}_" if len(merged.cells) > 1 else ""


def sweep_figure(key: str, method: str | None, role: str) -> str:
    """Name of the figure of a sweep, without the start."""
    return f"sweep_{slug(key)}{f'_{method}' if method else ''}_{slug(role)}.png"


def write_parts(merged: MergedReport) -> list[Part]:
    """The whole report; figures are those that `merged.figures` names."""
    parts: list[Part] = [Heading(1, merged.title), *_header(merged)]
    if merged.notes:
        parts += [Heading(2, "What these numbers show, and what they do not"), Items(merged.notes)]
    parts += [Heading(2, "How to read the tables"), Items(_legend(merged))]
    several = len(merged.cells) > 1
    if several:
        parts += [Heading(2, "All cells"), *tables.cells_tables(merged)]
    for cell in merged.cells:
        if several:
            parts.append(Heading(2, cell.title or "As written"))
            if not merged.models and cell.models:
                parts.append(Items(_models(cell.models)))
        parts += _cell_parts(merged, cell, 3 if several else 2)
    return [*parts, *highlight_parts(merged), Heading(2, "Runs"), tables.run_table(merged)]


def table_parts(parts: Sequence[Part]) -> list[Part]:
    """The tables that are not folded away."""
    return [part for part in parts if isinstance(part, Table)]


def _header(merged: MergedReport) -> list[Part]:
    parts: list[Part] = [Paragraph(merged.description)] if merged.description else []
    n = len(merged.runs)
    facts = [
        f"Recipe `{merged.recipe}`, {'one run' if n == 1 else f'{n} runs'}: "
        f"seed{'' if len(merged.seeds) == 1 else 's'} {', '.join(map(str, merged.seeds))}"
        + (f"; {len(merged.cells)} cells." if len(merged.cells) > 1 else "."),
        *_models(merged.models),
    ]
    options = "".join(f" --baseline {name}" for name in merged.baselines)
    facts.append(f"Made by {_command(merged)}; again from the finished runs with `first-trl report DIR{options}`.")
    return [*parts, Items(facts)]


def _command(merged: MergedReport) -> str:
    """What makes the runs; a recipe that does not travel with the package is read from the folder of its run."""
    if merged.recipe in recipe_names():
        return f"`first-trl run {merged.recipe}`"
    file = shlex.quote(f"{merged.runs[0]['run']}/recipe.yaml")
    others = ", and so for every folder under Runs" if len(merged.runs) > 1 else ""
    return f"`first-trl run {file}` in the folder above this report{others}"


def _models(models: Mapping[str, Any]) -> list[str]:
    lines = []
    for role, model in models.items():
        if not isinstance(model, Mapping):
            lines.append(f"{role.capitalize()}: `{model}`.")
            continue
        name = model.get("name_or_path")
        texts = [f"`{name}`" if name else f"`{model.get('architecture')}`, made from scratch"]
        others = {key: value for key, value in model.items() if key not in ("name_or_path", "architecture", "config")}
        for key, value in {**(model.get("config") or {}), **others}.items():
            if value is not None and not isinstance(value, Mapping | list):
                texts.append(f"{key.replace('_', ' ')} {f'{value:,}' if type(value) is int else value}")
        lines.append(f"{role.capitalize()}: {', '.join(texts)}.")
    return lines


def _legend(merged: MergedReport) -> list[str]:
    several = any(len(cell.runs) > 1 for cell in merged.cells)
    lines = []
    if several:
        lines.append("`a ± b`: mean and sample standard deviation over the seeds.")
    if any(len(cell.runs) == 1 for cell in merged.cells):
        lines.append(
            "Where there is one seed, no spread and no interval can be given: a difference may be chance, however "
            "large."
        )
    lines.append(
        "**Bold**: best mean among the students that have every seed. The teacher and the true posterior are "
        "references. Points of a sweep are left out: the best of them would be chosen on the rows it is reported on."
    )
    if several:
        lines += [
            f"{tables.LEVEL_MARK}: the paired difference to the best has a 95 % interval that holds 0; these seeds do "
            "not tell the two apart.",
            "Paired differences: arm minus baseline within each run; in square brackets the 95 % Student-t interval "
            "of the mean over the seeds; `k/n`: the arm is better in k of n. Bold: the interval leaves out 0. The "
            "intervals are not corrected for the number of comparisons.",
        ]
    if any("null_ece" in scores for cell in merged.cells for arm in cell.results.values() for scores in arm.values()):
        lines.append(
            "ECE if calibrated: what a perfectly calibrated model with the same confidences and as many rows would "
            "show, since bins hold few rows. In brackets: seeds whose ECE lies within 95 % of such models."
        )
    return lines


def _cell_parts(merged: MergedReport, cell: MergedCell, level: int) -> list[Part]:
    parts: list[Part] = []
    start = prefix(merged, cell)
    for index, (role, about) in enumerate(cell.roles.items()):
        title = f"`{role}`" + (f", {cell.title}" if len(merged.cells) > 1 and cell.title else "")
        parts.append(Heading(level, role_title(role, index, about["domain"])))
        parts += _given(tables.score_table(cell, role, "full_vocab", title))
        parts.append(Paragraph(score_meaning(about["sample"], merged.n_bins) + _rows(about)))
        if missing := tables.missing_lines(cell):
            parts.append(Items(missing))
        parts += _picture(merged, f"{start}accuracy_ece_{slug(role)}.png")
        differences = [
            table
            for name, arm in cell.arms.items()
            if arm["baseline"] and (table := tables.difference_table(cell, name, role, title)) is not None
        ]
        if differences:
            parts += [Heading(level + 1, "Paired differences"), *differences]
        name = f"{start}reliability_{slug(role)}.png"
        parts += _picture(merged, name) or [
            Paragraph(
                "There is no reliability diagram: the predictions of the runs "
                f"(`evaluate/ARM/{role}.parquet`) are not beside their reports."
            )
        ]
        if (options := tables.score_table(cell, role, "options", title)) is not None:
            parts.append(Fold(f"`{role}`, probabilities renormalised over the answer options", [options]))
        parts.append(Fold(f"`{role}`, every seed", [tables.seed_table(cell, role, title)]))
    return [*parts, *_sweep_parts(merged, cell, level), *_teacher_parts(merged, cell, level)]


def _sweep_parts(merged: MergedReport, cell: MergedCell, level: int) -> list[Part]:
    parts: list[Part] = []
    for key, method in dict.fromkeys((sweep["key"], sweep["method"]) for sweep in cell.sweeps):
        about = f" ({method.replace('_', ' ')})" if method else f" (`{key}`)"
        parts.append(Heading(level, f"Sweep of {key_title(key, method)}{about}"))
        for role in cell.roles:
            parts += _picture(merged, prefix(merged, cell) + sweep_figure(key, method, role))
            for sweep in cell.sweeps:
                if (sweep["key"], sweep["method"]) == (key, method):
                    parts += _given(tables.sweep_table(cell, sweep, role, f"`{role}`"))
    return parts


def _teacher_parts(merged: MergedReport, cell: MergedCell, level: int) -> list[Part]:
    inner: list[Part] = [*_picture(merged, f"{prefix(merged, cell)}kept_mass.png"), *_given(tables.fit_table(cell))]
    if cell.temperatures:
        fitted = ", ".join(
            f"{cell.arms[name]['label']} {one['mean']:.2f}" + (f" ± {one['sd']:.2f}" if one["sd"] is not None else "")
            for name, one in cell.temperatures.items()
            if name in cell.arms and not cell.arms[name]["swept"]
        )
        inner += [Paragraph(f"Post-hoc temperatures (fitted by NLL on `validation`): {fitted}.")] if fitted else []
    inner += _given(tables.novelty_table(cell))
    parts: list[Part] = [Heading(level, "Teacher and fitted values"), *inner] if inner else []
    costs = tables.cost_table(cell)
    return parts if costs is None else [*parts, Heading(level, "Costs"), costs]


def _rows(about: Mapping[str, Any]) -> str:
    if about["n"] is None:
        return ""
    low, high = about["n"]
    unit = "tokens" if about["sample"].get("unit") == "token" else "rows"
    return f" Scored {unit} a run: {low:,}." if low == high else f" Scored {unit} a run: {low:,} to {high:,}."


def _picture(merged: MergedReport, name: str) -> list[Part]:
    return [Picture(name, merged.figures[name])] if name in merged.figures else []


def _given(table: Table | None) -> list[Part]:
    return [] if table is None else [table]
