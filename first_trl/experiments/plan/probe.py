"""Hours of a recipe on this machine, from a few steps of models of its shapes that are made for the purpose."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...utils.processes import process_state
from ..recipe import Recipe
from ..run_folder import base_unit, student_unit
from .data import find_tokenizer
from .models import config_of, shape_of
from .schema import SettingPlan, TimePlan


_REPEATS = 3
_CAPTURE_ROWS = 16
# Weights, gradients and the state of AdamW, in float32
_TRAINING_BYTES = 16


@dataclass(frozen=True)
class _Speed:
    """Of one model: a forward of tokens, and a training step by its batch and row length."""

    model: Any
    vocabulary: int
    device: torch.device

    def step(self, batch: int, length: int, training: dict[str, Any]) -> float:
        """Seconds of a training step; the head sees one position of a row."""
        cast = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        ids = torch.randint(self.vocabulary, (batch, length), device=self.device)
        self.model.train()

        def once() -> None:
            with nullcontext() if cast is None else torch.autocast(self.device.type, cast):
                states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                logits = self.model.get_output_embeddings()(states)
            torch.nn.functional.cross_entropy(logits.float(), ids[:, 0]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return self._median(once)

    def forward(self, length: int) -> float:
        """Seconds for a row of this length, in a batch, without gradients."""
        ids = torch.randint(self.vocabulary, (_CAPTURE_ROWS, length), device=self.device)
        self.model.eval()

        def once() -> None:
            with torch.inference_mode():
                states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                self.model.get_output_embeddings()(states)

        return self._median(once) / _CAPTURE_ROWS

    def _median(self, work: Callable[[], None]) -> float:
        seconds = []
        for repeat in range(_REPEATS + 1):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def measure_times(recipe: Recipe, setting: SettingPlan, configs: Path | None = None) -> list[TimePlan]:
    """
    What each part of one run takes on this device: trainings by their steps, caches and evaluations by their rows. Rows
    are taken at their mean length, fits and figures at nothing, so it is a lower bound; units that are finished count too.

    Args:
        recipe ([`Recipe`]): Of one run.
        setting ([`SettingPlan`]): Its plan.
        configs (`Path`, *optional*): As in [`plan_recipe`].

    Raises:
        `ValueError`: a model or its rows are unknown, or it does not fit into memory.
    """
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    tokenizer = find_tokenizer(recipe)
    vocabulary = None if tokenizer is None else len(tokenizer)
    times: list[TimePlan] = []
    rows = {split.role: split for split in setting.splits}
    evaluated = [rows[role] for role in recipe.evaluation.splits]
    # Other arms behind one share a single pass over its rows, which is left out
    posthoc = [arm for arm in recipe.arms.values() if arm.kind == "temperature_scaling"]
    for role in ("teacher", "student"):
        spec = getattr(recipe, role)
        config = config_of(spec, role, vocabulary, configs)
        speed = _speed(role, config, shape_of(spec, config).parameters)
        for training in setting.trainings:
            if training.unit.startswith((student_unit(""), base_unit("student"))) != (role == "student"):
                continue
            if not training.steps or not training.tokens or not training.batch:
                raise ValueError(f"--probe needs the rows of {training.unit}, which are not on this machine.")
            length = max(2, round(training.tokens / (training.steps * training.batch)))
            arguments = _training(recipe, training.unit)
            forwards = int(arguments.get("gradient_accumulation_steps", 1))
            seconds = speed.step(training.batch // forwards, length, arguments)
            times.append(TimePlan(training.unit, training.steps * forwards * seconds))
        kinds = ("teacher",) if role == "teacher" else ("sft", "distill")
        arms = [name for name, arm in recipe.arms.items() if arm.kind in kinds]
        # They read the validation rows too
        behind = [arm for arm in posthoc if arm.of in arms]
        work: list[tuple[str, int, Any]] = [("evaluate", len(arms) + len(behind), split) for split in evaluated]
        work += [("evaluate", len(behind), rows["validation"])]
        if role == "teacher":
            work += [("capture", 1, rows[name]) for cache in setting.caches for name in cache.roles]
        totals: dict[str, float] = {}
        for what, times_read, split in work:
            if times_read and split.rows and split.tokens:
                seconds = speed.forward(max(2, round(split.tokens)))
                totals[what] = totals.get(what, 0.0) + times_read * split.rows * seconds
        times += [
            TimePlan(f"{what} ({role}s)" if what == "evaluate" else what, value) for what, value in totals.items()
        ]
    return times


def _training(recipe: Recipe, unit: str) -> dict[str, Any]:
    """Training arguments of a unit of the plan."""
    if unit.startswith(student_unit("")):
        return {**recipe.training, **recipe.arms[unit.removeprefix(student_unit(""))].training}
    for role in ("teacher", "student"):
        if unit == base_unit(role):
            return dict(getattr(recipe, role).pretrain or {})
    return dict(recipe.teacher.sft or {})


def _speed(role: str, config: PretrainedConfig, parameters: int) -> _Speed:
    device = torch.device(process_state().device)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if parameters * _TRAINING_BYTES > free:
        raise ValueError(
            f"--probe trains the {role} for a few steps: its {parameters / 1e9:.1f} billion weights take "
            f"{parameters * _TRAINING_BYTES / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free. Leave --probe out here."
        )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _Speed(model, config.get_text_config().vocab_size, device)
