"""What adapters do to a text beside changing weights."""

from typing import Any


def adds_virtual_tokens(model: Any) -> bool:
    """
    Whether a prompt-learning adapter puts virtual tokens before the text, or keys and values before its cache: positions
    counted from the front are then off, and a second forward behind the cache reads them wrongly.
    """
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def begins_in_the_text(model: Any) -> bool:
    """Whether an adapter begins at tokens that it looks for (activated LoRA), which a part of the text may not hold."""
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs.values())
