"""The files that make the students of a finished run decision models, written beside their weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...calibration.conditional import OptionTemperature
from ...calibration.threshold import ConfidenceThreshold
from ...cards.student import DecisionFacts
from ...vocabulary import REPORTED_MAX_ERROR
from ..run_folder import evaluation_unit, read_json
from .run import Run


def write_decision_files(run: Run, arm: str) -> DecisionFacts | None:
    """
    Write `decision.json`, `decision_template.jinja` and `first_trl_decision.json` into a student's folder: its prompt, labels,
    temperature and thresholds. What stock transformers cannot express is said, and the rest is written; what an earlier
    evaluation of the same student left there is taken away.

    Args:
        run ([`Run`]): The run.
        arm (`str`): A trained arm.

    Returns:
        [`DecisionFacts`]: For the card; `None` where the answers have no options or nothing was fitted.
    """
    path = run.folder.decisions(arm)
    if not path.is_file():
        counts = read_json(run.folder.counts) if run.folder.counts.is_file() else {}
        if counts.get("validation", {}).get("choices") and run.folder.scores(arm, run.roles[0]).is_file():
            marker = run.folder.marker(evaluation_unit(arm)).relative_to(run.folder.root)
            print(
                f"    {arm} was evaluated before students brought their temperature, and is no decision model. Delete {marker} and "
                "run the recipe again to make it one.",
                flush=True,
            )
        return None
    # Tasks import the tokenizer library, and cards of free text need neither
    from datasets import concatenate_datasets
    from transformers import AutoTokenizer

    from ...tasks.decision import remove_decision_config, save_decision_config
    from ...tasks.decision_extras import save_thresholds, write_decision_extras

    fitted: dict[str, Any] = read_json(path)
    folder = run.student(arm).model
    if "readings" not in fitted:
        remove_decision_config(folder)
        write_decision_extras(folder, **dict.fromkeys(("temperature", "option_temperature", "scoring", "thresholds")))
        print(f"    {arm} is no decision model of stock transformers: {fitted['reason']}", flush=True)
        return None
    temperature = saved_temperature(fitted)
    scored = {key: fitted.get(key, default) for key, default in (("scoring", "token"), ("length", "none"))}
    alike = [role for role in run.roles if run.task(role) == run.task("validation") and role != "validation"]
    rows = [run.folder.load_rows(role).select_columns(["prompt", "choices"]) for role in ("validation", *alike)]
    stock = True
    try:
        if scored["scoring"] != "token":
            raise ValueError(
                "its answers are scored by their whole text, and decision.json names one token an option."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        save_decision_config(
            folder, run.make_task("validation"), tokenizer, concatenate_datasets(rows), temperature=temperature
        )
        write_decision_extras(folder, scoring=None)
    except ValueError as error:
        print(f"    {arm} is no decision model of stock transformers: {error}", flush=True)
        stock = False
        remove_decision_config(folder)
        by_options = temperature.to_dict() if isinstance(temperature, OptionTemperature) else None
        own = {"temperature": None if by_options else temperature, "option_temperature": by_options}
        write_decision_extras(folder, **own, scoring=scored if scored["scoring"] != "token" else None)
    readings = {
        name: [ConfidenceThreshold.from_dict(each) for each in found] for name, found in fitted["readings"].items()
    }
    save_thresholds(folder, readings, temperature=temperature, fitted_on=fitted["fitted_on"], **scored)
    threshold = next(each for each in readings["full_vocab"] if each.max_error == REPORTED_MAX_ERROR)
    shown = temperature if isinstance(temperature, float) else str(temperature)
    return DecisionFacts(stock, shown, fitted["fitted_on"], dataclasses.replace(threshold, candidates=()))


def saved_temperature(fitted: Mapping[str, Any]) -> float | OptionTemperature:
    """The temperature that lives with a student, of what the evaluation fitted."""
    by_options = fitted.get("option_temperature")
    return float(fitted["temperature"]) if by_options is None else OptionTemperature.from_dict(by_options)
