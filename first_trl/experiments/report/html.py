"""A merged report as one HTML page that needs nothing beside it."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .document import Fold, Heading, Items, Paragraph, Part, Picture, Table, Value, value


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: #fff; color: #1c1c1c;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
p, li { max-width: 60rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
h4 { font-size: 1rem; margin-top: 1.5rem; }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; background: #f2f2f2; padding: .05em .3em;
  border-radius: 3px; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
nav a { color: #0b5394; }
.scroll { overflow-x: auto; margin: .8rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem .1rem; color: #444; }
th, td { padding: .28rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }
th { border-bottom: 2px solid #999; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td:first-child { max-width: 15rem; white-space: normal; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .86rem; color: #444; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: #0b5394; }
@media (max-width: 40rem) {
  body { padding: .7rem; font-size: 15px; }
  td:first-child { max-width: 8.5rem; }
  th, td { padding: .25rem .5rem; }
}
""".strip()


def to_html(parts: Sequence[Part], title: str, folder: Path) -> str:
    """The parts as one page with its style and figures inside; `folder` holds the figures."""
    headings = [part for part in parts if isinstance(part, Heading)]
    anchors = {id(part): f"part-{index}" for index, part in enumerate(headings)}
    body, listed = [], False
    for part in parts:
        if isinstance(part, Heading) and part.level == 2 and not listed:
            body.append(_contents(headings, anchors))
            listed = True
        body.append(_part(part, anchors, folder))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _contents(headings: Sequence[Heading], anchors: dict[int, str]) -> str:
    links = [
        f'<li><a href="#{anchors[id(part)]}">{_inline(part.text)}</a></li>' for part in headings if part.level == 2
    ]
    return f"<nav><ul>{''.join(links)}</ul></nav>"


def _part(part: Part, anchors: dict[int, str], folder: Path) -> str:
    match part:
        case Heading(level, text):
            anchor = f' id="{anchors[id(part)]}"' if id(part) in anchors else ""
            return f"<h{level}{anchor}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Items(texts):
            return "<ul>\n" + "\n".join(f"<li>{_inline(text)}</li>" for text in texts) + "\n</ul>"
        case Table():
            return _table(part)
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode("ascii")
            text = escape(caption.replace("`", ""), quote=True)
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Fold(title, inner):
            content = "\n".join(_part(one, anchors, folder) for one in inner)
            return f"<details><summary>{_inline(title)}</summary>\n{content}\n</details>"
    raise TypeError(f"{part!r} is no part of a report.")


def _table(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    rows = ["<tr>" + "".join(f"<td>{_cell(value(cell))}</td>" for cell in row) + "</tr>" for row in table.rows]
    return (
        f'<div class="scroll"><table><caption>{_inline(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _cell(cell: Value) -> str:
    text = _inline(cell.text)
    return (f"<strong>{text}</strong>" if cell.bold else text) + escape(cell.mark)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
