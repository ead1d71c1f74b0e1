"""A recipe made small: every stage and arm on the CPU in seconds, with tiny random models and a few rows."""

from .recipe import smoke_recipe


__all__ = ["smoke_recipe"]
