"""Stages `pretrain`, `teacher` and `capture`: the models students and teachers start from, the teachers, their caches."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ...cache.folder import load_teacher_cache
from ...teacher.backends import TransformersBackend, VLLMBackend
from ...teacher.capture import add_teacher_topk
from ..recipe import ArmSpec, ModelSpec, TeacherSpec
from .context import RunContext
from .training import load_trained, make_model, place, train_sft
from .workspace import path_fingerprint


@dataclass(frozen=True)
class Teacher:
    """One teacher of a recipe: the plain one (`name` is empty), or one of `teachers`."""

    name: str
    sft: dict[str, Any] | None
    select: str | None
    folds: int | None
    fold_by: str

    @property
    def suffix(self) -> str:
        return f"-{self.name}" if self.name else ""

    @property
    def parts(self) -> list[str]:
        """Subfolders of its models and caches: one, or one a fold."""
        return [""] if self.folds is None else [f"/fold-{i}" for i in range(self.folds)]


def teachers(run: RunContext) -> list[Teacher]:
    """The recipe's teacher and the further ones that an arm names."""
    spec = run.recipe.teacher
    plain = Teacher("", spec.sft, spec.select, None, "group")
    named = {arm.teacher for arm in run.recipe.arms.values()}
    variants = run.recipe.teachers.items()
    return [plain, *(_variant(name, spec, variant) for name, variant in variants if name in named)]


def teacher_of(run: RunContext, arm: ArmSpec) -> Teacher:
    return next(teacher for teacher in teachers(run) if teacher.name == (arm.teacher or ""))


def _variant(name: str, spec: ModelSpec, variant: TeacherSpec) -> Teacher:
    return Teacher(name, {**(spec.sft or {}), **variant.sft}, variant.select, variant.folds, variant.fold_by)


# models before fine-tuning


def run_pretrain(run: RunContext) -> None:
    for role in ("teacher", "student"):
        spec = getattr(run.recipe, role)
        inputs = {
            "model": [
                spec.architecture if spec.from_scratch else None,
                spec.config,
                spec.init_kwargs,
                path_fingerprint(spec.name_or_path),
            ],
            "pretrain": spec.pretrain,
            "seed": run.recipe.seed,
            # The tokenizer, of which a model from scratch has as many rows, is part of every role's key
            "data": [run.keys[f"data/{role}"] for role in ("train", *(["pretrain"] if spec.pretrain else []))],
        }
        if spec.pretrain is None and not spec.from_scratch:
            run.keys[f"base/{role}"] = json.dumps(inputs["model"])  # used where it is, nothing to make
        else:
            run.keys[f"base/{role}"] = run.workspace.run(
                "pretrain", f"base/{role}", inputs, partial(_make_base, run, role)
            )


def _make_base(run: RunContext, role: str, folder: Path) -> None:
    spec, tokenizer = getattr(run.recipe, role), run.tokenizer()
    model = make_model(spec, tokenizer, run.recipe.seed, role)
    if spec.pretrain is not None:
        train_sft(run.recipe, model, tokenizer, run.tokens("pretrain"), spec.pretrain, folder)
    elif run.is_main:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def base_model(run: RunContext, role: str) -> Any:
    """Teacher or student before fine-tuning."""
    spec = getattr(run.recipe, role)
    if spec.pretrain is None and not spec.from_scratch:
        return make_model(spec, None, run.recipe.seed, role)
    # By its whole path: adapters keep it, and are loaded from other working folders too
    return load_trained(run.folder.resolve() / "base" / role, spec, lambda: None)


# teachers


def run_teacher(run: RunContext) -> None:
    spec = run.recipe.teacher
    for teacher in teachers(run):
        for fold, part in enumerate(teacher.parts):
            unit = f"teacher{teacher.suffix}{part}"
            if teacher.sft is None:
                run.keys[unit] = run.keys["base/teacher"]
                continue
            inputs = {
                "sft": teacher.sft,
                "lora": spec.lora,
                "select": teacher.select,
                "fold": None if teacher.folds is None else [fold, teacher.folds, teacher.fold_by],
                "seed": run.recipe.seed,
                "base": run.keys["base/teacher"],
                "data": [run.keys[f"data/{role}"] for role in ("train", *(["validation"] if teacher.select else []))],
            }
            run.keys[unit] = run.workspace.run("teacher", unit, inputs, partial(_fine_tune, run, teacher, fold))


def _fine_tune(run: RunContext, teacher: Teacher, fold: int, folder: Path) -> None:
    rows = run.tokens("train")
    if teacher.folds is not None:
        rows = rows.select(np.flatnonzero(fold_numbers(run, teacher, "train") != fold))
    train_sft(
        run.recipe,
        base_model(run, "teacher"),
        run.tokenizer(),
        rows,
        teacher.sft or {},
        folder,
        lora=run.recipe.teacher.lora,
        validation=run.tokens("validation") if teacher.select else None,
    )


