"""
What `decision.json` cannot express, in a file of our own beside it: `first_trl_decision.json`.

```json
{"version": 1,
 "temperature": 1.4,  # of a model that decision.json cannot describe
 "scoring": {"scoring": "choices", "length": "none"},  # of answers of more than one token
 "option_temperature": {"common": 1.4, "kinds": {"choice": {"log_temperature": 0.3, "slope": 0.1, ...}}},
 "novelty": {"file": "novelty.safetensors", "sha256": "..."},
 "thresholds": {"temperature": 1.4, "fitted_on": "validation", "readings": {"full_vocab": [{"max_error": 0.05, ...}]}}}
```

Every entry may be missing, and others may stand beside them: who writes one keeps the rest. Stock transformers does not read
the file.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.decision import DecisionConfig
from transformers.utils import cached_file

from ..calibration.conditional import OptionTemperature
from ..calibration.threshold import ConfidenceThreshold
from ..utils.files import write_json


DECISION_EXTRAS_NAME = "first_trl_decision.json"
_VERSION = 1
# Of `abstain_below`
_PROMISE = "max_error="


def read_decision_extras(source: str | Path, *, revision: str | None = None, token: Any = None) -> dict[str, Any]:
    """
    The entries of a model's `first_trl_decision.json`; none where there is no such file.

    Args:
        source (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in `from_pretrained`.

    Warns:
        `UserWarning`: The Hub was not reached, so that it is not known whether there is such a file.

    Raises:
        `ValueError`: The file is damaged, or of a later version of this package.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(str(source), DECISION_EXTRAS_NAME, **options)
    if path is None:
        known = Path(source).is_dir() or try_to_load_from_cache(str(source), DECISION_EXTRAS_NAME, revision=revision)
        if not known:
            # A Hub that answers leaves a mark in the cache that there is no such file
            warnings.warn(
                f"The Hub was not reached and {DECISION_EXTRAS_NAME} of {source} is not in the cache: if the model brings a "
                f"temperature or thresholds, they are not used here. `hf download {source}` fetches all of its files.",
                UserWarning,
                stacklevel=3,
            )
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{DECISION_EXTRAS_NAME} of {source} is no JSON ({error}). Export the model again.") from None
    version = entries.pop("version", None) if isinstance(entries, dict) else None
    if version != _VERSION:
        raise ValueError(
            f"{DECISION_EXTRAS_NAME} of {source} has version {version!r}, and this package reads {_VERSION}. Update "
            "first_trl, or export the model again."
        )
    return dict(entries)


def write_decision_extras(folder: str | Path, **entries: Any) -> None:
    """
    Set entries of a saved model's `first_trl_decision.json` and keep the others; `None` takes an entry out, and the file
    goes with its last one.

    Args:
        folder (`str` or `Path`): Where the model was saved.
        entries: Plain values, for JSON.
    """
    path = Path(folder) / DECISION_EXTRAS_NAME
    known = read_decision_extras(folder) if path.is_file() else {}
    kept = {name: value for name, value in {**known, **entries}.items() if value is not None}
    if kept:
        write_json(path, {"version": _VERSION, **kept})
    else:
        path.unlink(missing_ok=True)


def read_temperature(
    source: str | Path, *, revision: str | None = None, token: Any = None
) -> float | OptionTemperature:
    """
    The post-hoc temperature that was saved with a model for questions of type `choice`: by number of options where it has
    one, else that of its `decision.json`, else 1.

    Args:
        source, revision, token: As in [`read_decision_extras`].
    """
    extras = read_decision_extras(source, revision=revision, token=token)
    if "option_temperature" in extras:
        return OptionTemperature.from_dict(extras["option_temperature"])
    if "temperature" in extras:
        return float(extras["temperature"])
    config = DecisionConfig.from_pretrained(str(source), revision=revision, token=token)
    return float(config.temperature.get("choice", 1.0))


def save_thresholds(
    folder: str | Path,
    readings: Mapping[str, Sequence[ConfidenceThreshold]],
    *,
    temperature: float | OptionTemperature = 1.0,
    fitted_on: str = "validation",
    scoring: str = "token",
    length: str = "none",
) -> None:
    """
    Store thresholds with a saved model, for `answer_pipeline(..., abstain_below="max_error=0.05")`.

    Args:
        folder (`str` or `Path`):
            Where the model, or its LoRA adapter, was saved.
        readings (`Mapping[str, Sequence]`):
            Reading of the confidence (as [`~first_trl.answer_pipeline`] names them) -> thresholds of
            [`~first_trl.fit_threshold`], one a promised error rate.
        temperature (`float` or [`~first_trl.calibration.conditional.OptionTemperature`], *optional*, defaults to `1.0`):
            Temperature of the confidences that they were fitted on.
        fitted_on (`str`, *optional*, defaults to `"validation"`):
            Which rows these were.
        scoring (`str`, *optional*, defaults to `"token"`), length (`str`, *optional*, defaults to `"none"`):
            How answers were scored, as [`~first_trl.answer_pipeline`] names it.

    Example:

    ```python
    >>> result = evaluate_multiple_choice(model, tokenizer, held_out, temperature=1.4)
    >>> given = result.confidences("full_vocab")
    >>> threshold = fit_threshold(given.confidence, given.correct, max_error=0.05)
    >>> save_thresholds("my-student", {"full_vocab": [threshold]}, temperature=1.4)
    ```
    """
    stored = {name: [replace(each, candidates=()).to_dict() for each in found] for name, found in readings.items()}
    plain = temperature.to_dict() if isinstance(temperature, OptionTemperature) else temperature
    thresholds = {
        "temperature": plain,
        "fitted_on": fitted_on,
        "scoring": scoring,
        "length": length,
        "readings": stored,
    }
    write_decision_extras(folder, thresholds=thresholds)


def stored_threshold(
    extras: Mapping[str, Any],
    promise: str,
    reading: str,
    temperature: Any = None,
    scoring: tuple[str, str] | None = None,
) -> ConfidenceThreshold:
    """
    The threshold that a model brings for a promised error rate.

    Args:
        extras (`Mapping`): From [`read_decision_extras`].
        promise (`str`): `"max_error=0.05"`.
        reading (`str`): Of the confidence that is compared with it.
        temperature (`float` or [`~first_trl.calibration.conditional.OptionTemperature`], *optional*): That of the confidences;
            checked where it is given.
        scoring (`tuple[str, str]`, *optional*): How answers are scored, and the length; checked where it is given.

    Raises:
        `ValueError`: The promise cannot be read, the model brings no threshold for it, or none was found when it was
            fitted; or the temperature or the scoring is another one.
    """
    try:
        max_error = float(promise.removeprefix(_PROMISE)) if promise.startswith(_PROMISE) else math.nan
    except ValueError:
        max_error = math.nan
    if math.isnan(max_error):
        raise ValueError(f"A promise is written {_PROMISE}0.05 (a share of the answers given), got {promise!r}.")
    stored = extras.get("thresholds") or {"readings": {}}
    if reading not in stored["readings"]:
        known = ", ".join(stored["readings"]) or "none"
        raise ValueError(
            f"This model brings no threshold for confidence={reading!r} (it brings: {known}). Fit one with fit_threshold "
            "and store it with first_trl.tasks.decision_extras.save_thresholds, or give a number."
        )
    if temperature is not None and not _same_temperature(temperature, stored["temperature"]):
        raise ValueError(
            f"The thresholds of this model were fitted at temperature {stored_temperature(extras)}, not at that of these confidences. "
            "Leave `temperature` out, or fit a threshold for it and give the number."
        )
    fitted = (stored.get("scoring", "token"), stored.get("length", "none"))
    if scoring is not None and scoring != fitted:
        raise ValueError(
            f"abstain_below={promise!r} is about answers that are scored by scoring={fitted[0]!r} and length={fitted[1]!r}: the "
            "thresholds of this model were fitted on such. Leave `scoring` and `length` out, or give a number."
        )
    found = {each["max_error"]: each for each in stored["readings"][reading]}
    if max_error not in found:
        raise ValueError(
            f"This model brings no threshold for {promise}, but for {', '.join(f'{value:g}' for value in sorted(found))}."
        )
    threshold = ConfidenceThreshold.from_dict(found[max_error])
    if threshold.threshold is None:
        raise ValueError(f"No threshold keeps {promise} for this model: {threshold.reason}")
    return threshold


def stored_temperature(extras: Mapping[str, Any]) -> str:
    """The temperature that a model's thresholds were fitted at, in words."""
    known = extras["thresholds"]["temperature"]
    return str(OptionTemperature.from_dict(known)) if isinstance(known, dict) else f"{known:.4g}"


def _same_temperature(used: Any, fitted: Any) -> bool:
    if isinstance(used, OptionTemperature) or isinstance(fitted, dict):
        return isinstance(used, OptionTemperature) and used.to_dict() == fitted
    return isinstance(used, int | float) and math.isclose(used, fitted)
