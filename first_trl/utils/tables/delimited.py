"""Texts of rows and cells: CSV, TSV and their relatives."""

import csv
import io
import re
import threading
from dataclasses import dataclass
from pathlib import Path


DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_QUOTES = 'Put a text that holds {}, a quote or a line break into double quotes, and double the quotes inside it ("")'
# The limit of a cell's length is one of the whole process
_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Delimited:
    """
    Attributes:
        names (`list[str]` or `None`): the header, where there is one.
        rows (`list[list[str | None]]`): cells, `None` where empty.
        lines (`list[int]`): line of the file in which each row begins, from 1.
        empty (`list[int]`): for each empty row left out the number of rows in front of it.
    """

    names: list[str] | None
    rows: list[list[str | None]]
    lines: list[int]
    empty: list[int]


def parse(text: str, path: Path, *, header: bool = True, delimiter: str | None = None) -> Delimited:
    """
    Read delimited text. See [`first_trl.utils.tables`] for what a cell means.

    Args:
        text (`str`): contents of the file.
        path (`Path`): its name, for errors.
        header (`bool`, *optional*, defaults to `True`): whether the first row names the columns.
        delimiter (`str`, *optional*): by default found out.

    Raises:
        `ValueError`: naming file and row, for a header that names no columns, rows of another length, and quotes that do
        not match.
    """
    first_line = 1
    told = re.match(r'"?sep=(.)"?\r?\n', text)
    if told is not None:
        text, delimiter, first_line = text[told.end() :], told[1], 2
    if delimiter is not None:
        return _parse(text, path, header, delimiter, first_line)
    if not header:
        # A row of one cell says nothing about what would cut it
        widths = {d: _header_width(text, d) for d in DELIMITERS}
        return _parse(text, path, header, "," if widths[","] > 1 else max(widths, key=lambda d: widths[d]), first_line)
    widths = {d: width for d in DELIMITERS if (width := _header_width(text, d)) > 1}
    if len(widths) < 2:
        return _parse(text, path, header, next(iter(widths), ","), first_line)
    fitting: dict[str, Delimited] = {}
    for candidate in widths:
        try:
            fitting[candidate] = _parse(text, path, header, candidate, first_line)
        except ValueError:
            continue
    best = [d for d in fitting or widths if widths[d] == max(widths[d] for d in fitting or widths)]
    if len(best) > 1 and fitting:
        raise ValueError(
            f"{path} could be cut at {' or at '.join(DELIMITERS[d] for d in best)}. Write the first line 'sep={best[0]}' "
            "(or the other one) in front of the header."
        )
    return fitting[best[0]] if fitting else _parse(text, path, header, best[0], first_line)


def _header_width(text: str, delimiter: str) -> int:
    """Cells of the first row that is not empty; 0 when it cannot be cut so."""
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if any(cell.strip() for cell in cells):
                return len(cells)
    except csv.Error:
        pass
    return 0


def _parse(text: str, path: Path, header: bool, delimiter: str, first_line: int) -> Delimited:
    records: list[tuple[int, list[str]]] = []
    empty: list[int] = []
    with _LIMIT:
        limit = csv.field_size_limit(2**31 - 1)
        try:
            # Strict: otherwise what stands behind a closing quote is taken into the cell without a word
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            line = first_line
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    records.append((line, cells))
                elif cells and len(records) >= header:  # A blank line is no row
                    empty.append(len(records) - header)
                line = first_line + reader.line_num
        except csv.Error as error:
            number = len(records) + (not header)
            row = f"row {number} (line {line})" if number else f"the header (line {line})"
            why = (
                "opens a double quote that is never closed" if "unexpected end" in str(error) else f"is cut by {error}"
            )
            if "expected after" in str(error):
                why = "has a text behind a closing double quote"
            raise ValueError(f"{path}, {row} {why}. {_QUOTES.format(DELIMITERS.get(delimiter, delimiter))}.") from None
        finally:
            csv.field_size_limit(limit)
    if not header:
        return Delimited(None, [_values(cells) for _, cells in records], [n for n, _ in records], empty)
    if not records:
        raise ValueError(f"{path} is empty: it has no rows. Its first row must name the columns.")
    names = [name.strip() for name in records[0][1]]
    rows = records[1:]
    names, rows = _without_unnamed(names, rows)
    if not all(names):
        raise ValueError(
            f"{path}, line {records[0][0]}: the first row must name the columns, each differently; number "
            f"{names.index('') + 1} of {len(names)} has no name."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{path}, line {records[0][0]}: the first row must name the columns, each differently; it names "
            f"{', '.join(map(repr, twice))} twice."
        )
    if not rows:
        raise ValueError(f"{path} has no rows under its header ({', '.join(names)}).")
    _check_widths(path, names, rows, delimiter)
    return Delimited(names, [_values(cells) for _, cells in rows], [line for line, _ in rows], empty)


def _values(cells: list[str]) -> list[str | None]:
    return [cell if cell.strip() else None for cell in cells]


def _without_unnamed(
    names: list[str], rows: list[tuple[int, list[str]]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Takes off the empty columns that a trailing delimiter makes; one in every row, or it is no column's."""
    n = len(names)
    while n and not names[n - 1]:
        n -= 1
    widths = {len(cells) for _, cells in rows}
    if (
        n
        and len(widths) == 1
        and widths.pop() >= n
        and not any(cell.strip() for _, cells in rows for cell in cells[n:])
    ):
        return names[:n], [(line, cells[:n]) for line, cells in rows]
    return (names[:n], rows) if not rows else (names, rows)


def _check_widths(path: Path, names: list[str], rows: list[tuple[int, list[str]]], delimiter: str) -> None:
    wrong = [(i, line, len(cells)) for i, (line, cells) in enumerate(rows, start=1) if len(cells) != len(names)]
    if not wrong:
        return
    listed = ", ".join(f"row {i} (line {line}) has {n} cell{'s' * (n != 1)}" for i, line, n in wrong[:5])
    more = f" (and {len(wrong) - 5} more such rows)" if len(wrong) > 5 else ""
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise ValueError(
        f"{path}, {listed}{more} under {len(names)} columns ({shown}). {_QUOTES.format(DELIMITERS.get(delimiter, delimiter))}."
    )
