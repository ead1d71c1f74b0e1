"""ECE inside lm-evaluation-harness: a task file that reports it, next to the accuracy."""

import os
import re
from pathlib import Path


_MODULE = '''\
"""Functions of the task files beside this one: the expected calibration error of a multiple-choice task."""

import numpy as np

from first_trl.calibration import expected_calibration_error


N_BINS = {n_bins}


def process_results(doc, results):
    """Accuracy, and (confidence, correct) for the ECE: the softmax over the choices' log-likelihoods."""
    logprobs = np.array([result[0] for result in results], dtype=np.float64)
    probabilities = np.exp(logprobs - logprobs.max())
    probabilities /= probabilities.sum()
    answer = int(probabilities.argmax())
    correct = int(answer == _gold(doc))
    return {{"acc": correct, "ece": (float(probabilities[answer]), correct)}}


def ece(items):
    """Expected calibration error over all documents, {n_bins} bins of equal width."""
    confidence, correct = zip(*items)
    return expected_calibration_error(list(confidence), list(correct), n_bins=N_BINS)


def _gold(doc):
    return {gold}
'''

_TASK = """\
include: {include}
task: {task}
process_results: !function {module}.process_results
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: ece
    aggregation: !function {module}.ece
    higher_is_better: false
"""


def add_ece_to_harness_task(
    base: str | os.PathLike[str],
    *,
    gold: str,
    task: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    n_bins: int = 10,
) -> Path:
    """
    Write a task file for lm-evaluation-harness that reports accuracy and ECE of an existing multiple-choice task.

    Two files are written: `<task>.yaml`, which includes the base task, and `<task>_calibration.py`, with the functions it
    names. Run it with `lm_eval --include_path <output_dir> --tasks <task>`. The harness has no way to add a metric to a
    multiple-choice task without replacing how results are processed, and its standard error for the ECE is N/A.

    Args:
        base (`str` or `os.PathLike`):
            The YAML file of a task with `output_type: multiple_choice`.
        gold (`str`):
            Python expression for the index of the right choice, over `doc`: `doc["gold"]`, `"ABCD".index(doc["answer"])`.
        task (`str`, *optional*):
            Name of the new task. Defaults to the name of the base file with `_ece`.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to write; beside the base file by default.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins.

    Returns:
        `Path`: the task file.

    Raises:
        `ValueError`: for a missing base file, a name that cannot be a module, or a `gold` that is no expression.
    """
    base = Path(base).resolve()
    if not base.is_file():
        raise ValueError(f"There is no task file {base}.")
    folder = Path(output_dir).resolve() if output_dir is not None else base.parent
    task = f"{base.stem}_ece" if task is None else task
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", task):
        raise ValueError(
            f"The task name {task!r} must be letters, digits and underscores: a module is named after it."
        )
    if n_bins < 1:
        raise ValueError(f"`n_bins` must be >= 1, got {n_bins}.")
    try:
        compile(gold, "gold", "eval")
    except SyntaxError as error:
        raise ValueError(f'`gold` must be a Python expression such as doc["gold"], got {gold!r}: {error}.') from None
    folder.mkdir(parents=True, exist_ok=True)
    module = f"{task}_calibration"
    (folder / f"{module}.py").write_text(_MODULE.format(n_bins=n_bins, gold=gold), encoding="utf-8")
    include = base.name if base.parent == folder else str(base)
    path = folder / f"{task}.yaml"
    path.write_text(_TASK.format(include=include, task=task, module=module), encoding="utf-8")
    return path
