"""
The one way from text to ids, for teacher, training, evaluation and inference.

Special tokens that the tokenizer puts in front of a text (`<bos>`) are kept once, also where the text brings them
itself; those it puts behind a text are left off, since a prompt is not the end of a text. A text that the chat template
wrote is taken as the template wrote it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .conversation import CHAT_TEMPLATE_KWARGS, Rendered, prompt_text, row_arguments, template_starts


def encode_prompts(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    row_kwargs: Sequence[Any] | None = None,
) -> list[list[int]]:
    """
    Token ids of prompts as the model reads them: leading special tokens once, no trailing ones.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts, texts that a chat template wrote, or conversations.
        tools (`Sequence`, *optional*): Tools of each conversation, objects or JSON text.
        chat_template_kwargs (`dict`, *optional*): Arguments of the chat template, such as `enable_thinking`.
        row_kwargs (`Sequence`, *optional*): Such arguments of each conversation, which go before them.

    Returns:
        `list[list[int]]`: one list of ids per prompt, without padding.

    Raises:
        `ValueError`: when all prompts are empty, or the chat template cannot write a conversation.
    """
    texts = prompt_texts(
        processing_class, prompts, tools=tools, chat_template_kwargs=chat_template_kwargs, row_kwargs=row_kwargs
    )
    if texts and not any(texts):
        raise ValueError("All prompts are empty: there is nothing for the model to read.")
    return encode_texts(processing_class, texts)


def prompt_texts(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    row_kwargs: Sequence[Any] | None = None,
) -> list[str]:
    """Texts of prompts up to where their answers begin, see [`~first_trl.tasks.conversation.prompt_text`]."""
    none = [None] * len(prompts)
    return [
        prompt_text(
            processing_class, prompt, tools=own_tools, chat_template_kwargs=row_arguments(chat_template_kwargs, own)
        )
        for prompt, own_tools, own in zip(prompts, tools or none, row_kwargs or none, strict=True)
    ]


def template_columns(rows: Mapping[str, Any] | Dataset) -> dict[str, Any]:
    """What rows bring for their chat template, as arguments of [`prompt_texts`] and [`encode_prompts`]."""
    names = rows.column_names if isinstance(rows, Dataset) else rows
    found = {"tools": "tools", "row_kwargs": CHAT_TEMPLATE_KWARGS}
    return {argument: rows[name][:] for argument, name in found.items() if name in names}


def filler_token_id(processing_class: PreTrainedTokenizerBase) -> int:
    """
    The token that stands where the answer of a prompt without one would begin: the end-of-sequence token, else the
    padding token.

    Raises:
        `ValueError`: when the tokenizer has neither.
    """
    for token_id in (processing_class.eos_token_id, processing_class.pad_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "A prompt without an answer ends with a filler token, and the tokenizer has neither an `eos_token` nor a "
        "`pad_token`. Set one of them."
    )


def encode_pairs(
    processing_class: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> tuple[list[list[int]], list[list[int] | None]]:
    """
    Token ids of prompts, and of what each completion adds to its prompt.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        prompts (`Sequence[str]`): Texts, as many as `completions`.
        completions (`Sequence[str]`): Texts appended to the prompts.

    Returns:
        `tuple`: ids of the prompts, and ids of the completions; `None` where the ids of prompt + completion do not
        begin with those of the prompt, so that no boundary between the two exists.
    """
    joint = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if not all(completions):
        raise ValueError("A completion is empty; remove the row.")
    if not joint:
        return [], []
    prompt_ids = encode_texts(processing_class, prompts)
    joint_ids = encode_texts(processing_class, joint)
    completion_ids = [
        both[len(prompt) :] if both[: len(prompt)] == prompt else None
        for prompt, both in zip(prompt_ids, joint_ids, strict=True)
    ]
    return prompt_ids, completion_ids


def encode_texts(processing_class: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of texts, with the special tokens in front once and none behind.

    Raises:
        `ValueError`: The tokenizer splits special tokens that a chat template wrote.
    """
    if not texts:
        return []
    encoded = processing_class([str(text) for text in texts], add_special_tokens=False)["input_ids"]
    _check_whole(processing_class, texts, encoded)
    front = front_tokens(processing_class, texts)
    if not front:
        return [list(ids) for ids in encoded]
    starts = template_starts(processing_class)
    written = "".join(processing_class.convert_ids_to_tokens(front))
    return [
        list(ids)
        if ids[: len(front)] == front
        or isinstance(text, Rendered)
        or (starts and text.startswith(starts))
        or (text.lstrip().startswith(written) and front[0] in ids)  # behind a line break that a file brings along
        else front + list(ids)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def _check_whole(processing_class: Any, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
    """Raises `ValueError` where the special tokens that a chat template wrote fell into letters."""
    if not getattr(processing_class, "split_special_tokens", False):
        return
    starts = template_starts(processing_class)
    source = "".join([*starts, str(processing_class.chat_template)])
    if "eos_token" in source:
        source += str(processing_class.eos_token)
    # A token that stands in a message alone is meant to be split
    tokens = ((i, str(token)) for i, token in processing_class.added_tokens_decoder.items() if token.special)
    special = {i: token for i, token in tokens if token in source}
    for text, ids in zip(texts, encoded, strict=True):
        if not isinstance(text, Rendered) and not (starts and text.startswith(starts)):
            continue
        split = next((token for i, token in special.items() if token in text and i not in ids), None)
        if split is not None:
            raise ValueError(
                f"the chat template writes {split!r}, and the tokenizer splits it into letters, which is not how a model "
                "learned to read it. Set `tokenizer.split_special_tokens = False`."
            )


def front_tokens(processing_class: PreTrainedTokenizerBase, texts: Sequence[str] = ("a",)) -> list[int]:
    """
    Special tokens that the tokenizer puts in front of a text.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        texts (`Sequence[str]`, *optional*): Texts that the tokenizer can read; one of them is looked at.
    """
    special = set(processing_class.all_special_ids)
    for probe in texts:
        try:
            bare = list(processing_class(str(probe), add_special_tokens=False)["input_ids"]) if probe else []
        except Exception:
            continue
        # A text of special tokens alone cannot be told from those that are put around it
        if any(token not in special for token in bare):
            break
    else:
        return _around_nothing(processing_class)
    with_special = list(processing_class(str(probe), add_special_tokens=True)["input_ids"])
    for start in range(len(with_special) - len(bare) + 1):
        if with_special[start : start + len(bare)] == bare:
            return with_special[:start]
    raise ValueError(
        f"Cannot tell which special tokens this tokenizer puts in front of a text: {probe[:40]!r} has the tokens "
        f"{with_special[:20]} with them and {bare[:20]} without. Use a tokenizer whose special tokens leave the text's "
        "own alone."
    )


def _around_nothing(processing_class: PreTrainedTokenizerBase) -> list[int]:
    """What stands around an empty text, up to the first end token."""
    ids = list(processing_class("", add_special_tokens=True)["input_ids"])
    ends = {processing_class.eos_token_id, processing_class.sep_token_id} - {processing_class.bos_token_id, None}
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
