"""The figures of a study in one small file: a row for each run, arm and evaluation role."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...calibration.intervals import holds_zero, paired_difference, summarize
from ...utils.names import nearest
from ...vocabulary import HIGHER_IS_BETTER, METRICS, READINGS, Metric
from .merged import MergedReport


_KEYS = ("cell", "run", "role", "arm")
_COLUMNS = (*_KEYS, *(metric.key for metric in METRICS))


class Score(NamedTuple):
    """One row: where a score comes from, and the built-in metrics over the whole vocabulary (fractions; NLL in nats)."""

    cell: str
    run: str
    role: str
    arm: str
    values: dict[str, float]


def write_results(merged: MergedReport, path: Path) -> None:
    """Write the scores of every run of a merged report as gzipped CSV. Equal scores give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in merged.cells:
        for role in cell.roles:
            for run in cell.runs:
                for arm, facts in cell.arms.items():
                    scores = cell.results.get(arm, {}).get(role, {}).get(READINGS[0], {})
                    found = [scores.get(metric.key, {}).get("values", {}).get(run) for metric in METRICS]
                    if any(value is not None for value in found):
                        numbers = ["" if value is None else repr(float(value)) for value in found]
                        writer.writerow([cell.title, run, role, facts["label"], *numbers])
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def read_results(path: str | Path) -> list[Score]:
    """
    Read what [`write_results`] wrote.

    Raises:
        `ValueError`: The file is missing, is no gzipped CSV, or has other columns.
    """
    try:
        text = gzip.decompress(Path(path).read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no gzipped CSV of results ({error}). Make one with `first-trl report DIR`."
        ) from None
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != _COLUMNS:
        raise ValueError(f"{path} must have the columns {', '.join(_COLUMNS)}. Make it with `first-trl report DIR`.")
    scores: dict[tuple[str, ...], Score] = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            values = [float(text) if text else None for text in row[len(_KEYS) :]]
            found = {metric.key: value for metric, value in zip(METRICS, values, strict=True) if value is not None}
        except ValueError:
            raise ValueError(f"{path}, line {number}: {row} is no row of results.") from None
        cell, run, role, arm = row[: len(_KEYS)]
        if scores.setdefault((cell, run, role, arm), Score(cell, run, role, arm, found)).values is not found:
            raise ValueError(
                f"{path}, line {number}: the arm {arm!r} of {run!r} on {role!r} is there twice. Two arms may have one label: "
                "make the file again with `first-trl report DIR`."
            )
    return list(scores.values())


def results_table(
    scores: Sequence[Score],
    *,
    roles: Sequence[str] = (),
    metrics: Sequence[str] = (),
    arms: Sequence[str] = (),
    baselines: Sequence[str] = (),
    intervals: bool = False,
) -> str:
    """
    A Markdown table of results: mean ± sample standard deviation over the runs (`2 of 3` where an arm lacks some), or with
    `baselines` mean paired differences, the number of runs in which the arm is better, and ° where the 95 % Student-t interval holds 0.

    Args:
        scores (`Sequence[Score]`): From [`read_results`].
        roles (`Sequence[str]`), metrics (`Sequence[str]`): Columns; all where none is named.
        arms (`Sequence[str]`): Rows, by label; all where none is named.
        baselines (`Sequence[str]`): What the arms are compared with, by label.
        intervals (`bool`): Print the intervals of the differences in place of °.

    Raises:
        `ValueError`: A name is unknown (the message names the nearest known one), or there are `intervals` without
            `baselines`.
    """
    if intervals and not baselines:
        raise ValueError("Intervals are those of paired differences: name a baseline too.")
    known = {
        "role": list(dict.fromkeys(score.role for score in scores)),
        "metric": [metric.key for metric in METRICS],
        "arm": list(dict.fromkeys(score.arm for score in scores)),
    }
    for kind, asked in (("role", roles), ("metric", metrics), ("arm", [*arms, *baselines])):
        for name in asked:
            if name not in known[kind]:
                raise ValueError(f"There is no {kind} {name!r}.{nearest(name, known[kind])}")
    shown = [metric for metric in METRICS if not metrics or metric.key in metrics]
    columns = [(role, metric) for role in roles or known["role"] for metric in shown]
    cells = list(dict.fromkeys(score.cell for score in scores))
    values: dict[tuple[str, str, str, str], dict[str, float]] = {}
    runs: dict[tuple[str, str, str], set[str]] = {}
    for score in scores:
        for key, value in score.values.items():
            runs.setdefault((score.cell, score.role, key), set()).add(score.run)
            values.setdefault((score.cell, score.arm, score.role, key), {})[score.run] = value
    head = [*(["cell"] if len(cells) > 1 else []), "arm", *(["minus"] if baselines else [])]
    lines = [[*head, *(f"{metric.title} `{role}`" for role, metric in columns)]]
    lines.append([*("---" for _ in head), *("---:" for _ in columns)])
    for cell in cells:
        for arm in arms or known["arm"]:
            others: list[str | None] = [name for name in baselines if name != arm] if baselines else [None]
            for baseline in others:
                row = []
                for role, metric in columns:
                    ours = values.get((cell, arm, role, metric.key), {})
                    theirs = None if baseline is None else values.get((cell, baseline, role, metric.key), {})
                    text = _text(ours, theirs, metric, intervals)
                    total = len(runs.get((cell, role, metric.key), ()))
                    # A mean over fewer seeds than its neighbours'; differences say their number anyway
                    row.append(
                        f"{text} ({len(ours)} of {total})" if theirs is None and 0 < len(ours) < total else text
                    )
                if any(row):
                    lines.append([*([cell] if len(cells) > 1 else []), arm, *([baseline] if baseline else []), *row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(ours: dict[str, float], theirs: dict[str, float] | None, metric: Metric, intervals: bool) -> str:
    if not ours:
        return ""
    if theirs is None:
        found = summarize(ours)
        spread = "" if found["sd"] is None else f" ± {found['sd'] * metric.scale:.{metric.digits}f}"
        return _number(found["mean"], metric) + spread
    difference: dict[str, Any] | None = paired_difference(
        ours, theirs, higher_is_better=metric.key in HIGHER_IS_BETTER
    )
    if difference is None:
        return ""
    mean, better = _number(difference["mean"], metric, sign="+"), f"{difference['better']}/{difference['n']}"
    if intervals and difference["low"] is not None:
        low, high = (_number(difference[end], metric, sign="+") for end in ("low", "high"))
        return f"{mean} [{low}, {high}] {better}"
    return f"{mean} {better}{'°' if holds_zero(difference) else ''}"


def _number(value: float, metric: Metric, sign: str = "") -> str:
    # `+ 0.0` keeps a rounded zero from having a sign
    text = f"{round(value * metric.scale, metric.digits) + 0.0:{sign}.{metric.digits}f}"
    return text.replace("-", "−")
