"""Which rows the teacher can score, the digest of their contents, and their division into batches."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..cache.schema import CACHE_COLUMNS, INPUT_IDS, LABELS, gold_flags
from ..vocabulary import HAS_GOLD, IGNORE_INDEX, TEACHER_HAS_GOLD


def usable_rows(rows: Dataset, max_length: int | None, num_tokens: int) -> tuple[Dataset, dict[str, Any]]:
    """
    Leave out what cannot be scored, count it, and keep the order. The result has the column `teacher_has_gold` where
    some row has no answer, and only there.

    Args:
        rows ([`~datasets.Dataset`]): Tokenised rows.
        max_length (`int` or `None`): The teacher's context.
        num_tokens (`int`): Ids the teacher knows.

    Returns:
        `tuple`: the rows to score, and the manifest's counts.

    Raises:
        `ValueError`: A row is malformed, or none can be scored.
    """
    if TEACHER_HAS_GOLD not in rows.column_names and HAS_GOLD in rows.column_names:
        rows = rows.rename_column(HAS_GOLD, TEACHER_HAS_GOLD)
    lengths, supervised = [], []
    first_row = 0
    for table in rows.select_columns([INPUT_IDS, LABELS]).with_format("arrow").iter(batch_size=1000):
        row_lengths, row_supervised = _check_tokens(table, first_row, num_tokens)
        lengths.append(row_lengths)
        supervised.append(row_supervised)
        first_row += len(row_lengths)
    length, count = np.concatenate(lengths), np.concatenate(supervised)
    too_long = length > max_length if max_length is not None else np.zeros(len(length), bool)
    masked = (count == 0) & ~too_long
    keep = np.flatnonzero(~too_long & ~masked)
    if len(keep) == 0:
        raise ValueError(
            "No row has a supervised position"
            + (f" within the teacher's context of {max_length} tokens" if too_long.any() else "")
            + f": {int(masked.sum())} rows have all labels masked (-100), {int(too_long.sum())} are too long. Unmask "
            "the completion's labels, or set `max_length`."
        )
    has_gold = _gold_of(rows)[keep]
    counts = {
        "rows": len(keep),
        "positions": int(count[keep].sum()),
        "rows_without_gold": int((~has_gold).sum()),
        "positions_without_gold": int(count[keep][~has_gold].sum()),
        "tokens": int(length[keep].sum()),
        "dropped_without_supervised_position": int(masked.sum()),
        "dropped_longer_than_context": int(too_long.sum()),
    }
    if len(keep) < len(rows):
        warnings.warn(
            f"{len(rows) - len(keep)} of {len(rows)} rows are left out of the cache: {int(masked.sum())} without a "
            f"supervised position, {int(too_long.sum())} longer than the teacher's context of {max_length} tokens."
        )
        rows = rows.select(keep)
    if TEACHER_HAS_GOLD in rows.column_names and has_gold.all():
        rows = rows.remove_columns(TEACHER_HAS_GOLD)
    return rows, counts


def _gold_of(rows: Dataset) -> np.ndarray:
    if TEACHER_HAS_GOLD not in rows.column_names:
        return np.ones(len(rows), bool)
    return gold_flags(rows.select_columns([TEACHER_HAS_GOLD]).with_format("arrow")[:])


def _check_tokens(table: pa.Table, first_row: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Length and number of supervised positions of each row; `ValueError` when a row is malformed."""

    def fail(row: int, what: str) -> None:
        raise ValueError(f"Row {first_row + row} of the dataset: {what}")

    columns = {}
    for name in (INPUT_IDS, LABELS):
        column = table.column(name).combine_chunks()
        if column.null_count:
            fail(int(np.flatnonzero(column.is_null())[0]), f"`{name}` is null. Remove the row.")
        if not hasattr(column, "offsets") or not pa.types.is_integer(column.type.value_type):
            raise ValueError(f"`{name}` has type {column.type}; it must be a list of integers.")
        columns[name] = column
    lengths = np.diff(np.asarray(columns[INPUT_IDS].offsets))
    unequal = np.flatnonzero(lengths != np.diff(np.asarray(columns[LABELS].offsets)))
    if len(unequal):
        fail(int(unequal[0]), "`input_ids` and `labels` differ in length. Tokenise the row again.")
    input_ids, labels = (np.asarray(columns[name].flatten()) for name in (INPUT_IDS, LABELS))
    row_of_token = np.repeat(np.arange(len(lengths)), lengths)
    for bad, what in (
        (
            (input_ids < 0) | (input_ids >= num_tokens),
            f"an input id is outside the vocabulary of {num_tokens}. Tokenise with the teacher's tokenizer.",
        ),
        (
            (labels != IGNORE_INDEX) & (labels != input_ids),
            "a label differs from the token it stands at. `labels[t]` must be `input_ids[t]` or -100: the shift to "
            "the next token is made here and by the trainer.",
        ),
    ):
        if bad.any():
            fail(int(row_of_token[np.flatnonzero(bad)[0]]), what)
    mask = labels != IGNORE_INDEX
    mask[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts a row's first token
    return lengths, np.bincount(row_of_token[mask], minlength=len(lengths))


def content_digest(rows: Dataset) -> str:
    """
    Digest of all rows in order: tokens, labels, which of these are no answer, and the other columns, which travel with
    the cache.
    """
    digest = hashlib.blake2b(digest_size=8)
    extra = sorted(name for name in rows.column_names if name not in CACHE_COLUMNS)
    gold = [name for name in (TEACHER_HAS_GOLD,) if name in rows.column_names]
    for table in rows.select_columns([INPUT_IDS, LABELS, *extra, *gold]).with_format("arrow").iter(batch_size=1000):
        for _ in gold:
            digest.update(gold_flags(table).tobytes())
        for name in (INPUT_IDS, LABELS):
            column = table.column(name).combine_chunks()
            digest.update(np.diff(np.asarray(column.offsets)).astype(np.int64).tobytes())
            digest.update(np.asarray(column.flatten()).astype(np.int32).tobytes())
        # Arrow buffers of equal columns can differ (slices, padding, validity bits); their values do not
        for name in extra:
            values = table.column(name).to_pylist()
            digest.update(
                json.dumps({name: values}, default=repr, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
    return digest.hexdigest()


def batches_by_length(rows: list[np.ndarray], max_tokens: int, max_rows: int) -> Iterator[list[int]]:
    """Rows of similar length together, longest first, so that an out-of-memory error comes at the start."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == max_rows or len(rows[batch[0]]) * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
