"""Packages that only some users need."""

import importlib
from typing import Any


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message is the command that installs it."""


def optional(module: str, *, extra: str, what: str) -> Any:
    """
    Import a module of an optional dependency.

    Args:
        module (`str`): Name of the module, e.g. `"sklearn.datasets"`.
        extra (`str`): Extra of this package that installs it.
        what (`str`): What needs it, as the beginning of the error.

    Raises:
        [`MissingExtra`]: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A broken installation is another matter than a missing one
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingExtra(f"{what} needs {package}: `pip install 'first_trl[{extra}]'`.") from error
