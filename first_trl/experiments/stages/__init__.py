"""Runs a recipe: the stages in order, each skipped when its result is there."""
