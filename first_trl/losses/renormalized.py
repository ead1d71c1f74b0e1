"""The estimator `"renormalized"`: teacher and student both renormalised over the kept ids."""

import torch

from .estimator import Estimator, Logits, Student, Target, cross_entropy


class Renormalized(Estimator):
    """`sum_i t_i log(t_i / q_i)`, `q` the student's softmax over the kept ids only."""

    over_kept = True
    warning = (
        "`estimator='renormalized'` constrains only the ratios among the cached ids: the mass of all other tokens is "
        "left to the student. Start from a student that was fine-tuned on the task, or use 'topk' or 'bucket'."
    )

    def divergence(self, student: Student, target: Target) -> torch.Tensor:
        return cross_entropy(student.log_q, target) - target.entropy

    def gradient(self, logits: Logits, student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        return target.total[:, None] * student.log_q.exp() - target.mass, torch.zeros_like(target.total)


RENORMALIZED = Renormalized()
