"""From a file to its rows."""

import contextlib
import datetime
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cells import as_text
from .content import decode, read_bytes
from .delimited import parse
from .names import ENDINGS, file_kind


# Errors of one file that are shown at a time
_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """
    Rows of a file.

    Attributes:
        path (`Path`): the file.
        kind (`str`): what it is, see [`file_kind`].
        rows (`list[dict]`): column name to value; with `header=False` `{"cells": [...]}`.
        lines (`list[int]` or `None`): line of the file in which each row begins, where it has lines.
        empty (`list[int]`): for each empty row left out the number of rows in front of it.
    """

    path: Path
    kind: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None
    empty: list[int] = field(default_factory=list)

    def place(self, index: int) -> str:
        """What to call a row in an error: its file, its number counted from 1, and its line."""
        return f"{self.path}, {_row(index, self.lines)}"


def _row(index: int, lines: Sequence[int] | None) -> str:
    return f"row {index + 1}" if lines is None else f"row {index + 1} (line {lines[index]})"


def load_table(path: str | os.PathLike[str], *, header: bool = True) -> Table:
    """
    Read a file of rows, whatever its format, compression, encoding and delimiter. See [`first_trl.utils.tables`] for
    what a cell means.

    Args:
        path (`str` or `os.PathLike`): an existing file.
        header (`bool`, *optional*, defaults to `True`): whether the first row of a CSV, TSV or Excel file names its
            columns.

    Returns:
        [`Table`] of at least one row.

    Raises:
        `ValueError`: one sentence that names the file, the rows and the mend, for whatever cannot be read.

    Example:

    ```python
    >>> table = load_table("answers.csv")
    >>> table.rows[0], table.place(0)
    ({'confidence': '0.8', 'correct': '1'}, 'answers.csv, row 1 (line 2)')
    ```
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    kind = file_kind(path)[1]
    if kind is None:
        raise ValueError(f"Cannot tell what {path} is: its name must end in {ENDINGS}; convert it to one of them.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has no rows.")
    data, inner = read_bytes(path)
    kind = inner if kind == "zip" else kind
    if kind is None:
        raise ValueError(f"Cannot tell what {path} holds: the name of the file in it must end in {ENDINGS}.")
    if not data:
        raise ValueError(f"{path} is empty: it has no rows.")
    if kind in ("parquet", "arrow"):
        table = Table(path, kind, _columnar(data, path, kind))
    elif kind == "xlsx":
        table = _excel(data, path, header)
    else:
        text, caution = decode(data, path)
        if caution is not None:
            warnings.warn(caution)
        if kind in ("csv", "tsv"):
            read = parse(text, path, header=header, delimiter="\t" if kind == "tsv" else None)
            rows: list[dict[str, Any]] = (
                [{"cells": cells} for cells in read.rows]
                if read.names is None
                else [dict(zip(read.names, cells, strict=True)) for cells in read.rows]
            )
            table = Table(path, kind, rows, read.lines, read.empty)
        else:
            table = _json(text, path, kind)
    if not table.rows:
        raise ValueError(f"{path} has no rows.")
    return table


def listed(errors: Sequence[str], total: int) -> str:
    """What is wrong with several rows: the first five errors, and of how many."""
    if len(errors) == 1:
        return errors[0]
    shown = f", the first {_SHOWN} of which are shown" if len(errors) > _SHOWN else ""
    return "\n".join([*errors[:_SHOWN], f"{len(errors)} of {total} rows cannot be used{shown}."])


def _json(text: str, path: Path, kind: str) -> Table:
    """A list of rows, or a row a line, whichever of the two endings the file has."""
    if not text.strip():
        raise ValueError(f"{path} is empty: it has no rows.")
    if text.lstrip().startswith("["):
        with _json_errors(path, ""):
            values = _loads(text)
        lines = None
    else:
        values, lines = [], []
        errors: list[str] = []
        # Only "\n" ends a row: `splitlines` would also cut at the line separators that JSON strings may hold unescaped
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                lines.append(number)
                try:
                    with _json_errors(path, f", line {number}"):
                        values.append(_loads(line))
                except ValueError as error:
                    errors.append(str(error))
        if errors:
            raise ValueError(listed(errors, len(lines)))
    wrong = [(i, value) for i, value in enumerate(values) if not isinstance(value, dict)]
    if wrong:
        what = ", ".join(f"{_row(i, lines)} is {json.dumps(value)[:40]}" for i, value in wrong[:_SHOWN])
        more = f" (and {len(wrong) - _SHOWN} more such rows)" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{path}, {what}{more}, not a JSON object with named fields.")
    return Table(path, kind, values, lines)


@contextlib.contextmanager
def _json_errors(path: Path, place: str) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        where = place or f", line {error.lineno}"
        raise ValueError(
            f"{path}{where} is not JSON ({error.msg}, at column {error.colno}). The file must hold one list of rows, or "
            "one row a line."
        ) from None
    except RecursionError:
        raise ValueError(f"{path}{place} is nested too deeply to be a row.") from None
    except ValueError as error:
        raise ValueError(f"{path}{place} {error}.") from None


def _loads(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_object)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a character (a lone \\ud8.. or \\udc..), which is no text") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"gives the field {twice!r} twice")
    return found


def load_columns(data: bytes | Path, path: Path, kind: str) -> Any:
    """
    The [`~pyarrow.Table`] of a Parquet or Arrow file; categories of pandas as what they stand for.

    Raises:
        `ValueError`: naming the file, when it is damaged or names a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            table = pq.ParquetFile(data if isinstance(data, Path) else pa.BufferReader(data)).read()
        else:
            # `datasets` saves streams, Feather is the other form
            content = data.read_bytes() if isinstance(data, Path) else data
            opened = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
            table = opened(pa.BufferReader(content)).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is damaged or no {kind} file: {reason}. Write or download it again.") from None
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has several columns of the name {', '.join(map(repr, twice))}. Rename them.")
    for i, field_ in enumerate(table.schema):
        if pa.types.is_dictionary(field_.type):
            table = table.set_column(i, field_.name, table.column(i).cast(field_.type.value_type))
    return table


