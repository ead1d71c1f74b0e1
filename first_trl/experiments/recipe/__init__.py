"""Recipes: the keys, how a file is read and checked, and the runs it stands for."""

from .grid import cells, merged_folder
from .models import (
    ArmSpec,
    CaptureSpec,
    EvaluationSpec,
    HubSpec,
    ModelSpec,
    NoveltySpec,
    RecalibrationSpec,
    Recipe,
    ReportSpec,
    SplitSpec,
    TaskSpec,
    TeacherSpec,
)
from .read import load_recipe


__all__ = [
    "ArmSpec",
    "CaptureSpec",
    "EvaluationSpec",
    "HubSpec",
    "ModelSpec",
    "NoveltySpec",
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
