"""Stage `capture`: the caches of the teachers."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ...cache.choices import CHOICE_IDS, add_soft_labels, only_answers, restrict_to_choices
from ...cache.folder import load_teacher_cache
from ...cache.schema import MUTUAL_INFORMATION
from ...cache.verify import verify_teacher_cache
from ...plugins import BACKENDS
from ...tasks.answers import answer_token_ids_of_rows
from ...teacher.backends import VLLMBackend
from ...teacher.capture import add_teacher_topk
from ...teacher.option_probs import OptionBackend
from ...vocabulary import TARGET_PROBS
from ..recipe import CaptureSpec, Recipe
from ..run_folder import cache_unit, read_json, teacher_unit
from .context import RunContext
from .probe import check_served, probe_rows, token_logprobs, write_probe
from .teachers import Teacher, base_model, fold_numbers, teacher_model, teachers
from .training import place
from .units import Unit


# What they are is told by the address of a server
_OWN_BACKENDS = (None, "transformers", "vllm")


def captured_roles(recipe: Recipe, teacher: Teacher) -> list[str]:
    """Roles that a teacher is run over: what its students train on, and what its rescale is fitted on."""
    arms = [arm for arm in recipe.arms.values() if arm.kind == "distill" and (arm.teacher or "") == teacher.name]
    if teacher.name and not arms:
        return []  # evaluated only
    # The plain teacher's cache is part of the result, whether an arm uses it or not
    roles = dict.fromkeys(["train", "validation"] if not teacher.name else ["validation"])
    for arm in arms:
        roles |= dict.fromkeys(arm.data)
    return list(roles)


def capture_units(run: RunContext) -> Iterator[Unit]:
    """One a cache."""
    spec = run.recipe.capture
    for teacher in teachers(run.recipe):
        roles = captured_roles(run.recipe, teacher)
        for fold in teacher.parts if roles else []:
            inputs = {
                # What enters the entries; how the work is cut or where it is served may change on the way
                "capture": [spec.k, spec.logprob_dtype, spec.num_draws, spec.vllm_url is not None, spec.vllm_model],
                # Left out where it is the default, so that runs from before it could be named go on
                **({"target": spec.target} if spec.target != "vocabulary" else {}),
                **_plugin_backend(spec),
                "teacher": run.keys[teacher_unit(teacher.name, fold)],
                "data": {role: run.role_keys[role] for role in roles},
            }
            yield Unit(cache_unit(teacher.name, fold), inputs, partial(_capture, run, teacher, fold))


def _plugin_backend(spec: CaptureSpec) -> dict[str, Any]:
    if spec.backend is None or spec.backend in _OWN_BACKENDS:
        return {}
    return {"backend": [spec.backend, spec.backend_options, BACKENDS.code(spec.backend)]}


def _capture(run: RunContext, teacher: Teacher, fold: int | None, folder: Path) -> None:
    options = asdict(run.recipe.capture)
    options.pop("target")
    url, server = options.pop("vllm_url"), {"model": options.pop("vllm_model")}
    server["concurrency"] = options.pop("vllm_concurrency")
    name, settings = options.pop("backend"), options.pop("backend_options")
    tokenizer = run.tokenizer()
    backend: Any
    if url is not None:
        backend = _served_teacher(run, teacher, url, **server)
    else:
        backend = BACKENDS.find(name or "transformers")(teacher_model(run, teacher, fold), **settings)
    selection = run.folder.teacher(teacher.name, fold).selection
    if selection.is_file():
        backend.notes = [*backend.notes, _selection_note(read_json(selection))]
    for role in captured_roles(run.recipe, teacher):
        rows = run.folder.load_tokens(role)
        engine = backend
        if run.recipe.capture.target == "options":
            rows = only_answers(_with_choices(run, role, rows, soft=False))
            engine, rows = _option_backend(run, role, backend, rows), rows.remove_columns(CHOICE_IDS)
        if teacher.folds is not None:
            rows = rows.select(np.flatnonzero(fold_numbers(run, teacher, role) == fold))
            if len(rows) == 0:
                continue
        add_teacher_topk(rows, engine, tokenizer, output_dir=folder, split=role, **options)


def _option_backend(run: RunContext, role: str, backend: Any, rows: Dataset) -> OptionBackend:
    """The teacher as an engine that gives the options' probabilities as the tokens that the student answers with."""
    asked = _texts(run, role, rows)
    options: dict[str, Any] = {"max_length": run.recipe.task.max_length, "disable_tqdm": True, "distributed": True}
    options["batch_size"] = run.recipe.evaluation.batch_size
    return OptionBackend(backend, run.tokenizer("teacher"), rows, asked, **options)


