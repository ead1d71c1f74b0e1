"""The teacher cache's columns, how they are read in bulk, and the digest that binds a row's fields together.

One row is one training sequence. Entry `i` of a teacher column is the teacher's distribution over the token at the
`i`-th position `t >= 1` with `labels[t] != -100`, computed from `input_ids[:t]`. Raw full-vocabulary log-probabilities
at temperature 1 are stored: recalibration and estimators are applied at training time.

A prompt without an answer is a row too. Its label is a filler that stands where an answer would begin, and
`teacher_has_gold` is false; the column exists only where some row has no answer, and null means that there is one.

The cache of a committee of M teachers holds the mean of their distributions, and in `teacher_mutual_information` how far they
disagree: the entropy of the mean minus the mean of their entropies, over the full vocabulary, in nats; 0 to log M. It is null
in rows of one teacher that were put together with such.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..vocabulary import IGNORE_INDEX, TEACHER_HAS_GOLD
from .arrow import column, flat_column, flat_values, list_column, list_offsets


INPUT_IDS = "input_ids"
LABELS = "labels"
TOPK_IDS = "teacher_topk_ids"
TOPK_LOGPROBS = "teacher_topk_logprobs"
TAIL_LOGPROB = "teacher_tail_logprob"
CACHE_ID = "teacher_cache"
ROW_DIGEST = "teacher_row_digest"
DRAW_IDS = "teacher_draw_ids"
DRAW_COUNTS = "teacher_draw_counts"
MUTUAL_INFORMATION = "teacher_mutual_information"
# Of rows whose entries are the choices: which choice each entry is (-1: none, it fills up the row), and soft labels beside
# a teacher
CHOICE_INDEX = "teacher_choice_index"
SOFT_LABELS = "teacher_soft_labels"

TEACHER_COLUMNS = (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB, CACHE_ID, ROW_DIGEST)
REQUIRED_COLUMNS = (INPUT_IDS, LABELS, *TEACHER_COLUMNS)
DRAW_COLUMNS = (DRAW_IDS, DRAW_COUNTS)
CACHE_COLUMNS = (*REQUIRED_COLUMNS, *DRAW_COLUMNS, MUTUAL_INFORMATION, TEACHER_HAS_GOLD)
LOGPROB_DTYPES = ("float16", "float32")


def cache_features(
    logprob_dtype: str = "float16", draws: bool = False, has_gold: bool = False, mutual_information: bool = False
) -> Features:
    """Types of the cache columns (`datasets.Features`)."""
    features = {
        INPUT_IDS: List(Value("int32")),
        LABELS: List(Value("int32")),
        TOPK_IDS: List(List(Value("int32"))),
        TOPK_LOGPROBS: List(List(Value(logprob_dtype))),
        TAIL_LOGPROB: List(Value("float32")),
        CACHE_ID: Value("string"),
        ROW_DIGEST: Value("int64"),
    }
    if draws:
        features |= {DRAW_IDS: List(List(Value("int32"))), DRAW_COUNTS: List(List(Value("uint16")))}
    if mutual_information:
        features |= {MUTUAL_INFORMATION: List(Value("float32"))}
    if has_gold:
        features |= {TEACHER_HAS_GOLD: Value("bool")}
    return Features(features)


def supervised_positions(labels: np.ndarray, row_starts: np.ndarray) -> np.ndarray:
    """
    Mask of the positions that carry a teacher entry: label set and not the first of its row, which nothing predicts.

    Args:
        labels (`np.ndarray` of shape `(tokens,)`): Labels of several rows, one after the other.
        row_starts (`np.ndarray` of shape `(rows,)`): Index of each row's first token.
    """
    mask = labels != IGNORE_INDEX
    starts = row_starts[row_starts < len(labels)]
    mask[starts] = False
    return mask


@dataclass
class TeacherArrays:
    """
    Several cache rows as flat arrays, one entry per supervised position.

    Args:
        ids (`np.ndarray` of shape `(N, k)`): Token ids, most likely first.
        logprobs (`np.ndarray` of shape `(N, k)`): Raw log-probabilities, float64.
        tail_logprob (`np.ndarray` of shape `(N,)`): Log-mass outside the k ids, float64.
        labels (`np.ndarray` of shape `(N,)`): The token that stands in the text.
        row (`np.ndarray` of shape `(N,)`): Row of each entry.
        first (`np.ndarray` of shape `(N,)`): Whether the entry is the first of its row (the answer position of
            single-token answers).
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    labels: np.ndarray
    row: np.ndarray
    first: np.ndarray


@dataclass
class DrawBatch:
    """
    The draws of several rows. Entry offsets delimit rows, `lengths` the distinct ids of each entry.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "DrawBatch":
        offsets, ids = list_column(table, DRAW_IDS)
        count_offsets, counts = list_column(table, DRAW_COUNTS)
        lengths = np.diff(list_offsets(ids))
        if not np.array_equal(offsets, count_offsets) or not np.array_equal(lengths, np.diff(list_offsets(counts))):
            raise ValueError(f"`{DRAW_IDS}` and `{DRAW_COUNTS}` differ in length; capture or pull the cache again.")
        return cls(offsets, lengths, flat_values(ids), flat_values(counts))

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, ids and counts of one row."""
        e0, e1 = self.offsets[row : row + 2]
        start, end = self.starts[e0], self.starts[e1]
        return self.lengths[e0:e1], self.ids[start:end], self.counts[start:end]


