"""Rescale of the teacher's cached top-k ("trustworthy maximization") and its fit on a validation split."""

from first_trl.recalibration.fit import CurvePoint, RecalibrationFit, fit_recalibration
from first_trl.recalibration.rescale import ESTIMATORS, METHODS, Recalibration


__all__ = ["ESTIMATORS", "METHODS", "CurvePoint", "Recalibration", "RecalibrationFit", "fit_recalibration"]
