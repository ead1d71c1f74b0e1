"""Every estimator, type and head: the loss and every gradient of the kernels against float64 on dense logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from first_trl.losses import fused_sparse_kl, sparse_kl_reference


ESTIMATORS = ("topk", "bucket", "sampled")
# Largest error of the loss (relative) and of a gradient (relative to its largest entry)
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-2, 1e-2)}


@dataclass
class Case:
    estimator: str
    dtype: str
    head: str
    bias: bool
    softcap: float | None
    ce_weight: float
    tokens: int
    hidden: int
    vocab: int
    k: int


def cases(small: bool) -> Iterator[Case]:
    """The cases to run: a few dozen rows and a small vocabulary for the interpreter, real sizes for a GPU."""
    tokens, hidden, vocab = (9, 16, 301) if small else (700, 512, 32_003)
    for estimator in ESTIMATORS:
        for dtype in TOLERANCE:
            for head in ("trainable", "frozen"):
                for bias, softcap, ce_weight in ((False, None, 0.0), (True, 30.0, 0.3)):
                    yield Case(estimator, dtype, head, bias, softcap, ce_weight, tokens, hidden, vocab, 5)


def errors(case: Case, device: str) -> dict[str, float]:
    """Error of the loss and of each gradient, relative to the reference's size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dtype = getattr(torch, case.dtype)
    hidden = draw(case.tokens, case.hidden).to(dtype)
    weight = (3 * draw(case.vocab, case.hidden) * case.hidden**-0.5).to(dtype)
    bias = draw(case.vocab).to(dtype) if case.bias else None
    stride = case.vocab // case.k
    ids = torch.arange(case.k) * stride + torch.randint(stride, (case.tokens, case.k), generator=generator)
    log_mass = draw(case.tokens, case.k + 1)
    labels = torch.randint(case.vocab, (case.tokens,), generator=generator)
    targets: dict[str, Any] = {"labels": labels.to(device), "estimator": case.estimator, "ce_weight": case.ce_weight}
    if case.estimator == "bucket":
        log_bucket = log_mass.log_softmax(-1).float().to(device)
        log_target, targets["tail_log_target"] = log_bucket[:, :-1], log_bucket[:, -1]
    else:
        log_target = log_mass[:, :-1].log_softmax(-1).float().to(device)

    def leaves(to: torch.dtype) -> list[torch.Tensor | None]:
        made = [None if tensor is None else tensor.to(device, to) for tensor in (hidden, weight, bias)]
        for tensor, wanted in zip(made, (True, case.head == "trainable", case.head == "trainable"), strict=True):
            if tensor is not None:
                tensor.requires_grad_(wanted)
        return made

    exact, ours = leaves(torch.float64), leaves(dtype)
    logits = exact[0] @ exact[1].T + (0.0 if exact[2] is None else exact[2])  # type: ignore[operator, union-attr]
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    wide = {name: value.double() if name == "tail_log_target" else value for name, value in targets.items()}
    expected = sparse_kl_reference(logits, ids.to(device), log_target.double(), **wide).loss
    expected.backward()
    loss = fused_sparse_kl(
        ours[0], ours[1], ids.to(device), log_target, bias=ours[2], final_logit_softcapping=case.softcap, **targets
    ).loss  # type: ignore[arg-type]
    loss.backward()
    found = {"loss": float((loss.double() - expected).abs().detach() / expected.abs().detach())}
    for name, mine, theirs in zip(("hidden", "weight", "bias"), ours, exact, strict=True):
        if mine is not None and mine.grad is not None:
            assert theirs is not None and theirs.grad is not None
            found[name] = float((mine.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max())
    return found


def run(device: str) -> list[dict[str, Any]]:
    """One row a case, with its errors and whether they are within the tolerance."""
    rows = []
    for case in cases(small=device == "cpu"):
        found = errors(case, device)
        loss_limit, gradient_limit = TOLERANCE[case.dtype]
        good = all(value <= (loss_limit if name == "loss" else gradient_limit) for name, value in found.items())
        rows.append({**vars(case), "errors": found, "ok": good})
    return rows
