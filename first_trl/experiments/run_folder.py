"""
The layout of a run's folder. Every path of a run is spelled here and nowhere else.

Words of a run, one meaning each:

- *run*: a recipe with one seed and one combination of grid values. It has one folder.
- *cell*: the combination of grid values of a run; empty for a recipe without a grid of runs.
- *arm*: one row of the report: a teacher, a trained student, or an arm with temperatures behind it.
- *role*: what rows are for (`train`, `validation`, `pretrain`, `threshold`, or an evaluation split), as the recipe's `task.splits`
  names them. A model also has a role, `teacher` or `student`.
- *unit*: the smallest piece of work that is kept or done again: one subfolder with its marker `unit.json`.
- *stage*: units of one kind, in the table of [`stages.table`].
- *share*: to publish what a run has made on the Hub.

```
recipe.yaml                         the recipe of this run, with every default
commits.json                        commits of what comes from the Hub, which stay those of the run
data/                               counts.json, rows/ROLE, tokens/ROLE
base/teacher, base/student          models before fine-tuning, where the run makes them
teacher[-NAME][/fold-I]             fine-tuned teachers
cache[-NAME][/fold-I]               their caches
recalibration[-NAME]/FIT.json       fitted rescales
students/ARM                        trained students
states/ARM                          ROLE.safetensors, layers.json
base_states/teacher, .../student    train.safetensors; of other roles in .../student-ROLE
evaluate/ARM                        ROLE.json, ROLE.parquet, temperature.json, decisions.json, novelty.json, novelty.safetensors
report/                             report.md, report.json and figures
share/                              repositories.json
share.json                          all that was ever shared
```

A folder of a training holds `model/`, `training_log.json`, `versions.json`, `selection.json` and, while it goes on,
`checkpoints/`. The folder of a merged report has `report/` alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..plugins import load_plugins
from ..utils.versions import VERSIONS


if TYPE_CHECKING:
    from datasets import Dataset


MARKER = "unit.json"

DATA, REPORT, SHARE = "data", "report", "share"


def base_unit(role: str) -> str:
    """Unit of the teacher or student before fine-tuning."""
    return f"base/{role}"


def teacher_unit(teacher: str = "", fold: int | None = None) -> str:
    """Unit of a fine-tuned teacher; the plain one has no name."""
    return _of_teacher("teacher", teacher, fold)


def cache_unit(teacher: str = "", fold: int | None = None) -> str:
    """Unit of a teacher's cache; with folds, without `fold`, the folder above them."""
    return _of_teacher("cache", teacher, fold)


def recalibration_unit(teacher: str = "") -> str:
    """Unit of the fits of a teacher."""
    return _of_teacher("recalibration", teacher, None)


def student_unit(arm: str) -> str:
    """Unit of a trained arm."""
    return f"students/{arm}"


def states_unit(arm: str) -> str:
    """Unit of what an arm's model says and how it got there, for the arms with temperatures by novelty behind it."""
    return f"states/{arm}"


def base_states_unit(model: str, role: str = "train") -> str:
    """Unit of what the teacher or student says of the rows of a role before it is fine-tuned."""
    return f"base_states/{model}" + ("" if role == "train" else f"-{role}")


def evaluation_unit(arm: str) -> str:
    """Unit of an arm's scores."""
    return f"evaluate/{arm}"


def _of_teacher(kind: str, teacher: str, fold: int | None) -> str:
    return kind + (f"-{teacher}" if teacher else "") + ("" if fold is None else f"/fold-{fold}")


@dataclass(frozen=True)
class TrainingFolder:
    """Folder of one training: a base model, a teacher or a student."""

    path: Path

    @property
    def model(self) -> Path:
        """Weights, or the adapter."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted training goes on from."""
        return self.path / "checkpoints"

    @property
    def reports(self) -> Path:
        """What `report_to` wrote beside the checkpoints: event files of TensorBoard, emissions of CodeCarbon."""
        return self.path / "logs"

    @property
    def log(self) -> Path:
        """The trainer's log; written last, so that with it the model is whole."""
        return self.path / "training_log.json"

    @property
    def selection(self) -> Path:
        """Which epoch was kept, and why."""
        return self.path / "selection.json"

    @property
    def probe(self) -> Path:
        """Log-probabilities of a few rows, by which a server that holds this model is known."""
        return self.path / "probe.json"

    @property
    def versions(self) -> Path:
        """Libraries of the training."""
        return self.path / VERSIONS

    def steps(self) -> int:
        """Optimiser steps; 0 where nothing was trained."""
        return int(read_json(self.log)[-1]["step"]) if self.log.is_file() else 0

    @property
    def has_model(self) -> bool:
        return (self.model / "config.json").is_file() or self.is_adapter

    @property
    def is_adapter(self) -> bool:
        return adapter_config(self.model).is_file()


def adapter_config(model: Path) -> Path:
    """The file that tells PEFT's adapters from whole models."""
    return model / "adapter_config.json"


