"""One shard of a cache: its Arrow columns, its Parquet encoding, and whether a file found on disk is whole."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..vocabulary import IGNORE_INDEX, TEACHER_HAS_GOLD
from .manifest import Manifest
from .schema import (
    CACHE_COLUMNS,
    CACHE_ID,
    DRAW_COUNTS,
    DRAW_IDS,
    INPUT_IDS,
    LABELS,
    MUTUAL_INFORMATION,
    ROW_DIGEST,
    TAIL_LOGPROB,
    TOPK_IDS,
    TOPK_LOGPROBS,
    CacheBatch,
    cache_features,
    gold_flags,
    row_digest,
)
from .scores import Scores


_SPLIT_COLUMNS = (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB, DRAW_IDS, MUTUAL_INFORMATION)


@dataclass
class ShardRows:
    """
    The token rows of a shard.

    Args:
        input_ids (`list[np.ndarray]`), labels (`list[np.ndarray]`): int32, one array a row.
        positions (`list[np.ndarray]`): Positions `t >= 1` whose label is set.
        carried (`pa.Table` or `None`): The source's other columns.
        carried_features (`Features`): Their types.
        has_gold (`np.ndarray` or `None`): Whether the labels of each row are an answer; `None` where all are.
    """

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    positions: list[np.ndarray]
    carried: pa.Table | None
    carried_features: Features
    has_gold: np.ndarray | None

    @classmethod
    def read(cls, rows: Dataset, start: int, stop: int) -> "ShardRows":
        shard = rows.select(range(start, stop))
        table = shard.select_columns([INPUT_IDS, LABELS]).with_format("arrow")[:]
        input_ids, labels = (_arrays(table.column(name).combine_chunks()) for name in (INPUT_IDS, LABELS))
        extra = [name for name in shard.column_names if name not in CACHE_COLUMNS]
        return cls(
            input_ids,
            labels,
            [np.flatnonzero(values[1:] != IGNORE_INDEX) + 1 for values in labels],
            shard.select_columns(extra).with_format("arrow")[:] if extra else None,
            Features({name: shard.features[name] for name in extra}),
            gold_flags(shard.select_columns([TEACHER_HAS_GOLD]).with_format("arrow")[:])
            if TEACHER_HAS_GOLD in shard.column_names
            else None,
        )

    def __len__(self) -> int:
        return len(self.input_ids)


def _arrays(column: pa.ListArray) -> list[np.ndarray]:
    values = np.asarray(column.flatten()).astype(np.int32)
    offsets = np.asarray(column.offsets)
    return np.split(values, offsets[1:-1] - offsets[0])


def write_shard(rows: ShardRows, scores: list[Scores | None], manifest: Manifest, path: Path) -> None:
    """Write a shard under a temporary name and rename it when it is on disk: a reader sees all of it or nothing."""
    logprob_type = np.dtype(manifest.logprob_dtype)
    cache_id = manifest.cache_id
    ids, logprobs, tails, digests, draws = [], [], [], [], []
    disagreement: list[Any] = []
    has_gold = np.ones(len(rows), bool) if rows.has_gold is None else rows.has_gold
    for input_ids, labels, score, answered in zip(rows.input_ids, rows.labels, scores, has_gold, strict=True):
        assert score is not None
        ids.append(score.ids.astype(np.int32))
        logprobs.append(score.logprobs.astype(logprob_type))
        tails.append(score.tail_logprob.astype(np.float32))
        counted = _count_draws(score.draws) if score.draws is not None else None
        draws.append(counted)
        information = score.mutual_information if manifest.committee_size else None
        disagreement.append(information)
        digests.append(
            row_digest(
                input_ids, labels, ids[-1].ravel(), logprobs[-1].ravel(), tails[-1], cache_id, counted, bool(answered),
                information,
            )
        )  # fmt: skip
    per_row = [len(tail) for tail in tails]
    per_position = np.full(sum(per_row), manifest.k)
    columns: dict[str, Any] = {
        **_source_columns(rows),
        TOPK_IDS: _lists(per_row, _lists(per_position, np.concatenate(ids).ravel())),
        TOPK_LOGPROBS: _lists(per_row, _lists(per_position, np.concatenate(logprobs).ravel())),
        TAIL_LOGPROB: _lists(per_row, np.concatenate(tails)),
        CACHE_ID: pa.array([cache_id] * len(rows)),
        ROW_DIGEST: pa.array(np.array(digests, np.int64)),
    }
    if manifest.num_draws:
        lengths, drawn, counts = (np.concatenate(parts) for parts in zip(*draws, strict=True))
        columns[DRAW_IDS] = _lists(per_row, _lists(lengths, drawn))
        columns[DRAW_COUNTS] = _lists(per_row, _lists(lengths, counts))
    if manifest.committee_size:
        columns[MUTUAL_INFORMATION] = _lists(per_row, np.concatenate(disagreement).astype(np.float32))
    schema = _schema(rows, manifest)
    table = pa.table({name: columns[name] for name in schema.names}).cast(schema)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A crash of the machine must not leave a renamed but empty file, hence the sync
    with open(temporary, "wb") as file:
        pq.write_table(table, file, **parquet_options(schema))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _schema(rows: ShardRows, manifest: Manifest) -> pa.Schema:
    features = cache_features(
        manifest.logprob_dtype,
        draws=manifest.num_draws > 0,
        has_gold=rows.has_gold is not None,
        mutual_information=manifest.committee_size > 0,
    )
    return Features({**rows.carried_features, **features}).arrow_schema


def _source_columns(rows: ShardRows) -> dict[str, Any]:
    """What a shard holds before the teacher is asked: tokens, labels, whether these are an answer, carried columns."""
    columns: dict[str, Any] = {
        INPUT_IDS: _lists([len(row) for row in rows.input_ids], np.concatenate(rows.input_ids)),
        LABELS: _lists([len(row) for row in rows.labels], np.concatenate(rows.labels)),
    }
    if rows.has_gold is not None:
        columns[TEACHER_HAS_GOLD] = pa.array(rows.has_gold)
    if rows.carried is not None:
        columns |= {name: rows.carried.column(name) for name in rows.carried.column_names}
    return columns


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """
    How a cache is encoded as Parquet (arguments of `pyarrow.parquet.write_table`), here and wherever it is written
    again. The bytes of the teacher's numbers are stored as one stream per place: the high bytes of ids and exponents
    repeat and compress away, the low bytes are noise that no dictionary would shorten.
    """
    empty = io.BytesIO()
    pq.write_table(schema.empty_table(), empty)
    parquet_schema = pq.ParquetFile(empty).schema
    leaves = [parquet_schema.column(i).path for i in range(len(parquet_schema))]
    split = [leaf for leaf in leaves if leaf.split(".")[0] in _SPLIT_COLUMNS]
    return {
        "compression": "zstd",
        "compression_level": 9,
        "use_dictionary": [leaf for leaf in leaves if leaf not in split],
        "column_encoding": dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
    }


def _lists(lengths: Any, values: Any) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"A shard would hold {offsets[-1]:,} values in one column, more than a list column can address. Lower "
            "`shard_size` or `k`."
        )
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values if isinstance(values, pa.Array) else pa.array(values)
    )


def _count_draws(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids per position by falling count, then rising id: (how many, ids, counts)."""
    position = np.repeat(np.arange(len(draws), dtype=np.int64), draws.shape[1])
    pairs, counts = np.unique((position << 32) | draws.ravel(), return_counts=True)
    position, ids = pairs >> 32, pairs & 0xFFFFFFFF
    order = np.lexsort((ids, -counts, position))
    lengths = np.bincount(position, minlength=len(draws))
    return lengths.astype(np.int32), ids[order].astype(np.int32), counts[order].astype(np.uint16)


