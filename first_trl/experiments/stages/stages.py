"""The stages of a recipe, in order, for each of its runs."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import yaml
from transformers.utils import logging as hf_logging

from ...utils.files import write_atomically
from ...utils.names import nearest
from ...utils.processes import process_state
from ..recipe import STAGES, Recipe, cells, merged_folder
from ..report import write_merged_report
from .context import RunContext
from .data import run_data
from .evaluate import run_evaluate
from .recalibrate import run_recalibrate
from .reporting import run_report, run_share
from .students import run_students
from .teachers import run_capture, run_pretrain, run_teacher


_WORK: dict[str, Callable[[RunContext], None]] = {
    "data": run_data,
    "pretrain": run_pretrain,
    "teacher": run_teacher,
    "capture": run_capture,
    "recalibrate": run_recalibrate,
    "students": run_students,
    "evaluate": run_evaluate,
    "report": run_report,
    "share": run_share,
}


def run_recipe(recipe: Recipe, stage: str | None = None) -> Path:
    """
    Run a recipe from teacher to report, for all its seeds and grid values. Finished units are kept, unfinished ones
    continued. The reports of several runs are merged.

    Args:
        recipe ([`Recipe`]): From [`load_recipe`].
        stage (`str`, *optional*): Run one stage only.

    Returns:
        `Path`: Folder of the run, or of all runs; `report/report.md` is what to read first.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"Unknown stage {stage!r}.{nearest(stage, STAGES)}")
    runs = cells(recipe)
    # Every training ends with collections that walk over all modules loaded so far, which takes longer than the training
    # of a tiny model
    gc.collect()
    gc.freeze()
    for run in runs:
        _run_one(run, stage)
    merged = merged_folder(recipe)
    if merged is None:
        return runs[0].folder
    if recipe.merge and len(runs) > 1 and stage in (None, "report", "share"):
        state = process_state()
        if state.is_main_process:
            write_merged_report([run.folder for run in runs], merged / "report")
            print(f"\nMerged report: {merged / 'report' / 'report.md'}", flush=True)
        state.wait_for_everyone()
    return merged


def _run_one(recipe: Recipe, stage: str | None) -> None:
    run = RunContext(recipe, stage)
    run.workspace.say(f"{recipe.name}, seed {recipe.seed} -> {recipe.folder}")
    if run.is_main:
        recipe.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe.folder / "recipe.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False))
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    bars = datasets.is_progress_bar_enabled()
    # One line a unit and the bars of the long loops; a bar for every small map would bury them
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    try:
        for name, work in _WORK.items():
            run.workspace.say(f"[{name}]")
            work(run)
            if name == stage:
                break
    finally:
        if bars:
            datasets.enable_progress_bars()
            hf_logging.enable_progress_bar()
