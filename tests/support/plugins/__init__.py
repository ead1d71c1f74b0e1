"""A user's additions, as they would stand beside a recipe: one file each, all imported by the module a recipe names."""

from . import backend, estimator, metric, recalibration, task


__all__ = ["backend", "estimator", "metric", "recalibration", "task"]