def fold_numbers(run: RunContext, teacher: Teacher, role: str) -> np.ndarray:
    """
    Fold of every row of a role: the number of the teacher that did not see its key in training. Keys that no training
    row has were seen by none of them and are dealt out evenly.
    """
    assert teacher.folds is not None
    keys = sorted(set(run.tokens("train")[teacher.fold_by]))
    order = np.random.default_rng(run.recipe.seed).permutation(len(keys))
    fold_of = {key: int(place) % teacher.folds for key, place in zip(keys, order, strict=True)}
    if len(keys) < teacher.folds:
        raise ValueError(
            f"teachers.{teacher.name}: {teacher.folds} folds need as many values of {teacher.fold_by!r}, the training "
            f"rows have {len(keys)}. Choose fold_by: id, or fewer folds."
        )
    column = run.tokens(role)[teacher.fold_by]
    return np.array([fold_of.get(key, i % teacher.folds) for i, key in enumerate(column)])


def teacher_model(run: RunContext, teacher: Teacher, part: str = "") -> Any:
    """A fine-tuned teacher on this process's device."""
    if teacher.sft is None:
        return place(base_model(run, "teacher"))
    folder = run.folder / f"teacher{teacher.suffix}{part}"
    return load_trained(folder, run.recipe.teacher, lambda: base_model(run, "teacher"))


# caches


def captured_roles(run: RunContext, teacher: Teacher) -> list[str]:
    """Roles that a teacher is run over: what its students train on, and what its rescale is fitted on."""
    arms = [arm for arm in run.recipe.arms.values() if arm.kind == "distill" and (arm.teacher or "") == teacher.name]
    if teacher.name and not arms:
        return []  # evaluated only
    # The plain teacher's cache is part of the result, whether an arm uses it or not
    roles = dict.fromkeys(["train", "validation"] if not teacher.name else ["validation"])
    for arm in arms:
        roles |= dict.fromkeys(arm.data)
    return list(roles)


def run_capture(run: RunContext) -> None:
    for teacher in teachers(run):
        for fold, part in enumerate(teacher.parts if captured_roles(run, teacher) else []):
            spec = run.recipe.capture
            inputs = {
                # What enters the entries; how the work is cut or where it is served may change on the way
                "capture": [spec.k, spec.logprob_dtype, spec.num_draws, spec.vllm_url is not None, spec.vllm_model],
                "teacher": run.keys[f"teacher{teacher.suffix}{part}"],
                "data": {role: run.keys[f"data/{role}"] for role in captured_roles(run, teacher)},
            }
            unit = f"cache{teacher.suffix}{part}"
            run.keys[unit] = run.workspace.run("capture", unit, inputs, partial(_capture, run, teacher, fold))


def _capture(run: RunContext, teacher: Teacher, fold: int, folder: Path) -> None:
    options = asdict(run.recipe.capture)
    url, served = options.pop("vllm_url"), options.pop("vllm_model")
    tokenizer, part = run.tokenizer(), teacher.parts[fold]
    backend: Any
    if url is not None:
        backend = _served_teacher(run, teacher, part, url, served)
    else:
        backend = TransformersBackend(teacher_model(run, teacher, part))
    selection = run.folder / f"teacher{teacher.suffix}{part}" / "selection.json"
    if selection.is_file():
        chosen = json.loads(selection.read_text(encoding="utf-8"))
        backend.notes = [*backend.notes, _selection_note(chosen)]
    for role in captured_roles(run, teacher):
        rows = run.tokens(role)
        if teacher.folds is not None:
            rows = rows.select(np.flatnonzero(fold_numbers(run, teacher, role) == fold))
            if len(rows) == 0:
                continue
        add_teacher_topk(rows, backend, tokenizer, output_dir=folder, split=role, **options)


def _served_teacher(run: RunContext, teacher: Teacher, part: str, url: str, served: str | None) -> VLLMBackend:
    folder = run.folder / f"teacher{teacher.suffix}{part}" / "model"
    how = f"vllm serve {folder if teacher.sft is not None else run.recipe.teacher.name_or_path} --max-logprobs 20"
    if teacher.sft is not None and run.recipe.teacher.lora is not None:
        how = (
            f"vllm serve {run.recipe.teacher.name_or_path} --max-logprobs 20 --enable-lora --lora-modules "
            f"teacher={folder}\n(and capture.vllm_model=teacher)"
        )
    try:
        return VLLMBackend(url, served)
    except OSError as error:
        raise ValueError(
            f"No vLLM server answers at {url} ({error}). Serve the teacher, for example with\n  {how}\nand run the same "
            "command again: what is finished is kept."
        ) from None


def _selection_note(chosen: dict[str, Any]) -> str:
    return (
        f"Teacher selected by negative log-likelihood on the validation rows: {chosen['nll']:.4f} after epoch "
        f"{chosen['epoch']:g} of {chosen['epochs']:g}."
    )


def load_cache(run: RunContext, teacher: Teacher, role: str) -> Dataset:
    """Rows of a role with the teacher's entries, over all folds."""
    folders = [run.folder / f"cache{teacher.suffix}{part}" for part in teacher.parts]
    parts = [load_teacher_cache(path, role) for path in folders if (path / "manifest" / f"{role}.json").is_file()]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
