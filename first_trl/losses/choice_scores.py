"""Brier and ranked probability score of the student among the choices, beside the divergence."""

from dataclasses import dataclass

import torch

from .estimator import Target


@dataclass(frozen=True)
class ChoiceScores:
    r"""
    With `q` the student's softmax over the kept ids, `t` the target among them and `n` their number:

    - Brier: \\( \sum_i (q_i - t_i)^2 \\) (Brier 1950), in [0, 2].
    - RPS: \\( \sum_{j<n} (Q_j - T_j)^2 / (n - 1) \\) with cumulative sums in the order of the kept ids, which must be that
      of the choices, lowest first (Epstein 1969), in [0, 1]. Being wrong by one level costs less than by two.

    Both are proper: `q = t` is the one minimum, as it is of the divergence. They are bounded where the divergence is not.

    Args:
        brier_weight (`float`), rps_weight (`float`):
            Factors of the two in the loss.
    """

    brier_weight: float = 0.0
    rps_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("brier_weight", self.brier_weight), ("rps_weight", self.rps_weight)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")

    def __bool__(self) -> bool:
        return self.brier_weight > 0 or self.rps_weight > 0

    def value(self, log_q: torch.Tensor, target: Target) -> torch.Tensor:
        """Weighted sum of both for every row, shape `(n,)`, from the student's log-probabilities among the kept ids `(n, k)`."""
        _, gap = _gap(log_q, target)
        total = torch.zeros_like(target.total)
        if self.brier_weight:
            total = total + self.brier_weight * gap.square().sum(-1)
        if self.rps_weight:
            total = total + self.rps_weight * (_ahead(gap, target).square().sum(-1) / _steps(target))
        return total

    def gradient(self, log_q: torch.Tensor, target: Target) -> torch.Tensor:
        """Gradient of [`~ChoiceScores.value`] with respect to the logits of the kept ids, shape `(n, k)`; 0 at padding."""
        q, gap = _gap(log_q, target)
        by_q = 2 * self.brier_weight * gap
        if self.rps_weight:
            ahead = _ahead(gap, target)
            # Each probability is in the sums of its own slot and of all behind it
            behind = ahead.sum(-1, keepdim=True) - ahead.cumsum(-1) + ahead
            by_q = by_q + 2 * self.rps_weight * behind / _steps(target)[:, None]
        return q * (by_q - (q * by_q).sum(-1, keepdim=True))


def _gap(log_q: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    # Padding may hold NaN: it is taken out before the exponential, for the sake of its gradient
    q = torch.where(target.kept, log_q.masked_fill(~target.kept, 0.0).exp(), 0.0)
    return q, q - target.mass / target.mass.sum(-1, keepdim=True)


def _ahead(gap: torch.Tensor, target: Target) -> torch.Tensor:
    """How far the student's cumulative sums are ahead of the target's; 0 at padding. At the last id both are 1."""
    return torch.where(target.kept, gap.cumsum(-1), 0.0)


def _steps(target: Target) -> torch.Tensor:
    return (target.kept.sum(-1) - 1).clamp(min=1).to(target.total.dtype)
