"""
Keep teacher entries on their tokens while rows are truncated and packed.

Everything works on Arrow tables and never visits a token in Python. A cache stores one list of entries per *supervised
position*. Truncation and packing cut and join *tokens*, so entries are spread to one per token first (null where no
label is scored), and gathered again afterwards. The trainer's collator reads rows whose inner lists are flattened:
fetching those costs a tenth of fetching nested lists.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from ..cache.arrow import column, list_column
from ..cache.schema import (
    DRAW_COLUMNS,
    DRAW_COUNTS,
    INPUT_IDS,
    LABELS,
    TAIL_LOGPROB,
    TOPK_IDS,
    TOPK_LOGPROBS,
    gold_flags,
)
from ..plugins import estimator_target
from ..utils.versions import versioned
from ..vocabulary import IGNORE_INDEX, TEACHER_HAS_GOLD


# Distinct draws of each supervised position, from which the flattened draws are split again
DRAW_LENGTHS = "teacher_draw_lengths"
SEQ_LENGTHS = "seq_lengths"


def entry_columns(estimator: str) -> tuple[str, ...]:
    """Columns of the cache that an estimator reads."""
    return DRAW_COLUMNS if estimator_target(estimator) == "draws" else (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB)


def align(
    dataset: Dataset | IterableDataset,
    columns: tuple[str, ...],
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    packing_strategy: str | None = None,
    shuffle_seed: int | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Verified cache rows -> rows for [`DataCollatorForDistillation`]: cut to `max_length`, packed, flattened. Rows that
    keep no supervised position are dropped.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Cache rows.
        columns (`tuple[str, ...]`):
            Teacher columns to keep, from [`entry_columns`], and `teacher_has_gold`, which a row has one of and its
            supervised positions get one each of.
        max_length (`int`, *optional*):
            Longest row, in tokens. With packing, the length rows are packed to.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            `"keep_start"` or `"keep_end"`. The first token that is kept is predicted by nothing: its entry goes.
        packing_strategy (`str`, *optional*):
            `"bfd"` or `"bfd_split"`; no packing when not set.
        shuffle_seed (`int`, *optional*):
            Seed to shuffle with before packing.
        num_proc (`int`, *optional*):
            Processes of the `map` calls.
    """
    options: dict[str, Any] = {"batched": True}
    if isinstance(dataset, Dataset):
        options["num_proc"] = num_proc
    # "bfd_split" cuts long rows into pieces that all stay
    window = (None if packing_strategy == "bfd_split" else max_length, truncation_mode)
    cut = {"columns": columns, "window": window}
    dataset = dataset.select_columns([INPUT_IDS, LABELS, *columns]).with_format("arrow")
    if packing_strategy is None:
        return dataset.map(versioned(_align_table), fn_kwargs=cut, **options).with_format(None)
    if max_length is None:
        raise ValueError("Packing needs `max_length`, the length rows are packed to.")
    dataset = dataset.map(versioned(_spread), fn_kwargs=cut, **options).with_format(None)
    if shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    map_kwargs = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    dataset = pack_dataset(dataset, max_length, packing_strategy, map_kwargs).with_format("arrow")
    return dataset.map(versioned(_gather), fn_kwargs={"columns": columns}, **options).with_format(None)


def count_cuts(dataset: Dataset, max_length: int | None, truncation_mode: str) -> tuple[int, int]:
    """Rows longer than `max_length`, and rows without a supervised position once they are cut."""
    cut, dropped = 0, 0
    for table in dataset.select_columns([LABELS]).with_format("arrow").iter(batch_size=1000):
        offsets, labels = list_column(table, LABELS)
        starts, ends = _window(offsets, max_length, truncation_mode)
        mask = np.asarray(labels) != IGNORE_INDEX
        mask[starts[starts < ends]] = False
        supervised = np.concatenate([[0], np.cumsum(mask)])
        cut += int((ends - starts < np.diff(offsets)).sum())
        dropped += int((supervised[ends] == supervised[starts]).sum())
    return cut, dropped


