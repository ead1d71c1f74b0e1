"""A report as Markdown."""

import re
from collections.abc import Sequence
from html import escape

from ...utils.text_tables import markdown_table
from .document import Fold, Heading, Items, Paragraph, Part, Picture, Table, Value, value


def to_markdown(parts: Sequence[Part]) -> str:
    """The parts as one Markdown text; figures are links to the files beside it."""
    return "\n".join(line for part in parts for line in _lines(part))


def _lines(part: Part) -> list[str]:
    match part:
        case Heading(level, text):
            return [f"{'#' * level} {text}", ""]
        case Paragraph(text):
            return [text, ""]
        case Items(texts):
            return [*(f"- {text}" for text in texts), ""]
        case Table(caption, header, rows):
            cells = [[_cell(value(cell)) for cell in row] for row in rows]
            return [f"*{caption}*", "", markdown_table(header, cells, right=range(1, len(header))), ""]
        case Picture(file, caption):
            return [f"![{caption.replace('`', '')}]({file})", ""]
        case Fold(title, inner):
            # The empty lines make GitHub read what stands between the tags as Markdown
            lines = [line for one in inner for line in _lines(one)]
            summary = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(title, quote=False))
            return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]
    raise TypeError(f"{part!r} is no part of a report.")


def _cell(cell: Value) -> str:
    return (f"**{cell.text}**" if cell.bold else cell.text) + cell.mark
