"""Card templates and the small pieces of text that all cards share."""

import os
import re
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..resources import template_path


def render(template: str, **values: Any) -> str:
    """Render a card template; a value that the template uses and nobody gave is an error."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    return environment.from_string(template_path(template).read_text(encoding="utf-8")).render(**values)


def hub_id(name: str | None) -> str | None:
    """The name when it can be a repository on the Hub, `None` for folders and for models without a name."""
    if not name or os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return None
    return name


def public_name(name: str) -> str:
    """A name that may be shared: the last part of a path, everything else as it is."""
    return name if hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def cell(text: Any) -> str:
    """Text for a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
