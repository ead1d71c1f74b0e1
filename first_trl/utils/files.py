"""Files that are whole or absent, however the process ends."""

import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (dataclasses and paths included). NaN is refused: it is no JSON."""
    write_atomically(path, json.dumps(value, indent=2, default=plain, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`default` of `json.dumps` for dataclasses and paths."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON serialisable")
