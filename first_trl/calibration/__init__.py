"""
Calibration of classifiers and language models: numpy in, plain Python values out.

Needs numpy only (and matplotlib when a diagram is drawn); nothing here imports torch or a Hugging Face library.
"""

from .accumulator import CalibrationAccumulator
from .diagram import reliability_data, reliability_diagram, save_figure
from .examples import CalibrationWarning
from .report import calibration_report, expected_calibration_error


__all__ = [
    "CalibrationAccumulator",
    "CalibrationWarning",
    "calibration_report",
    "expected_calibration_error",
    "reliability_data",
    "reliability_diagram",
    "save_figure",
]