@dataclass(frozen=True)
class ReportFolder:
    """Folder of a report, of one run or merged."""

    path: Path

    @property
    def markdown(self) -> Path:
        return self.path / "report.md"

    @property
    def json(self) -> Path:
        return self.path / "report.json"

    @property
    def latex(self) -> Path:
        return self.path / "report.tex"

    @property
    def html(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        """Scores of every run; merged reports only."""
        return self.path / "results.csv.gz"

    def figure(self, name: str) -> Path:
        return self.path / f"{name}.png"


@dataclass(frozen=True)
class RunFolder:
    """
    Paths and loaders of a run.

    Args:
        root (`Path`): Folder of the run: of one seed and one cell.
    """

    root: Path

    # the run

    @property
    def recipe(self) -> Path:
        """The recipe as it was run."""
        return self.root / "recipe.yaml"

    def load_recipe(self) -> dict[str, Any]:
        """The recipe as it was run, its plugins loaded; empty where there is none."""
        found = yaml.safe_load(self.recipe.read_text(encoding="utf-8")) if self.recipe.is_file() else None
        if not isinstance(found, dict):
            return {}
        if found.get("plugins"):
            load_plugins(found["plugins"])
        return found

    @property
    def lock(self) -> Path:
        """Held by the process that runs the recipe."""
        return self.root / ".lock"

    def marker(self, unit: str) -> Path:
        """Key, inputs and state of a unit."""
        return self.root / unit / MARKER

    def load_marker(self, unit: str) -> dict[str, Any]:
        """Key, inputs and state of a unit; empty where it was never begun."""
        path = self.marker(unit)
        return dict(read_json(path)) if path.is_file() else {}

    @property
    def commits(self) -> Path:
        """Commits of the models, tokenizers and datasets of the Hub; a run in another folder takes the newest."""
        return self.root / "commits.json"

    # data

    @property
    def counts(self) -> Path:
        """What became of the rows of each role."""
        return self.root / DATA / "counts.json"

    def rows(self, role: str) -> Path:
        """Rows as the task gives them, of roles that are evaluated on their text."""
        return self.root / DATA / "rows" / role

    def tokens(self, role: str) -> Path:
        """Rows tokenised and labelled."""
        return self.root / DATA / "tokens" / role

    def load_rows(self, role: str) -> "Dataset":
        return _load_dataset(self.rows(role))

    def load_tokens(self, role: str) -> "Dataset":
        return _load_dataset(self.tokens(role))

    # models and caches

    def base(self, role: str) -> TrainingFolder:
        return TrainingFolder(self.root / base_unit(role))

    def teacher(self, teacher: str = "", fold: int | None = None) -> TrainingFolder:
        return TrainingFolder(self.root / teacher_unit(teacher, fold))

    def student(self, arm: str) -> TrainingFolder:
        return TrainingFolder(self.root / student_unit(arm))

    def cache(self, teacher: str = "", fold: int | None = None) -> Path:
        return self.root / cache_unit(teacher, fold)

    def caches(self, teacher: str, folds: int | None, role: str) -> list[Path]:
        """Caches of a teacher that hold a role: one, or one a fold. A fold may have no rows of it."""
        from ..cache.folder import manifest_path

        parts = [self.cache(teacher, fold) for fold in ([None] if folds is None else range(folds))]
        return [part for part in parts if manifest_path(part, role).is_file()]

    # fits

    def fit(self, name: str, teacher: str = "") -> Path:
        """A fitted rescale."""
        return self.root / recalibration_unit(teacher) / f"{name}.json"

    # scores

    def scores(self, arm: str, role: str) -> Path:
        """Report of an arm on a role."""
        return self.root / evaluation_unit(arm) / f"{role}.json"

    def predictions(self, arm: str, role: str) -> Path:
        """One row a prediction, Parquet."""
        return self.scores(arm, role).with_suffix(".parquet")

    def temperature(self, arm: str) -> Path:
        """The fitted post-hoc temperature of an arm that has one."""
        return self.root / evaluation_unit(arm) / "temperature.json"

    def decisions(self, arm: str) -> Path:
        """The post-hoc temperature and the thresholds of a trained arm, or why it has none."""
        return self.root / evaluation_unit(arm) / "decisions.json"

    def states(self, arm: str, role: str) -> Path:
        """Logits and hidden states of an arm's model at the answer positions of a role."""
        return self.root / states_unit(arm) / f"{role}.safetensors"

    def base_states(self, model: str, role: str = "train") -> Path:
        """Logits and hidden states of the teacher or student before fine-tuning, at the answer positions of a role."""
        return self.root / base_states_unit(model, role) / f"{role}.safetensors"

    def agreement(self, arm: str) -> Path:
        """The temperature that an arm got by agreement with the model before fine-tuning."""
        return self.root / evaluation_unit(arm) / "agreement.json"

    def layers(self, arm: str) -> Path:
        """Which layers were read, and which of them are tried where an arm names none."""
        return self.root / states_unit(arm) / "layers.json"

    def novelty(self, arm: str) -> Path:
        """The fitted temperature by novelty of an arm that has one, and how new the evaluated rows are."""
        return self.root / evaluation_unit(arm) / "novelty.json"

    def novelty_reference(self, arm: str) -> Path:
        """Training rows that distances are measured to, with the fit: what is saved beside the weights of its model."""
        return self.novelty(arm).with_suffix(".safetensors")

    # report and what is shared

    @property
    def report(self) -> ReportFolder:
        return ReportFolder(self.root / REPORT)

    @property
    def repositories(self) -> Path:
        """What the stage `share` has shared."""
        return self.root / SHARE / "repositories.json"

    @property
    def shared(self) -> Path:
        """All that was shared of this run, by the stage or by hand."""
        return self.root / "share.json"


def read_json(path: Path) -> Any:
    """
    Raises:
        `ValueError`: The file is no JSON, with its path.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Delete it and run the recipe again.") from error


def _load_dataset(path: Path) -> "Dataset":
    # `datasets` takes long to import, and who reads reports does not need it
    from datasets import Dataset

    return Dataset.load_from_disk(str(path))
