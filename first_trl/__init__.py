"""Trustworthy distillation on the Hugging Face stack (FIRST, arXiv 2408.12168)."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Name -> module that defines it. Imported on first use: `import first_trl` and the calibration core stay light, and
# someone who only wants an ECE never loads torch.
_EXPORTS = {
    "FirstDistillConfig": "first_trl.training.config",
    "FirstDistillTrainer": "first_trl.training.trainer",
    "add_teacher_topk": "first_trl.teacher.capture",
    "load_teacher_cache": "first_trl.cache.folder",
    "verify_teacher_cache": "first_trl.cache.verify",
    "Recalibration": "first_trl.recalibration",
    "fit_recalibration": "first_trl.recalibration",
    "expected_calibration_error": "first_trl.calibration",
    "calibration_report": "first_trl.calibration",
    "reliability_diagram": "first_trl.calibration",
    "evaluate_multiple_choice": "first_trl.evaluation.multiple_choice",
    "answer_pipeline": "first_trl.inference",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from first_trl.cache.folder import load_teacher_cache
    from first_trl.cache.verify import verify_teacher_cache
    from first_trl.calibration import calibration_report, expected_calibration_error, reliability_diagram
    from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
    from first_trl.inference import answer_pipeline
    from first_trl.recalibration import Recalibration, fit_recalibration
    from first_trl.teacher.capture import add_teacher_topk
    from first_trl.training.config import FirstDistillConfig
    from first_trl.training.trainer import FirstDistillTrainer
