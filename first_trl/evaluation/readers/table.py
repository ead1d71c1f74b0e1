"""Confidences in a table: CSV (also gzipped), JSON lines or Parquet."""

import csv
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..confidence import Confidences


_RIGHT, _WRONG = {"1", "1.0", "true"}, {"0", "0.0", "false"}


def read_table(
    path: str | os.PathLike[str],
    *,
    confidence_column: str = "confidence",
    correct_column: str = "correct",
    correct_value: str | None = None,
) -> Confidences:
    """
    Read a column of confidences and a column of outcomes.

    Args:
        path (`str` or `os.PathLike`):
            `.csv`, `.jsonl` (both also with `.gz`) or `.parquet`.
        confidence_column (`str`, *optional*, defaults to `"confidence"`):
            Numbers in [0, 1].
        correct_column (`str`, *optional*, defaults to `"correct"`):
            0 / 1 or true / false.
        correct_value (`str`, *optional*):
            Where outcomes are words: this one is right, all others are wrong.

    Returns:
        [`~first_trl.evaluation.confidence.Confidences`]

    Raises:
        `ValueError`: naming file and row for a missing column or a value that is neither.
    """
    path = Path(path)
    confidence, correct = [], []
    for number, row in enumerate(table_rows(path), start=1):
        for column in (confidence_column, correct_column):
            if column not in row:
                raise ValueError(f"{path}, row {number} has no column {column!r}; it has {list(row)}.")
        try:
            value = float(row[confidence_column])
        except (TypeError, ValueError):
            value = float("nan")
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"{path}, row {number}: the confidence is {row[confidence_column]!r}, it must be a number from 0 to 1."
            )
        confidence.append(value)
        correct.append(_outcome(row[correct_column], correct_value, f"{path}, row {number}", correct_column))
    if not confidence:
        raise ValueError(f"{path} has no rows.")
    if correct_value is not None and not any(correct):
        raise ValueError(f"{path}: no row has {correct_column} = {correct_value!r}.")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return Confidences(name, np.array(confidence), np.array(correct, dtype=bool), f"column {confidence_column!r}")


def _outcome(value: Any, correct_value: str | None, place: str, column: str) -> bool:
    text = str(value).strip()
    if value is None or text == "" or text.lower() == "nan":
        raise ValueError(f"{place}: {column!r} is empty.")
    if correct_value is not None:
        return text == correct_value
    if text.lower() in _RIGHT:
        return True
    if text.lower() in _WRONG:
        return False
    raise ValueError(f"{place}: {column!r} is {value!r}, neither 0/1 nor true/false. Say which value is right.")


def table_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table as dictionaries, by the ending of its name."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind == "parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    if kind not in ("csv", "jsonl"):
        raise ValueError(f"Cannot tell what {path} is: it must end in .csv, .jsonl (or either with .gz) or .parquet.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        if kind == "csv":
            reader = csv.DictReader(file)
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise ValueError(f"{path}, row {number} has another number of fields than the header.")
                yield row
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(values, dict):
                raise ValueError(f"{path}, line {number} is {line.strip()[:40]!r}, not a JSON object.")
            yield values
