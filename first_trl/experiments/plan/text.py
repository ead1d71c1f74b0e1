"""A plan as text."""

import textwrap
from collections.abc import Sequence

from ...utils.text_tables import text_table
from .schema import MemoryPlan, ModelPlan, Plan, RunPlan, SettingPlan, TrainingPlan


_UNKNOWN = "unknown"
_GROUPS = ("weights", "gradients", "optimizer", "copies", "head", "activations")


_BEGUN = ("done", "running", "changed", "unchecked")


def format_plan(plan: Plan) -> str:
    """
    A plan for reading: one table a section, and what several grid values have in common only once.

    Args:
        plan ([`Plan`]): From [`plan_recipe`].
    """
    lines = [f"Plan of {plan.name}" + ("" if len(plan.runs) == 1 else f": {len(plan.runs)} runs")]
    if plan.description:
        lines += textwrap.wrap(plan.description, 110)
    lines += ["", "Runs", *_runs(plan.runs)]
    if plan.merged is not None:
        lines.append(f"  merged report: {plan.merged}")
    shown: dict[str, str] = {}
    for setting in plan.settings:
        cell = _cell(setting.cell)
        for title, body in _sections(plan, setting):
            text = "\n".join(body)
            if shown.get(title) == text:
                continue
            shown[title] = text
            lines += ["", title + (f", {cell}" if cell else ""), *body]
    lines += _pushes(plan.runs)
    lines += _times(plan)
    last = "Memory is an estimate" + ("." if plan.times else "; time is not estimated (--probe does).")
    lines += ["", f"Nothing was loaded or downloaded. {last}"]
    return "\n".join(lines)


def _times(plan: Plan) -> list[str]:
    if not plan.times:
        return []
    whole = sum(time.seconds for time in plan.times)
    rows = [[time.what, _minutes(time.seconds)] for time in plan.times]
    rows += [["one run", _minutes(whole)]]
    if len(plan.runs) > 1:
        rows += [[f"{len(plan.runs)} runs like the first", _minutes(whole * len(plan.runs))]]
    note = "  A few steps of models of these shapes at the mean row length; fits and figures are not counted."
    return ["", "Time on this machine, at least", *_table(["part", "minutes"], rows), note]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f}" if seconds >= 6 else f"{seconds / 60:.2f}"


def _sections(plan: Plan, setting: SettingPlan) -> list[tuple[str, list[str]]]:
    gpus = f"{plan.processes} process" + ("es" if plan.processes > 1 else "")
    how = gpus if plan.sharding == "none" else f"{gpus}, {plan.sharding}"
    return [
        ("Rows", _splits(setting)),
        ("Models", _models(setting.models)),
        (f"Memory per GPU ({how}), GB", _memory(setting.memory)),
        ("Teacher cache", _caches(setting)),
        (f"Trainings ({gpus})", _trainings(setting.trainings)),
    ]


def _runs(runs: list[RunPlan]) -> list[str]:
    rows = []
    for run in runs:
        statuses = (*_BEGUN, "to do")
        counted = [f"{run.count(status)} {status}" for status in statuses if run.count(status)]
        rows.append([_cell(run.cell) or "-", str(run.seed), run.folder, ", ".join(counted)])
    lines = _table(["cell", "seed", "folder", "units"], rows)
    # One run is told unit by unit, many only where they are neither whole nor untouched
    for run in runs:
        begun = sum(run.count(status) for status in _BEGUN)
        if len(runs) > 1 and (begun == 0 or run.count("done") == len(run.units)):
            continue
        if len(runs) > 1:
            lines.append(f"  {run.folder}:")
        for stage in dict.fromkeys(unit.stage for unit in run.units):
            units = [unit for unit in run.units if unit.stage == stage]
            states: dict[str, list[str]] = {}
            for unit in units:
                states.setdefault(unit.status, []).append(unit.unit.removeprefix(f"{stage}/"))
            told = "; ".join(f"{status}: {', '.join(names)}" for status, names in states.items())
            lines.append(f"  {stage:<12} {told}")
    return lines


