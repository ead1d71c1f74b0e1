"""Rows of our own in the formats of the benchmarks, and slices of them that leave no role empty."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...tasks import get_task
from ...tasks.mmlu_category import SUBJECTS
from ..recipe import SplitSpec, TaskSpec


DATA = Path(__file__).parent / "data"
# Task -> its rows. Other tasks make their rows themselves.
_FILES = {
    "alpaca": "alpaca/alpaca_data.json",
    "arc": "arc",
    "boolq": "boolq",
    "commonsense_qa": "commonsense_qa",
    "custom": "custom",
    "mmlu": "mmlu",
    "openbook_qa": "openbook_qa",
    "system_one": "system_one",
}
# Rows a role of other tasks
_LIMIT = 24
# Options that pick rows, which ours do not have
_ROW_OPTIONS = {"mmlu": ("subject",)}
_BOUND = r"-?\d+(?:\.\d+)?%?"
_SLICE = re.compile(rf"(?P<name>[^\[\]]+)\[\s*(?P<start>{_BOUND})?\s*:\s*(?P<end>{_BOUND})?\s*\]")


def has_rows(task: str) -> bool:
    """Whether a task reads text that only our tokenizer of a smoke run covers."""
    return task in _FILES or task == "mmlu_field"


def smoke_task(task: TaskSpec, folder: Path) -> TaskSpec:
    """
    A recipe's task on the packaged rows, with the same roles and options, and slices in proportion.

    Args:
        task ([`~first_trl.experiments.recipe.TaskSpec`]):
            The recipe's.
        folder (`Path`):
            Where rows are written for a task whose splits have fixed sizes.
    """
    slices = _Slices(task)
    splits = {}
    for role, spec in task.splits.items():
        name = spec.task or task.name
        splits[role] = SplitSpec(
            split=slices.scaled(spec),
            task=spec.task,
            path=None if spec.task is None else _path(spec.task, folder),
            options=_options(name, spec.options),
            limit=small_limit(spec.limit) if spec.limit is not None or name not in _FILES else None,
            unseen=spec.unseen,
        )
    return TaskSpec(
        name=task.name,
        splits=splits,
        path=_path(task.name, folder),
        options=_options(task.name, task.options) or {},
        # Our tokenizer has few words, so the same text is longer
        max_length=None if task.max_length is None else 512,
        on_overflow=task.on_overflow,
        append_eos=task.append_eos,
    )


def small_limit(limit: int | None) -> int:
    """A limit within the rows there are."""
    return _LIMIT if limit is None else min(limit, _LIMIT)


def _path(task: str, folder: Path) -> str | None:
    if task in ("mmlu_category", "mmlu_field"):
        return str(write_mmlu_questions(folder / "mmlu_questions"))
    return str(DATA / _FILES[task]) if task in _FILES else None


def _options(task: str, options: dict[str, Any] | None) -> dict[str, Any] | None:
    if options is None:
        return None
    return {key: value for key, value in options.items() if key not in _ROW_OPTIONS.get(task, ())}


def write_mmlu_questions(folder: Path) -> Path:
    """
    Questions of all 57 subjects of MMLU in its original format. The task cuts splits of fixed sizes out of the whole test
    split, so there are 160 a subject; the recipe's limits keep a few.
    """
    if folder.is_dir():
        return folder
    lines = {}
    for subject in (subject for subjects in SUBJECTS.values() for subject in subjects):
        words = subject.replace("_", " ")
        lines[subject] = "".join(
            f"Which of these belongs to lesson {number} of {words}?,a kettle,a ladder,a lantern,a snail,{'ABCD'[number % 4]}\n"
            for number in range(160)
        )
    part = folder.with_name(f"{folder.name}.part")
    (part / "test").mkdir(parents=True, exist_ok=True)
    for subject, text in lines.items():
        (part / "test" / f"{subject}_test.csv").write_text(text, encoding="utf-8")
    # Whole or not at all: a run is continued with the rows it was started with
    part.rename(folder)
    return folder


class _Slices:
    """
    Slices of big files on small ones: bounds keep their order and their place, and every part keeps at least two rows
    where the file has enough.
    """

    def __init__(self, task: TaskSpec) -> None:
        self.task = task
        self.bounds: dict[tuple[str, str], dict[float, int]] = {}
        parts: dict[tuple[str, str], list[str]] = {}
        for spec in task.splits.values():
            found = _SLICE.fullmatch(spec.split)
            if found and self._name(spec) in _FILES:
                parts.setdefault((self._name(spec), found["name"]), []).extend(
                    [found["start"] or "0%", found["end"] or "100%"]
                )
        self.largest = {key: _largest(texts) for key, texts in parts.items()}
        for (name, split), texts in parts.items():
            n = get_task(name).load(split, path=str(DATA / _FILES[name])).n_read
            self.bounds[name, split] = _spread(sorted({_share(text, self.largest[name, split]) for text in texts}), n)

    def _name(self, spec: SplitSpec) -> str:
        return spec.task or self.task.name

    def scaled(self, spec: SplitSpec) -> str:
        found = _SLICE.fullmatch(spec.split)
        key = (self._name(spec), found["name"] if found else "")
        if found is None or key not in self.bounds:
            return spec.split
        start, end = (
            self.bounds[key][_share(text, self.largest[key])]
            for text in (found["start"] or "0%", found["end"] or "100%")
        )
        return f"{found['name']}[{start}:{end}]"


def _largest(texts: Iterable[str]) -> float:
    return max((abs(float(text)) for text in texts if not text.endswith("%")), default=0.0) or 1.0


def _share(text: str, largest: float) -> float:
    """
    Place of a bound in the file, 0 to 1. How many rows the real file has is not known: counts from the start divide the
    first four fifths, counts from the end the last fifth.
    """
    if text.endswith("%"):
        value = float(text.rstrip("%")) / 100.0
    else:
        value = float(text) * (0.2 if text.startswith("-") else 0.8) / largest
    return round(1.0 + value if text.startswith("-") else value, 9)


def _spread(shares: list[float], n: int) -> dict[float, int]:
    least = min(2, n // max(len(shares) - 1, 1))
    bounds = [round(share * n) for share in shares]
    for i in range(1, len(bounds)):
        bounds[i] = max(bounds[i], bounds[i - 1] + least)
    bounds[-1] = min(bounds[-1], n)
    for i in reversed(range(len(bounds) - 1)):
        bounds[i] = min(bounds[i], bounds[i + 1] - least)
    return dict(zip(shares, bounds, strict=True))
