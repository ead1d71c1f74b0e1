"""A finished run in the words of its cards."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from ...cache.folder import load_manifest, manifest_path
from ...cache.manifest import Manifest
from ...calibration import CalibrationWarning
from ...cards.render import hub_id, public_name
from ...cards.scores import Scored, null_of_report, score_result, score_tokens, scores_of_report
from ...cards.wording import shown_arguments
from ...evaluation.predictions import MultipleChoiceResult
from ...vocabulary import BAYES, BAYES_LABEL, role_domain
from ..run_folder import RunFolder, TrainingFolder, cache_unit, read_json, student_unit


if TYPE_CHECKING:
    from ...tasks import Task


_TRAINED = ("sft", "distill")


class Run:
    """
    What a run's folder says about its students.

    Args:
        folder (`Path`): Folder with `recipe.yaml`, `report/report.json` and `students/`.

    Raises:
        `ValueError`: It is no folder of a finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = RunFolder(Path(folder))
        for path in (self.folder.recipe, self.folder.report.json):
            if not path.is_file():
                raise ValueError(
                    f"{folder} is no finished run: {path.relative_to(folder)} is missing. Give the folder "
                    "of one seed, such as outputs/quickstart/seed-0, and finish it with `first-trl run` first."
                )
        self.recipe = self.folder.load_recipe()
        self.report: dict[str, Any] = read_json(self.folder.report.json)
        self.arms: dict[str, dict[str, Any]] = self.recipe["arms"]
        self._scored: dict[tuple[str, str], Scored | None] = {}

    @property
    def students(self) -> list[str]:
        """Arms with weights of their own."""
        return [name for name, arm in self.arms.items() if arm["kind"] in _TRAINED]

    def student(self, arm: str) -> TrainingFolder:
        """
        Raises:
            `ValueError`: The arm has no weights of its own, or they are not there yet.
        """
        folder = self.folder.student(arm)
        if arm not in self.students:
            raise ValueError(f"Arm {arm!r} has no weights of its own. Choose among {', '.join(self.students)}.")
        if not folder.has_model:
            raise ValueError(f"{folder.model} holds no model. Finish the run with `first-trl run` first.")
        return folder

    def label(self, arm: str) -> str:
        """An arm in tables, with its name where another one has the same label."""
        label = self._label(arm)
        same = [name for name in self.report["results"] if self._label(name) == label]
        return f"{label} ({arm})" if len(same) > 1 else label

    def _label(self, arm: str) -> str:
        given = self.report.get("labels", {}).get(arm) or self.arms.get(arm, {}).get("label")
        return str(given or (BAYES_LABEL if arm == BAYES else arm))

    def is_swept(self, arm: str) -> bool:
        """Whether an arm is a point of a sweep, or one number behind such an arm."""
        return bool(self.arms.get(arm, {}).get("swept"))

    def is_other_point(self, name: str, arm: str) -> bool:
        """Whether `name` is a point of a sweep that the card of `arm` is not about."""
        return self.is_swept(name) and arm not in (name, self.arms[name].get("of"))

    @property
    def roles(self) -> list[str]:
        return list(self.recipe["evaluation"]["splits"])

    def domain(self, role: str) -> str:
        """What a score on an evaluation role is a score of."""
        stated = (self.report.get("rows") or {}).get(role, {}).get("domain")
        return role_domain(role, self.roles.index(role), stated)

    def score(self, arm: str, role: str) -> Scored | None:
        """Scores of an arm; `None` where it was not evaluated."""
        if (arm, role) not in self._scored:
            self._scored[arm, role] = self._score(arm, role)
        return self._scored[arm, role]

    def _score(self, arm: str, role: str) -> Scored | None:
        report = self.report["results"].get(arm, {}).get(role)
        if report is None:
            return None
        path = self.folder.predictions(arm, role)
        if not path.is_file():
            return scores_of_report(report)
        table, seed = pq.read_table(path), int(self.recipe.get("seed") or 0)
        if report.get("unit") == "token":
            return score_tokens({name: table[name].to_numpy() for name in table.column_names}, report, seed=seed)
        rows = table.to_pylist()
        n_bins = int(report["full_vocab"]["calibration"]["config"]["n_bins"])
        with warnings.catch_warnings():
            # What they say of small samples stands in the card
            warnings.simplefilter("ignore", CalibrationWarning)
            result = MultipleChoiceResult.from_rows(rows, n_bins=n_bins)
        scored = score_result(result, seed=seed)
        return replace(scored, calibration=scored.calibration | null_of_report(report))

    # models

    @property
    def base_folder(self) -> Path | None:
        """The students' base where only this run (or this machine) has it; `None` for a model on the Hub."""
        made = self.folder.base("student").model
        if made.is_dir():
            return made
        name = self.recipe["student"]["name_or_path"]
        return Path(name) if name and Path(name).is_dir() else None

    @property
    def base_hub_id(self) -> str | None:
        return None if self.base_folder is not None else hub_id(self.recipe["student"]["name_or_path"])

    def teacher(self, arm: str) -> TrainingFolder:
        """
        A teacher that this run has fine-tuned or made.

        Raises:
            `ValueError`: There are none, they are several, or they are an adapter on a base that nobody else has.
        """
        name, spec, base = self._teacher(arm), self.recipe["teacher"], self.folder.base("teacher")
        folder = self.folder.teacher(name)
        if not name and not folder.model.is_dir():
            folder = base
        if not folder.model.is_dir():
            raise ValueError(
                f"Arm {arm!r} has no weights in this run: its teacher is {spec['name_or_path']!r} as it is, or one "
                "teacher a fold. Leave it out of `arms`."
            )
        own_base = base.path.is_dir() or hub_id(spec["name_or_path"]) is None
        if own_base and folder.is_adapter:
            raise ValueError(
                f"The teacher of arm {arm!r} is an adapter on a model that is on this machine alone. Push that model "
                "first and name it in the recipe, or leave the teacher out of `arms`."
            )
        return folder

    def model_text(self, role: str) -> str:
        """The recipe's teacher or student in words."""
        spec = self.recipe[role]
        name = spec["name_or_path"]
        revision = (spec.get("init_kwargs") or {}).get("revision")
        at = f" at `{revision}`" if revision else ""
        if name is None:
            text = f"a `{spec['architecture']}` made from scratch"
        elif hub_id(name):
            text = f"[{name}](https://huggingface.co/{name}){at}"
        else:
            text = f"a local model, `{public_name(name)}`"
        # Runs from before layers could be left out say nothing about them
        if layers := spec.get("keep_layers"):
            text = f"the first {layers} layers of {text}"
        return text + (", pre-trained in the same run" if spec.get("pretrain") else "")

    def teacher_text(self, arm: str | None) -> str:
        """The teacher of an arm in words, with its fine-tuning; `None` stands for the recipe's own."""
        spec, name = self.recipe["teacher"], self._teacher(arm)
        variant = self.recipe["teachers"][name] if name else {}
        parts = [self.model_text("teacher")]
        if spec.get("sft") is not None:
            parts.append("fine-tuned on the training rows")
        if variant.get("folds"):
            by = "rows" if variant.get("fold_by") == "id" else "groups of rows"
            parts.append(
                f"{variant['folds']} times, each without one share of the {by}: a row is cached from the one that has not "
                "seen it"
            )
        if (variant if name else spec).get("select") == "nll":
            parts.append("epoch with the lowest negative log-likelihood on the validation rows")
        if variant.get("committee"):
            members = ", ".join(f"`{member}`" for member in variant["committee"])
            parts.append(f"as a committee: the mean distribution of the teachers {members}")
        changed = ", ".join(f"`{key}` {value}" for key, value in shown_arguments(variant.get("sft") or {}).items())
        if name:
            parts.append(f"teacher `{name}` of the recipe" + (f" with {changed}" if changed else ""))
        return ", ".join(parts)

    def teacher_name(self, arm: str | None) -> str:
        """The teacher of an arm in a few words, for a heading."""
        spec, name = self.recipe["teacher"], self._teacher(arm)
        path = spec["name_or_path"]
        text = f"{spec['architecture']} made from scratch" if path is None else public_name(path)
        text += ", fine-tuned" if spec.get("sft") is not None else ""
        return f"{text} ({name})" if name else text

    def _teacher(self, arm: str | None) -> str:
        return (self.arms[arm].get("teacher") if arm else None) or ""

    def versions(self, arm: str) -> dict[str, str]:
        """Libraries that the arm was trained with."""
        file = self.student(arm).versions
        return dict(read_json(file)) if file.is_file() else {}

    # cache

    def cache_folder(self, arm: str | None = None) -> Path:
        """Cache of an arm's teacher, or of the plain one; with folds, the folder above them."""
        return self.folder.cache(self._teacher(arm))

    def caches(self, arms: list[str]) -> dict[str, str | None]:
        """
        Caches that can be shared: the plain one, and those of further teachers of the arms. With folds there is one a
        fold, and no whole.

        Returns:
            `dict`: Name of the folder -> an arm that learned from it, `None` for the plain one.
        """
        found: dict[str, str | None] = {cache_unit(): None}
        for arm in arms:
            folder = self.cache_folder(arm)
            if self.arms[arm]["kind"] == "distill" and manifest_path(folder, "train").parent.is_dir():
                found.setdefault(folder.name, arm)
        return found

    def manifests(self, arm: str) -> list[Manifest]:
        """Manifests of what an arm was trained on, over its roles and folds."""
        name = self._teacher(arm)
        variants = self.recipe["teachers"]
        # Members of a committee are all made of the same folds
        first = ((variants[name].get("committee") if name else None) or [name])[0]
        folds = variants.get(first, {}).get("folds")
        roles = self.arms[arm].get("data") or ["train"]
        return [load_manifest(part, role) for role in roles for part in self.folder.caches(name, folds, role)]

    def fit(self, arm: str) -> dict[str, Any] | None:
        """The fitted rescale that an arm was trained with; `None` where there is none, or its value was given."""
        spec = self.arms[arm]
        if spec["recalibration"] == "none" or spec["recalibration_value"] is not None:
            return None
        name = (self.report["arms"].get(arm) or {}).get("fit")
        found: dict[str, Any] | None = self.report["recalibration"].get(name)
        return found

    def unit(self, arm: str) -> dict[str, Any]:
        """Inputs of an arm's training, as the run recorded them."""
        inputs: dict[str, Any] = self.folder.load_marker(student_unit(arm)).get("inputs", {})
        return inputs

    # data

    def source_text(self, role: str) -> str:
        """Where the rows of a role come from, in words."""
        source = self.source(role)
        text = (
            f"[{source['id']}](https://huggingface.co/datasets/{source['id']})"
            if source["id"]
            else f"task `{source['name']}`"
        )
        return f"{text}, split `{source['split']}`"

    def task(self, role: str) -> tuple[str, dict[str, Any]]:
        """Name and options of the task that the rows of a role are of."""
        task, spec = self.recipe["task"], self.recipe["task"]["splits"][role]
        return spec["task"] or task["name"], {
            **(task["options"] if not spec["task"] else {}),
            **(spec["options"] or {}),
        }

    def make_task(self, role: str) -> "Task":
        """The task that the rows of a role are of."""
        # Tasks import the tokenizer library, which the cards of a cache do not need
        from ...tasks import get_task

        name, options = self.task(role)
        return get_task(name, **options)

    def source(self, role: str) -> dict[str, Any]:
        """Where the rows of a role come from: `name`, `id`, `config` and `revision` on the Hub, `split`, and `bundled`
        for rows that the task brings with it."""
        task, spec = self.recipe["task"], self.recipe["task"]["splits"][role]
        path = spec["path"] or (task["path"] if not spec["task"] else None)
        benchmark = self.make_task(role)
        place: dict[str, Any] = {
            "name": self.task(role)[0],
            "id": hub_id(path),
            "config": benchmark.hub_config,
            "revision": None,
            "split": spec["split"],
            "bundled": path is None and benchmark.hub_id is None,
        }
        if path is None:
            place["id"] = benchmark.hub_id
        if place["id"] is None:
            place["config"] = None
        elif not spec["task"]:
            place["revision"] = task["revision"]
        return place
