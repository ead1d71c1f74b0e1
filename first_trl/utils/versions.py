"""Versions of the libraries that a training runs on."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


__version__ = "0.1.0"
VERSIONS = "versions.json"  # beside the log of a training
_LIBRARIES = ("trl", "transformers", "peft", "torch", "datasets")


def training_versions() -> dict[str, str]:
    """Library -> installed version, for cards and the records of a run."""
    return {"first_trl": __version__} | {name: _installed(name) for name in _LIBRARIES}


@cache
def _installed(library: str) -> str:
    # 10 ms to read and parse, and asked twice for every unit of a run
    return version(library)


def code_version(modules: Iterable[str]) -> str:
    """
    Digest of the source text of modules: part of the name of what they made and left on disk, so that another version of
    the code makes it anew.

    Args:
        modules (`Iterable[str]`): Their full names.

    Returns:
        `str`: 12 hexadecimal digits. Where the source is not installed, the version of the package stands for it.
    """
    digest = hashlib.sha256()
    for name in sorted(modules):
        spec = find_spec(name)
        path = None if spec is None or spec.origin is None else Path(spec.origin)
        text = path.read_bytes() if path is not None and path.suffix == ".py" and path.is_file() else b""
        digest.update(name.encode() + (text or __version__.encode()))
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Versioned:
    """
    A function for `Dataset.map`, with the version of its code. datasets names a result on disk after the function and its
    arguments, and an imported function by its name alone: another version of the code would be given what an earlier one
    made.

    Args:
        function (`Callable`): What `map` calls.
        version (`str`): From [`code_version`].
    """

    function: Callable[..., Any]
    version: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def versioned(function: Callable[..., Any], *modules: str) -> Versioned:
    """`function` with the version of its own module and of the `modules` that it calls."""
    return Versioned(function, code_version((function.__module__, *modules)))
