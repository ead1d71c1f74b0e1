"""Recipes: the keys, how a file is read and checked, and the runs it stands for."""

from .cells import cells, merged_folder
from .read import load_recipe
from .schema import (
    STAGES,
    ArmSpec,
    CaptureSpec,
    EvaluationSpec,
    HubSpec,
    ModelSpec,
    RecalibrationSpec,
    Recipe,
    ReportSpec,
    SplitSpec,
    TaskSpec,
    TeacherSpec,
)


__all__ = [
    "STAGES",
    "ArmSpec",
    "CaptureSpec",
    "EvaluationSpec",
    "HubSpec",
    "ModelSpec",
    "RecalibrationSpec",
    "Recipe",
    "ReportSpec",
    "SplitSpec",
    "TaskSpec",
    "TeacherSpec",
    "cells",
    "load_recipe",
    "merged_folder",
]
