"""Sparse KL losses: a readable reference on dense logits and a fused one that never builds `[N, V]`."""

from .chunks import default_chunk_size
from .fused import fused_sparse_kl
from .inputs import ESTIMATORS, Estimator, SparseKLOutput, check_targets
from .reference import sparse_kl_reference


__all__ = [
    "ESTIMATORS",
    "Estimator",
    "SparseKLOutput",
    "check_targets",
    "default_chunk_size",
    "fused_sparse_kl",
    "sparse_kl_reference",
]
