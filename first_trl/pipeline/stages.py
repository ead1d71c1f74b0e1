"""The stages of a recipe, in order."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import yaml
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from ..evaluation.multiple_choice import MultipleChoiceResult, evaluate_multiple_choice
from ..evaluation.posthoc import fit_posthoc_temperature
from ..files import write_json
from ..recalibration import fit_recalibration
from ..recipe import STAGES, ArmSpec, Recipe, SplitSpec, nearest
from ..report import write_report
from ..tasks import get_task, tokenize_rows
from ..teacher.cache import load_manifest, load_teacher_cache, store_recalibration
from ..teacher.capture import add_teacher_topk
from .reference import true_posterior
from .training import load_trained, make_model, train_distill, train_sft
from .workspace import Workspace, path_fingerprint


# Row of the report for tasks whose true answer distribution is known
BAYES = "bayes"


def run_recipe(recipe: Recipe, stage: str | None = None) -> Path:
    """
    Run a recipe from teacher to report. Finished units are kept, unfinished ones continued.

    Args:
        recipe ([`Recipe`]): From [`load_recipe`].
        stage (`str`, *optional*): Run one stage only.

    Returns:
        `Path`: Folder of the run; `report/report.md` is what to read first.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"Unknown stage {stage!r}.{nearest(stage, STAGES)}")
    return _Run(recipe, stage).all()


