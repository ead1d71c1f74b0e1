"""The plan of a recipe before it starts: sizes, memory, steps and progress, from configurations alone."""

from .plan import plan_recipe
from .schema import Plan
from .text import format_plan


__all__ = ["Plan", "format_plan", "plan_recipe"]
