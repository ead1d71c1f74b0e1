"""Random problems for the sparse KL losses, solved by the fused loss and by the float64 reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from first_trl.losses import SparseKLOutput, fused_sparse_kl, sparse_kl_reference


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    log_target: torch.Tensor
    tail_log_target: torch.Tensor | None
    labels: torch.Tensor
    estimator: str
    ce_weight: float
    logit_scale: float
    softcap: float | None
    student_temperature: float | None

    @property
    def targets(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "estimator": self.estimator,
            "ce_weight": self.ce_weight,
            "student_temperature": self.student_temperature,
        }

    def fused(self, **kwargs: Any) -> SparseKLOutput:
        return fused_sparse_kl(
            self.hidden,
            self.weight,
            self.ids,
            self.log_target,
            tail_log_target=self.tail_log_target,
            bias=self.bias,
            logit_scale=self.logit_scale,
            final_logit_softcapping=self.softcap,
            **self.targets,
            **kwargs,
        )

    def reference(self) -> tuple[SparseKLOutput, list[torch.Tensor]]:
        leaves = [x.detach().double().requires_grad_() for x in self.parameters()]
        logits = self.dense_logits(leaves)
        tail = None if self.tail_log_target is None else self.tail_log_target.double()
        output = sparse_kl_reference(logits, self.ids, self.log_target.double(), tail_log_target=tail, **self.targets)
        return output, list(torch.autograd.grad(output.loss, leaves))

    def dense_logits(self, leaves: list[torch.Tensor]) -> torch.Tensor:
        """All logits, of copies of [`parameters`]."""
        logits = leaves[0] @ leaves[1].t()
        if self.bias is not None:
            logits = logits + leaves[2]
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def parameters(self) -> list[torch.Tensor]:
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])


def descend(logits: torch.Tensor, loss: Callable[[], torch.Tensor]) -> None:
    """Takes `logits`, in place, to where `loss` of them is least."""
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    optimizer.step(closure)


def make_problem(
    seed: int,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    k: int,
    estimator: str = "topk",
    *,
    padding: int = 0,
    bias: bool = False,
    ce_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    student_temperature: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # The first k ids of a random order per row, without a [tokens, vocab_size] permutation for large vocabularies.
    if vocab_size <= 5000:
        ids = torch.rand(tokens, vocab_size, generator=generator).argsort(-1)[:, :k].contiguous()
    else:
        stride = vocab_size // k
        ids = torch.arange(k) * stride + torch.randint(stride, (tokens, k), generator=generator)
    # Half of the labels are kept ids, as with a good teacher.
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    inside = torch.rand(tokens, generator=generator) < 0.5
    labels = torch.where(inside, ids[:, 0], labels)
    log_mass = 2 * normal(tokens, k + 1)
    padding = min(padding, k - 1)
    if padding:
        log_mass[:, k - padding : k] = -torch.inf
        ids[:, k - padding :] = ids[:, :1]
    if k == vocab_size:
        log_mass[:, -1] = -torch.inf
    tail = None
    if estimator == "bucket":
        log_mass = log_mass.log_softmax(-1)
        log_target, tail = log_mass[:, :-1], log_mass[:, -1]
    else:
        log_target = log_mass[:, :-1].log_softmax(-1)
    weight = normal(vocab_size, hidden_size) * 2 * hidden_size**-0.5
    return Problem(
        hidden=normal(tokens, hidden_size).to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        bias=normal(vocab_size).to(dtype).requires_grad_() if bias else None,
        ids=ids,
        log_target=log_target,
        tail_log_target=tail,
        labels=labels,
        estimator=estimator,
        ce_weight=ce_weight,
        logit_scale=logit_scale,
        softcap=softcap,
        student_temperature=student_temperature,
    )
