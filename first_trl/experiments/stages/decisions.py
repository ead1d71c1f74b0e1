"""Trained students as decision models: one temperature and thresholds for error rates, fitted on rows that nothing is reported on."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from ...calibration import expected_calibration_error
from ...calibration.conditional import OptionTemperature, fit_option_temperature
from ...calibration.threshold import ConfidenceThreshold, fit_threshold
from ...evaluation.multiple_choice import evaluate_multiple_choice
from ...evaluation.posthoc import fit_posthoc_temperature
from ...evaluation.whole_answers import evaluate_whole_answers
from ...tasks.answers import check_answers, question_kinds
from ...utils.files import write_json
from ...vocabulary import REPORTED_MAX_ERROR, THRESHOLD_ROLE
from ..run_folder import read_json
from ..share.decisions import saved_temperature
from .context import RunContext


# What users may ask for; each promise stands alone
_MAX_ERRORS = (0.01, 0.02, REPORTED_MAX_ERROR, 0.1, 0.2)
_READINGS = ("full_vocab", "renormalized")
# Shares of the rows that a curve of risk against coverage is drawn at
_COVERAGES = np.arange(1, 41) / 40


def fit_temperature(run: RunContext, model: Any, tokenizer: Any, **options: Any) -> float:
    """
    One post-hoc temperature of a model, on the validation rows: at the answer where it is one token, else at every token.

    Args:
        run ([`RunContext`]): The run.
        model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model.
        options: `batch_size`, `disable_tqdm` and `distributed` of the evaluation.
    """
    if run.has_choices("validation") and run.recipe.evaluation.scoring == "token":
        rows = run.folder.load_rows("validation")
        options["max_length"] = run.recipe.task.max_length
    else:
        rows = run.folder.load_tokens("validation")
    return fit_posthoc_temperature(model, tokenizer, rows, **options).temperature


def fit_decisions(run: RunContext, name: str, model: Any, **options: Any) -> None:
    """
    Fit a student's post-hoc temperature on the validation rows, by type and number of options where these differ, and, at
    this temperature, thresholds on the rows of the role `threshold`, or where there is none on the validation rows again;
    write them, or the reason why there are none.

    Args:
        run ([`RunContext`]): The run.
        name (`str`): Arm of the student.
        model ([`~transformers.PreTrainedModel`]): The student.
        options: `batch_size`, `disable_tqdm` and `distributed` of the evaluation.
    """
    role = THRESHOLD_ROLE if THRESHOLD_ROLE in run.recipe.task.splits else "validation"
    rows = {each: run.folder.load_rows(each) for each in ("validation", role) if run.has_choices(each)}
    if len(rows) < len({"validation", role}):
        return  # Free text has no options
    tokenizer, spec = run.tokenizer(), run.recipe.evaluation
    try:
        for each in rows.values():
            check_answers(tokenizer, each, spec.scoring)
    except ValueError as error:
        if run.is_main:
            write_json(run.folder.decisions(name), {"reason": str(error)})
        return
    whole = {"length": spec.length} if spec.scoring == "choices" else {}
    evaluate: Any = evaluate_whole_answers if whole else evaluate_multiple_choice
    evaluate = partial(evaluate, model, tokenizer, max_length=run.recipe.task.max_length, **whole, **options)
    with warnings.catch_warnings():
        # What few rows mean for a temperature is said of the arms of kind temperature_scaling; bins play no part here
        warnings.simplefilter("ignore", UserWarning)
        common = fit_temperature(run, model, tokenizer, **options)
        by_options = None if whole else _by_options(rows["validation"], evaluate)
        result = evaluate(rows[role], temperature=by_options or common)
    readings = {}
    for reading in _READINGS:
        given = result.confidences(reading)
        readings[reading] = [fit_threshold(given.confidence, given.correct, each).to_dict() for each in _MAX_ERRORS]
    fitted: dict[str, Any] = {
        "temperature": common,
        "fitted_on": role,
        "scoring": spec.scoring,
        "length": spec.length,
        "readings": readings,
    }
    if by_options is not None:
        fitted["option_temperature"] = by_options.to_dict()
    if whole:  # the temperature is inside the sum over tokens, so that stored predictions are of no use
        fitted["roles"] = {}
        for each in filter(run.has_choices, spec.splits):
            given = evaluate(run.folder.load_rows(each), temperature=common).confidences("renormalized")
            fitted["roles"][each] = _scores(given.confidence, given.correct, _threshold(fitted).threshold, spec.n_bins)
    if run.is_main:
        write_json(run.folder.decisions(name), fitted)


def _by_options(rows: Dataset, evaluate: Any) -> OptionTemperature | None:
    """A temperature by type and number of options, where the rows differ in these."""
    labelled = rows.select([i for i, gold in enumerate(rows["gold"]) if gold >= 0])
    kinds = question_kinds(labelled)
    if len(set(zip(kinds, map(len, labelled["choices"]), strict=True))) < 2:
        return None
    found = evaluate(labelled).predictions
    return fit_option_temperature(found["choice_logprobs"], found["gold"], kinds)


def _threshold(fitted: Mapping[str, Any]) -> ConfidenceThreshold:
    """The one that is reported."""
    stored = next(each for each in fitted["readings"]["renormalized"] if each["max_error"] == REPORTED_MAX_ERROR)
    return ConfidenceThreshold.from_dict(stored)


def decision_scores(run: RunContext, name: str) -> dict[str, Any] | None:
    """
    What a student's answers as a decision model are worth, on every role that is evaluated: probabilities of the options
    alone, with the fitted temperature, from the stored predictions.

    Returns:
        `dict`: `temperature` (and `temperature_text`, of one by number of options too), `fitted_on`, `threshold` (for 5 % of
        errors) and `roles`: role -> `n`, `accuracy`, `ece`, `coverage` and `error` above the threshold, and `curve`, pairs of coverage and error. `None` where nothing was fitted.
    """
    path = run.folder.decisions(name)
    fitted = read_json(path) if path.is_file() else {}
    if "readings" not in fitted:
        return None
    threshold, temperature = _threshold(fitted), saved_temperature(fitted)
    roles = dict(fitted.get("roles", {}))
    for role in run.recipe.evaluation.splits:
        if run.has_choices(role) and role not in roles:
            confidence, correct = _renormalized(run, name, role, temperature)
            roles[role] = _scores(confidence, correct, threshold.threshold, run.recipe.evaluation.n_bins)
    return {
        "temperature": fitted["temperature"],
        "temperature_text": f"{temperature:.2f}" if isinstance(temperature, float) else str(temperature),
        "fitted_on": fitted["fitted_on"],
        "threshold": {**threshold.to_dict(), "candidates": []},
        "roles": roles,
    }


def _renormalized(
    run: RunContext, name: str, role: str, temperature: float | OptionTemperature
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each labelled row, and whether its answer is right."""
    import pyarrow.parquet as pq

    table = pq.read_table(run.folder.predictions(name, role), columns=["gold", "choice_logprobs"]).to_pydict()
    logprobs = table["choice_logprobs"]
    if isinstance(temperature, OptionTemperature):
        divisors = temperature.of_rows([len(row) for row in logprobs], question_kinds(run.folder.load_rows(role)))
    else:
        divisors = np.full(len(logprobs), temperature)
    confidence, correct = [], []
    for gold, row, divisor in zip(table["gold"], logprobs, divisors, strict=True):
        if gold >= 0:
            scaled = np.array(row) / divisor
            confidence.append(np.exp(scaled.max() - np.logaddexp.reduce(scaled)))
            correct.append(int(scaled.argmax()) == gold)
    return np.array(confidence), np.array(correct)


def _scores(confidence: np.ndarray, correct: np.ndarray, threshold: float | None, n_bins: int) -> dict[str, Any]:
    n = len(confidence)
    # Surest first, one number an answered row
    errors = np.cumsum(~correct[np.argsort(-confidence, kind="stable")])
    counts = sorted({max(round(float(coverage) * n), 1) for coverage in _COVERAGES})
    answered = np.zeros(n, bool) if threshold is None else confidence >= threshold
    return {
        "n": n,
        "accuracy": float(correct.mean()),
        "ece": expected_calibration_error(confidence, correct.astype(int), n_bins=n_bins),
        "coverage": float(answered.mean()),
        "error": float((~correct[answered]).mean()) if answered.any() else None,
        "curve": [[count / n, float(errors[count - 1] / count)] for count in counts],
    }
