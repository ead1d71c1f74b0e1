"""Finding the runs to merge, and refusing those that do not belong together."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...vocabulary import BAYES
from ..run_folder import REPORT, ReportFolder, RunFolder, read_json


MERGED_FORMAT = "first_trl.merged_report"

# Keys of a recipe that two runs of one experiment may differ in: what tells runs apart, where things lie, what is said
# about them, and how the work is cut into pieces. Arms are compared one by one, since a run may lack some.
_FREE = frozenset((
    "seed", "seeds", "grid", "cases", "cell", "output_dir", "num_threads", "report", "report_to", "description",
    "reproduces", "hub", "arms",
))  # fmt: skip
_FREE_LEAVES = frozenset((
    "label", "batch_size", "max_tokens_per_batch", "shard_size", "vllm_url", "vllm_model", "vllm_concurrency",
    "per_device_eval_batch_size", "gradient_checkpointing", "dataloader_num_workers", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit",
))  # fmt: skip
# Where one number says how many rows make a step, how they are cut into pieces changes nothing
_STEP_SIZE = "global_batch_size"
_PIECES = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
# Models and files may lie elsewhere on another machine
_PLACES = frozenset({"name_or_path", "path", "tokenizer"})


@dataclass(frozen=True)
class FinishedRun:
    """
    One finished run.

    Attributes:
        folder (`Path`): Where it lies.
        name (`str`): The folder as the merged report calls it.
        data (`dict`): Its `report/report.json`.
        recipe (`dict`): Its `recipe.yaml`; empty when there is none.
    """

    folder: Path
    name: str
    data: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.data["seed"])

    @property
    def cell(self) -> dict[str, Any]:
        return self.data.get("cell") or {}

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Arm -> its settings, with `base` and `values` for the arms of a sweep."""
        arms: dict[str, dict[str, Any]] = self.data["arms"]
        return arms


def cell_title(cell: Mapping[str, Any]) -> str:
    """The grid values of a run, as `key = value`; the name of a case stands alone."""
    return ", ".join(str(value) if key == "case" else f"{key} = {value}" for key, value in cell.items())


