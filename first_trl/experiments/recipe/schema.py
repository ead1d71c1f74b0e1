"""The JSON schema of recipes, for editors that complete keys and mark mistakes."""

import dataclasses
import json
import re
from typing import Any

from pydantic import TypeAdapter

from ...training.options import DistillOptions, estimators, recalibrations
from . import models
from .arguments import INIT_KWARGS, lora_fields, training_fields


def recipe_schema() -> dict[str, Any]:
    """
    JSON schema (draft 2020-12) of a recipe: keys with their meaning, types, limits and known values, and the names of
    training, adapter and loading arguments.
    """
    schema = TypeAdapter(models.Recipe).json_schema()
    for name, definition in {**schema["$defs"], "Recipe": schema}.items():
        texts = _texts(getattr(models, name))
        definition["description"] = " ".join(str(getattr(models, name).__doc__).split("Args:")[0].split())
        for key, entry in definition["properties"].items():
            if key in texts:
                entry["description"] = texts[key]
    arm, model = schema["$defs"]["ArmSpec"]["properties"], schema["$defs"]["ModelSpec"]["properties"]
    arm["estimator"]["enum"], arm["recalibration"]["enum"] = list(estimators()), list(recalibrations())
    training = [name for name in sorted(training_fields()) if name not in DistillOptions.__dataclass_fields__]
    schema["$defs"] |= {"Training": _names(training), "Lora": _names(lora_fields()), "Loading": _names(INIT_KWARGS)}
    teacher = schema["$defs"]["TeacherSpec"]["properties"]
    for entries, key, kind in (
        (schema["properties"], "training", "Training"), (arm, "training", "Training"), (teacher, "sft", "Training"),
        (model, "pretrain", "Training"), (model, "sft", "Training"), (model, "lora", "Lora"), (arm, "lora", "Lora"),
        (model, "init_kwargs", "Loading"),
    ):  # fmt: skip
        choices = [{"$ref": f"#/$defs/{kind}"}] + ([{"type": "null"}] if "anyOf" in entries[key] else [])
        described = {"description": entries[key]["description"]} if "description" in entries[key] else {}
        entries[key] = {"anyOf": choices} | described
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "first_trl recipe", **schema}


def schema_text() -> str:
    """The schema as it is written to a file."""
    return json.dumps(recipe_schema(), indent=1, sort_keys=True) + "\n"


def _names(known: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {} for name in sorted(known)}, "additionalProperties": False}


def _texts(cls: type) -> dict[str, str]:
    """Key -> what the docstring of its class, or the help of a trainer's option, says about it."""
    found = {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if "help" in f.metadata}
    lines = str(cls.__doc__).partition("Args:")[2]
    for entry in re.split(r"\n {8}(?=\w)", "\n" + lines.strip("\n").replace("\n    \n", "\n")):
        head, _, text = entry.partition("): ")
        if text:
            found |= dict.fromkeys(re.findall(r"(\w+) \(`", head), " ".join(text.split()))
    return found