def _columnar(data: bytes, path: Path, kind: str) -> list[dict[str, Any]]:
    table = load_columns(data, path, kind)
    rows: list[dict[str, Any]] = table.to_pylist()
    for field_ in table.schema:
        if (dtype := _coarse_float(field_.type)) is not None:
            for row in rows:
                row[field_.name] = _coarse(row[field_.name], dtype)
    for column, labels in _class_labels(table.schema.metadata).items():
        for i, row in enumerate(rows):
            row[column] = label_name(row.get(column), labels, f"{path}, row {i + 1}: {column!r}")
    return rows


def _coarse_float(kind: Any) -> Any:
    """The numpy type of a column of float16 or float32, or of lists of them; `None` for any other column."""
    import numpy as np
    import pyarrow as pa

    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return np.float16 if pa.types.is_float16(kind) else np.float32 if pa.types.is_float32(kind) else None


class _Coarse(float):
    """A float16 or float32: exact as a number, and as a text the shortest decimal that means it in its own precision."""

    text: str

    def __str__(self) -> str:
        return self.text


def _coarse(value: Any, dtype: Any) -> Any:
    if isinstance(value, list):
        return [_coarse(each, dtype) for each in value]
    if value is None:
        return None
    found = _Coarse(value)
    found.text = str(float(str(dtype(value))))
    return found


def _class_labels(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Columns that `datasets` wrote as numbers of names."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}


def label_name(value: Any, names: Sequence[str], place: str) -> str | None:
    """
    Name of a class label of `datasets`; `None` for -1, which means that a row has none.

    Raises:
        `ValueError`: for a number without a name.
    """
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise ValueError(f"{place} is {value!r}, not the number of one of its {len(names)} labels.")
    return names[value]


def _excel(data: bytes, path: Path, header: bool) -> Table:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{path} needs openpyxl: `pip install 'first_trl[excel]'`, or save it as .csv.") from None

    def sheets(**options: bool) -> dict[str, list[tuple[Any, ...]]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, **options)
        found = {}
        for sheet in book.worksheets:
            # Some writers state a smaller area than the sheet fills, and cells outside it would not be read
            sheet.reset_dimensions()
            found[sheet.title] = list(sheet.iter_rows())
        return found

    try:
        values, formulas = sheets(data_only=True), sheets(data_only=False)
    except Exception as error:
        # openpyxl lets through whatever zipfile, its XML reader and its own checks raise
        raise ValueError(
            f"{path} is damaged or no Excel workbook: {str(error).rstrip('.') or type(error).__name__}. Save it again as "
            ".xlsx or .csv."
        ) from None
    filled = [title for title, rows in values.items() if any(not _blank(cell) for row in rows for cell in row)]
    if len(filled) != 1:
        raise ValueError(
            f"{path} has {len(filled)} sheets with cells ({', '.join(filled)}). Keep one of them, or save one as .csv."
            if filled
            else f"{path} is empty: it has no rows."
        )
    return _sheet(values[filled[0]], formulas[filled[0]], path, header)


def _blank(cell: Any) -> bool:
    return cell.value is None or (isinstance(cell.value, str) and not cell.value.strip())


def _sheet(values: list[tuple[Any, ...]], formulas: list[tuple[Any, ...]], path: Path, header: bool) -> Table:
    width = max(i + 1 for row in values for i, cell in enumerate(row) if not _blank(cell))
    names: list[str] | None = None
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    empty: list[int] = []
    for line, (row, formula_row) in enumerate(zip(values, formulas, strict=True), start=1):
        cells: list[Any] = []
        for cell, formula in zip(row[:width], formula_row[:width], strict=False):
            place = f"{path}, line {line}, column {len(cells) + 1}"
            if formula.data_type == "f" and cell.value is None:
                raise ValueError(
                    f"{place} is a formula whose value is not stored. Save the file once in a spreadsheet."
                )
            if cell.data_type == "e":
                raise ValueError(f"{place} is the error {cell.value}. Mend or empty it.")
            cells.append(None if _blank(cell) else _plain(cell))
        cells += [None] * (width - len(cells))
        if all(cell is None for cell in cells):
            if names is not None or not header:
                empty.append(len(rows))
        elif names is None and header:
            names = [_header(cell) for cell in cells]
            if not all(names) or len(set(names)) < len(names):
                raise ValueError(
                    f"{path}, line {line}: the first row must name the columns, each differently: {names}."
                )
        else:
            rows.append({"cells": cells} if names is None else dict(zip(names, cells, strict=True)))
            lines.append(line)
    # A sheet counts the rows that were ever touched
    while empty and empty[-1] == len(rows):
        empty.pop()
    if not rows:
        raise ValueError(f"{path} has no rows under its header ({', '.join(names or [])}).")
    return Table(path, "xlsx", rows, lines, empty)


def _plain(cell: Any) -> Any:
    value = cell.value
    if (
        isinstance(value, datetime.datetime)
        and value.time() == datetime.time()
        and "h" not in cell.number_format.lower()
    ):
        value = value.date()  # A day is stored as its midnight
    return value if isinstance(value, str | bool | int | float) else as_text(value)


def _header(cell: Any) -> str:
    return "" if cell is None else as_text(cell).strip()
