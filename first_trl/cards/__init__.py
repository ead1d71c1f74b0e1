"""Cards: the README of what is shared on the Hub, rendered from the templates in `model_cards/`."""

from .license import License, find_license
from .render import render
from .scores import Scored, score_result
from .student import Evaluation, StudentCard
from .teacher_cache import teacher_cache_card


__all__ = [
    "Evaluation",
    "License",
    "Scored",
    "StudentCard",
    "find_license",
    "render",
    "score_result",
    "teacher_cache_card",
]
