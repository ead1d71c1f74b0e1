"""Engines that score token rows with a teacher. All return the same [`Scores`], so that the cache is the same."""

from .base import Scores, TeacherBackend
from .transformers import TransformersBackend
from .vllm import VLLMBackend


__all__ = ["Scores", "TeacherBackend", "TransformersBackend", "VLLMBackend"]
