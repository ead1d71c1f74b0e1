"""The parts of a report, before they become Markdown, LaTeX or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """A table cell: its text, whether it is printed bold, and a mark behind it."""

    text: str
    bold: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Heading:
    """`level` 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text with `code` and **bold** as in Markdown."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of the same length as the header; a plain string is a cell without emphasis."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value | str]]


@dataclass(frozen=True)
class Picture:
    """An image beside the report."""

    file: str
    caption: str


@dataclass(frozen=True)
class Fold:
    """Parts that few readers need: closed at first on a page, left out of the LaTeX tables."""

    title: str
    parts: "Sequence[Part]"


Part = Heading | Paragraph | Items | Table | Picture | Fold


def value(cell: Value | str) -> Value:
    """A cell with its emphasis."""
    return cell if isinstance(cell, Value) else Value(cell)
