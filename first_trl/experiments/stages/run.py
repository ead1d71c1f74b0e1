"""Running a recipe: all stages, for each of its runs."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import yaml
from filelock import FileLock, Timeout
from transformers.utils import logging as hf_logging

from ...utils.files import write_atomically
from ...utils.names import nearest
from ...utils.processes import process_state
from ...vocabulary import STAGES
from ..recipe import Recipe, cells, merged_folder
from ..report import write_merged_report
from ..run_folder import RunFolder
from .context import RunContext
from .table import STAGE_TABLE
from .training import check_reporting


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
    with one_at_a_time([run.folder for run in runs]):
        return _run_all(recipe, runs, stage)


@contextmanager
def one_at_a_time(folders: list[Path]) -> Iterator[None]:
    """
    Hold the lock of every run's folder; it is released when the process ends, however that is.

    Raises:
        `ValueError`: Another process runs a recipe in one of them.
    """
    with ExitStack() as stack:
        for folder in folders if process_state().is_main_process else []:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(RunFolder(folder).lock, timeout=0))
            except Timeout:
                raise ValueError(
                    f"Another run is at work in {folder}. Wait for it, end it, or give this one another folder "
                    "(--output-dir)."
                ) from None
        yield


@contextmanager
def _loaded_modules_frozen() -> Iterator[None]:
    """
    Every training ends with collections that walk over all modules loaded so far, which takes longer than the training of a
    tiny model. Where the caller has frozen objects, it is left as it is: Python unfreezes all or none.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _run_all(recipe: Recipe, runs: list[Recipe], stage: str | None) -> Path:
    for report_to in {run.report_to for run in runs}:
        check_reporting(report_to)
    with _loaded_modules_frozen():
        for run in runs:
            _run_one(run, stage)
    merged = merged_folder(recipe)
    if merged is None:
        return runs[0].folder
    if recipe.merge and len(runs) > 1 and stage in (None, "report", "share"):
        state = process_state()
        if state.is_main_process:
            report = RunFolder(merged).report
            write_merged_report([run.folder for run in runs], report.path)
            print(f"\nMerged report: {report.markdown}", flush=True)
        state.wait_for_everyone()
    return merged


def _run_one(recipe: Recipe, stage: str | None) -> None:
    run = RunContext(recipe, stage)
    run.workspace.say(f"{recipe.name}, seed {recipe.seed} -> {recipe.folder}")
    if run.is_main:
        write_atomically(run.folder.recipe, yaml.safe_dump(asdict(recipe), sort_keys=False))
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    bars = datasets.is_progress_bar_enabled()
    # One line a unit and the bars of the long loops; a bar for every small map would bury them
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    try:
        for one in STAGE_TABLE:
            run.workspace.say(f"[{one.name}]")
            one.run(run)
            if one.name == stage:
                break
    finally:
        if bars:
            datasets.enable_progress_bars()
            hf_logging.enable_progress_bar()
