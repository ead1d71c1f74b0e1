"""Card templates and the small pieces of text that all cards share."""

import os
import re
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..utils.resources import template_path
from ..utils.text_tables import escape_cell, markdown_table


def render(template: str, **values: Any) -> str:
    """Render a card template; a value that the template uses and nobody gave is an error."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.globals["markdown_table"] = markdown_table
    environment.filters["cell"] = escape_cell
    return environment.from_string(template_path(template).read_text(encoding="utf-8")).render(**values)


# Ends of files of data: what is called so and is not here was here when somebody wrote it down
_FILE = re.compile(r"\.(csv|tsv|txt|json|jsonl|ndjson|parquet|arrow|gz|zip|zst|xz|bz2)", re.IGNORECASE)


def hub_id(name: str | None) -> str | None:
    """The name when it can be a repository on the Hub, `None` for files, folders and models without a name."""
    if not name or os.path.isabs(name) or os.path.exists(name) or _FILE.fullmatch(os.path.splitext(name)[1]):
        return None
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None


def public_name(name: str) -> str:
    """A name that may be shared: the last part of a path, everything else as it is."""
    return name if hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