def default_parent(folders: Sequence[Path]) -> Path:
    """The folder that holds all runs."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def find_runs(folders: Iterable[Path | str]) -> list[Path]:
    """
    Folders with a finished run (`report/report.json`) below the given ones, each once, in the order of their paths.
    Merged reports are passed over.

    Raises:
        `ValueError`: A folder that does not exist or holds no finished run.
    """
    found: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}: give folders of runs, or folders that hold some.")
        # Not `rglob`, which fails when a run that is still going removes its checkpoints meanwhile
        places = (ReportFolder(Path(place)) for place, *_ in os.walk(folder.resolve()) if Path(place).name == REPORT)
        reports = [report for report in places if report.json.is_file()]
        here = {report.path.parent for report in reports if _read_report(report).get("format") != MERGED_FORMAT}
        if not here:
            raise ValueError(
                f"No finished run below {folder}: a run is finished when it has a report/report.json. "
                "Make one with `first-trl run`."
            )
        found |= here
    return sorted(found)


def load_runs(folders: Sequence[Path], relative_to: Path) -> list[FinishedRun]:
    """
    Read runs, sorted by cell (numbers by size) and seed.

    Raises:
        `ValueError`: A file that is no report of a run, or runs that cannot be merged; the message names them.
    """
    runs = [_load(folder, relative_to) for folder in folders]
    runs.sort(key=lambda run: (_cell_order(run.cell), run.seed, run.name))
    check_runs(runs)
    return runs


def _load(folder: Path, relative_to: Path) -> FinishedRun:
    run = RunFolder(folder)
    data = _read_report(run.report)
    missing = [key for key in ("recipe", "seed", "n_bins", "arms", "results") if key not in data]
    if missing:
        raise ValueError(f"{run.report.json} is no report of a run: it has no {', '.join(missing)}.")
    name = Path(os.path.relpath(folder.resolve(), relative_to.resolve())).as_posix()
    return FinishedRun(folder, name, data, run.load_recipe())


def _read_report(report: ReportFolder) -> dict[str, Any]:
    data = read_json(report.json)
    if not isinstance(data, dict):
        raise ValueError(f"{report.json} is no report of a run: it holds a {type(data).__name__}.")
    return data


def _cell_order(cell: Mapping[str, Any]) -> list[tuple[str, int, float, str]]:
    return [
        (key, 0, float(value), "") if is_number(value) else (key, 1, 0.0, str(value)) for key, value in cell.items()
    ]


def is_number(value: Any) -> bool:
    """Whether a value of a grid can be put on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_runs(runs: Sequence[FinishedRun]) -> None:
    """
    Refuse runs whose numbers must not be averaged or compared.

    Raises:
        `ValueError`: Different recipes, bins, settings or arms, or one cell and seed twice.
    """
    first = runs[0]
    cells: dict[str, list[FinishedRun]] = {}
    seen: dict[tuple[str, int], FinishedRun] = {}
    for run in runs:
        if run.data["recipe"] != first.data["recipe"]:
            raise ValueError(
                f"{first.name} is a run of the recipe {first.data['recipe']!r}, {run.name} one of {run.data['recipe']!r}: "
                "merge the runs of one recipe at a time."
            )
        if run.data["n_bins"] != first.data["n_bins"]:
            raise ValueError(
                f"{first.name} has ECE over {first.data['n_bins']} bins, {run.name} over {run.data['n_bins']}: such "
                "numbers cannot be compared. Evaluate both with one `evaluation.n_bins`."
            )
        title = cell_title(run.cell)
        where = f" of {title}" if title else ""
        if (other := seen.setdefault((title, run.seed), run)) is not run:
            raise ValueError(f"{other.name} and {run.name} are both seed {run.seed}{where}: give one of them.")
        others = cells.setdefault(title, [])
        # All of them: what the first does not state may differ between later ones
        for other in others:
            _check_settings(other, run)
        others.append(run)
        shared = (others[0].data["results"].keys() & run.data["results"].keys()) - {BAYES}
        if not shared and run is not others[0]:
            raise ValueError(f"{others[0].name} and {run.name} have no arm in common: there is nothing to average.")


def _check_settings(reference: FinishedRun, run: FinishedRun) -> None:
    """Two seeds of one cell."""
    changed = _first_change(
        {key: value for key, value in reference.recipe.items() if key not in _FREE},
        {key: value for key, value in run.recipe.items() if key not in _FREE},
    )
    if changed is None:
        for name, spec in reference.arms.items():
            changed = changed or _first_change(spec, run.arms.get(name, {}), f"arms.{name}.")
    if changed is not None:
        key, one, two = changed
        raise ValueError(
            f"{reference.name} was run with {key} = {one!r}, {run.name} with {two!r}: these are different "
            "experiments. Put the key into the recipe's `grid`, or merge them apart."
        )


def _first_change(one: Mapping[str, Any], two: Mapping[str, Any], where: str = "") -> tuple[str, Any, Any] | None:
    # A key that only one has is no change: it has its default in a recipe of an older version
    for key in one:
        if key not in two or key in _FREE_LEAVES:
            continue
        if key in _PIECES and one.get(_STEP_SIZE) is not None and two.get(_STEP_SIZE) is not None:
            continue
        left, right = one[key], two[key]
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            if (inner := _first_change(left, right, f"{where}{key}.")) is not None:
                return inner
        elif key in _PLACES and isinstance(left, str) and isinstance(right, str):
            if not _same_place(left, right):
                return f"{where}{key}", left, right
        elif left != right:
            return f"{where}{key}", left, right
    return None


def _same_place(one: str, two: str) -> bool:
    # Two names on the Hub are two models; a folder may be a copy of what bears its name
    if Path(one).is_absolute() or Path(two).is_absolute():
        return Path(one).name == Path(two).name
    return one == two
