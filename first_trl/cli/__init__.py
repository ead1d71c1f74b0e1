"""The `first-trl` command, one module a sub-command."""

from .main import main


__all__ = ["main"]
