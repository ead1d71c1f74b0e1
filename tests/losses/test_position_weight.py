"""Weights of positions in the sparse KL: the divergence alone is weighted, and every sum but the loss stays as it was."""

import pytest
import torch

from first_trl.losses import ESTIMATORS, SparseKLOutput, sparse_kl_reference
from tests.support.sparse_kl import Problem, make_problem


WEIGHTS = torch.tensor([0.0, 1.0, 0.3, 2.5, 0.7, 1.0, 0.05, 1.4, 0.9, 0.0, 0.2], dtype=torch.float64)


def problem_of(estimator: str, dtype: torch.dtype, ce_weight: float, softcap: float | None) -> Problem:
    return make_problem(
        3, len(WEIGHTS), 8, 60, 5, estimator, padding=1, bias=True, ce_weight=ce_weight, logit_scale=0.7, softcap=softcap,
        dtype=dtype,
    )  # fmt: skip


def naive(problem: Problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One token at a time, from the dense logits of the reference without weights."""
    leaves = [x.detach().double().requires_grad_() for x in problem.parameters()]
    logits = problem.dense_logits(leaves)
    loss = logits.new_zeros(())
    for row, weight in enumerate(WEIGHTS):
        one = slice(row, row + 1)
        tail = None if problem.tail_log_target is None else problem.tail_log_target[one].double()
        plain = {**problem.targets, "labels": problem.labels[one], "ce_weight": 0.0}
        ids, target = problem.ids[one], problem.log_target[one].double()
        divergence = sparse_kl_reference(logits[one], ids, target, tail_log_target=tail, **plain).loss
        hard = -logits[row].log_softmax(-1)[problem.labels[row]]
        loss = loss + (1 - problem.ce_weight) * weight * divergence + problem.ce_weight * hard
    return loss, list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize(("ce_weight", "softcap", "chunk_size"), [(0.0, None, None), (0.3, 3.0, 4)])
@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_loss_and_gradients_are_those_of_one_token_at_a_time(
    estimator: str, ce_weight: float, softcap: float | None, chunk_size: int | None, kernel: str, monkeypatch
) -> None:
    if kernel == "triton":
        pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setenv("FIRST_TRL_KERNEL", kernel)
    dtype = torch.float64 if kernel == "torch" else torch.float32
    tolerance = 1e-9 if kernel == "torch" else 1e-5
    problem = problem_of(estimator, dtype, ce_weight, softcap)
    output = problem.fused(chunk_size=chunk_size, position_weight=WEIGHTS.to(dtype))
    loss, gradients = naive(problem)
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    for found, expected in zip(torch.autograd.grad(output.loss, problem.parameters()), gradients, strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()
    plain = problem.fused(chunk_size=chunk_size)
    for name in SparseKLOutput._fields[1:]:
        torch.testing.assert_close(getattr(output, name), getattr(plain, name), equal_nan=True)


@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
def test_the_reference_has_them_too(estimator: str) -> None:
    problem = problem_of(estimator, torch.float64, 0.3, None)
    logits = problem.dense_logits([x.detach() for x in problem.parameters()])
    found = sparse_kl_reference(
        logits, problem.ids, problem.log_target, tail_log_target=problem.tail_log_target, position_weight=WEIGHTS,
        **problem.targets,
    )  # fmt: skip
    assert found.loss.item() == pytest.approx(naive(problem)[0].item(), rel=1e-9)


def test_weights_of_one_change_nothing() -> None:
    problem = problem_of("bucket", torch.float32, 0.0, None)
    found = problem.fused(position_weight=torch.ones(len(WEIGHTS)))
    plain = problem.fused()
    assert torch.equal(found.loss, plain.loss)
    gradients = (torch.autograd.grad(output.loss, problem.parameters()) for output in (found, plain))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"`position_weight` must have shape \(11,\)"),
        (torch.ones(11).index_fill(0, torch.tensor([4]), -0.1), "Row 4: the weight -0.1"),
        (torch.ones(11).index_fill(0, torch.tensor([2]), torch.nan), "Row 2: the weight nan must be finite"),
    ],
)
def test_bad_weights_are_named(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem_of("topk", torch.float32, 0.0, None).fused(position_weight=weights)
