"""
One token per answer.

Confidence at the answer position is the probability of one token, so every choice has to be exactly one token behind
its prompt. Whether it is depends on the tokenizer, the choice and the end of the prompt; it is checked on every row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .encode import encode_texts, prompt_texts


_MEND = (
    "The model's confidence in an answer is the probability of one token. Answer with letters instead of words "
    "(completion=' {letter}'), or move the space: put it into the completion (prompt ends with 'Answer:', completion "
    "' A', right for GPT-2-like vocabularies), or end the prompt just before the letter (template "
    "'...\\nAnswer: (', completion '{letter}'), right for sentencepiece and character vocabularies, which may "
    "write ' A' as '▁' and 'A' and put a '▁' in front of every text."
)


# (end of the prompt, its last tokens, choice) -> tokens of the choice, `None` when it merges with the prompt.
_Known = dict[tuple[str, tuple[int, ...], str], list[int] | None]


def answer_token_ids(processing_class: PreTrainedTokenizerBase, prompt: str, choices: Sequence[str]) -> list[int]:
    """
    The token of each choice behind `prompt`.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        prompt (`str`): Text the model reads.
        choices (`Sequence[str]`): Answers exactly as they are appended to `prompt`.

    Returns:
        `list[int]`: one id per choice.

    Raises:
        `ValueError`: when a choice is not exactly one token behind the unchanged tokens of the prompt, is the unknown
        token, or shares its token with another choice.

    Example:

    ```python
    >>> answer_token_ids(tokenizer, "2 + 2 = 4?\\nAnswer:", [" yes", " no"])
    [3763, 645]
    ```
    """
    return _token_ids(
        processing_class, prompt_texts(processing_class, [prompt]), [list(choices)], ["this prompt"], {}
    )[0]


def answer_token_ids_of_rows(
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    batch_size: int = 1000,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """
    [`answer_token_ids`] for every row of a task's dataset, tokenized in batches. Every prompt is checked with its first
    choice, and every choice behind every end of a prompt that occurs.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        dataset ([`~datasets.Dataset`]): Rows with `prompt` (texts or conversations) and `choices`; `tools` are read.
        batch_size (`int`, *optional*, defaults to `1000`): Rows tokenized at a time.
        chat_template_kwargs (`dict`, *optional*): Arguments of the chat template.

    Returns:
        `list[list[int]]`: one list per row, as long as its `choices`.

    Raises:
        `ValueError`: as [`answer_token_ids`], naming the row; also when the dataset has no `choices`.
    """
    for column in ("prompt", "choices"):
        if column not in dataset.column_names:
            raise ValueError(f"The dataset has no column {column!r} (it has {', '.join(dataset.column_names)}).")
    token_ids: list[list[int]] = []
    known: _Known = {}
    for start in range(0, len(dataset), batch_size):
        batch = dataset[start : start + batch_size]
        names = batch.get("id") or [f"row {start + i}" for i in range(len(batch["prompt"]))]
        prompts = prompt_texts(
            processing_class, batch["prompt"], tools=batch.get("tools"), chat_template_kwargs=chat_template_kwargs
        )
        token_ids += _token_ids(processing_class, prompts, batch["choices"], names, known)
    return token_ids


def _token_ids(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    names: Sequence[str],
    known: _Known,
) -> list[list[int]]:
    for name, row_choices in zip(names, choices, strict=True):
        if not row_choices:
            raise ValueError(f"{name}: there are no choices; multiple choice needs a task that has them.")
        if not all(row_choices):
            raise ValueError(f"{name}: a choice is empty; every answer needs a text.")
    if prompts and not any(prompts):
        raise ValueError("All prompts are empty: there is nothing for the model to read.")
    prompt_ids = encode_texts(processing_class, prompts)

    # Every prompt is tokenized with its first choice. The other choices are looked up by the end of the prompt, text
    # and tokens, once they were seen behind such an end: that saves most of the work on a benchmark of one template.
    def key(row: int, choice: str) -> tuple[str, tuple[int, ...], str]:
        return prompts[row][-32:], tuple(prompt_ids[row][-4:]), choice

    rows, texts, wanted = [], [], set()
    for row, row_choices in enumerate(choices):
        for i, choice in enumerate(row_choices):
            if i == 0 or (key(row, choice) not in known and key(row, choice) not in wanted):
                rows.append((row, choice))
                texts.append(prompts[row] + choice)
                wanted.add(key(row, choice))
    first: dict[int, list[int] | None] = {}
    for (row, choice), joint in zip(rows, encode_texts(processing_class, texts), strict=True):
        n = len(prompt_ids[row])
        behind = joint[n:] if joint[:n] == prompt_ids[row] else None
        known[key(row, choice)] = behind
        first.setdefault(row, behind)

    token_ids: list[list[int]] = []
    for row, (name, row_choices) in enumerate(zip(names, choices, strict=True)):
        owners: dict[int, str] = {}
        for i, choice in enumerate(row_choices):
            ids = first[row] if i == 0 else known[key(row, choice)]
            if ids is None:
                raise ValueError(
                    f"{name}: appending the answer {choice!r} changes the tokens of the prompt, which ends in "
                    f"{prompts[row][-12:]!r} (token {_tokens(processing_class, prompt_ids[row][-1:])}): the two merge. "
                    f"{_MEND}"
                )
            if len(ids) != 1:
                raise ValueError(
                    f"{name}: the answer {choice!r} is {len(ids)} tokens behind the prompt "
                    f"({_tokens(processing_class, ids)}), it must be exactly 1. {_MEND}"
                )
            token = ids[0]
            if token == processing_class.unk_token_id:
                raise ValueError(
                    f"{name}: the answer {choice!r} is the unknown token {processing_class.unk_token!r} in this "
                    f"tokenizer. {_MEND}"
                )
            if token in owners:
                raise ValueError(
                    f"{name}: the answers {owners[token]!r} and {choice!r} are the same token {token} "
                    f"({_tokens(processing_class, ids)}); every choice needs its own. {_MEND}"
                )
            owners[token] = choice
        token_ids.append(list(owners))
    return token_ids


def _tokens(processing_class: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " + ".join(repr(token) for token in processing_class.convert_ids_to_tokens(list(ids)))
