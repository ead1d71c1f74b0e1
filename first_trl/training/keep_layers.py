"""A smaller student of a pretrained model: its first layers."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as hf_logging


# Arguments of `from_pretrained` that say which configuration is read
WHERE = ("revision", "subfolder", "token", "trust_remote_code", "cache_dir")


def keep_first_layers(config: PretrainedConfig, n: int) -> PretrainedConfig:
    """
    The configuration of a model without its upper layers.

    Args:
        config ([`~transformers.PretrainedConfig`]): Of the whole model; changed in place.
        n (`int`): Layers to keep, counted from the embeddings.

    Returns:
        [`~transformers.PretrainedConfig`]: `config`, with `n` layers and with `n` entries in what it lists by layer.

    Raises:
        `ValueError`: when the model has fewer than `n` layers, or is no stack of them.
    """
    text: Any = config.get_text_config()
    whole = getattr(text, "num_hidden_layers", None)
    if not isinstance(whole, int) or not 1 <= n <= whole:
        raise ValueError(
            f"keep_layers={n}: a {config.model_type} of {whole} layers keeps from 1 to {whole} of them. Give another number."
        )
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole and not key.endswith("token_id"):
            setattr(text, key, value[:n])
    text.num_hidden_layers = n
    return config


def load_first_layers(name_or_path: str, n: int, *, config: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """
    A pretrained causal language model with its first `n` layers, its embeddings, its last norm and its head: a student
    that begins with what the large model knows, at a share of its cost (the start of DistilBERT and of its relatives,
    which keep every second layer). The head has never read these hidden states, so it answers at chance before training.

    Args:
        name_or_path (`str`): Hub id or folder.
        n (`int`): Layers to keep, counted from the embeddings.
        config (`dict`, *optional*): Overrides of the loaded configuration.
        kwargs: Passed to `from_pretrained`: `dtype`, `revision`, ...

    Raises:
        `ValueError`: when the model has fewer than `n` layers.

    Example:

    ```python
    >>> student = load_first_layers("HuggingFaceTB/SmolLM2-135M-Instruct", 10)
    ```
    """
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    cut = keep_first_layers(AutoConfig.from_pretrained(name_or_path, **where, **(config or {})), n)
    verbosity = hf_logging.get_verbosity()
    # Every weight of the layers that are left out would be listed as unexpected
    hf_logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, config=cut, **kwargs)
    finally:
        hf_logging.set_verbosity(verbosity)
