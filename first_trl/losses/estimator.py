"""What an estimator of the divergence to the teacher is: one function of the student at the kept tokens."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch


@dataclass(frozen=True)
class Target:
    """
    The target side of some rows, in the type of the sums, with padding made harmless.

    Attributes:
        ids (`torch.Tensor` of shape `(n, k)`, int64):
            Kept token ids; padded slots repeat the row's heaviest id.
        slots (`torch.Tensor` of shape `(n, k)`, int64):
            The slot that each slot repeats, itself for real entries.
        kept (`torch.Tensor` of shape `(n, k)`, bool):
            `False` for padding.
        mass (`torch.Tensor` of shape `(n, k)`):
            Target probabilities, 0 for padding.
        tail (`torch.Tensor` of shape `(n,)`):
            Target mass outside the kept ids; 0 where the target has no tail.
        total (`torch.Tensor` of shape `(n,)`):
            Kept mass and tail together: 1 up to rounding.
        entropy (`torch.Tensor` of shape `(n,)`):
            Entropy of the target in nats, tail included.
        labels (`torch.Tensor` of shape `(n,)`, int64, *optional*):
            Hard labels.
        weight (`torch.Tensor` of shape `(n,)`, *optional*):
            Factor of each row's divergence in the loss; 1 without it.
    """

    ids: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    mass: torch.Tensor
    tail: torch.Tensor
    total: torch.Tensor
    entropy: torch.Tensor
    labels: torch.Tensor | None
    weight: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        ids: torch.Tensor,
        log_target: torch.Tensor,
        tail_log_target: torch.Tensor | None,
        labels: torch.Tensor | None,
        dtype: torch.dtype,
        weight: torch.Tensor | None = None,
    ) -> Self:
        """From log-probabilities, where `-inf` marks padding."""
        kept = log_target > -torch.inf
        # Writing at a padded id could overwrite a kept one: point padding at an entry of its own row, with its value.
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        slots = torch.where(kept, slots, log_target.argmax(-1, keepdim=True))
        log_mass = log_target.to(dtype)
        mass = log_mass.exp()
        entropy = -(mass * log_mass.masked_fill(~kept, 0.0)).sum(-1)
        total = mass.sum(-1)
        tail = torch.zeros_like(total)
        if tail_log_target is not None:
            log_tail = tail_log_target.to(dtype)
            tail = log_tail.exp()
            entropy = entropy - torch.where(tail > 0, tail * log_tail, 0.0)
            total = total + tail
        weight = None if weight is None else weight.to(dtype)
        return cls(ids.gather(1, slots), slots, kept, mass, tail, total, entropy, labels, weight)

    def weighted(self, divergence: torch.Tensor) -> torch.Tensor:
        """The divergences of the rows, or their gradients, as the loss counts them: their first dimension is the rows."""
        if self.weight is None:
            return divergence
        return divergence * self.weight.view(-1, *[1] * (divergence.dim() - 1))

    def rows(self, rows: slice) -> Self:
        """Some of the rows."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})


class Student(NamedTuple):
    """
    The student at the kept tokens of some rows.

    Attributes:
        log_p (`torch.Tensor` of shape `(n, k)`):
            Log-probabilities of the kept ids over the whole vocabulary. A padded slot repeats the row's heaviest id.
        log_q (`torch.Tensor` of shape `(n, k)`):
            Log-probabilities among the kept ids alone; whatever at padded slots.
        log_tail (`torch.Tensor` of shape `(n,)`):
            Log of the mass outside the kept ids; hugely negative or `-inf` where nothing is outside.
    """

    log_p: torch.Tensor
    log_q: torch.Tensor
    log_tail: torch.Tensor

    @classmethod
    def build(cls, logits: torch.Tensor, tail_logsumexp: torch.Tensor, kept: torch.Tensor) -> Self:
        """From the logits of the kept ids `(n, k)` and the logsumexp of all others `(n,)`."""
        log_kept = logits.masked_fill(~kept, -torch.inf).logsumexp(-1)
        log_z = torch.logaddexp(tail_logsumexp, log_kept)
        return cls(logits - log_z[:, None], logits - log_kept[:, None], tail_logsumexp - log_z)


class Estimator:
    """
    Base of the estimators. A subclass defines [`~Estimator.divergence`]; the fused loss and the reference both use it,
    and its gradient is found by autograd on the kept entries alone, never on `[N, V]`. Options are the fields of a
    frozen dataclass: with a field `student_temperature` it takes the trainer's option of that name.

    Attributes:
        warning (`str` or `None`):
            What the trainer says to someone who chooses it.
    """

    warning: str | None = None
    # Whether the divergence reads `log_q` alone. The fused loss then skips the vocabulary, and `log_p` and `log_tail`
    # are NaN.
    over_kept = False

    def divergence(self, student: Student, target: Target) -> torch.Tensor:
        """
        Divergence of every row, in nats.

        Args:
            student ([`Student`]):
                Any differentiable function of its fields may be used. Entries at padded slots (`~target.kept`) must
                not count.
            target ([`Target`]):
                The recalibrated teacher.

        Returns:
            `torch.Tensor` of shape `(n,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `divergence`")

    def gradient(self, logits: "Logits", student: Student, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Gradient of the divergence with respect to the logits; by autograd where a subclass has no formula of its own.

        Args:
            logits ([`Logits`]):
                What `student` was made of.
            student ([`Student`]), target ([`Target`]):
                As in [`~Estimator.divergence`].

        Returns:
            `tuple`: the gradient at the kept ids, of shape `(n, k)`, and the factor, of shape `(n,)`, on
            `exp(logit - tail_max)` that makes the gradient of every other logit.
        """
        with torch.enable_grad():
            # All others act through their logsumexp, whose derivative by one of them is its share of the tail
            free = logits.kept.detach().requires_grad_()
            tail = logits.tail_logsumexp.detach().requires_grad_()
            total = self.divergence(Student.build(free, tail, target.kept), target).sum()
            on_kept, on_tail = torch.autograd.grad(total, (free, tail), allow_unused=True, materialize_grads=True)
        return on_kept, torch.where(logits.tail_sum > 0, on_tail / logits.tail_sum, 0.0)


class Logits(NamedTuple):
    """
    Logits of some rows, the kept ids apart from all others.

    Attributes:
        kept (`torch.Tensor` of shape `(n, k)`):
            Of the kept ids.
        tail_logsumexp (`torch.Tensor` of shape `(n,)`):
            Logsumexp of the others.
        tail_sum (`torch.Tensor` of shape `(n,)`):
            Sum of `exp(logit - tail_max)` over the others, with `tail_max` the largest of them.
        to_p (`torch.Tensor` of shape `(n,)`):
            Factor that makes probabilities of `exp(logit - tail_max)`.
    """

    kept: torch.Tensor
    tail_logsumexp: torch.Tensor
    tail_sum: torch.Tensor
    to_p: torch.Tensor


def cross_entropy(log_student: torch.Tensor, target: Target) -> torch.Tensor:
    """`-sum_i t_i log_student_i` over the kept ids of every row, shape `(n,)`."""
    return -torch.where(target.kept, target.mass * log_student, 0.0).sum(-1)
