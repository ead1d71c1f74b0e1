"""Logits of the token that follows each prompt, for any causal language model."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..utils.adapters import adds_virtual_tokens
from ..utils.processes import ALL, Share


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def context_length(model: Any) -> int | None:
    """Longest input the model takes, `None` where its config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def cut_to_length(
    rows: Sequence[Sequence[int]], max_length: int | None, special_ids: Sequence[int]
) -> tuple[list[list[int]], list[bool]]:
    """
    Cut rows longer than `max_length` at the front, behind a leading special token: the answer belongs to the end.

    Returns:
        `tuple`: the rows, and for each whether it was cut.
    """
    if max_length is not None and not (isinstance(max_length, int | np.integer) and max_length >= 2):
        raise ValueError(f"`max_length` must be a whole number of at least 2, got {max_length!r}.")
    kept, cut = [], []
    for row in rows:
        too_long = max_length is not None and len(row) > max_length
        if too_long:
            assert max_length is not None
            front = list(row[:1]) if row[0] in special_ids else []
            row = front + list(row[len(row) - max_length + len(front) :])
        kept.append(list(row))
        cut.append(too_long)
    return kept, cut


def next_token_logits(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    disable_tqdm: bool,
    desc: str,
    share: Share = ALL,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """
    Batches of next-token logits, longest rows first.

    Rows are padded on the right and read at their last real position, which is exact for every causal model (left padding
    is not for recurrent ones) and does not depend on the tokenizer's padding side.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model; it is read where it is, in its dtype.
        rows (`Sequence[Sequence[int]]`):
            Token ids of each prompt, not padded.
        share ([`~first_trl.utils.processes.Share`], *optional*):
            The batches of this process; all by default.

    Yields:
        `tuple`: row indices, int64 `[B]`, and logits, float32 `[B, V]` on the model's device.

    Raises:
        `ValueError`: when a prompt has no token, or the logits are not finite.
    """
    for index, logits, _ in next_token_states(
        model, rows, (), batch_size=batch_size, disable_tqdm=disable_tqdm, desc=desc, share=share
    ):
        yield index, logits


def next_token_states(
    model: Any,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int,
    disable_tqdm: bool,
    desc: str,
    share: Share = ALL,
) -> Iterator[tuple[np.ndarray, torch.Tensor, list[torch.Tensor]]]:
    """
    As [`next_token_logits`], with the hidden states that the logits come from.

    Args:
        layers (`Sequence[int]`):
            Transformer blocks behind which states are read: 1 is the first, `num_hidden_layers` the last (for most models
            with the final norm). None are read by default.

    Yields:
        `tuple`: row indices, logits, and one `[B, H]` for each of `layers`, on the model's device in its dtype.

    Raises:
        `ValueError`: Also for a layer that the model does not have.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    lengths = np.array([len(row) for row in rows])
    if len(rows) and lengths.min() == 0:
        raise ValueError(f"Prompt {int(lengths.argmin())} has no token: there is nothing to predict from.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters and not adds_virtual_tokens(model)
    device = model.get_input_embeddings().weight.device
    order = np.argsort(-lengths, kind="stable")
    starts = share.part(range(0, len(order), batch_size))
    with evaluation_mode(model):
        for start in tqdm(starts, desc=desc, disable=disable_tqdm):
            index = order[start : start + batch_size]
            last = lengths[index] - 1
            input_ids = torch.zeros(len(index), int(last.max()) + 1, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for i, row in enumerate(index):
                input_ids[i, : lengths[row]] = torch.tensor(rows[row], dtype=torch.long)
                attention_mask[i, : lengths[row]] = 1
            # Only the few distinct last positions of the batch go through the head: [B, T, V] is never built.
            needed, column = np.unique(last, return_inverse=True)
            kwargs: dict[str, Any] = {"use_cache": False}
            if keeps_logits:
                kwargs["logits_to_keep"] = torch.from_numpy(needed).to(device)
            if layers:
                kwargs["output_hidden_states"] = True
            with torch.no_grad():
                output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **kwargs)
            # Behind virtual tokens, where the model has some
            text = slice(-input_ids.shape[1], None)
            logits = output.logits if keeps_logits else output.logits[:, text]
            states = [
                _layer(output, layer)[:, text][torch.arange(len(index)), torch.from_numpy(last)] for layer in layers
            ]
            del output
            position = torch.from_numpy(column if keeps_logits else last).to(logits.device)
            logits = logits[torch.arange(len(index), device=logits.device), position].float()
            finite = torch.isfinite(logits.logsumexp(-1))
            if not finite.all():
                row = int(index[int((~finite).nonzero()[0])])
                raise ValueError(
                    f"The model's logits for prompt {row} are NaN or infinite. Load it in bfloat16 or float32, and check "
                    "its weights."
                )
            yield index, logits, states


def _layer(output: Any, layer: int) -> torch.Tensor:
    found = getattr(output, "hidden_states", None)
    if found is None:
        raise ValueError(
            f"{type(output).__name__} holds no hidden states: the novelty of inputs of this model is not known."
        )
    if not 1 <= layer < len(found):
        raise ValueError(f"There is no layer {layer}: the model has {len(found) - 1}, counted from 1.")
    return found[layer]
