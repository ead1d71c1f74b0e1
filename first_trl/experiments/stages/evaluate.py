"""Stage `evaluate`: predictions and scores of every arm on every role."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ...calibration import calibration_report
from ...evaluation.multiple_choice import MultipleChoiceResult, evaluate_multiple_choice, multiple_choice_report
from ...evaluation.option_order import evaluate_option_order
from ...evaluation.token_level import evaluate_token_level
from ...evaluation.whole_answers import evaluate_whole_answers
from ...plugins import METRICS
from ...tasks import answer_token_ids_of_rows
from ...tasks.multiple_choice import MultipleChoice
from ...utils.files import write_json
from ...vocabulary import BAYES
from ..recipe import ArmSpec
from ..run_folder import (
    DATA,
    base_states_unit,
    base_unit,
    evaluation_unit,
    read_json,
    states_unit,
    student_unit,
    teacher_unit,
)
from .context import RunContext
from .data import task_of
from .decisions import fit_decisions, fit_temperature
from .novelty import (
    agreement_results,
    base_role,
    base_rows,
    novelty_results,
    read_base_states,
    read_states,
    states_inputs,
)
from .teachers import base_model, teacher_model, teacher_of
from .training import load_trained
from .units import Key, Unit


def evaluation_units(run: RunContext) -> Iterator[Unit]:
    """
    One an arm, and one for the true answer distribution where the rows bring it. What arms with temperatures by novelty need
    of a model is read once for all of them.
    """
    for name, arm in run.recipe.arms.items():
        inputs: dict[str, Any] = {
            "evaluation": run.recipe.evaluation,
            "data": run.keys[DATA],
            **_plugin_metrics(),
            "arm": [arm.kind, arm.of],
            "model": _model_key(run, arm.of or name),
        }
        if arm.kind not in ("novelty_scaling", "agreement_scaling"):
            yield Unit(evaluation_unit(name), inputs, partial(_evaluate, run, name, arm))
            continue
        of = str(arm.of)
        states = states_unit(of)
        if states not in run.keys:
            read = {"data": run.keys[DATA], "model": inputs["model"], **states_inputs(run, of)}
            yield Unit(states, read, partial(_read_states, run, of))
        inputs |= {"novelty": arm.novelty, "states": run.keys[states], "seed": run.recipe.seed}
        role = base_rows(arm)
        if arm.prompts is not None:
            inputs["prompts"] = arm.prompts
        if role is not None:
            model = base_role(run, of)
            base = base_states_unit(model, role)
            if base not in run.keys:
                read = {"data": run.role_keys[role], "model": run.keys[base_unit(model)], "seed": run.recipe.seed}
                yield Unit(base, read, partial(read_base_states, run, model, role))
            inputs["base_states"] = run.keys[base]
        results = novelty_results if arm.kind == "novelty_scaling" else agreement_results
        yield Unit(evaluation_unit(name), inputs, partial(_evaluate_states, run, name, results))
    if run.has_posterior:
        inputs = {"evaluation": run.recipe.evaluation, "data": run.keys[DATA], "arm": BAYES, **_plugin_metrics()}
        yield Unit(evaluation_unit(BAYES), inputs, partial(_evaluate_bayes, run))


def _plugin_metrics() -> dict[str, Any]:
    # Left out where there are none: what was evaluated without them holds
    return {"metrics": {name: METRICS.code(name) for name in sorted(METRICS)}} if METRICS else {}


def _model_key(run: RunContext, name: str) -> Key:
    arm = run.recipe.arms[name]
    unit = teacher_unit(teacher_of(run.recipe, arm).name) if arm.kind == "teacher" else student_unit(name)
    return run.keys[unit]


def _model_of(run: RunContext, name: str) -> Any:
    """The model of an arm that has one."""
    arm = run.recipe.arms[name]
    if arm.kind == "teacher":
        return teacher_model(run, teacher_of(run.recipe, arm))
    return load_trained(run.folder.student(name), run.recipe.student, lambda: base_model(run, "student"))


def _read_states(run: RunContext, name: str, folder: Path) -> None:
    read_states(run, name, _model_of(run, name))


def _evaluate_states(run: RunContext, name: str, results: Callable[..., Any], folder: Path) -> None:
    if run.is_main:
        for role, result in results(run, name):
            _store(run, result, name, role)


def _evaluate(run: RunContext, name: str, arm: ArmSpec, folder: Path) -> None:
    model = _model_of(run, arm.of or name)
    tokenizer = run.tokenizer(base_role(run, arm.of or name))
    options: dict[str, Any] = {
        "batch_size": run.recipe.evaluation.batch_size,
        "disable_tqdm": True,
        "distributed": True,
    }
    if arm.kind in ("sft", "distill"):
        fit_decisions(run, name, model, **options)
    temperature = 1.0
    if arm.kind == "temperature_scaling":
        fitted = _fitted_before(run, str(arm.of))
        temperature = fit_temperature(run, model, tokenizer, **options) if fitted is None else fitted
        if run.is_main:
            write_json(run.folder.temperature(name), {"temperature": temperature, "objective": "nll"})
    options |= {"temperature": temperature, "n_bins": run.recipe.evaluation.n_bins}
    for role in run.recipe.evaluation.splits:
        result: Any
        if run.has_choices(role):
            max_length = run.recipe.task.max_length
            spec, rows = run.recipe.evaluation, run.folder.load_rows(role)
            whole = {"length": spec.length} if spec.scoring == "choices" else {}
            scorer: Any = evaluate_whole_answers if whole else evaluate_multiple_choice
            result = scorer(model, tokenizer, rows, max_length=max_length, **whole, **options)
            task = task_of(run.recipe, run.recipe.task.splits[role])
            if spec.permutations and isinstance(task, MultipleChoice):
                how: dict[str, Any] = {
                    "scoring": spec.scoring,
                    "length": spec.length,
                    "max_length": max_length,
                    **options,
                }
                orders = evaluate_option_order(model, tokenizer, task, rows, permutations=spec.permutations, **how)
                result.report["option_order"] = orders.report
        else:
            result = evaluate_token_level(model, tokenizer, run.folder.load_tokens(role), **options)
        if run.is_main:
            _store(run, result, name, role)


def _fitted_before(run: RunContext, of: str) -> float | None:
    """The temperature that a student got with its thresholds, where it was evaluated before."""
    path = run.folder.decisions(of)
    found = read_json(path) if evaluation_unit(of) in run.done and path.is_file() else {}
    return found.get("temperature")


def _evaluate_bayes(run: RunContext, folder: Path) -> None:
    if not run.is_main:
        return
    spec = run.recipe.evaluation
    tokenizer = run.tokenizer() if spec.scoring == "token" else None
    for role in spec.splits:
        result = _true_posterior(run.folder.load_rows(role), tokenizer, n_bins=spec.n_bins)
        _store(run, result, BAYES, role)


def _true_posterior(rows: Dataset, tokenizer: Any, *, n_bins: int) -> MultipleChoiceResult:
    """Predictions of a model that knows the `posterior` of every row; without a tokenizer, of whole texts."""
    probabilities = np.array(rows["posterior"])
    gold = np.array(rows["gold"])
    answer = probabilities.argmax(axis=1)
    every = np.arange(len(gold))
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities)
    tokens = None if tokenizer is None else np.array(answer_token_ids_of_rows(tokenizer, rows))
    predictions = {
        "id": np.array(rows["id"]),
        "gold": gold,
        "n_choices": np.full(len(gold), probabilities.shape[1]),
        **({} if tokens is None else {"choice_tokens": tokens}),
        "choice_logprobs": logprobs,
        "option_mass": probabilities.sum(axis=1),
        "answer": answer,
        **({} if tokens is None else {"top_token": tokens[every, answer]}),
        "top_prob": probabilities[every, answer],
        "top_is_gold": answer == gold,
        "gold_logprob": logprobs[every, gold],
        "sum_squares": (probabilities**2).sum(axis=1),
        "truncated": np.zeros(len(gold), bool),
    }
    if tokens is None:
        predictions["choice_scores"] = logprobs
    return MultipleChoiceResult(predictions, multiple_choice_report(predictions, n_bins=n_bins))


def _store(run: RunContext, result: Any, name: str, role: str) -> None:
    report = dict(result.report)
    if "n_choices" in result.predictions:
        labelled = result.predictions["gold"] >= 0
        report["chance_accuracy"] = float((1 / result.predictions["n_choices"][labelled]).mean())
    given = result.confidences("full_vocab")
    with warnings.catch_warnings():
        # That an ECE is within chance is for the report to say, once
        warnings.simplefilter("ignore")
        null = calibration_report(
            given.confidence,
            given.correct,
            n_bins=run.recipe.evaluation.n_bins,
            null_test=True,
            n_resamples=run.recipe.evaluation.null_draws,
            return_bins=False,
        )
    report["null_ece"] = {"mean": null["null_mean"], "q95": null["null_high"]}
    write_json(run.folder.scores(name, role), report)
    Dataset.from_list(result.to_rows()).to_parquet(run.folder.predictions(name, role))
    scores = report["full_vocab"]
    run.workspace.say(
        f"    {role}: accuracy {100 * scores['accuracy']:.1f}, ECE {100 * scores['ece']:.1f}, n {report['n']}"
        + (f", {report['n_truncated']} prompts cut" if report["n_truncated"] else "")
    )
