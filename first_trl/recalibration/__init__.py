"""Rescale of the teacher's cached top-k ("trustworthy maximization") and its fit on a validation split."""

from .fit import RecalibrationFit, fit_recalibration
from .rescale import ESTIMATORS, METHODS, Recalibration
from .scores import CurvePoint


__all__ = ["ESTIMATORS", "METHODS", "CurvePoint", "Recalibration", "RecalibrationFit", "fit_recalibration"]
