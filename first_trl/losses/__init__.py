"""Sparse KL losses: a readable reference on dense logits and a fused one that never builds `[N, V]`."""

from ..plugins import ESTIMATORS
from .choice_scores import ChoiceScores
from .chunks import default_chunk_size
from .estimator import Estimator, Student, Target, cross_entropy
from .fused import fused_sparse_kl
from .inputs import SparseKLOutput, check_targets, get_estimator
from .reference import sparse_kl_reference


__all__ = [
    "ESTIMATORS",
    "ChoiceScores",
    "Estimator",
    "SparseKLOutput",
    "Student",
    "Target",
    "check_targets",
    "cross_entropy",
    "default_chunk_size",
    "fused_sparse_kl",
    "get_estimator",
    "sparse_kl_reference",
]