def whole_shard(path: Path, rows: ShardRows, manifest: Manifest) -> bool:
    """
    Whether a shard left by an earlier run can be kept: readable, of this cache, every digest right, and holding these
    very rows. The digests alone would take any shard of the cache, and any carried column.
    """
    schema = _schema(rows, manifest)
    try:
        batch = shard_batch(path)
        with pq.ParquetFile(path) as file:
            stored = file.read()
        return (
            batch.num_rows == len(rows)
            and stored.schema.names == schema.names
            and set(batch.cache_ids) == {manifest.cache_id}
            and all(
                _equal(stored.column(name), pa.table({name: values}).column(0), schema.field(name).type)
                for name, values in _source_columns(rows).items()
            )
            and np.array_equal(batch.row_digests(), batch.digests)
        )
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException):
        return False


def _equal(stored: pa.ChunkedArray, wanted: pa.ChunkedArray, kind: pa.DataType) -> bool:
    stored, wanted = stored.cast(kind).combine_chunks(), wanted.cast(kind).combine_chunks()
    # To Arrow, NaN differs from itself
    return bool(stored.equals(wanted)) or repr(stored.to_pylist()) == repr(wanted.to_pylist())


def shard_batch(path: Path) -> CacheBatch:
    """The cache columns of a shard."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        return CacheBatch.from_arrow(file.read(columns=[name for name in CACHE_COLUMNS if name in names]))
