"""Runs a recipe: the stages in order, each skipped when its result is there."""

from .stages import run_recipe


__all__ = ["run_recipe"]