@dataclass
class CacheBatch:
    """
    Arrow columns of a few rows as flat numpy arrays. Offsets have one entry more than there are rows. The teacher
    columns are left ragged here (`topk_lengths`): whether they are well formed is for `verify` to say.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    label_offsets: np.ndarray
    entry_offsets: np.ndarray
    logprob_offsets: np.ndarray
    tail_offsets: np.ndarray
    topk_lengths: np.ndarray
    logprob_lengths: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    cache_ids: list[str]
    digests: np.ndarray
    has_gold: np.ndarray
    draws: "DrawBatch | None" = None
    informed: np.ndarray | None = None
    information_offsets: np.ndarray | None = None
    mutual_information: np.ndarray | None = None

    def information(self, row: int) -> np.ndarray | None:
        """Disagreement of the committee at each supervised position of a row; `None` for a row of one teacher."""
        if self.informed is None or self.information_offsets is None or self.mutual_information is None:
            return None
        return self.mutual_information[slice(*self.information_offsets[row : row + 2])] if self.informed[row] else None

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "CacheBatch":
        offsets, input_ids = flat_column(table, INPUT_IDS)
        label_offsets, labels = flat_column(table, LABELS)
        entry_offsets, topk = list_column(table, TOPK_IDS)
        logprob_offsets, logprobs = list_column(table, TOPK_LOGPROBS)
        tail_offsets, tail = flat_column(table, TAIL_LOGPROB)
        informed = information_offsets = information = None
        if MUTUAL_INFORMATION in table.column_names and table.column(MUTUAL_INFORMATION).null_count < table.num_rows:
            found = column(table, MUTUAL_INFORMATION)
            informed = np.asarray(found.is_valid())
            if found.null_count and hasattr(found, "offsets"):
                found = pc.fill_null(found, pa.scalar([], found.type))
            information_offsets, information = flat_column(pa.table({MUTUAL_INFORMATION: found}), MUTUAL_INFORMATION)
        return cls(
            input_ids=input_ids,
            labels=labels,
            offsets=offsets,
            label_offsets=label_offsets,
            entry_offsets=entry_offsets,
            logprob_offsets=logprob_offsets,
            tail_offsets=tail_offsets,
            topk_lengths=np.diff(list_offsets(topk)),
            logprob_lengths=np.diff(list_offsets(logprobs)),
            ids=flat_values(topk),
            logprobs=flat_values(logprobs),
            tail_logprob=tail,
            cache_ids=column(table, CACHE_ID).to_pylist(),
            digests=flat_values(column(table, ROW_DIGEST)),
            has_gold=gold_flags(table),
            draws=DrawBatch.from_arrow(table) if DRAW_IDS in table.column_names else None,
            informed=informed,
            information_offsets=information_offsets,
            mutual_information=information,
        )

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row_digests(self) -> np.ndarray:
        """Digest of every row from its contents, to be compared with the stored `digests`."""
        ids_at = np.concatenate([[0], np.cumsum(self.topk_lengths)])
        logprobs_at = np.concatenate([[0], np.cumsum(self.logprob_lengths)])
        digests = np.empty(self.num_rows, np.int64)
        for row in range(self.num_rows):
            e0, e1 = self.entry_offsets[row : row + 2]
            l0, l1 = self.logprob_offsets[row : row + 2]
            digests[row] = row_digest(
                self.input_ids[self.offsets[row] : self.offsets[row + 1]],
                self.labels[self.label_offsets[row] : self.label_offsets[row + 1]],
                self.ids[ids_at[e0] : ids_at[e1]],
                self.logprobs[logprobs_at[l0] : logprobs_at[l1]],
                self.tail_logprob[self.tail_offsets[row] : self.tail_offsets[row + 1]],
                self.cache_ids[row],
                None if self.draws is None else self.draws.row(row),
                bool(self.has_gold[row]),
                self.information(row),
            )
        return digests


def row_digest(
    input_ids: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    tail_logprob: np.ndarray,
    cache_id: str,
    draws: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    has_gold: bool = True,
    mutual_information: np.ndarray | None = None,
) -> int:
    """
    64-bit digest of one row: its tokens, which of them are supervised, the teacher's entries in their stored dtype,
    the draws if there are any (lengths, ids, counts), the mutual information of a committee, the cache they belong to, and
    whether the labels are no answer.
    Lengths enter too, so that no value can move between neighbouring fields.
    """
    digest = hashlib.blake2b(digest_size=8)
    for values, dtype in (
        (input_ids, np.int32),
        (np.asarray(labels) != IGNORE_INDEX, np.uint8),
        (ids, np.int32),
        (logprobs, None),
        (tail_logprob, np.float32),
        *(zip(draws, (np.int32, np.int32, np.uint16), strict=True) if draws is not None else ()),
        *([(mutual_information, np.float32)] if mutual_information is not None else ()),
    ):
        array = np.ascontiguousarray(values, dtype)
        digest.update(array.size.to_bytes(8, "little"))
        digest.update(array.tobytes())
    digest.update(cache_id.encode())
    if not has_gold:
        digest.update(b"\0no gold")  # after a NUL, which no cache id contains
    return int.from_bytes(digest.digest(), "little", signed=True)


def flatten_cache(dataset: Dataset, batch_size: int = 1000) -> TeacherArrays:
    """
    Read a cache into flat arrays.

    Args:
        dataset (`datasets.Dataset`): A cache; call [`verify_teacher_cache`] on it first.

    Raises:
        `ValueError`: A column is missing, the entries do not match the supervised positions, or the labels of a row
            are no answer.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Missing teacher cache columns {missing}; the dataset has {dataset.column_names}. Make them with "
            "`add_teacher_topk`."
        )
    without_gold = count_without_gold(dataset)
    if without_gold:
        raise ValueError(
            f"{without_gold} of {len(dataset)} rows of the teacher cache have no answer (`{TEACHER_HAS_GOLD}` is false): "
            "their labels are fillers, which nothing can be fitted to. Give a cache of labelled rows, or keep those: "
            f"`cache.filter(lambda has_gold: has_gold is not False, input_columns=[{TEACHER_HAS_GOLD!r}])`."
        )
    parts: list[tuple[np.ndarray, ...]] = []
    first_row = 0
    for batch in iterate_batches(dataset, batch_size):
        mask = supervised_positions(batch.labels, batch.offsets[:-1])
        per_row = np.add.reduceat(np.append(mask, False), batch.offsets[:-1]) * (np.diff(batch.offsets) > 0)
        lengths = np.unique(batch.topk_lengths)
        if len(lengths) > 1 or not np.array_equal(np.diff(batch.entry_offsets), per_row):
            raise ValueError(
                "The teacher entries do not match the supervised positions; run `verify_teacher_cache` for the row."
            )
        k = int(lengths[0]) if len(lengths) else 0
        row = np.repeat(np.arange(batch.num_rows) + first_row, per_row)
        first = np.diff(row, prepend=-1) != 0
        parts.append(
            (
                batch.ids.reshape(-1, k).astype(np.int64) if k else np.empty((0, 0), np.int64),
                batch.logprobs.reshape(-1, k).astype(np.float64) if k else np.empty((0, 0)),
                batch.tail_logprob.astype(np.float64),
                batch.labels[mask].astype(np.int64),
                row,
                first,
            )
        )
        first_row += batch.num_rows
    parts = [part for part in parts if len(part[0])]
    if not parts:
        raise ValueError("The teacher cache has no supervised position: nothing to fit or train on.")
    return TeacherArrays(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def gold_flags(table: pa.Table) -> np.ndarray:
    """Whether the labels of each row are an answer, bool."""
    if TEACHER_HAS_GOLD not in table.column_names:
        return np.ones(table.num_rows, bool)
    flags = column(table, TEACHER_HAS_GOLD)
    if pa.types.is_null(flags.type):
        return np.ones(table.num_rows, bool)
    if not pa.types.is_boolean(flags.type):
        raise ValueError(
            f"`{TEACHER_HAS_GOLD}` has type {flags.type} instead of bool; capture or pull the cache again."
        )
    return flags.fill_null(True).to_numpy(zero_copy_only=False)


def count_of_one_teacher(dataset: Dataset) -> int:
    """Rows without a disagreement of teachers, of a dataset that has its column."""
    tables = dataset.select_columns([MUTUAL_INFORMATION]).with_format("arrow").iter(batch_size=10_000)
    return sum(table.column(0).null_count for table in tables)


def count_without_gold(dataset: Dataset) -> int:
    """Rows whose labels are no answer."""
    if TEACHER_HAS_GOLD not in dataset.column_names:
        return 0
    tables = dataset.select_columns([TEACHER_HAS_GOLD]).with_format("arrow").iter(batch_size=10_000)
    return sum(int((~gold_flags(table)).sum()) for table in tables)


def refuse_transform(dataset: Any) -> None:
    """
    Raises `ValueError` for rows under [`~datasets.Dataset.with_transform`]: what is read here are the stored columns, and
    the transform would be passed over.
    """
    if getattr(dataset, "format", {}).get("type") == "custom":
        raise ValueError(
            "The dataset has a transform (`with_transform` or `set_transform`), which is applied when a row is read and "
            "changes nothing that is stored: it would be ignored here. Apply it with `dataset.map(...)` before, or take it "
            "off with `dataset.with_format(None)`."
        )


def iterate_batches(dataset: Dataset, batch_size: int = 1000) -> Iterator[CacheBatch]:
    """Walk over a cache in Arrow batches; memory stays at one batch."""
    refuse_transform(dataset)
    columns = [name for name in CACHE_COLUMNS if name in dataset.column_names]
    arrow = dataset.select_columns(columns).with_format("arrow")
    for table in arrow.iter(batch_size=batch_size):
        yield CacheBatch.from_arrow(table)
