"""Rescale of the teacher's cached top-k ("trustworthy maximization") and its fit on a validation split."""

from .fit import RecalibrationFit, fit_recalibration
from .methods import Method
from .rescale import Recalibration
from .scores import CurvePoint


__all__ = ["CurvePoint", "Method", "Recalibration", "RecalibrationFit", "fit_recalibration"]
