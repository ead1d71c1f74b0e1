"""Keep teacher entries on their tokens while rows are truncated and packed."""

from typing import Any

from datasets import Dataset, IterableDataset
from trl import pack_dataset

from ..teacher.schema import IGNORE_INDEX, INPUT_IDS, LABELS, TAIL_LOGPROB, TOPK_IDS, TOPK_LOGPROBS


ENTRY_COLUMNS = (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB)


def expand(row: dict[str, Any], columns: tuple[str, ...] = ENTRY_COLUMNS) -> dict[str, Any]:
    """One entry per supervised position -> one per token, so that slicing tokens slices entries. Others repeat any
    entry: `compact` drops them again."""
    labels = [IGNORE_INDEX, *row[LABELS][1:]]
    expanded: dict[str, Any] = {LABELS: labels}
    for name in columns:
        entries = iter(row[name])
        filler = row[name][0] if row[name] else None
        expanded[name] = [filler if label == IGNORE_INDEX else next(entries) for label in labels]
    return expanded


def compact(row: dict[str, Any], columns: tuple[str, ...] = ENTRY_COLUMNS) -> dict[str, Any]:
    """Inverse of `expand`. The first token of a document is predicted by nothing: its label and entry go."""
    labels = list(row[LABELS])
    start = 0
    for length in row.get("seq_lengths") or [len(labels)]:
        labels[start] = IGNORE_INDEX
        start += length
    compacted: dict[str, Any] = {LABELS: labels}
    for name in columns:
        compacted[name] = [entry for entry, label in zip(row[name], labels, strict=True) if label != IGNORE_INDEX]
    return compacted


def truncate(
    dataset: Dataset | IterableDataset,
    max_length: int,
    mode: str,
    columns: tuple[str, ...],
    map_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """Cut rows to `max_length` tokens and drop the ones that keep no supervised position."""
    window = slice(None, max_length) if mode == "keep_start" else slice(-max_length, None)

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        row = {**row, **expand(row, columns)}
        row = {name: row[name][window] for name in (INPUT_IDS, LABELS, *columns)}
        return {INPUT_IDS: row[INPUT_IDS], **compact(row, columns)}

    dataset = dataset.map(cut, **map_kwargs)
    return dataset.filter(lambda row: any(label != IGNORE_INDEX for label in row[LABELS]), **map_kwargs)


def pack(
    dataset: Dataset | IterableDataset,
    max_length: int,
    strategy: str,
    columns: tuple[str, ...],
    map_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """TRL's packing with the teacher entries as further per-token columns."""
    dataset = dataset.map(expand, fn_kwargs={"columns": columns}, **map_kwargs)
    dataset = dataset.select_columns([INPUT_IDS, LABELS, *columns])
    dataset = pack_dataset(dataset, max_length, strategy, map_kwargs)
    return dataset.map(compact, fn_kwargs={"columns": columns}, **map_kwargs)
