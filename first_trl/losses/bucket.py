"""The estimator `"bucket"`: the kept ids and one entry for all other tokens."""

import torch

from .estimator import Estimator, Logits, Student, Target, cross_entropy


class Bucket(Estimator):
    """`sum_i t_i log(t_i / p_i) + b log(b / p_tail)`, `b` the target's tail and `p_tail` the student's."""

    def divergence(self, student: Student, target: Target) -> torch.Tensor:
        total = cross_entropy(student.log_p, target)
        total = total - torch.where(target.tail > 0, target.tail * student.log_tail, 0.0)
        return total - target.entropy

    def gradient(self, logits: Logits, student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        # `total * p` less `b * p / p_tail`. The exponentials over their own sum are p / p_tail without the division of
        # two tiny numbers.
        on_tail = target.total * logits.to_p - torch.where(target.tail > 0, target.tail / logits.tail_sum, 0.0)
        return target.total[:, None] * student.log_p.exp() - target.mass, on_tail


BUCKET = Bucket()
