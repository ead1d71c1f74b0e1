"""Stage `evaluate`: predictions and scores of every arm on every role."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...calibration import calibration_report
from ...evaluation.multiple_choice import evaluate_multiple_choice
from ...evaluation.posthoc import fit_posthoc_temperature
from ...evaluation.token_level import evaluate_token_level
from ...utils.files import write_json
from ...vocabulary import BAYES
from ..recipe import ArmSpec
from .context import RunContext
from .reference import true_posterior
from .teachers import base_model, teacher_model, teacher_of
from .training import load_trained


# Draws of a perfectly calibrated model, for the ECE that it would show by chance
_NULL_DRAWS = 200


def run_evaluate(run: RunContext) -> None:
    for name, arm in run.recipe.arms.items():
        source = run.recipe.arms[str(arm.of)] if arm.of is not None else arm
        inputs = {
            "evaluation": run.recipe.evaluation,
            "data": run.keys["data"],
            "arm": [arm.kind, arm.of],
            "model": run.keys[f"teacher{teacher_of(run, source).suffix}"]
            if source.kind == "teacher"
            else run.keys[arm.of or name],
        }
        run.keys[f"evaluate/{name}"] = run.workspace.run(
            "evaluate", f"evaluate/{name}", inputs, partial(_evaluate, run, name, arm, source)
        )
    if all("posterior" in run.rows(role).column_names for role in run.recipe.evaluation.splits):
        inputs = {"evaluation": run.recipe.evaluation, "data": run.keys["data"], "arm": BAYES}
        run.keys[f"evaluate/{BAYES}"] = run.workspace.run(
            "evaluate", f"evaluate/{BAYES}", inputs, partial(_evaluate_bayes, run)
        )


def _evaluate(run: RunContext, name: str, arm: ArmSpec, source: ArmSpec, folder: Path) -> None:
    if not run.is_main:
        return
    if source.kind == "teacher":
        model = teacher_model(run, teacher_of(run, source))
    else:
        folder_of_model = run.folder / "students" / (arm.of or name)
        model = load_trained(folder_of_model, run.recipe.student, lambda: base_model(run, "student"))
    tokenizer = run.tokenizer()
    options: dict[str, Any] = {"batch_size": run.recipe.evaluation.batch_size, "disable_tqdm": True}
    temperature = 1.0
    if arm.kind == "temperature_scaling":
        choices = run.has_choices("validation")
        temperature = fit_posthoc_temperature(
            model,
            tokenizer,
            run.rows("validation") if choices else run.tokens("validation"),
            max_length=run.recipe.task.max_length if choices else None,
            **options,
        ).temperature
        write_json(folder / "temperature.json", {"temperature": temperature, "objective": "nll"})
    options |= {"temperature": temperature, "n_bins": run.recipe.evaluation.n_bins}
    for role in run.recipe.evaluation.splits:
        result: Any
        if run.has_choices(role):
            max_length = run.recipe.task.max_length
            result = evaluate_multiple_choice(model, tokenizer, run.rows(role), max_length=max_length, **options)
        else:
            result = evaluate_token_level(model, tokenizer, run.tokens(role), **options)
        _store(run, result, folder, role)


def _evaluate_bayes(run: RunContext, folder: Path) -> None:
    if not run.is_main:
        return
    for role in run.recipe.evaluation.splits:
        result = true_posterior(run.rows(role), run.tokenizer(), n_bins=run.recipe.evaluation.n_bins)
        _store(run, result, folder, role)


def _store(run: RunContext, result: Any, folder: Path, role: str) -> None:
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
            n_resamples=_NULL_DRAWS,
            return_bins=False,
        )
    report["null_ece"] = {"mean": null["null_mean"], "q95": null["null_high"]}
    write_json(folder / f"{role}.json", report)
    Dataset.from_list(result.to_rows()).to_parquet(folder / f"{role}.parquet")
    scores = report["full_vocab"]
    run.workspace.say(
        f"    {role}: accuracy {100 * scores['accuracy']:.1f}, ECE {100 * scores['ece']:.1f}, n {report['n']}"
        + (f", {report['n_truncated']} prompts cut" if report["n_truncated"] else "")
    )