def _splits(setting: SettingPlan) -> list[str]:
    rows = [
        [
            split.role,
            f"{split.task} {split.split}",
            _int(split.rows),
            _mean(split.tokens),
            _mean(split.positions),
            _int(split.longest),
            _int(split.all_tokens),
            split.basis,
        ]
        for split in setting.splits
    ]
    header = ["role", "split", "rows", "tokens/row", "supervised/row", "longest", "tokens", "from"]
    lines = _table(header, rows, right=(2, 3, 4, 5, 6))
    lines += [f"  {split.role}: {note}" for split in setting.splits for note in split.notes]
    refused = [(split.role, split.problem.splitlines()[0]) for split in setting.splits if split.problem]
    return lines + [f"  {role}: a run would stop here: {problem}" for role, problem in refused]


def _models(models: list[ModelPlan]) -> list[str]:
    rows = []
    for model in models:
        lora: dict[int, list[str]] = {}
        for name, count in model.lora.items():
            lora.setdefault(count, []).append(name)
        trained = "; ".join(f"LoRA {_count(count)} ({', '.join(names)})" for count, names in lora.items())
        rows.append(
            [model.role, model.name, _count(model.parameters), model.dtype if model.parameters else "", trained]
        )
    lines = _table(["role", "model", "parameters", "dtype", "trainable with LoRA"], rows, right=(2,))
    return lines + [f"  {model.problem}" for model in models if model.problem is not None]


def _memory(plans: list[MemoryPlan]) -> list[str]:
    rows = []
    for plan in plans:
        # Capture has no gradients; activations are left out where the longest row is not known
        absent = {"activations": _UNKNOWN} if plan.parts else {}
        numbers = [_gb(plan.parts[part]) if part in plan.parts else absent.get(part, "") for part in _GROUPS]
        rows.append([plan.activity, *numbers, _UNKNOWN if plan.total is None else _gb(plan.total), plan.note])
    return _table(["activity", *_GROUPS, "total", "for"], rows, right=range(1, len(_GROUPS) + 2))


def _caches(setting: SettingPlan) -> list[str]:
    rows = [
        [
            cache.unit,
            "+".join(cache.roles),
            _int(cache.rows),
            _int(cache.tokens),
            _int(cache.positions),
            _size(cache.bytes),
            cache.note,
        ]
        for cache in setting.caches
    ]
    header = ["cache", "roles", "rows", "tokens read", "positions scored", "size", ""]
    return _table(header, rows, right=(2, 3, 4, 5))


def _trainings(plans: list[TrainingPlan]) -> list[str]:
    rows = [
        [
            plan.unit,
            _int(plan.rows),
            f"{plan.epochs:g}",
            _int(plan.batch),
            _int(plan.steps),
            _int(plan.tokens),
            plan.note,
        ]
        for plan in plans
    ]
    steps = [plan.steps for plan in plans if plan.steps is not None]
    if len(steps) == len(plans) > 1:
        rows.append(["all", "", "", "", f"{sum(steps):,}", "", ""])
    return _table(["training", "rows", "epochs", "batch", "steps", "tokens", ""], rows, right=(1, 2, 3, 4, 5))


def _pushes(runs: list[RunPlan]) -> list[str]:
    first = runs[0].pushes
    if not first:
        return ["", "Nothing is pushed: the recipe has no `hub`."]
    rows = [
        [push["repo_id"], push["kind"], "private" if push["private"] else "public", _size(push["bytes"])]
        for push in first
    ]
    lines = ["", "Pushed to the Hub at the end", *_table(["repository", "kind", "visibility", "size"], rows, (3,))]
    if len(runs) > 1:
        pushes = [push for run in runs for push in run.pushes]
        sizes = [push["bytes"] for push in pushes]
        total = _size(None if None in sizes else sum(sizes))
        lines.append(
            f"  and so for every run, its cell and seed in the names: {len(pushes)} repositories, {total} in all"
        )
    return lines


def _table(header: Sequence[str], rows: list[list[str]], right: Sequence[int] = ()) -> list[str]:
    return text_table(header, rows, right, indent="  ")


def _cell(cell: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in cell.items())


def _int(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _mean(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1f}"


def _count(value: int | None) -> str:
    if value is None:
        return _UNKNOWN
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:,}"


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}" if value >= 5e7 else "<0.1"


def _size(value: int | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value / 1e9:.{2 if value >= 1e7 else 5}f} GB"
