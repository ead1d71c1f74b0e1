"""A merged report as one HTML page that needs nothing beside it."""

import base64
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .document import Heading, Part, value


_TEMPLATE = Path(__file__).with_name("report.html.j2")


def to_html(parts: Sequence[Part], title: str, folder: Path) -> str:
    """The parts as one page with its style and figures inside; `folder` holds the figures."""
    headings = [part for part in parts if isinstance(part, Heading)]
    names = {id(part): f"part-{index}" for index, part in enumerate(headings)}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "kind": lambda part: type(part).__name__,
        "anchor": lambda part: f' id="{names[id(part)]}"' if id(part) in names else "",
        "anchor_name": lambda part: names[id(part)],
        "base64": lambda file: base64.b64encode((folder / file).read_bytes()).decode("ascii"),
        "escape": escape,
        "inline": _inline,
        "value": value,
    }
    environment.filters |= filters
    sections = [part for part in headings if part.level == 2]
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(parts=parts, title=title, sections=sections)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
