"""Answered rows, texts or conversations, -> token rows with the masks that labels are made from."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, LargeList, List, Value

from ..cache.schema import INPUT_IDS
from ..tasks.conversation import (
    CHAT_TEMPLATE_KWARGS,
    answered_text,
    read_messages,
    read_tools,
    render,
    row_arguments,
    without_nulls,
)
from ..tasks.encode import encode_texts
from ..utils.versions import versioned
from .padding import ASSISTANT_MASKS, COMPLETION_MASK


# Columns with whole conversations
MESSAGES = ("messages", "conversations")
# Helper columns: rows whose context is another than a model reads that is asked the prompt, and rows whose answer is empty
DIVERGED, EMPTY = "_diverged", "_empty"


def writable_columns(dataset: Dataset, num_proc: int | None) -> Dataset:
    """
    Tools, and columns in which an object has no key (`parameters: {}`), as JSON text: Arrow would give all tools the
    same keys, and Parquet cannot store an object without any. Conversations stay conversations, since a text would be
    read as the prompt itself: such objects get a key that is null, which readers leave out.
    """
    types = {name: dataset.data.schema.field(name).type for name in dataset.column_names}
    empty = [name for name, type_ in types.items() if type_ is not None and _has_empty_struct(type_)]
    # Before they are read they are as they came
    kept = [name for name in empty if name in _READ_AS_OBJECTS]
    keyed = Features(
        {**dataset.features, **{name: _with_key(dataset.features[name]) for name in kept if INPUT_IDS in types}}
    )
    names = [name for name in empty if name not in kept]
    if "tools" in types and not _is_text(types["tools"]) and not pa.types.is_null(types["tools"]):
        names = [*dict.fromkeys([*names, "tools"])]
    if not names and keyed == dataset.features:
        return dataset
    return dataset.map(
        versioned(_as_json, "first_trl.tasks.conversation"),
        batched=True,
        num_proc=num_proc,
        features=Features({**keyed, **{name: Value("string") for name in names}}),
        fn_kwargs={"names": names},
        desc=f"Writing {', '.join([*names, *kept])} as Parquet can",
    )


_READ_AS_OBJECTS = ("prompt", "completion", CHAT_TEMPLATE_KWARGS, *MESSAGES)


def _with_key(feature: Any) -> Any:
    """The feature, with a key in objects that have none."""
    if isinstance(feature, dict):
        return {name: _with_key(value) for name, value in feature.items()} or {"_": Value("string")}
    return type(feature)(_with_key(feature.feature)) if isinstance(feature, List | LargeList) else feature


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _has_empty_struct(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_) and type_.num_fields == 0:
        return True
    return any(_has_empty_struct(type_.field(i).type) for i in range(type_.num_fields))


def _as_json(batch: dict[str, list[Any]], *, names: list[str]) -> dict[str, list[str | None]]:
    return {
        name: [
            None if value is None else json.dumps(without_nulls(value), ensure_ascii=False, default=str)
            for value in batch[name]
        ]
        for name in names
    }


def is_from_template(dataset: Dataset, text_field: str) -> bool | None:
    """Whether a chat template writes the text of the rows; `None` for rows that are tokenised already."""
    if INPUT_IDS in dataset.column_names:
        return None
    field = next(name for name in ("prompt", *MESSAGES, text_field) if name in dataset.column_names)
    return not _is_text(dataset.data.schema.field(field).type)


def tokenize_conversations(
    dataset: Dataset,
    tokenizer: Any,
    *,
    text_field: str,
    assistant_only_loss: bool,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any],
    num_proc: int | None,
) -> Dataset:
    """
    Rows with `input_ids` and the masks [`~trl.SFTTrainer`] makes labels from. Texts end with the end-of-sequence token,
    conversations as the template ends them.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with `prompt` and `completion`, `messages`, or texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        text_field (`str`): Column of texts.
        assistant_only_loss (`bool`): Whether the template marks what is supervised.
        chat_template (`str`, *optional*): Instead of the tokenizer's.
        chat_template_kwargs (`dict`): Arguments of the template for all rows.
        num_proc (`int`, *optional*): Processes of `map`.

    Raises:
        `ValueError`: A row is malformed, naming it.
    """
    columns = dataset.column_names
    field = "prompt" if "prompt" in columns else next((name for name in MESSAGES if name in columns), text_field)
    rows = dataset.map(
        versioned(_tokenize, "first_trl.tasks.conversation", "first_trl.tasks.encode"),
        batched=True,
        batch_size=100,
        with_indices=True,
        num_proc=num_proc,
        # Renamed to "messages", as SFTTrainer does
        remove_columns=["conversations"] if field == "conversations" else None,
        fn_kwargs={
            "tokenizer": tokenizer,
            "field": field,
            "assistant_only_loss": assistant_only_loss,
            "chat_template": chat_template,
            "arguments": dict(chat_template_kwargs),
        },
        desc="Tokenizing rows",
    )
    return writable_columns(rows, num_proc)


def _tokenize(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: Any,
    field: str,
    assistant_only_loss: bool,
    chat_template: str | None,
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    rows = []
    for i, index in enumerate(indices):
        row = {name: values[i] for name, values in batch.items()}
        try:
            own = row_arguments(arguments, row.get(CHAT_TEMPLATE_KWARGS))
            rows.append(_tokenize_row(row, tokenizer, field, assistant_only_loss, chat_template, own))
        except ValueError as error:
            raise ValueError(f"Row {index} of the dataset: {error}") from None
    return {name: [row[name] for row in rows] for name in rows[0]}


def _tokenize_row(
    row: dict[str, Any],
    tokenizer: Any,
    field: str,
    assistant_only_loss: bool,
    chat_template: str | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    tools = row.get("tools")
    if field == "prompt" and isinstance(row["prompt"], str):
        if not isinstance(row["completion"], str):
            raise ValueError("the prompt is a text and the completion a conversation. Make both the same.")
        completion = _ended(row["completion"], tokenizer)
        prompt_ids, completion_ids = _encode_pair(tokenizer, row["prompt"], completion)
        _check_end(completion_ids, tokenizer)
        return {
            "completion": completion,
            INPUT_IDS: prompt_ids + completion_ids,
            COMPLETION_MASK: [0] * len(prompt_ids) + [1] * len(completion_ids),
            DIVERGED: False,
            EMPTY: not row["completion"],
        }
    if field == "prompt":
        head, tail, served = answered_text(
            tokenizer,
            row["prompt"],
            row["completion"],
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=arguments,
        )
        if not tail:
            raise ValueError("the chat template writes nothing for the completion.")
        prompt_ids, completion_ids = _encode_pair(tokenizer, head, tail)
        encoded: dict[str, Any] = {INPUT_IDS: prompt_ids + completion_ids}
        if assistant_only_loss:
            answer = row["completion"]
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            marked = _marked(tokenizer, [*row["prompt"], *answer], tools, chat_template, arguments)
            if marked[INPUT_IDS] != encoded[INPUT_IDS]:
                prompt_ids = prompt_ids[: _common_prefix(prompt_ids, marked[INPUT_IDS])]
            encoded = marked
        n = len(prompt_ids)
        return {
            **encoded,
            COMPLETION_MASK: [0] * n + [1] * (len(encoded[INPUT_IDS]) - n),
            DIVERGED: not served,
            EMPTY: _says_nothing(row["completion"]),
        }
    if isinstance(row[field], str):
        text = _ended(row[field], tokenizer)
        ids = encode_texts(tokenizer, [text])[0]
        _check_end(ids, tokenizer)
        return {field: text, INPUT_IDS: ids}
    encoded = {}
    if field == "conversations":
        template = tokenizer.get_chat_template(chat_template, None) if tokenizer.chat_template else ""
        encoded["messages"] = read_messages(row[field], template)
    text = render(tokenizer, row[field], tools=tools, chat_template=chat_template, chat_template_kwargs=arguments)
    encoded[INPUT_IDS] = encode_texts(tokenizer, [text])[0]
    if assistant_only_loss:
        return encoded | _marked(tokenizer, row[field], tools, chat_template, arguments)
    return encoded


def _says_nothing(completion: Any) -> bool:
    """Whether the last message of an answer has an empty content, and nothing else."""
    if isinstance(completion, str) or not completion:
        return not completion
    last = {name: value for name, value in completion[-1].items() if value is not None}
    return last.get("content", last.get("value")) == "" and not any(
        last.get(name) for name in last.keys() - {"role", "from", "name"}
    )


def _check_end(ids: list[int], tokenizer: Any) -> None:
    """A student that learns to write the letters of the end token never ends."""
    if not ids or tokenizer.eos_token_id is None or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"the end-of-sequence token {tokenizer.eos_token!r} is no token behind this text: the tokenizer splits it. "
            f"Set `tokenizer.eos_token` to one that its vocabulary has, and leave `split_special_tokens` off."
        )


def _ended(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _encode_pair(tokenizer: Any, head: str, tail: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens are those it has alone; the completion's those that follow, its own where the two merge."""
    prompt_ids, joint = (
        encode_texts(tokenizer, [head, head + tail]) if head else ([], encode_texts(tokenizer, [tail])[0])
    )
    if joint[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, joint[len(prompt_ids) :]
    return prompt_ids, list(tokenizer(str(tail), add_special_tokens=False)["input_ids"])


def _marked(
    tokenizer: Any, messages: Any, tools: Any, chat_template: str | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Tokens of a conversation, and which of them the template marks as the assistant's."""
    read = read_tools(tools)
    template = tokenizer.get_chat_template(chat_template, read)
    encoded = tokenizer.apply_chat_template(
        read_messages(messages, template),
        chat_template=template,
        tools=read,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **{name: value for name, value in arguments.items() if name != "chat_template"},
    )
    if 1 not in encoded[ASSISTANT_MASKS]:
        raise ValueError(
            "`assistant_only_loss=True`, and the chat template marks nothing of this conversation. Remove the row if it "
            "has no assistant message; else use a template that puts what the assistant says between "
            "`{% generation %}` and `{% endgeneration %}`."
        )
    return {INPUT_IDS: list(encoded[INPUT_IDS]), ASSISTANT_MASKS: list(encoded[ASSISTANT_MASKS])}


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