def _window(offsets: np.ndarray, max_length: int | None, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 token that each row keeps."""
    starts, ends = offsets[:-1], offsets[1:]
    if max_length is None:
        return starts, ends
    if mode == "keep_start":
        return starts, np.minimum(ends, starts + max_length)
    return np.maximum(starts, ends - max_length), ends


def _align_table(table: pa.Table, columns: tuple[str, ...], window: tuple[int | None, str]) -> pa.Table:
    return _gather(_spread(table, columns, window), columns)


def _spread(table: pa.Table, columns: tuple[str, ...], window: tuple[int | None, str]) -> pa.Table:
    """Cut the rows and give every token of them its entry, null where there is none."""
    offsets, input_ids = list_column(table, INPUT_IDS)
    _, label_values = list_column(table, LABELS)
    labels = np.array(label_values)
    labels[offsets[:-1][np.diff(offsets) > 0]] = IGNORE_INDEX
    mask = labels != IGNORE_INDEX
    entry_of_token = np.cumsum(mask) - 1

    starts, ends = _window(offsets, *window)
    # Nothing predicts the first kept token
    mask[starts[starts < ends]] = False
    supervised = np.concatenate([[0], np.cumsum(mask)])
    keep = supervised[ends] > supervised[starts]
    starts, ends = starts[keep], ends[keep]
    tokens = _ranges(starts, ends)
    row_offsets = pa.array(np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32))

    labels = np.where(mask, labels, IGNORE_INDEX).astype(np.int32)
    arrays = [
        pa.ListArray.from_arrays(row_offsets, input_ids.take(pa.array(tokens)).cast(pa.int32())),
        pa.ListArray.from_arrays(row_offsets, pa.array(labels[tokens])),
    ]
    entries = pa.array(entry_of_token[tokens], mask=~mask[tokens])
    for name in columns:
        if name == TEACHER_HAS_GOLD:
            row_of_token = np.repeat(np.arange(table.num_rows), np.diff(offsets))
            values = pa.array(gold_flags(table)[row_of_token[tokens]])
        else:
            values = list_column(table, name)[1].take(entries)
        arrays.append(pa.ListArray.from_arrays(row_offsets, values))
    return pa.table(arrays, names=[INPUT_IDS, LABELS, *columns])


def _gather(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Inverse of `_spread`, for packed rows too, with inner lists flattened."""
    offsets, label_values = list_column(table, LABELS)
    labels = np.array(label_values)
    documents = offsets[:-1]
    if SEQ_LENGTHS in table.column_names:
        lengths = np.asarray(list_column(table, SEQ_LENGTHS)[1])
        documents = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    labels[documents] = IGNORE_INDEX
    mask = labels != IGNORE_INDEX
    entry_offsets = np.concatenate([[0], np.cumsum(mask)])[offsets]

    arrays: dict[str, pa.Array] = {
        INPUT_IDS: column(table, INPUT_IDS),
        LABELS: pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(labels)),
    }
    for name in columns:
        values = list_column(table, name)[1].filter(pa.array(mask))
        value_offsets = entry_offsets
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            inner = np.asarray(values.offsets) - np.asarray(values.offsets)[0]
            if name == DRAW_COUNTS:
                lengths = pa.array(np.diff(inner).astype(np.int32))
                arrays[DRAW_LENGTHS] = pa.ListArray.from_arrays(pa.array(entry_offsets.astype(np.int32)), lengths)
            values, value_offsets = values.flatten(), inner[entry_offsets]
        arrays[name] = pa.ListArray.from_arrays(pa.array(value_offsets.astype(np.int32)), values)
    if SEQ_LENGTHS in table.column_names:
        arrays[SEQ_LENGTHS] = column(table, SEQ_LENGTHS)
    return pa.table(arrays)


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`concatenate([arange(s, e) for s, e in zip(starts, ends)])`."""
    lengths = ends - starts
    before = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)
