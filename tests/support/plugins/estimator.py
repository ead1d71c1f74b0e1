"""An estimator: the squared error of the probabilities, tail included."""

import torch

from first_trl import register_estimator
from first_trl.losses import Estimator


@register_estimator("squared_error", target="tail")
class SquaredError(Estimator):
    def divergence(self, student, target):
        on_kept = torch.where(target.kept, (student.log_p.exp() - target.mass) ** 2, 0.0).sum(-1)
        return on_kept + (student.log_tail.exp() - target.tail) ** 2
