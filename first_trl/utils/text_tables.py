"""Tables as Markdown and as aligned text."""

from collections.abc import Container, Sequence
from typing import Any


def escape_cell(text: Any) -> str:
    """Text that stays within one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]], right: Container[int] = ()) -> str:
    """
    A Markdown table without a line break at its end; what would end a cell early is escaped.

    Args:
        header (`Sequence`): Titles of the columns.
        rows (`Sequence[Sequence]`): One cell a column.
        right (`Container[int]`, *optional*): Columns aligned at their right end, as numbers are.
    """
    marks = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [[escape_cell(cell) for cell in header], marks, *([escape_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int] = (), *, indent: str = ""
) -> list[str]:
    """
    Lines of a table for the terminal: columns as wide as their widest cell, two spaces between them.

    Args:
        header, rows, right: As in [`markdown_table`].
        indent (`str`, *optional*): In front of every line.
    """
    table = [header, *rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return (indent + "  ".join(padded)).rstrip()

    return [line(cells) for cells in table]
