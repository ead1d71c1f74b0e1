"""Tokenised rows that come with masks or padding."""

from typing import Any

import numpy as np
from datasets import Dataset

from ..cache.schema import INPUT_IDS, LABELS
from ..utils.versions import versioned
from ..vocabulary import HAS_GOLD, IGNORE_INDEX, TEACHER_HAS_GOLD


ATTENTION_MASK, COMPLETION_MASK, ASSISTANT_MASKS = "attention_mask", "completion_mask", "assistant_masks"
# Columns with one entry per token
_PER_TOKEN = (
    INPUT_IDS,
    LABELS,
    COMPLETION_MASK,
    ASSISTANT_MASKS,
    ATTENTION_MASK,
    "token_type_ids",
    "special_tokens_mask",
)


_OF_TOKENIZER = ("special_tokens_mask", "mm_token_type_ids")


def refuse_unknown_masks(dataset: Dataset) -> None:
    """
    Refuse tokenised rows without labels whose mask has a name that is not read: all their tokens would be supervised.

    Raises:
        `ValueError`: naming the columns.
    """
    columns = dataset.column_names
    known = (COMPLETION_MASK, ASSISTANT_MASKS, ATTENTION_MASK, *_OF_TOKENIZER)
    unknown = [name for name in columns if name.endswith(("mask", "masks")) and name not in known]
    if unknown and LABELS not in columns and not {COMPLETION_MASK, ASSISTANT_MASKS} & set(columns):
        raise ValueError(
            f"The rows have `input_ids`, no `labels`, and {unknown}, which is not read as a mask of what is supervised. "
            f"Rename it to `{COMPLETION_MASK}` or `{ASSISTANT_MASKS}` (1 = supervised), or remove the column."
        )


def refuse_packed(dataset: Dataset) -> None:
    """
    Refuse tokenised rows that hold several documents: a teacher would read the later ones behind the first.

    Raises:
        `ValueError`: naming the row, where positions begin anew, there are several lengths, or a mask numbers documents.
    """
    names = [name for name in (ATTENTION_MASK, "position_ids", "seq_lengths") if name in dataset.column_names]
    first = 0
    for batch in dataset.select_columns(names).with_format(None).iter(batch_size=1000) if names else ():
        for name in names:
            for i, values in enumerate(batch[name]):
                if values is None:
                    continue
                numbers = np.asarray(values)
                if name == "position_ids":
                    mask = (
                        np.ones(numbers.shape) if ATTENTION_MASK not in names else np.asarray(batch[ATTENTION_MASK][i])
                    )
                    kept = numbers[mask != 0] if mask.shape == numbers.shape else numbers
                    packed = bool((np.diff(kept.astype(np.int64)) != 1).any())
                else:
                    packed = len(numbers) > 1 if name == "seq_lengths" else bool((numbers > 1).any())
                if packed:
                    raise ValueError(
                        f"Row {first + i} of the dataset: by its `{name}` it holds several documents, and the teacher would "
                        "read each behind the others. Give one document a row; training packs them again."
                    )
        first += len(batch[names[0]])


def remove_padding(dataset: Dataset, num_proc: int | None) -> Dataset:
    """
    Rows without the tokens that `attention_mask` masks, on the left and on the right. Without such a column, or where
    it masks nothing, the rows as they are.

    Raises:
        `ValueError`: A mask differs in length from its row, masks tokens in the middle, or masks all.
    """
    if ATTENTION_MASK not in dataset.column_names:
        return dataset
    padded, first = False, 0
    per_token = [name for name in _PER_TOKEN if name in dataset.column_names]
    for batch in dataset.select_columns([INPUT_IDS, ATTENTION_MASK]).with_format(None).iter(batch_size=1000):
        for i, (ids, mask) in enumerate(zip(batch[INPUT_IDS], batch[ATTENTION_MASK], strict=True)):
            place = f"Row {first + i} of the dataset: "
            if ids is None:
                raise ValueError(f"{place}`{INPUT_IDS}` is null. Remove the row.")
            if mask is None or len(mask) != len(ids):
                raise ValueError(f"{place}`{ATTENTION_MASK}` and `{INPUT_IDS}` differ in length. Tokenise it again.")
            kept = np.flatnonzero(mask)
            if not len(kept):
                raise ValueError(f"{place}`{ATTENTION_MASK}` masks every token. Remove the row.")
            if kept[-1] - kept[0] + 1 != len(kept):
                raise ValueError(
                    f"{place}`{ATTENTION_MASK}` masks tokens between others, which no padding does. Remove those tokens, "
                    "or the column."
                )
            padded = padded or len(kept) < len(ids)
        first += len(batch[INPUT_IDS])
    if not padded:
        return dataset
    # Counted for the longer row; nothing asks for them again
    if "position_ids" in dataset.column_names:
        dataset = dataset.remove_columns("position_ids")
    return dataset.map(
        versioned(_trim), batched=True, num_proc=num_proc, features=dataset.features, fn_kwargs={"names": per_token},
        desc="Removing padding",
    )  # fmt: skip


def _trim(batch: dict[str, list[Any]], *, names: list[str]) -> dict[str, list[Any]]:
    spans = [(kept[0], kept[-1] + 1) for kept in (np.flatnonzero(mask) for mask in batch[ATTENTION_MASK])]
    lengths = [len(ids) for ids in batch[INPUT_IDS]]
    return {
        name: [
            # One of another length is malformed, and named so when the rows are checked
            value[start:stop] if value is not None and len(value) == length else value
            for value, (start, stop), length in zip(batch[name], spans, lengths, strict=True)
        ]
        for name in names
    }


def check_padding(dataset: Dataset, processing_class: Any) -> None:
    """
    Refuse rows that are padded and do not say so: a teacher would read the padding.

    Raises:
        `ValueError`: A row begins with the padding token, or is supervised on it.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    # A padding token with another use can stand once at either end
    shared = pad in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    run = 2 if shared else 1
    # It ends texts, or fills the place of an answer
    may_end = shared or bool({HAS_GOLD, TEACHER_HAS_GOLD} & set(dataset.column_names))
    if pad == tokenizer.unk_token_id:
        return
    first = 0
    for batch in dataset.select_columns([INPUT_IDS, LABELS]).with_format(None).iter(batch_size=1000):
        for i, (ids, labels) in enumerate(zip(batch[INPUT_IDS], batch[LABELS], strict=True)):
            place = f"Row {first + i} of the dataset"
            if not ids or not labels or len(ids) != len(labels) or len(ids) <= run:
                continue  # said when the rows are checked, or nothing to say
            if ids[:run] == [pad] * run:
                raise ValueError(
                    f"{place} begins with the padding token {tokenizer.pad_token!r}, which the teacher would read. Remove "
                    "the padding, or give its `attention_mask`."
                )
            if not may_end and ids[-1] == pad and labels[-1] != IGNORE_INDEX:
                raise ValueError(
                    f"{place} ends with the padding token {tokenizer.pad_token!r}, and its label is not masked. Set labels "
                    "of padding to -100, or give the `attention_mask`."
                )
        first += len(batch[INPUT_IDS])
