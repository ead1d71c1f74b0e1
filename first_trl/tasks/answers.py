"""
Tokens of answers.

Confidence at the answer position is the probability of one token, so every choice has to be exactly one token behind
its prompt. Whether it is depends on the tokenizer, the choice and the end of the prompt; it is checked on every row.
Answers of several tokens are scored by their whole text; they must not merge with the prompt either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .encode import encode_pairs, encode_texts, prompt_texts, template_columns


_MEND = (
    "The model's confidence in an answer is the probability of one token. Answer with letters instead of words "
    "(completion=' {letter}'), or move the space: put it into the completion (prompt ends with 'Answer:', completion "
    "' A', right for GPT-2-like vocabularies), or end the prompt just before the letter (template "
    "'...\\nAnswer: (', completion '{letter}'), right for sentencepiece and character vocabularies, which may "
    "write ' A' as '▁' and 'A' and put a '▁' in front of every text. Answers that are meant to have several tokens can "
    'be scored by the probability of their whole text: `evaluation.scoring: choices` in a recipe, `scoring="choices"` in '
    "`answer_pipeline`, `--scoring choices` of `first-trl evaluate`."
)


class NotOneToken(ValueError):
    """An answer cannot be told by one token behind its prompt."""


# (end of the prompt, its last tokens, choice) -> tokens of the choice, `None` when it merges with the prompt.
_Known = dict[tuple[str, tuple[int, ...], str], list[int] | None]


def choice_texts(choices: Any, name: str) -> list[str]:
    """
    The choices of one row, as a list.

    Raises:
        `ValueError`: for what is no list of texts. The object of lists that benchmarks on the Hub hold (`label` and `text`)
            would otherwise be read as its keys.
    """
    if isinstance(choices, Mapping):
        raise ValueError(
            f"{name}: `choices` is an object with the keys {list(choices)}. Give the list of answers as they are appended to "
            "the prompt, such as [' A', ' B']."
        )
    found = None if choices is None or isinstance(choices, str) or not hasattr(choices, "__len__") else list(choices)
    if found is None or not all(isinstance(choice, str) for choice in found):
        raise ValueError(f"{name}: `choices` must be a list of texts, got {choices!r}.")
    return [str(choice) for choice in found]


def plain_rows(dataset: Dataset) -> Dataset:
    """The rows without a format such as numpy, whose lists of texts are arrays; a transform stays."""
    return dataset if dataset.format["type"] in (None, "custom") else dataset.with_format(None)


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
    return _token_ids(processing_class, prompt_texts(processing_class, [prompt]), [choices], ["this prompt"], {})[0]


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
        dataset ([`~datasets.Dataset`]): Rows with `prompt` (texts or conversations) and `choices`; `tools` and
            `chat_template_kwargs` are read.
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
    dataset = plain_rows(dataset)
    for start in range(0, len(dataset), batch_size):
        batch = dataset[start : start + batch_size]
        names = batch.get("id") or [f"row {start + i}" for i in range(len(batch["prompt"]))]
        prompts = prompt_texts(
            processing_class, batch["prompt"], chat_template_kwargs=chat_template_kwargs, **template_columns(batch)
        )
        token_ids += _token_ids(processing_class, prompts, batch["choices"], names, known)
    return token_ids


def question_kinds(dataset: Dataset) -> list[str]:
    """Type of each question (`choice`, `score` or `noul`): its `kind`, and `choice` where it has none."""
    kinds = dataset["kind"][:] if "kind" in dataset.column_names else [None] * len(dataset)
    return [kind or "choice" for kind in kinds]


def check_answers(processing_class: PreTrainedTokenizerBase, dataset: Dataset, scoring: str) -> None:
    """
    Checks that the choices of every row can be scored: as one `token` each, or as `choices` of any number of tokens.

    Raises:
        `ValueError`: see [`answer_token_ids`] and [`choice_token_ids`].
    """
    if scoring == "token":
        answer_token_ids_of_rows(processing_class, dataset)
    else:
        prompts = prompt_texts(processing_class, dataset["prompt"], **template_columns(dataset))
        choice_token_ids(processing_class, prompts, dataset["choices"], dataset["id"])


def choice_token_ids(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    names: Sequence[str],
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """
    Tokens of prompts and of their choices, one or more a choice.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        prompts (`Sequence[str]`): Texts the model reads.
        choices (`Sequence[Sequence[str]]`): Of each prompt, exactly as they are appended to it.
        names (`Sequence[str]`): What each row is called in an error.

    Returns:
        `tuple`: ids of each prompt, and of each of its choices.

    Raises:
        `ValueError`: for a row without choices, an empty choice, one that merges with the end of its prompt, or two
        different ones with the same tokens.
    """
    choices = [choice_texts(row, name) for name, row in zip(names, choices, strict=True)]
    for name, row in zip(names, choices, strict=True):
        if not row or not all(row):
            raise ValueError(f"{name}: {'a choice is empty' if row else 'there are no choices'}.")
    flat_prompt_ids, flat_choice_ids = encode_pairs(
        processing_class,
        [prompt for prompt, row in zip(prompts, choices, strict=True) for _ in row],
        [choice for row in choices for choice in row],
    )
    prompt_ids, choice_ids, start = [], [], 0
    for name, row in zip(names, choices, strict=True):
        tokens = flat_choice_ids[start : start + len(row)]
        kept = [ids for ids in tokens if ids]
        if len(kept) < len(row):
            text = next(choice for choice, ids in zip(row, tokens, strict=True) if not ids)
            raise ValueError(
                f"{name}: the choice {text!r} merges with the last token of the prompt. Move the space: into the choice "
                "(' answer' behind 'Answer:'), or to the end of the prompt."
            )
        owners: dict[tuple[int, ...], str] = {}
        for choice, ids in zip(row, kept, strict=True):
            if owners.setdefault(tuple(ids), choice) != choice:
                raise ValueError(
                    f"{name}: the answers {owners[tuple(ids)]!r} and {choice!r} are the same tokens "
                    f"({_tokens(processing_class, ids)}), so nothing tells them apart. Use a tokenizer that knows their "
                    "words, or letters as answers (completion=' {letter}')."
                )
        prompt_ids.append(flat_prompt_ids[start])
        choice_ids.append(kept)
        start += len(row)
    return prompt_ids, choice_ids


def _token_ids(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    names: Sequence[str],
    known: _Known,
) -> list[list[int]]:
    choices = [choice_texts(row, name) for name, row in zip(names, choices, strict=True)]
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
                raise NotOneToken(
                    f"{name}: appending the answer {choice!r} changes the tokens of the prompt, which ends in "
                    f"{prompts[row][-12:]!r} (token {_tokens(processing_class, prompt_ids[row][-1:])}): the two merge. "
                    f"{_MEND}"
                )
            if len(ids) != 1:
                raise NotOneToken(
                    f"{name}: the answer {choice!r} is {len(ids)} tokens behind the prompt "
                    f"({_tokens(processing_class, ids)}), it must be exactly 1. {_MEND}"
                )
            token = ids[0]
            if token == processing_class.unk_token_id:
                raise NotOneToken(
                    f"{name}: the answer {choice!r} is the unknown token {processing_class.unk_token!r} in this "
                    f"tokenizer. {_MEND}"
                )
            if token in owners:
                raise NotOneToken(
                    f"{name}: the answers {owners[token]!r} and {choice!r} are the same token {token} "
                    f"({_tokens(processing_class, ids)}); every choice needs its own. {_MEND}"
                )
            owners[token] = choice
        token_ids.append(list(owners))
    return token_ids


def _tokens(processing_class: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " + ".join(repr(token) for token in processing_class.convert_ids_to_tokens(list(ids)))
