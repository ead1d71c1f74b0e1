"""Multiple choice by the log-probability of whole answers: choices of any length, with the question read once."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..calibration.temperature import check_temperature
from ..tasks.answers import choice_texts, choice_token_ids, plain_rows
from ..tasks.encode import encode_prompts, prompt_texts, template_columns
from ..utils.adapters import adds_virtual_tokens, begins_in_the_text
from ..utils.processes import ALL, Share
from .confidence import Confidences, answers_to_confidences, choice_scores, gold_indices
from .next_token import context_length, cut_to_length, evaluation_mode


UNITS = ("characters", "bytes", "tokens")
# What the log-probability of a choice is divided by, or `unconditional`: what it is without the question is taken off
LENGTHS = ("none", *UNITS, "unconditional")


@dataclass(frozen=True)
class ChoiceScores:
    """
    Log-probabilities of the choices of each question, from [`score_choices`].

    Attributes:
        ids (`list[str]`): one per question.
        gold (`np.ndarray` of shape `[N]`): index of the right choice, -1 = hidden.
        logprobs (`list[np.ndarray]`): summed log-probability of each choice behind its question, in nats.
        lengths (`dict[str, list[np.ndarray]]`): `characters`, `bytes` (both without a leading space) and `tokens`.
        unconditional (`list[np.ndarray]` or `None`): log-probabilities without the question.
        truncated (`np.ndarray` of shape `[N]`, bool): questions that lost their beginning.
    """

    ids: list[str]
    gold: np.ndarray
    logprobs: list[np.ndarray]
    lengths: dict[str, list[np.ndarray]]
    unconditional: list[np.ndarray] | None
    truncated: np.ndarray

    @property
    def n_truncated(self) -> int:
        """Questions that lost their beginning."""
        return int(self.truncated.sum())

    def scores(self, length: str = "none") -> list[np.ndarray]:
        """
        What the choices of each question are compared by; their softmax is the probability of each.

        Args:
            length (`str`, *optional*, defaults to `"none"`):
                `"none"`: the log-probability of the text, which favours short choices. `"tokens"`, `"characters"`,
                `"bytes"`: divided by the length. `"unconditional"`: minus the log-probability without the question.

        Returns:
            `list[np.ndarray]`: in nats, one array per question.
        """
        check_length(length)
        if length == "none":
            return self.logprobs
        if length == "unconditional":
            if self.unconditional is None:
                raise ValueError(
                    "length='unconditional' needs choices that were scored with an `unconditional_prompt`."
                )
            return [values - bare for values, bare in zip(self.logprobs, self.unconditional, strict=True)]
        for name, lengths in zip(self.ids, self.lengths[length], strict=True):
            if not lengths.all():
                raise ValueError(f"Row {name}: a choice has no {length}, so nothing can be divided by its length.")
        return [values / lengths for values, lengths in zip(self.logprobs, self.lengths[length], strict=True)]

    def confidences(
        self, definition: str = "renormalized", *, unit: str = "characters", name: str = "choices"
    ) -> Confidences:
        """
        Confidences of the rows with an answer, under one definition.

        Args:
            definition (`str`, *optional*, defaults to `"renormalized"`):
                `"renormalized"`, `"length_normalized"`, `"unconditional"` or `"choice"`, see
                [`~first_trl.evaluation.confidence.choice_scores`].
            unit (`str`, *optional*, defaults to `"characters"`):
                Of the length: `"characters"`, `"bytes"` or `"tokens"`.
            name (`str`, *optional*, defaults to `"choices"`):
                Name of the result.
        """
        if unit not in UNITS:
            raise ValueError(f"`unit` must be one of {list(UNITS)}, got {unit!r}.")
        labelled = np.flatnonzero(self.gold >= 0)
        scores = [
            choice_scores(
                self.logprobs[i],
                definition=definition,
                lengths=self.lengths[unit][i],
                unconditional=None if self.unconditional is None else self.unconditional[i],
            )
            for i in labelled
        ]
        hidden = len(self.gold) - len(labelled)
        dropped = {"without a gold answer": hidden} if hidden else {}
        gold = [int(g) for g in self.gold[labelled]]
        return answers_to_confidences(name, scores, gold, definition=definition, dropped=dropped)


def score_choices(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    unconditional_prompt: str | None = None,
    batch_size: int = 32,
    temperature: float = 1.0,
    max_length: int | None = None,
    prefix_cache: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> ChoiceScores:
    """
    Log-probability of every choice of every question, as whole strings.

    The question is read once for all its choices: its keys and values are kept and repeated. Questions of equal length go
    together, so that nothing is padded before the choices, which makes the result independent of batching.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, used where it is; the softmax is in float32.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` (texts or conversations), `choices` (as appended to the prompt) and `gold` (-1 = hidden), and `id` where there is one.
        unconditional_prompt (`str`, *optional*):
            Also score each choice behind this text, for the definition `"unconditional"`: `""` (the begin-of-sequence token
            alone, as lm-evaluation-harness does) or for example `"Answer:"`. The tokens are those behind the question; the
            harness cuts the bare text anew, which with sentencepiece vocabularies are others.
        batch_size (`int`, *optional*, defaults to `32`):
            Choices per forward.
        temperature (`float`, *optional*, defaults to `1.0`):
            The logits of every token are divided by it.
        max_length (`int`, *optional*):
            Questions that would not fit with their choices lose tokens at the front; they are counted and reported in a
            warning. Defaults to the context length of the model.
        prefix_cache (`bool`, *optional*, defaults to `True`):
            `False` reads the question anew for each choice, as is always done for models with recurrent or
            convolutional layers.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template where prompts are conversations, such as `enable_thinking`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the batches over the processes of the launch. Every process must call, and every one gets the whole
            result, the same as of one process.

    Returns:
        [`ChoiceScores`]

    Raises:
        `ValueError`: for missing columns, an empty dataset, a gold index outside the choices, a choice that merges with the
            end of its prompt, or logits that are not finite.
    """
    missing = [name for name in ("prompt", "choices", "gold") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The dataset lacks the columns {missing}; it has {dataset.column_names}.")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no row to score. Check the split and its filters.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    temperature = check_temperature(temperature)
    dataset = plain_rows(dataset)
    prompts = prompt_texts(
        processing_class, dataset["prompt"], chat_template_kwargs=chat_template_kwargs, **template_columns(dataset)
    )
    gold = gold_indices(dataset["gold"][:])
    ids = [str(name) for name in (dataset["id"] if "id" in dataset.column_names else range(len(dataset)))]
    choices = [choice_texts(texts, f"Row {name}") for name, texts in zip(ids, dataset["choices"], strict=True)]
    for name, texts, answer in zip(ids, choices, gold, strict=True):
        if not texts or not -1 <= answer < len(texts):
            raise ValueError(f"Row {name} has gold = {answer} but {len(texts)} choices; -1 marks a hidden answer.")
    prompt_ids, choice_ids = choice_token_ids(processing_class, prompts, choices, [f"Row {name}" for name in ids])
    limit = context_length(model) if max_length is None else max_length
    contexts, truncated = [], []
    for name, context, row in zip(ids, prompt_ids, choice_ids, strict=True):
        room = None if limit is None else limit - max(len(tokens) for tokens in row)
        if room is not None and room < 2:
            raise ValueError(f"Row {name}: a choice leaves no room for the question within {limit} tokens.")
        (cut,), (was_cut,) = cut_to_length([context], room, processing_class.all_special_ids)
        contexts.append(cut)
        truncated.append(was_cut)
    if any(truncated):
        warnings.warn(
            f"{sum(truncated)} of {len(contexts)} prompts do not fit into {limit} tokens with their choices and lose their "
            "beginning. Use a model with a longer context or shorter prompts.",
            UserWarning,
            stacklevel=2,
        )
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "temperature": temperature,
        "prefix_cache": prefix_cache,
        "disable_tqdm": disable_tqdm,
        "share": Share.of(distributed),
    }
    logprobs = choice_logprobs(model, contexts, choice_ids, ids, **options)
    unconditional = None
    if unconditional_prompt is not None:
        bare = bare_context(processing_class, unconditional_prompt)
        unconditional = choice_logprobs(model, [bare] * len(contexts), choice_ids, ids, **options)
    lengths = choice_lengths(choices, choice_ids)
    return ChoiceScores(ids, gold, logprobs, lengths, unconditional, np.array(truncated))


def check_length(length: str) -> None:
    """`ValueError` for an unknown normalisation."""
    if length not in LENGTHS:
        raise ValueError(f"`length` must be one of {', '.join(LENGTHS)}; got {length!r}.")


def choice_lengths(
    choices: Sequence[Sequence[str]], choice_ids: Sequence[Sequence[Sequence[int]]]
) -> dict[str, list[np.ndarray]]:
    """Lengths of choices in `characters` and `bytes` (both without a leading space) and `tokens`."""
    bare_text = [[choice.removeprefix(" ") for choice in row] for row in choices]
    return {
        "characters": [np.array([len(text) for text in row]) for row in bare_text],
        "bytes": [np.array([len(text.encode()) for text in row]) for row in bare_text],
        "tokens": [np.array([len(tokens) for tokens in row]) for row in choice_ids],
    }


def bare_context(processing_class: Any, prompt: str) -> list[int]:
    """Tokens that stand for no question: those of a text, or of `""` the begin-, else the end-of-sequence token."""
    if prompt:
        return encode_prompts(processing_class, [prompt])[0]
    token = processing_class.bos_token_id
    token = processing_class.eos_token_id if token is None else token
    if token is None:
        raise ValueError(
            "unconditional_prompt='' needs a begin- or end-of-sequence token; give a text, such as 'Answer:'."
        )
    return [token]


def _batches(contexts: list[list[int]], choices: list[list[list[int]]], size: int) -> Iterator[list[int]]:
    """Rows whose contexts are equally long, with at most `size` choices together (a row is never split)."""
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    batch: list[int] = []
    count = 0
    for i in order:
        if batch and (len(contexts[i]) != len(contexts[batch[0]]) or count + len(choices[i]) > size):
            yield batch
            batch, count = [], 0
        batch.append(i)
        count += len(choices[i])
    if batch:
        yield batch


def choice_logprobs(
    model: Any,
    contexts: list[list[int]],
    choices: list[list[list[int]]],
    ids: Sequence[str],
    *,
    batch_size: int,
    temperature: float = 1.0,
    prefix_cache: bool = True,
    disable_tqdm: bool = True,
    share: Share = ALL,
) -> list[np.ndarray]:
    """Summed log-probability of each choice behind its context, all as token ids; see [`score_choices`]."""
    n_choices = [len(row) for row in choices]
    scores, done = np.zeros((len(contexts), max(n_choices))), np.zeros(len(contexts), dtype=bool)
    batches = list(_batches(contexts, choices, batch_size))
    mine = [batches[i] for i in share.part(range(len(batches)))]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
    prefix_cache = prefix_cache and not (adds_virtual_tokens(model) or begins_in_the_text(model))
    with (
        evaluation_mode(model),
        tqdm(total=sum(map(len, mine)), desc="Scoring choices", disable=disable_tqdm) as progress,
        torch.no_grad(),
    ):
        for batch in mine:
            prefix = [contexts[i] for i in batch]
            parents = np.repeat(np.arange(len(batch)), [len(choices[i]) for i in batch])
            flat = [tokens for i in batch for tokens in choices[i]]
            options = (flat, keeps_logits, temperature)
            totals = _score_behind_cache(model, prefix, parents, *options) if prefix_cache else None
            if totals is None:
                # What holds for one batch holds for all
                prefix_cache = False
                totals = _score_whole(model, [prefix[p] for p in parents], *options)
            values = totals.cpu().double().numpy()
            for row, i in enumerate(batch):
                scores[i, : n_choices[i]] = values[parents == row]
                done[i] = True
                if np.isnan(scores[i]).any():
                    raise ValueError(
                        f"The model's logits for row {ids[i]} are NaN or infinite. Load it in bfloat16 or float32, and check "
                        "its weights."
                    )
            progress.update(len(batch))
    share.merge(done, [scores])
    return [row[:n] for row, n in zip(scores, n_choices, strict=True)]


def _padded(rows: list[list[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens.to(device), mask.to(device)


def _summed(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over positions of the log-probability of the targets; float32 softmax."""
    logits = logits.float() / temperature
    logprobs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return logprobs.where(mask.bool(), 0.0).sum(-1)


def _score_behind_cache(
    model: Any,
    prefix: list[list[int]],
    parents: np.ndarray,
    choices: list[list[int]],
    keeps_logits: bool,
    temperature: float,
) -> torch.Tensor | None:
    """`None` where the model keeps more of a text than keys and values, which cannot be repeated."""
    device = model.get_input_embeddings().weight.device
    context = torch.tensor(prefix, dtype=torch.long, device=device)
    parent = torch.from_numpy(parents).to(device)
    tokens, mask = _padded(choices, device)
    first = model(
        input_ids=context,
        attention_mask=torch.ones_like(context),
        use_cache=True,
        **({"logits_to_keep": 1} if keeps_logits else {}),
    )
    last = first.logits[:, -1:][parent.to(first.logits.device)]
    total = _summed(last, tokens[:, :1].to(last.device), mask[:, :1].to(last.device), temperature)
    if tokens.shape[1] == 1:
        return total
    cache: Any = getattr(first, "past_key_values", None)
    if not _is_repeatable(cache):
        return None
    cache.batch_select_indices(parent)
    logits = model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([torch.ones_like(context)[parent], mask[:, :-1]], dim=1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return total + _summed(logits, tokens[:, 1:].to(logits.device), mask[:, 1:].to(logits.device), temperature)


def _is_repeatable(cache: Any) -> bool:
    """Whether all layers keep keys and values alone: recurrent and convolutional ones (Mamba, LFM2, ...) keep a state."""
    layers = getattr(cache, "layers", ())
    return hasattr(cache, "batch_select_indices") and not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) or not hasattr(layer, "batch_select_indices")
        for layer in layers
    )


def _score_whole(
    model: Any, prefix: list[list[int]], choices: list[list[int]], keeps_logits: bool, temperature: float
) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    rows = [context + tokens for context, tokens in zip(prefix, choices, strict=True)]
    tokens, mask = _padded(rows, device)
    # All contexts of a batch are equally long.
    start = len(prefix[0])
    width = tokens.shape[1] - start + 1
    logits = model(
        input_ids=tokens, attention_mask=mask, use_cache=False, **({"logits_to_keep": width} if keeps_logits else {})
    ).logits[:, -width:-1]
    return _summed(logits, tokens[:, start:].to(logits.device), mask[:, start:].to(logits.device), temperature)
