"""Engines that score token rows with a teacher. All return the same [`Scores`], so that the cache is the same."""

from .base import Scores, TeacherBackend
from .committee import CommitteeBackend, transformers_backend
from .transformers import TransformersBackend
from .vllm import VLLMBackend


__all__ = [
    "CommitteeBackend", "Scores", "TeacherBackend", "TransformersBackend", "VLLMBackend", "transformers_backend"
]  # fmt: skip