class _Run:
    def __init__(self, recipe: Recipe, stage: str | None) -> None:
        self.recipe = recipe
        self.workspace = Workspace(recipe.folder, stage)
        self.keys: dict[str, str] = {}

    def all(self) -> Path:
        workspace, recipe = self.workspace, self.recipe
        stages: dict[str, Callable[[], None]] = {
            "data": self._data,
            "pretrain": self._pretrain,
            "teacher": self._teacher,
            "capture": self._capture,
            "recalibrate": self._recalibrate,
            "students": self._students,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        workspace.say(f"{recipe.name}, seed {recipe.seed} -> {recipe.folder}")
        if workspace.state.is_main_process:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            (recipe.folder / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
        if recipe.num_threads is not None:
            torch.set_num_threads(recipe.num_threads)
        bars = datasets.is_progress_bar_enabled()
        # One line a unit and the bars of the long loops; a bar for every small map would bury them
        datasets.disable_progress_bars()
        hf_logging.disable_progress_bar()
        try:
            for name, work in stages.items():
                workspace.say(f"[{name}]")
                work()
                if name == workspace.stage:
                    break
        finally:
            if bars:
                datasets.enable_progress_bars()
                hf_logging.enable_progress_bar()
        return recipe.folder

    # data

    def _task(self, spec: SplitSpec) -> Any:
        task = self.recipe.task
        if spec.task is None:
            return get_task(task.name, **{**task.options, **(spec.options or {})})
        return get_task(spec.task, **(spec.options or {}))

    def _path(self, spec: SplitSpec) -> str | None:
        return spec.path or (self.recipe.task.path if spec.task is None else None)

    def tokenizer(self) -> Any:
        name = self.recipe.tokenizer or self.recipe.teacher.name_or_path
        tokenizer = get_task(self.recipe.task.name, **self.recipe.task.options).tokenizer()
        if self.recipe.tokenizer is None and tokenizer is not None:
            return tokenizer
        if name is None:
            raise ValueError(
                f"Task {self.recipe.task.name!r} brings no tokenizer and the teacher is made from scratch: name one "
                "with the recipe's `tokenizer` key."
            )
        return AutoTokenizer.from_pretrained(name, revision=self.recipe.teacher.init_kwargs.get("revision"))

    def _data(self) -> None:
        task = self.recipe.task
        inputs = {
            "task": task,
            "seed": self.recipe.seed,
            "tokenizer": path_fingerprint(self.recipe.tokenizer or self.recipe.teacher.name_or_path),
            "files": [path_fingerprint(self._path(spec)) for spec in task.splits.values()],
        }

        def work(folder: Path) -> None:
            if not self.workspace.state.is_main_process:
                return
            tokenizer = self.tokenizer()
            counts = {}
            for role, spec in task.splits.items():
                split = self._task(spec).load(
                    spec.split,
                    path=self._path(spec),
                    revision=task.revision if spec.task is None else None,
                    limit=spec.limit,
                    seed=self.recipe.seed,
                )
                count = {
                    "read": split.n_read,
                    "not_selected": split.n_not_selected,
                    "rows": len(split.dataset),
                    "dropped": split.reasons,
                }
                if role not in self.recipe.evaluation.splits:
                    tokenized = tokenize_rows(
                        split.dataset,
                        tokenizer,
                        max_length=task.max_length,
                        append_eos=task.append_eos and role != "pretrain",
                        supervise="all" if role == "pretrain" else "completion",
                        on_overflow="truncate_right" if role == "pretrain" else cast(Any, task.on_overflow),
                    )
                    tokenized.dataset.save_to_disk(folder / "tokens" / role)
                    count |= {
                        "rows": tokenized.n_out,
                        "cut": tokenized.n_truncated,
                        "dropped": {**split.reasons, **tokenized.reasons},
                    }
                if role not in ("train", "pretrain"):
                    split.dataset.save_to_disk(folder / "rows" / role)
                counts[role] = count
                self.workspace.say(f"    {role}: {_describe(count)}")
            write_json(folder / "counts.json", counts)

        self.keys["data"] = self.workspace.run("data", "data", inputs, work)

    def rows(self, role: str) -> Dataset:
        return load_from_disk(str(self.recipe.folder / "data" / "rows" / role))

    def tokens(self, role: str) -> Dataset:
        return load_from_disk(str(self.recipe.folder / "data" / "tokens" / role))

    # models before fine-tuning

    def _pretrain(self) -> None:
        for role in ("teacher", "student"):
            spec = getattr(self.recipe, role)
            inputs = {
                "model": [spec.architecture, spec.config, spec.init_kwargs, path_fingerprint(spec.name_or_path)],
                "pretrain": spec.pretrain,
                "seed": self.recipe.seed,
                "data": self.keys["data"],
            }

            def work(folder: Path, spec: Any = spec, role: str = role) -> None:
                tokenizer = self.tokenizer()
                model = make_model(spec, tokenizer, self.recipe.seed, role)
                if spec.pretrain is not None:
                    train_sft(self.recipe, model, tokenizer, self.tokens("pretrain"), spec.pretrain, folder)
                elif self.workspace.state.is_main_process:
                    model.save_pretrained(folder / "model")
                    tokenizer.save_pretrained(folder / "model")

            if spec.pretrain is None and spec.architecture is None:
                self.keys[f"base/{role}"] = json.dumps(inputs["model"])  # used where it is, nothing to make
            else:
                self.keys[f"base/{role}"] = self.workspace.run("pretrain", f"base/{role}", inputs, work)

    def _base(self, role: str) -> Any:
        spec = getattr(self.recipe, role)
        if spec.pretrain is None and spec.architecture is None:
            return make_model(spec, None, self.recipe.seed, role)
        return load_trained(self.recipe.folder / "base" / role / "model", **spec.init_kwargs)

    # teacher

    def _teacher(self) -> None:
        spec = self.recipe.teacher
        if spec.sft is None:
            self.keys["teacher"] = self.keys["base/teacher"]
            return
        inputs = {"sft": spec.sft, "seed": self.recipe.seed, "base": self.keys["base/teacher"]}
        inputs["data"] = self.keys["data"]

        def work(folder: Path) -> None:
            train_sft(
                self.recipe, self._base("teacher"), self.tokenizer(), self.tokens("train"), spec.sft or {}, folder
            )

        self.keys["teacher"] = self.workspace.run("teacher", "teacher", inputs, work)

    def _teacher_model(self) -> Any:
        if self.recipe.teacher.sft is None:
            return self._base("teacher").to(self.workspace.state.device)
        return load_trained(self.recipe.folder / "teacher" / "model", **self.recipe.teacher.init_kwargs)

    def _capture(self) -> None:
        spec = self.recipe.capture
        inputs = {"capture": spec, "teacher": self.keys["teacher"], "data": self.keys["data"]}

        def work(folder: Path) -> None:
            teacher, tokenizer = self._teacher_model(), self.tokenizer()
            for role in ("train", "validation"):
                add_teacher_topk(
                    self.tokens(role), teacher, tokenizer, output_dir=folder, split=role, **asdict(spec)
                )  # fmt: skip

        self.keys["capture"] = self.workspace.run("capture", "cache", inputs, work)

    @property
    def cache(self) -> Path:
        return self.recipe.folder / "cache"

    def _recalibrate(self) -> None:
        spec = self.recipe.recalibration
        inputs = {"recalibration": spec, "cache": self.keys["capture"], "seed": self.recipe.seed}

        def work(folder: Path) -> None:
            if not self.workspace.state.is_main_process:
                return
            validation = load_teacher_cache(self.cache, "validation")
            for method in spec.methods:
                fit = fit_recalibration(
                    validation,
                    method=method,
                    objective=spec.objective,
                    estimator=spec.estimator,
                    positions=spec.positions,
                    n_bins=spec.n_bins,
                    seed=self.recipe.seed,
                )
                store_recalibration(self.cache, "train", method, fit.to_dict())
                write_json(folder / f"{method}.json", fit.to_dict())
                self.workspace.say(
                    f"    {method}: {fit.recalibration.value:g}, teacher's validation ECE "
                    f"{100 * fit.raw.ece:.1f} -> {100 * fit.chosen.ece:.1f}"
                )

        self.keys["recalibrate"] = self.workspace.run("recalibrate", "recalibration", inputs, work)

    # students

    def _students(self) -> None:
        for name, arm in self.recipe.arms.items():
            if arm.kind not in ("sft", "distill"):
                continue
            training = {**self.recipe.training, **arm.training}
            inputs = {
                "arm": {**asdict(arm), "label": None},
                "training": training,
                "seed": self.recipe.seed,
                "base": self.keys["base/student"],
                "data": self.keys["data"],
            }
            if arm.kind == "distill":
                inputs["cache"] = self.keys["capture"]
                if arm.recalibration != "none" and arm.recalibration_value is None:
                    inputs["recalibration"] = self.keys["recalibrate"]
            self.keys[name] = self.workspace.run(
                "students", f"students/{name}", inputs, partial(self._student, arm, training)
            )

    def _student(self, arm: ArmSpec, training: dict[str, Any], folder: Path) -> None:
        student, tokenizer = self._base("student"), self.tokenizer()
        if arm.kind == "sft":
            train_sft(self.recipe, student, tokenizer, self.tokens("train"), training, folder, arm.lora)
        else:
            cache = load_teacher_cache(self.cache, "train")
            train_distill(self.recipe, student, tokenizer, cache, arm, training, folder)

    # evaluation and report

    def _evaluate(self) -> None:
        for name, arm in self.recipe.arms.items():
            inputs = {
                "evaluation": self.recipe.evaluation,
                "data": self.keys["data"],
                "arm": arm.kind,
                "of": arm.of,
                "model": self.keys["teacher" if arm.kind == "teacher" else str(arm.of or name)]
                if self.recipe.arms.get(str(arm.of), arm).kind != "teacher"
                else self.keys["teacher"],
            }
            self.keys[f"evaluate/{name}"] = self.workspace.run(
                "evaluate", f"evaluate/{name}", inputs, partial(self._evaluate_arm, name, arm)
            )
        if "posterior" in self.rows(self.recipe.evaluation.splits[0]).column_names:
            inputs = {"evaluation": self.recipe.evaluation, "data": self.keys["data"], "arm": BAYES}
            self.keys[f"evaluate/{BAYES}"] = self.workspace.run(
                "evaluate", f"evaluate/{BAYES}", inputs, self._evaluate_bayes
            )

    def _evaluate_arm(self, name: str, arm: ArmSpec, folder: Path) -> None:
        if not self.workspace.state.is_main_process:
            return
        source, of = (self.recipe.arms[str(arm.of)], str(arm.of)) if arm.of is not None else (arm, name)
        model = (
            self._teacher_model()
            if source.kind == "teacher"
            else load_trained(self.recipe.folder / "students" / of / "model", **self.recipe.student.init_kwargs)
        )
        tokenizer = self.tokenizer()
        options: dict[str, Any] = {"batch_size": self.recipe.evaluation.batch_size, "disable_tqdm": True}
        temperature = 1.0
        if arm.kind == "temperature_scaling":
            fit = fit_posthoc_temperature(model, tokenizer, self.rows("validation"), **options)
            temperature = fit.temperature
            write_json(folder / "temperature.json", {"temperature": temperature, "objective": "nll"})
        for role in self.recipe.evaluation.splits:
            result = evaluate_multiple_choice(
                model,
                tokenizer,
                self.rows(role),
                temperature=temperature,
                max_length=self.recipe.task.max_length,
                n_bins=self.recipe.evaluation.n_bins,
                **options,
            )
            self._store(result, folder, role)

    def _evaluate_bayes(self, folder: Path) -> None:
        if not self.workspace.state.is_main_process:
            return
        for role in self.recipe.evaluation.splits:
            result = true_posterior(self.rows(role), self.tokenizer(), n_bins=self.recipe.evaluation.n_bins)
            self._store(result, folder, role)

    def _store(self, result: MultipleChoiceResult, folder: Path, role: str) -> None:
        rows = result.predictions["gold"] >= 0
        chance = float((1 / result.predictions["n_choices"][rows]).mean())
        write_json(folder / f"{role}.json", {**result.report, "chance_accuracy": chance})
        Dataset.from_list(result.to_rows()).to_parquet(folder / f"{role}.parquet")
        scores = result.report["full_vocab"]
        self.workspace.say(
            f"    {role}: accuracy {100 * scores['accuracy']:.1f}, ECE {100 * scores['ece']:.1f}, "
            f"n {result.report['n']}"
            + (f", {result.report['n_truncated']} prompts cut" if result.report["n_truncated"] else "")
        )

    def _report(self) -> None:
        arms = [name for name in (*self.recipe.arms, BAYES) if f"evaluate/{name}" in self.keys]
        inputs = {
            "report": self.recipe.report,
            "labels": {name: arm.label for name, arm in self.recipe.arms.items()},
            "results": {name: self.keys[f"evaluate/{name}"] for name in arms},
            "recalibration": self.keys["recalibrate"],
            "description": self.recipe.description,
        }

        def work(folder: Path) -> None:
            if not self.workspace.state.is_main_process:
                return
            root = self.recipe.folder
            write_report(
                folder,
                recipe=self.recipe,
                arms=arms,
                results={
                    name: {
                        role: json.loads((root / "evaluate" / name / f"{role}.json").read_text())
                        for role in self.recipe.evaluation.splits
                    }
                    for name in arms
                },
                temperatures={
                    name: json.loads(path.read_text())["temperature"]
                    for name in arms
                    if (path := root / "evaluate" / name / "temperature.json").is_file()
                },
                fits={
                    method: json.loads((root / "recalibration" / f"{method}.json").read_text())
                    for method in self.recipe.recalibration.methods
                },
                manifest=load_manifest(self.cache, "train"),
                counts=json.loads((root / "data" / "counts.json").read_text()),
                timings=self.workspace.log,
            )

        self.keys["report"] = self.workspace.run("report", "report", inputs, work)
        report = self.recipe.folder / "report" / "report.md"
        self.workspace.say("")
        self.workspace.say(report.read_text(encoding="utf-8") if report.is_file() else "")
        self.workspace.say(f"Report: {report}")


def _describe(count: dict[str, Any]) -> str:
    parts = [f"{count['rows']} rows"]
    if count["not_selected"]:
        parts.append(f"{count['not_selected']} left out by limit")
    if count.get("cut"):
        parts.append(f"{count['cut']} cut to max_length")
    parts += [f"{number} dropped ({reason})" for reason, number in count["dropped"].items()]
    return ", ".join(parts)
