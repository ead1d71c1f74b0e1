"""Multiple choice by the next token: what the model believes at the answer position, and how well calibrated it is."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..calibration.conditional import OptionTemperature
from ..calibration.temperature import check_temperature
from ..tasks.answers import answer_token_ids_of_rows, choice_texts, plain_rows, question_kinds
from ..tasks.encode import encode_prompts, template_columns
from ..utils.processes import Share
from .confidence import gold_indices
from .next_token import context_length, cut_to_length, next_token_states
from .predictions import MultipleChoiceResult, fill_rows, multiple_choice_report


def spelling_variants(choice: str) -> list[str]:
    """Other spellings of a letter answer: with and without the space, in lower and upper case."""
    bare = choice.strip()
    return [space + text for space in (" ", "") for text in (bare, bare.lower(), bare.upper())]


def evaluate_multiple_choice(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    temperature: Any = 1.0,
    max_length: int | None = None,
    n_bins: int = 10,
    top_k: int = 5,
    variants: Callable[[str], Sequence[str]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
    distributed: bool = False,
) -> MultipleChoiceResult:
    """
    Evaluate a causal language model on multiple choice, by its distribution over the token behind the prompt.

    Two readings are always reported, since both are called "accuracy" and "ECE" in print: over the whole vocabulary, as the
    authors of FIRST evaluate (right = the most likely of all tokens is the gold answer's, confidence = its probability),
    and renormalised over the choices, with `option_mass`, the probability that the second reading divides by.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, used where it is and in its dtype; the softmax is in float32. Its train/eval mode is
            given back.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. The padding side does not matter.
        dataset ([`~datasets.Dataset`]):
            Rows of a task: `prompt` (texts or conversations), `choices` (as appended to the prompt, one token each), `gold` (-1 = hidden) and,
            where there is one, `id`.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per forward; prompts of like length go together.
        temperature (`float`, [`~first_trl.calibration.conditional.OptionTemperature`] or [`~first_trl.evaluation.novelty_scaling.NoveltyScaling`], *optional*, defaults to `1.0`):
            Logits are divided by it (see [`fit_posthoc_temperature`]); of one by type and number of options, by that of each
            row (its type is in the column `kind`, `choice` where there is none). With one by novelty, the predictions also hold
            each row's `temperature` and its `novelty`, the share of the training rows that are no newer, as the answer pipeline
            says it.
        max_length (`int`, *optional*):
            Longer prompts lose tokens at the front. Defaults to the context length of the model. Cut rows are counted and
            reported in a warning.
        n_bins (`int`, *optional*, defaults to `10`):
            Equal-width bins of the ECE.
        top_k (`int`, *optional*, defaults to `5`):
            The predictions hold the mass of this many most likely tokens, for confidences relative to a captured top-k.
        variants (`Callable[[str], Sequence[str]]`, *optional*):
            Other spellings of a choice, for example [`spelling_variants`], whose tokens are merged with it. Spellings that
            are not one token are left out. By default every token stands for itself.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template where prompts are conversations, such as `enable_thinking`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the batches over the processes of the launch. Every process must call, and every one gets the whole
            result, the same as of one process.

    Returns:
        [`MultipleChoiceResult`]

    Raises:
        `ValueError`: for missing columns, no row with an answer, a choice that is not one token, a gold index outside the
            choices, or logits that are not finite.

    Example:

    ```python
    >>> from first_trl import evaluate_multiple_choice
    >>> result = evaluate_multiple_choice(model, tokenizer, dataset)
    >>> result.report["full_vocab"]["ece"], result.report["options"]["ece"], result.report["option_mass"]
    ```
    """
    by_options = temperature if isinstance(temperature, OptionTemperature) else None
    scaling = temperature if hasattr(temperature, "of_states") else None
    if by_options is None and scaling is None:
        temperature = check_temperature(temperature)
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    rows = read_multiple_choice_rows(
        model, processing_class, dataset, max_length=max_length, chat_template_kwargs=chat_template_kwargs
    )
    groups = _token_groups(processing_class, dataset["choices"], rows.choice_tokens, variants)
    n = len(rows.prompt_ids)
    choice_tokens = fill_rows(rows.choice_tokens, -1, np.int64)
    choice_logprobs = np.full(choice_tokens.shape, -np.inf)
    top_token, top_logprob, topk_mass, sum_squares = np.empty(n, np.int64), np.empty(n), np.empty(n), np.empty(n)
    divisors, novelty = np.ones(n), np.zeros(n)
    if by_options is not None:
        divisors = by_options.of_rows([len(tokens) for tokens in rows.choice_tokens], question_kinds(dataset))
    layers = [] if scaling is None else scaling.layers
    share, done = Share.of(distributed), np.zeros(n, dtype=bool)
    batches = next_token_states(
        model, rows.prompt_ids, layers, batch_size=batch_size, disable_tqdm=disable_tqdm, desc="Evaluating", share=share
    )  # fmt: skip
    for index, logits, states in batches:
        done[index] = True
        divisor: Any = temperature
        if scaling is not None:
            divisors[index], novelty[index] = scaling.of_states(dict(zip(layers, states, strict=True)), logits)
        if scaling is not None or by_options is not None:
            divisor = torch.from_numpy(divisors[index]).to(logits.dtype).to(logits.device)[:, None]
        lp = torch.log_softmax(logits / divisor, dim=-1)
        for i, row in enumerate(index):
            for group in groups[row]:
                if len(group) > 1:
                    merged = lp[i, group].logsumexp(0)
                    lp[i, group] = -torch.inf
                    lp[i, group[0]] = merged
        tokens = choice_tokens[index]
        gathered = lp.gather(-1, torch.from_numpy(np.maximum(tokens, 0)).to(lp.device)).cpu().double().numpy()
        choice_logprobs[index] = np.where(tokens >= 0, gathered, -np.inf)
        best = lp.topk(min(top_k, lp.shape[-1]), dim=-1)
        top_token[index] = best.indices[:, 0].cpu().numpy()
        top_logprob[index] = best.values[:, 0].cpu().double().numpy()
        topk_mass[index] = best.values.exp().sum(dim=-1).cpu().double().numpy()
        sum_squares[index] = (2.0 * lp).exp().sum(dim=-1).cpu().double().numpy()
    share.merge(done, [choice_logprobs, top_token, top_logprob, topk_mass, sum_squares, divisors, novelty])

    labelled = rows.gold >= 0
    gold_column = np.where(labelled, rows.gold, 0)
    every = np.arange(n)
    predictions = {
        "id": rows.ids,
        "gold": rows.gold,
        "n_choices": np.array([len(tokens) for tokens in rows.choice_tokens]),
        "choice_tokens": choice_tokens,
        "choice_logprobs": choice_logprobs,
        "option_mass": np.exp(choice_logprobs).sum(axis=1),
        "answer": choice_logprobs.argmax(axis=1),
        "top_token": top_token,
        "top_prob": np.exp(top_logprob),
        "topk_mass": topk_mass,
        "top_is_gold": labelled & (top_token == choice_tokens[every, gold_column]),
        "gold_logprob": np.where(labelled, choice_logprobs[every, gold_column], np.nan),
        "sum_squares": sum_squares,
        "truncated": rows.truncated,
        **({} if scaling is None else {"temperature": divisors, "novelty": novelty}),
    }
    return MultipleChoiceResult(predictions, multiple_choice_report(predictions, n_bins=n_bins))


@dataclass(frozen=True)
class MultipleChoiceRows:
    """Tokenised rows of a multiple-choice dataset: what a forward needs, and what it is compared with."""

    ids: np.ndarray
    gold: np.ndarray
    prompt_ids: list[list[int]]
    choice_tokens: list[list[int]]
    truncated: np.ndarray


def read_multiple_choice_rows(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> MultipleChoiceRows:
    """
    Check and tokenise the rows of a multiple-choice dataset.

    Raises:
        `ValueError`: see [`evaluate_multiple_choice`].
    """
    missing = [name for name in ("prompt", "choices", "gold") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The dataset lacks the columns {missing}; it has {dataset.column_names}.")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no row to evaluate. Check the split and its filters.")
    dataset = plain_rows(dataset)
    gold = gold_indices(dataset["gold"][:])
    n_choices = np.array([len(choice_texts(choices, f"Row {row}")) for row, choices in enumerate(dataset["choices"])])
    outside = np.flatnonzero((gold >= n_choices) | (gold < -1))
    if outside.size:
        row = int(outside[0])
        raise ValueError(f"Row {row} has gold = {gold[row]} but {n_choices[row]} choices; -1 marks a hidden answer.")
    if not (gold >= 0).any():
        raise ValueError("No row has a gold answer (all are -1): there is nothing to score. Use a labelled split.")
    choice_tokens = answer_token_ids_of_rows(processing_class, dataset, chat_template_kwargs=chat_template_kwargs)
    head_size = model.get_output_embeddings().weight.shape[0]
    largest = max(max(tokens) for tokens in choice_tokens)
    if largest >= head_size:
        raise ValueError(
            f"An answer has the token {largest}, but the model's head has {head_size} rows: the tokenizer is another "
            "model's."
        )
    limit = context_length(model) if max_length is None else max_length
    encoded = encode_prompts(
        processing_class,
        dataset["prompt"],
        chat_template_kwargs=chat_template_kwargs,
        **template_columns(dataset),
    )
    prompt_ids, cut = cut_to_length(encoded, limit, processing_class.all_special_ids)
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(cut)} prompts are longer than {limit} tokens and lose their beginning. Use a model with a "
            "longer context or shorter prompts.",
            UserWarning,
            stacklevel=3,
        )
    names = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
    ids = np.array([str(name) for name in names])
    return MultipleChoiceRows(ids, gold, prompt_ids, choice_tokens, np.array(cut))


def _token_groups(
    processing_class: Any,
    choices: Sequence[Sequence[str]],
    choice_tokens: Sequence[Sequence[int]],
    variants: Callable[[str], Sequence[str]] | None,
) -> list[list[list[int]]]:
    """For each row and choice the tokens that count for it, its own first."""
    if variants is None:
        return [[[token] for token in tokens] for tokens in choice_tokens]
    known: dict[str, list[int]] = {}
    for choice in {choice for row in choices for choice in row}:
        encoded = [processing_class(text, add_special_tokens=False)["input_ids"] for text in variants(choice)]
        known[choice] = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != processing_class.unk_token_id]
    groups = []
    for number, (row, tokens) in enumerate(zip(choices, choice_tokens, strict=True)):
        row_groups = [list(dict.fromkeys([token, *known[choice]])) for choice, token in zip(row, tokens, strict=True)]
        merged = [token for group in row_groups for token in group]
        if len(merged) != len(set(merged)):
            raise ValueError(
                f"Row {number}: two of the choices {list(row)} share a spelling, so their tokens cannot be merged. Leave "
                "`variants` out or make the spellings distinct."
            )
        groups.append(row_groups)
    return groups
