"""Models counted from their configurations, on the meta device: no weights are made or read."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ...hub.reach import quick_offline
from ...training.keep_layers import WHERE, keep_first_layers
from ...utils.resources import shipped_config
from ..recipe import ModelSpec


# Bytes of a weight that bitsandbytes keeps in 4 or 8 bits, absmax statistics included
_QUANTISED = {"load_in_4bit": 0.56, "load_in_8bit": 1.0}
_FLOATS = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float64": 8.0}


@dataclass(frozen=True)
class Shape:
    """
    What sizes are computed from.

    Args:
        parameters (`int`): Distinct weights: tied embeddings count once.
        largest_layer (`int`): Weights of the largest block that sharding gathers at a time.
        hidden, intermediate, layers, vocabulary (`int`): Of the language model.
        dtype (`str`): Dtype of the weights in memory.
        weight_bytes (`float`): Bytes of one weight; less than its dtype's where it is quantised.
    """

    parameters: int
    largest_layer: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    dtype: str
    weight_bytes: float


class UnknownModel(ValueError):
    """There is no configuration to count."""


def config_of(spec: ModelSpec, role: str, vocabulary: int | None, folder: Path | None = None) -> PretrainedConfig:
    """
    The configuration of a recipe's model.

    Args:
        spec ([`ModelSpec`]): The model.
        role (`str`): `teacher` or `student`, for messages.
        vocabulary (`int`, *optional*): Size of the tokenizer, for models made from scratch.
        folder (`Path`, *optional*): Folder of local configurations: `<organisation>--<name>/config.json`.

    Raises:
        [`UnknownModel`]: The Hub cannot be reached or has no such model, or the tokenizer's size is not known.
    """
    if spec.name_or_path is None:
        values = {"vocab_size": vocabulary, **spec.config}
        if values["vocab_size"] is None:
            raise UnknownModel(
                f"{role}: a {spec.architecture} made from scratch has as many embeddings as the tokenizer has tokens, "
                f"and the tokenizer is not on this machine. Give {role}.config.vocab_size=SIZE for the plan."
            )
        return AutoConfig.for_model(str(spec.architecture), **values)
    config = _named_config(spec, role, folder)
    return config if spec.keep_layers is None else keep_first_layers(config, spec.keep_layers)


def _named_config(spec: ModelSpec, role: str, folder: Path | None) -> PretrainedConfig:
    name = str(spec.name_or_path)
    local = None if folder is None else folder / name.replace("/", "--")
    source = name if local is None or not (local / "config.json").is_file() else str(local)
    options = {key: value for key, value in spec.init_kwargs.items() if key in WHERE and source == name}
    try:
        with quick_offline():
            return AutoConfig.from_pretrained(source, **options, **spec.config)
    except (OSError, ValueError) as error:
        if (shipped := shipped_config(name)) is not None:
            return AutoConfig.from_pretrained(str(shipped), **spec.config)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f"{role}: no configuration of {name!r} ({first}) For the plan, name a folder that holds its config.json: "
            f"{role}.name_or_path=FOLDER."
        ) from None


def shape_of(spec: ModelSpec, config: PretrainedConfig) -> Shape:
    """Counts and sizes of a model, exact: every weight of the built model is visited."""
    text = config.get_text_config()
    found = _count(_key(config), None)
    dtype = _dtype(spec, config)
    return Shape(
        parameters=found["parameters"],
        largest_layer=found["largest_layer"],
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        dtype=dtype,
        weight_bytes=_weight_bytes(spec.init_kwargs, dtype),
    )


def lora_parameters(config: PretrainedConfig, lora: dict[str, Any]) -> int:
    """Trainable weights of the model with this LoRA, as PEFT makes it."""
    return _count(_key(config), json.dumps(lora, sort_keys=True))["trainable"]


def _key(config: PretrainedConfig) -> str:
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    return json.dumps([type(config).model_type, values], sort_keys=True, default=str)


@lru_cache(maxsize=64)
def _count(key: str, lora: str | None) -> dict[str, int]:
    model_type, values = json.loads(key)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        if lora is not None:
            model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **json.loads(lora)}))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in blocks]
    return {
        # `parameters` visits a shared weight once
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "largest_layer": max((sum(w.numel() for w in layer.parameters()) for layer in layers), default=0),
    }


def _dtype(spec: ModelSpec, config: PretrainedConfig) -> str:
    asked = spec.init_kwargs.get("dtype", spec.init_kwargs.get("torch_dtype", "auto"))
    if asked == "auto":
        # `from_pretrained` keeps the checkpoint's dtype; what is made from scratch has torch's default
        asked = getattr(config, "dtype", None) or "float32"
    return str(asked).removeprefix("torch.")


def _weight_bytes(init_kwargs: dict[str, Any], dtype: str) -> float:
    quantisation = init_kwargs.get("quantization_config") or {}
    for key, size in _QUANTISED.items():
        if isinstance(quantisation, dict) and quantisation.get(key):
            return size
    return _FLOATS.get(dtype, 2.0)
