"""Model specifications of a few kilobytes, of the family that a recipe names."""

from typing import Any

from transformers import AutoConfig

from ..recipe import ModelSpec


_N_LAYERS = 2
# What families call these by other names is found through the `attribute_map` of their configuration; a key that a
# family does not have is left out.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": _N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    # Wide enough that random logits differ, so that the fits have something to fit
    "initializer_range": 0.2,
    "query_pre_attn_scalar": 8,
    # Below the length of a prompt, so that it cuts something
    "sliding_window": 16,
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def tiny_model(spec: ModelSpec, place: str) -> ModelSpec:
    """
    A model to make from scratch in place of the recipe's.

    Args:
        spec ([`~first_trl.experiments.recipe.ModelSpec`]):
            The recipe's. Switches and fractions of its `config` are kept, its sizes are not.
        place (`str`):
            Names the model in messages.

    Raises:
        `ValueError`: when the family is unknown.
    """
    family = _text_family(spec.architecture or _cached_family(str(spec.name_or_path), place), place)
    tiny = tiny_config(family)
    kept = {key: value for key, value in spec.config.items() if isinstance(value, bool | float) and key not in tiny}
    # A type that is named shows what it does to trainings; "auto" is that of the checkpoint
    dtype = {key: value for key, value in spec.init_kwargs.items() if key == "dtype" and value != "auto"}
    return ModelSpec(architecture=family, config={**kept, **tiny}, init_kwargs=dtype)


def tiny_config(family: str) -> dict[str, Any]:
    """Arguments of a family's configuration that make it tiny; the token ids come from the tokenizer."""
    default = AutoConfig.for_model(family)
    names: dict[str, str] = default.attribute_map
    tiny: dict[str, Any] = {
        name: value
        for key, value in _SIZES.items()
        # `None` is a feature that the family has and does not use; a property follows from other keys
        if getattr(default, name := names.get(key, key), None) is not None
        and not isinstance(getattr(type(default), name, None), property)
    }
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        values = getattr(default, key, None)
        if values:
            # One layer of each kind, in order of appearance
            kinds = list(dict.fromkeys(values))
            tiny[key] = [kinds[i % len(kinds)] for i in range(_N_LAYERS)]
    return tiny


def _cached_family(name: str, place: str) -> str:
    try:
        return str(AutoConfig.from_pretrained(name, local_files_only=True).model_type)
    except (OSError, ValueError):
        raise ValueError(
            f"{place} is {name!r}, whose configuration is not on this machine, so a smoke run cannot tell its family. Write "
            "the model type beside the name, e.g. `architecture: llama`; nothing is downloaded then."
        ) from None


def _text_family(family: str, place: str) -> str:
    """The language model of a family that also reads images; the family itself for others."""
    try:
        return str(AutoConfig.for_model(family).get_text_config().model_type)
    except ValueError:
        raise ValueError(
            f"{place}.architecture {family!r} is no model type of this version of transformers. Write it as in the "
            "`model_type` of the model's config.json, e.g. llama."
        ) from None