def _served_teacher(run: RunContext, teacher: Teacher, url: str, **options: Any) -> VLLMBackend:
    folder = run.folder.teacher(teacher.name).model
    spec = run.recipe.teacher
    plain = spec.name_or_path if spec.used_as_it_is else run.folder.base("teacher").model
    how = f"vllm serve {folder if teacher.sft is not None else plain} --max-logprobs 20"
    if teacher.sft is not None and run.recipe.teacher.lora is not None:
        how = (
            f"vllm serve {run.recipe.teacher.name_or_path} --max-logprobs 20 --enable-lora --lora-modules "
            f"teacher={folder}\n(and capture.vllm_model=teacher)"
        )
    try:
        server = VLLMBackend(url, **options)
    except OSError as error:
        raise ValueError(
            f"No vLLM server answers at {url} ({error}). Serve the teacher, for example with\n  {how}\nand run the same "
            "command again: what is finished is kept."
        ) from None
    if teacher.sft is not None:
        _check_served(run, teacher, server, url, how)
    elif not run.recipe.teacher.used_as_it_is or any(arm.kind == "teacher" for arm in run.recipe.arms.values()):
        # Where the run loads the teacher anyway: what it evaluates and what students learn from are one model
        rows = probe_rows(run.folder.load_tokens("train"))
        own = token_logprobs(place(base_model(run, "teacher")), rows)
        check_served({"input_ids": rows, "base_logprobs": own, "logprobs": own}, server, url, how)
    return server


def _check_served(run: RunContext, teacher: Teacher, server: VLLMBackend, url: str, how: str) -> None:
    path = run.folder.teacher(teacher.name).probe
    if run.is_main and not path.is_file():  # trained before the recipe named a server
        probe = probe_rows(run.folder.load_tokens("train"))
        before = token_logprobs(place(base_model(run, "teacher")), probe)
        write_probe(path, probe, before, token_logprobs(teacher_model(run, teacher), probe))
    run.workspace.state.wait_for_everyone()
    check_served(read_json(path), server, url, how)


def _selection_note(chosen: dict[str, Any]) -> str:
    return (
        f"Teacher selected by negative log-likelihood on the validation rows: {chosen['nll']:.4f} after epoch "
        f"{chosen['epoch']:g} of {chosen['epochs']:g}."
    )


def load_cache(run: RunContext, teacher: Teacher, role: str, target: str = "vocabulary") -> Dataset:
    """Rows of a role with what an arm of this `target` trains on: the teacher's entries, over all folds, or soft labels."""
    if target == "soft_labels":
        return add_soft_labels(_with_choices(run, role, run.folder.load_tokens(role), soft=True), run.tokenizer())
    parts = [load_teacher_cache(path, role) for path in run.folder.caches(teacher.name, teacher.folds, role)]
    cache = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if target == "vocabulary":
        return cache
    verify_teacher_cache(cache)
    return restrict_to_choices(_with_choices(run, role, cache, soft=target == "both"))


def disagreement_of(run: RunContext, teacher: Teacher, role: str, rows: Dataset) -> np.ndarray:
    """Of a committee at the first supervised position of each row, in nats, float64 `(N,)`; NaN where it was not asked."""
    cache = load_cache(run, teacher, role).with_format(None)
    found = {name: values[0] for name, values in zip(cache["id"], cache[MUTUAL_INFORMATION], strict=True)}
    return np.array([found.get(name, np.nan) for name in rows["id"]], np.float64)


def _with_choices(run: RunContext, role: str, dataset: Dataset, *, soft: bool) -> Dataset:
    """Tokenised rows with the token of each choice, and with their soft labels."""
    rows = _texts(run, role, dataset)
    if not all(rows["choices"]):
        raise ValueError(
            f"Rows of role {role!r} have no choices: `restrict_to_choices`, `soft_label_weight` and `capture.target: options` "
            "are for multiple choice."
        )
    dataset = dataset.add_column(CHOICE_IDS, answer_token_ids_of_rows(run.tokenizer(), rows))
    return dataset.add_column(TARGET_PROBS, rows[TARGET_PROBS][:]) if soft else dataset


def _texts(run: RunContext, role: str, dataset: Dataset) -> Dataset:
    """The rows of a role as the task gives them, in the order of tokenised ones."""
    rows = run.folder.load_rows(role)
    place = {name: i for i, name in enumerate(rows["id"])}
    return rows.select([place[name] for name in dataset["id"]])
