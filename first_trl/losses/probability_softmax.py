"""The estimator `"probability_softmax"`: how the authors' code of FIRST reads the student's temperature."""

from dataclasses import dataclass

import torch

from .estimator import Estimator, Logits, Student, Target, cross_entropy


@dataclass(frozen=True)
class ProbabilitySoftmax(Estimator):
    """
    `sum_i t_i log(t_i / r_i)`, `r` the softmax over the kept ids of the *probabilities* `p_i / student_temperature`.

    Args:
        student_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the student's probabilities.
    """

    student_temperature: float = 1.0
    warning = (
        "`estimator='probability_softmax'` is for replication of the authors' code: with equal temperatures on both "
        "sides the student learns the raw teacher up to a constant, with a smaller one on the teacher it gets sharper "
        "than the teacher, and the mass of all other tokens is free. 'topk' with "
        "`recalibration='probability_temperature'` is the method of the paper."
    )

    def divergence(self, student: Student, target: Target) -> torch.Tensor:
        return cross_entropy(self._log_student(student.log_p.exp(), target), target) - target.entropy

    def gradient(self, logits: Logits, student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        # `pull` is the derivative by p on the kept ids. Every logit of the row moves every p: dp_i/dz_j is
        # p_i * ((i == j) - p_j), so p_j takes `pull_j` of its own less the mean of all of them.
        p = student.log_p.exp()
        pull = target.total[:, None] * self._log_student(p, target).exp() - target.mass
        pull = pull / self.student_temperature
        mean_pull = (pull * p).sum(-1)
        return p * (pull - mean_pull[:, None]), -mean_pull * logits.to_p

    def _log_student(self, p: torch.Tensor, target: Target) -> torch.Tensor:
        return (p / self.student_temperature).masked_fill(~target.kept, -torch.inf).log_softmax(-1)


PROBABILITY_SOFTMAX = ProbabilitySoftmax()
