"""The estimators `"topk"` and `"sampled"`: the student's full softmax at the kept ids."""

import torch

from .estimator import Estimator, Logits, Student, Target, cross_entropy


class TopK(Estimator):
    """`sum_i t_i log(t_i / p_i)`, `p` the student over the full vocabulary."""

    def divergence(self, student: Student, target: Target) -> torch.Tensor:
        return cross_entropy(student.log_p, target) - target.entropy

    def gradient(self, logits: Logits, student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        return target.total[:, None] * student.log_p.exp() - target.mass, target.total * logits.to_p


TOPK = TopK()
