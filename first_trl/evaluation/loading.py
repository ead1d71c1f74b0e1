"""Models to evaluate or to answer with: full ones, LoRA adapters and decision models, from a folder or the Hub."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.decision import DecisionConfig
from transformers.utils import find_adapter_config_file


def load_model(
    source: str, *, revision: str | None = None, token: Any = None, dtype: Any = "auto", **kwargs: Any
) -> tuple[Any, str]:
    """
    The model of a folder or repository, and where its tokenizer is.

    Args:
        source (`str`): Folder or Hub id of a causal language model, of a LoRA adapter or of a decision model.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in `from_pretrained`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Precision to load in.
        kwargs: Further arguments of `from_pretrained`.

    Returns:
        `tuple`: the model, and the folder or repository that its tokenizer is loaded from.
    """
    where = {"revision": revision, "token": token}
    if find_adapter_config_file(source, **where) is None:
        model = _class_of(source, where).from_pretrained(source, dtype=dtype, **where, **kwargs)
        subfolder = DecisionConfig.from_pretrained(source, **where).adapter
        if subfolder:
            # As stock pipelines do: a decision model may keep a LoRA beside the weights of its base
            model.load_adapter(source, adapter_kwargs={"subfolder": subfolder, **where})
        return model, source
    # Imported here: a full model needs no peft
    from peft import AutoPeftModelForCausalLM
    from transformers.utils import cached_file

    model = AutoPeftModelForCausalLM.from_pretrained(source, dtype=dtype, **where, **kwargs)
    own = cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **where)
    base = model.peft_config["default"].base_model_name_or_path
    return model, source if own is not None else base


def _class_of(source: str, where: dict[str, Any]) -> Any:
    """Models with a decision head have a class of their own; everything else is a causal language model."""
    architectures = AutoConfig.from_pretrained(source, **where).architectures or []
    if any(name.endswith("ForDecision") for name in architectures):
        from transformers import AutoModelForDecision

        return AutoModelForDecision
    return AutoModelForCausalLM
