"""Trained students as decision models: one temperature and thresholds for error rates, fitted on rows that nothing is reported on."""

import warnings
from typing import Any

import numpy as np

from ...calibration import expected_calibration_error
from ...calibration.threshold import ConfidenceThreshold, fit_threshold
from ...evaluation.multiple_choice import evaluate_multiple_choice
from ...evaluation.posthoc import fit_posthoc_temperature
from ...tasks.answers import check_answers
from ...utils.files import write_json
from ...vocabulary import REPORTED_MAX_ERROR, THRESHOLD_ROLE
from ..run_folder import read_json
from .context import RunContext


# What users may ask for; each promise stands alone
_MAX_ERRORS = (0.01, 0.02, REPORTED_MAX_ERROR, 0.1, 0.2)
_READINGS = ("full_vocab", "renormalized")
# Shares of the rows that a curve of risk against coverage is drawn at
_COVERAGES = np.arange(1, 41) / 40


def fit_decisions(run: RunContext, name: str, model: Any, **options: Any) -> None:
    """
    Fit a student's post-hoc temperature on the validation rows and, at this temperature, thresholds on the rows of the role
    `threshold`, or where there is none on the validation rows again; write them, or the reason why there are none.

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
    tokenizer = run.tokenizer()
    try:
        if run.recipe.evaluation.scoring != "token":
            raise ValueError(
                "its answers are scored by their whole text, and decision.json names one token an option."
            )
        for each in rows.values():
            check_answers(tokenizer, each, "token")
    except ValueError as error:
        if run.is_main:
            write_json(run.folder.decisions(name), {"reason": str(error)})
        return
    options["max_length"] = run.recipe.task.max_length
    with warnings.catch_warnings():
        # What few rows mean for a temperature is said of the arms of kind temperature_scaling; bins play no part here
        warnings.simplefilter("ignore", UserWarning)
        temperature = fit_posthoc_temperature(model, tokenizer, rows["validation"], **options).temperature
        result = evaluate_multiple_choice(model, tokenizer, rows[role], temperature=temperature, **options)
    readings = {}
    for reading in _READINGS:
        given = result.confidences(reading)
        readings[reading] = [fit_threshold(given.confidence, given.correct, each).to_dict() for each in _MAX_ERRORS]
    if run.is_main:
        fitted = {"temperature": temperature, "fitted_on": role, "readings": readings}
        write_json(run.folder.decisions(name), fitted)


def decision_scores(run: RunContext, name: str) -> dict[str, Any] | None:
    """
    What a student's answers as a decision model are worth, on every role that is evaluated: probabilities of the options
    alone, with the fitted temperature, from the stored predictions.

    Returns:
        `dict`: `temperature`, `fitted_on`, `threshold` (for 5 % of errors) and `roles`: role -> `n`, `accuracy`, `ece`,
        `coverage` and `error` above the threshold, and `curve`, pairs of coverage and error. `None` where nothing was fitted.
    """
    path = run.folder.decisions(name)
    fitted = read_json(path) if path.is_file() else {}
    if "readings" not in fitted:
        return None
    stored = next(each for each in fitted["readings"]["renormalized"] if each["max_error"] == REPORTED_MAX_ERROR)
    threshold = ConfidenceThreshold.from_dict(stored)
    roles = {}
    for role in run.recipe.evaluation.splits:
        if run.has_choices(role):
            confidence, correct = _renormalized(run, name, role, fitted["temperature"])
            roles[role] = _scores(confidence, correct, threshold.threshold, run.recipe.evaluation.n_bins)
    return {
        "temperature": fitted["temperature"],
        "fitted_on": fitted["fitted_on"],
        "threshold": {**threshold.to_dict(), "candidates": []},
        "roles": roles,
    }


def _renormalized(run: RunContext, name: str, role: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each labelled row, and whether its answer is right."""
    import pyarrow.parquet as pq

    table = pq.read_table(run.folder.predictions(name, role), columns=["gold", "choice_logprobs"]).to_pydict()
    confidence, correct = [], []
    for gold, logprobs in zip(table["gold"], table["choice_logprobs"], strict=True):
        if gold >= 0:
            scaled = np.array(logprobs) / temperature
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
