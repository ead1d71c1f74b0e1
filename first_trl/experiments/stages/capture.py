"""Stage `capture`: the caches of the teachers."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ...cache.choices import CHOICE_IDS, restrict_to_choices
from ...cache.folder import load_teacher_cache
from ...cache.verify import verify_teacher_cache
from ...plugins import BACKENDS
from ...tasks.answers import answer_token_ids_of_rows
from ...teacher.backends import VLLMBackend
from ...teacher.capture import add_teacher_topk
from ..recipe import Recipe
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
                **({"backend": [spec.backend, spec.backend_options]} if spec.backend not in _OWN_BACKENDS else {}),
                "teacher": run.keys[teacher_unit(teacher.name, fold)],
                "data": {role: run.role_keys[role] for role in roles},
            }
            yield Unit(cache_unit(teacher.name, fold), inputs, partial(_capture, run, teacher, fold))


def _capture(run: RunContext, teacher: Teacher, fold: int | None, folder: Path) -> None:
    options = asdict(run.recipe.capture)
    url, served = options.pop("vllm_url"), options.pop("vllm_model")
    name, settings = options.pop("backend"), options.pop("backend_options")
    tokenizer = run.tokenizer()
    backend: Any
    if url is not None:
        backend = _served_teacher(run, teacher, url, served)
    else:
        backend = BACKENDS.find(name or "transformers")(teacher_model(run, teacher, fold), **settings)
    selection = run.folder.teacher(teacher.name, fold).selection
    if selection.is_file():
        backend.notes = [*backend.notes, _selection_note(read_json(selection))]
    for role in captured_roles(run.recipe, teacher):
        rows = run.folder.load_tokens(role)
        if teacher.folds is not None:
            rows = rows.select(np.flatnonzero(fold_numbers(run, teacher, role) == fold))
            if len(rows) == 0:
                continue
        add_teacher_topk(rows, backend, tokenizer, output_dir=folder, split=role, **options)


def _served_teacher(run: RunContext, teacher: Teacher, url: str, served: str | None) -> VLLMBackend:
    folder = run.folder.teacher(teacher.name).model
    how = f"vllm serve {folder if teacher.sft is not None else run.recipe.teacher.name_or_path} --max-logprobs 20"
    if teacher.sft is not None and run.recipe.teacher.lora is not None:
        how = (
            f"vllm serve {run.recipe.teacher.name_or_path} --max-logprobs 20 --enable-lora --lora-modules "
            f"teacher={folder}\n(and capture.vllm_model=teacher)"
        )
    try:
        server = VLLMBackend(url, served)
    except OSError as error:
        raise ValueError(
            f"No vLLM server answers at {url} ({error}). Serve the teacher, for example with\n  {how}\nand run the same "
            "command again: what is finished is kept."
        ) from None
    if teacher.sft is not None:
        _check_served(run, teacher, server, url, how)
    return server


def _check_served(run: RunContext, teacher: Teacher, server: VLLMBackend, url: str, how: str) -> None:
    path = run.folder.teacher(teacher.name).probe
    if run.is_main and not path.is_file():  # trained before the recipe named a server
        probe = probe_rows(run.folder.load_tokens("train"))
        before = token_logprobs(place(base_model(run, "teacher")), probe)
        write_probe(path, probe, before, token_logprobs(teacher_model(run, teacher), probe))
    run.workspace.state.wait_for_everyone()
    check_served(path, server, url, how)


def _selection_note(chosen: dict[str, Any]) -> str:
    return (
        f"Teacher selected by negative log-likelihood on the validation rows: {chosen['nll']:.4f} after epoch "
        f"{chosen['epoch']:g} of {chosen['epochs']:g}."
    )


def load_cache(run: RunContext, teacher: Teacher, role: str, *, choices: bool = False) -> Dataset:
    """Rows of a role with the teacher's entries, over all folds; with `choices`, over the choices of each question."""
    parts = [load_teacher_cache(path, role) for path in run.folder.caches(teacher.name, teacher.folds, role)]
    cache = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if not choices:
        return cache
    rows = run.folder.load_rows(role)
    if not any(rows["choices"]):
        raise ValueError(
            f"Role {role!r} has no choices: `restrict_to_choices` is for arms that train on multiple choice."
        )
    verify_teacher_cache(cache)
    tokens = dict(zip(rows["id"], answer_token_ids_of_rows(run.tokenizer(), rows), strict=True))
    return restrict_to_choices(cache.add_column(CHOICE_IDS, [tokens[name] for name in cache["id"]]))
