"""Token log-probabilities from generation: transformers' `generate` and vLLM, without importing either."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..confidence import Confidences


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    return z - np.logaddexp.reduce(z, axis=-1)[..., None]


def generated_token_logprobs(output: Any, *, end_ids: Sequence[int] = ()) -> list[np.ndarray]:
    """
    Log-probability of every generated token, from `model.generate(..., output_logits=True, return_dict_in_generate=True)`.

    `logits` are what the model said. `scores` (`output_scores=True`) are what was left after temperature, top-k and top-p:
    they are used only where `logits` are missing.

    Args:
        output ([`~transformers.generation.GenerateDecoderOnlyOutput`]):
            With `sequences` `[B, prompt + T]` and `logits` (or `scores`), T tensors `[B, V]`. No beam search.
        end_ids (`Sequence[int]`, *optional*):
            End-of-sequence ids: tokens behind the first one are padding and are left out, the end token is kept.

    Returns:
        `list[np.ndarray]`: one float64 array per sequence, ready for [`sequence_confidence`].
    """
    steps = getattr(output, "logits", None) or getattr(output, "scores", None)
    if not steps:
        raise ValueError(
            "The output holds no logits: call `generate(..., output_logits=True, return_dict_in_generate=True)`."
        )
    if getattr(output, "beam_indices", None) is not None:
        raise ValueError("Beam search reorders its scores; use greedy search or sampling.")
    sequences = _array(output.sequences)
    generated = sequences[:, sequences.shape[1] - len(steps) :]
    logprobs = np.empty(generated.shape)
    for t, step in enumerate(steps):
        step = _array(step)
        if step.shape[0] != len(generated):
            raise ValueError(f"Step {t} has {step.shape[0]} rows for {len(generated)} sequences.")
        logprobs[:, t] = np.take_along_axis(_log_softmax(step), generated[:, t, None], axis=1)[:, 0]
    rows = []
    for tokens, row in zip(generated, logprobs, strict=True):
        end = np.flatnonzero(np.isin(tokens, list(end_ids)))
        rows.append(row[: end[0] + 1] if end.size else row)
    return rows


def token_confidences(logits: Any, labels: Any, *, name: str = "tokens", ignore_index: int = -100) -> Confidences:
    """
    Token-level calibration of teacher-forced logits: the top probability at each position against whether it is the label.

    Args:
        logits (`array-like` of shape `[..., T, V]`):
            Logits; position t predicts the label of position t (shift before).
        labels (`array-like` of shape `[..., T]`):
            Token ids, `ignore_index` where not scored.
        name (`str`, *optional*, defaults to `"tokens"`):
            Name of the result.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Label of positions left out; they are counted in `dropped`.
    """
    z, y = _array(logits), _array(labels)
    if z.shape[:-1] != y.shape:
        raise ValueError(
            f"The logits {z.shape} and labels {y.shape} do not fit together: [..., T, V] and [..., T] are needed."
        )
    z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    kept = y != ignore_index
    z, labelled = z[kept], y[kept]
    if np.isnan(z).any():
        raise ValueError(f"The logits of scored position {int(np.flatnonzero(np.isnan(z).any(axis=1))[0])} hold NaN.")
    if labelled.size and (labelled.min() < 0 or labelled.max() >= z.shape[1]):
        raise ValueError(f"A label is outside the vocabulary 0..{z.shape[1] - 1}.")
    lp = _log_softmax(z)
    best = lp.argmax(axis=1)
    extras = {"nll": float(-lp[np.arange(len(lp)), labelled].mean())} if len(lp) else {}
    dropped = {f"label {ignore_index}": int((~kept).sum())} if not kept.all() else {}
    return Confidences(name, np.exp(lp.max(axis=1, initial=-np.inf)), best == labelled, "full_vocab", extras, dropped)


def _logprob(entry: Any) -> float:
    value = entry.logprob if hasattr(entry, "logprob") else entry["logprob"] if isinstance(entry, Mapping) else entry
    return float(value)


def vllm_token_logprobs(outputs: Sequence[Any]) -> list[np.ndarray]:
    """
    Log-probability of every generated token from vLLM, sampled with `SamplingParams(logprobs=1)`.

    Args:
        outputs (`Sequence[vllm.CompletionOutput]`):
            `request.outputs[0]` of each request, with `token_ids` and `logprobs` (one dictionary id -> `Logprob` a token).

    Returns:
        `list[np.ndarray]`: one float64 array per completion, ready for [`sequence_confidence`].
    """
    rows = []
    for number, output in enumerate(outputs):
        if not output.logprobs:
            raise ValueError(f"Completion {number} holds no logprobs: use `SamplingParams(logprobs=1)`.")
        if len(output.token_ids) != len(output.logprobs):
            raise ValueError(
                f"Completion {number} has {len(output.token_ids)} tokens and {len(output.logprobs)} logprobs."
            )
        row = []
        for position, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            if token not in entries:
                raise ValueError(f"Completion {number}, token {position}: id {token} is not among its logprobs.")
            row.append(_logprob(entries[token]))
        rows.append(np.array(row))
    return rows


def vllm_prompt_token_confidences(requests: Sequence[Any], *, name: str = "tokens", start: int = 1) -> Confidences:
    """
    Token-level calibration of given text from vLLM, scored with `SamplingParams(prompt_logprobs=1, max_tokens=1)`.

    Args:
        requests (`Sequence[vllm.RequestOutput]`):
            With `prompt_token_ids` and `prompt_logprobs` (`None` at the first position, then one dictionary id -> `Logprob`
            per position: the most likely tokens and the one that stands there).
        name (`str`, *optional*, defaults to `"tokens"`):
            Name of the result.
        start (`int`, *optional*, defaults to `1`):
            First position scored in every request; 1 skips only the token that nothing precedes.
    """
    if start < 1:
        raise ValueError(f"`start` must be at least 1 (nothing predicts the first token), got {start}.")
    confidence, correct, losses = [], [], []
    for number, request in enumerate(requests):
        if not request.prompt_logprobs:
            raise ValueError(f"Request {number} holds no prompt logprobs: use `SamplingParams(prompt_logprobs=1)`.")
        pairs = list(zip(request.prompt_token_ids, request.prompt_logprobs, strict=True))
        for position, (token, entries) in enumerate(pairs[start:], start=start):
            if not entries or token not in entries:
                raise ValueError(f"Request {number}, position {position}: id {token} is not among its logprobs.")
            top = max(entries, key=lambda i: _logprob(entries[i]))
            confidence.append(np.exp(_logprob(entries[top])))
            correct.append(top == token)
            losses.append(-_logprob(entries[token]))
    extras = {"nll": float(np.mean(losses))} if losses else {}
    return Confidences(name, np.array(confidence), np.array(correct, dtype=bool), "full_vocab", extras)
