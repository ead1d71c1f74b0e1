"""Brier and ranked probability score in the fused loss: against a naive reference, and at their minimum."""

import dataclasses

import pytest
import torch

from first_trl.losses import ESTIMATORS, fused_sparse_kl, sparse_kl_reference
from tests.support.sparse_kl import Problem, descend, make_problem


WEIGHTS = [(0.7, 0.0), (0.0, 1.3), (0.7, 1.3)]


def naive_score(logits: torch.Tensor, problem: Problem, brier_weight: float, rps_weight: float) -> torch.Tensor:
    """One row and one choice at a time, from the dense logits."""
    total = logits.new_zeros(())
    for row in range(len(problem.ids)):
        kept = [i for i in range(problem.ids.shape[1]) if problem.log_target[row, i] > -torch.inf]
        own = [logits[row, problem.ids[row, i]].exp() for i in kept]
        target = [problem.log_target[row, i].double().exp() for i in kept]
        q = [value / sum(own) for value in own]
        t = [value / sum(target) for value in target]
        brier = sum((a - b) ** 2 for a, b in zip(q, t, strict=True))
        ranked = sum((sum(q[:j]) - sum(t[:j])) ** 2 for j in range(1, len(kept))) / max(len(kept) - 1, 1)
        total = total + brier_weight * brier + rps_weight * ranked
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_value_and_gradients_equal_a_naive_reference(
    estimator: str, weights: tuple[float, float], dtype: torch.dtype
) -> None:
    """What is added to the divergence, through chunks, padding, bias, scale and soft cap."""
    brier_weight, rps_weight = weights
    for padding, softcap, chunk_size in ((0, None, None), (2, 3.0, 4)):
        problem = make_problem(
            3, 11, 8, 60, 5, estimator, padding=padding, bias=True, ce_weight=0.3, logit_scale=0.7, softcap=softcap,
            dtype=dtype,
        )  # fmt: skip
        output = problem.fused(chunk_size=chunk_size, brier_weight=brier_weight, rps_weight=rps_weight)
        found = torch.autograd.grad(output.loss, problem.parameters())
        plain, plain_gradients = problem.reference()
        leaves = [x.detach().double().requires_grad_() for x in problem.parameters()]
        score = naive_score(problem.dense_logits(leaves), problem, brier_weight, rps_weight)
        gradients = torch.autograd.grad(score, leaves)
        assert output.choice_score.item() == pytest.approx(score.item(), rel=1e-6)
        assert output.loss.item() == pytest.approx((plain.loss + score).item(), rel=1e-6)
        for one, alone, added in zip(found, plain_gradients, gradients, strict=True):
            expected = alone + added
            assert added.norm() > 1e-3
            assert (one.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
def test_the_reference_on_dense_logits_has_them_too(estimator: str) -> None:
    problem = make_problem(5, 6, 8, 30, 4, estimator, padding=1, dtype=torch.float64)
    logits = problem.dense_logits([x.detach() for x in problem.parameters()])
    tail = {} if problem.tail_log_target is None else {"tail_log_target": problem.tail_log_target}
    targets = {**problem.targets, **tail, "ids": problem.ids, "log_target": problem.log_target}
    plain = sparse_kl_reference(logits, **targets)
    found = sparse_kl_reference(logits, **targets, brier_weight=0.4, rps_weight=0.6)
    score = naive_score(logits, problem, 0.4, 0.6)
    torch.testing.assert_close(found.choice_score, score)
    torch.testing.assert_close(found.loss, plain.loss + score)
    assert plain.choice_score == 0


def test_by_hand() -> None:
    # q = (.5, .3, .2), t = (.2, .3, .5): Brier .09 + 0 + .09; RPS ((.3)^2 + (.3)^2) / 2
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    target = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    arguments = (logits, torch.eye(3, dtype=torch.float64), torch.tensor([[0, 1, 2]]), target)
    assert fused_sparse_kl(*arguments, brier_weight=1.0).choice_score.item() == pytest.approx(0.18, abs=1e-12)
    assert fused_sparse_kl(*arguments, rps_weight=1.0).choice_score.item() == pytest.approx(0.09, abs=1e-12)

    # One level away is better than two, for the ranked score alone
    def score(q: list[float], **weight: float) -> float:
        sure = torch.tensor([[1.0, 1e-30, 1e-30]], dtype=torch.float64).log()
        hidden = torch.tensor([q], dtype=torch.float64).log()
        return fused_sparse_kl(hidden, *arguments[1:3], sure, **weight).choice_score.item()

    near, far = [0.2, 0.7, 0.1], [0.2, 0.1, 0.7]
    assert score(near, rps_weight=1.0) < score(far, rps_weight=1.0)
    assert score(near, brier_weight=1.0) == pytest.approx(score(far, brier_weight=1.0), abs=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
def test_minimised_at_the_target(estimator: str, weights: tuple[float, float]) -> None:
    """At the target they are 0 without a gradient; anywhere else they are more, and lead back to it."""
    brier_weight, rps_weight = weights
    options = {"estimator": estimator, "brier_weight": brier_weight, "rps_weight": rps_weight}
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 5, generator=generator, dtype=torch.float64).softmax(-1)
    tail, vocab_size = torch.full((4,), 0.2, dtype=torch.float64), 9
    if estimator == "bucket":
        options["tail_log_target"] = tail.log()
        log_target = (0.8 * target).log()
    else:
        log_target = target.log()
    ids, eye = torch.arange(5).repeat(4, 1), torch.eye(vocab_size, dtype=torch.float64)
    # What the divergence wants too: the target on the choices, and the tail (or nothing) on the four other tokens
    rest = (tail / 4).log() if estimator == "bucket" else torch.full((4,), -40.0, dtype=torch.float64)
    best = torch.cat([log_target, rest[:, None].expand(4, 4)], dim=1).requires_grad_()
    found = fused_sparse_kl(best, eye, ids, log_target, **options)
    found.loss.backward()
    assert found.choice_score.item() == pytest.approx(0.0, abs=1e-20)
    assert best.grad is not None and best.grad.abs().max() < 1e-12
    for _ in range(50):
        moved = best.detach() + torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert fused_sparse_kl(moved, eye, ids, log_target, **options).choice_score > 1e-4

    start = torch.randn(4, vocab_size, generator=generator, dtype=torch.float64).requires_grad_()
    descend(start, lambda: fused_sparse_kl(start, eye, ids, log_target, **options).loss)
    torch.testing.assert_close(start.detach()[:, :5].softmax(-1), target, atol=1e-4, rtol=0)


def test_refused_weights_and_one_kept_id() -> None:
    problem = make_problem(1, 4, 8, 20, 1, dtype=torch.float64)
    assert problem.fused(brier_weight=1.0, rps_weight=1.0).choice_score == 0
    with pytest.raises(ValueError, match="`rps_weight` must be finite and at least 0, got -1"):
        problem.fused(rps_weight=-1.0)
    empty = dataclasses.replace(
        problem, hidden=problem.hidden[:0], ids=problem.ids[:0], log_target=problem.log_target[:0],
        labels=problem.labels[:0],
    )  # fmt: skip
    assert empty.fused(brier_weight=1.0).loss == 0
