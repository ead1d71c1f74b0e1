"""What each estimator minimises, and how its gradient relates to the full KL, through the fused loss."""

from typing import Any

import pytest
import torch
from scipy.stats import norm

from first_trl.losses import fused_sparse_kl
from tests.support.sparse_kl import descend


def loss_and_gradient(logits: torch.Tensor, ids: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    """The fused loss on given logits, by way of an identity head."""
    leaf = logits.detach().clone().requires_grad_()
    output = fused_sparse_kl(leaf, torch.eye(logits.shape[1], dtype=logits.dtype), ids, target, **kwargs)
    output.loss.backward()
    return output, leaf.grad


def teacher(vocab_size: int = 12, seed: int = 0) -> torch.Tensor:
    """Probabilities, sorted downwards, so that the top-k ids are 0 .. k-1."""
    logits = 1.5 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(-1).sort(descending=True).values


def minimise(ids: torch.Tensor, target: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    eye = torch.eye(vocab_size, dtype=torch.float64)
    descend(logits, lambda: fused_sparse_kl(logits, eye, ids, target, **kwargs).loss)
    return logits.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized", "sampled"])
def test_student_equal_to_teacher_with_every_token_kept_gives_zero(estimator: str, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(8, 40, generator=torch.Generator().manual_seed(0), dtype=dtype)
    order = torch.rand(8, 40, generator=torch.Generator().manual_seed(1)).argsort(-1)
    kwargs = {"tail_log_target": torch.full((8,), -torch.inf)} if estimator == "bucket" else {}
    output, gradient = loss_and_gradient(
        logits, order, logits.log_softmax(-1).gather(1, order), estimator=estimator, **kwargs
    )
    assert output.loss.abs() / 8 < 1e-6
    assert gradient.abs().max() < 1e-6


def test_optimum_of_topk_is_the_renormalised_head_without_a_tail() -> None:
    t = teacher()
    ids = torch.arange(4)[None]
    head = t[:4] / t[:4].sum()
    p = minimise(ids, head.log()[None], 12).softmax(-1)[0]
    torch.testing.assert_close(p[:4], head, rtol=1e-4, atol=1e-4)
    assert p[4:].sum() < 1e-4


def test_optimum_of_bucket_is_exact_on_the_head_and_on_the_tail_total() -> None:
    t = teacher()
    ids = torch.arange(4)[None]
    kwargs = {"estimator": "bucket", "tail_log_target": t[4:].sum().log()[None]}
    logits = minimise(ids, t[:4].log()[None], 12, **kwargs)
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(p[:4], t[:4], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(p[4:].sum(), t[4:].sum(), rtol=1e-6, atol=1e-8)
    # The shape of the tail is free: it is not the teacher's.
    assert (p[4:] - t[4:]).abs().max() > 1e-3


def test_optimum_of_renormalized_fixes_ratios_and_leaves_the_tail_mass_free() -> None:
    t = teacher()
    ids = torch.arange(4)[None]
    head = t[:4] / t[:4].sum()
    logits = minimise(ids, head.log()[None], 12, estimator="renormalized")
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(p[:4] / p[:4].sum(), head, rtol=1e-6, atol=1e-8)
    logits[:, 4:] += 3.0
    output, gradient = loss_and_gradient(logits, ids, head.log()[None], estimator="renormalized")
    assert output.loss.abs() < 1e-9
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("teacher_temperature", "student_temperature"), [(0.28, 0.28), (0.5, 0.4), (0.5, 0.7)])
def test_optimum_of_probability_softmax_is_the_raw_teacher_up_to_a_constant_and_a_factor(
    teacher_temperature: float, student_temperature: float
) -> None:
    q = teacher()[:4]
    ids = torch.arange(4)[None]
    target = (q / teacher_temperature).log_softmax(-1)
    kwargs = {"estimator": "probability_softmax", "student_temperature": student_temperature}
    output, _ = loss_and_gradient(logits := minimise(ids, target[None], 12, **kwargs), ids, target[None], **kwargs)
    assert output.loss.abs() < 1e-9
    difference = logits.softmax(-1)[0, :4] / student_temperature - q / teacher_temperature
    torch.testing.assert_close(difference, difference.mean().expand(4), rtol=0, atol=1e-4)
    # That is not the recalibrated target.
    assert (logits.softmax(-1)[0, :4] - target.exp()).abs().max() > 1e-2


def test_optimum_of_probability_softmax_is_one_hot_where_the_differences_asked_for_exceed_one() -> None:
    q = teacher()[:4]
    assert (q[0] - q[1]) / 0.28 > 1  # what c = 0.28 asks of a student at temperature 1
    target = (q / 0.28).log_softmax(-1)
    logits = minimise(torch.arange(4)[None], target[None], 12, estimator="probability_softmax")
    assert logits.softmax(-1)[0, 0] > 0.999 and target[0].exp() < 0.6


def test_probability_softmax_at_the_teacher_with_equal_temperatures_is_a_fixed_point() -> None:
    q = teacher()
    ids = torch.arange(4)[None]
    for temperature in (0.1, 0.28, 1.0):
        output, gradient = loss_and_gradient(
            q.log()[None],
            ids,
            (q[:4] / temperature).log_softmax(-1)[None],
            estimator="probability_softmax",
            student_temperature=temperature,
        )
        assert output.loss.abs() < 1e-12 and gradient.abs().max() < 1e-12


def test_optimum_of_sampled_over_many_draws_is_the_teacher() -> None:
    t = teacher()
    draws = torch.multinomial(t, 4000 * 8, replacement=True, generator=torch.Generator().manual_seed(2)).view(4000, 8)
    ids, log_share = distinct_draws(draws, 12)
    mean_share = torch.zeros(12, dtype=torch.float64)
    mean_share.scatter_add_(0, ids.flatten(), log_share.exp().flatten()).div_(4000)
    logits = t.log().expand(4000, -1)
    _, gradient = loss_and_gradient(logits, ids, log_share, estimator="sampled")
    # At the teacher the mean gradient is the sampling noise of the shares alone.
    torch.testing.assert_close(gradient.mean(0), t - mean_share, rtol=0, atol=1e-12)
    assert gradient.mean(0).abs().max() < 4 * (t * (1 - t) / 32_000).sqrt().max()


def distinct_draws(draws: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids per row and the log of their share of the draws; padding repeats id 0 with -inf."""
    counts = torch.zeros(len(draws), vocab_size, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(draws.shape, dtype=torch.float64)
    )
    top = counts.topk(min(draws.shape[1], vocab_size), -1)
    return top.indices.masked_fill(top.values == 0, 0), (top.values / draws.shape[1]).log()


def within_interval(mean: torch.Tensor, expected: torch.Tensor, samples: torch.Tensor) -> bool:
    """Whether every coordinate lies in the simultaneous (Bonferroni) 99% interval of the mean of `samples`."""
    radius = norm.ppf(1 - 0.01 / (2 * len(expected))) * samples.std(0) / len(samples) ** 0.5
    return bool(((mean - expected).abs() <= radius).all())


def test_sampled_is_unbiased_for_the_full_kl_and_topk_is_not() -> None:
    num_draws, repeats, vocab_size = 8, 2000, 12
    t = teacher(vocab_size)
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    full = logits.softmax(-1) - t
    draws = torch.multinomial(
        t.expand(repeats, -1), num_draws, replacement=True, generator=torch.Generator().manual_seed(4)
    )
    ids, log_share = distinct_draws(draws, vocab_size)
    _, sampled = loss_and_gradient(logits.expand(repeats, -1), ids, log_share, estimator="sampled")
    assert within_interval(sampled.mean(0), full, sampled)

    # Even with as many kept ids as there are draws.
    head = t[:num_draws] / t[:num_draws].sum()
    _, topk = loss_and_gradient(logits[None], torch.arange(num_draws)[None], head.log()[None])
    assert not within_interval(topk[0], full, sampled)


def test_sampled_value_is_cross_entropy_minus_the_entropy_of_the_draws() -> None:
    t = teacher()
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = torch.multinomial(t.expand(4000, -1), 6, replacement=True, generator=torch.Generator().manual_seed(5))
    ids, log_share = distinct_draws(draws, 12)
    output, _ = loss_and_gradient(logits.expand(4000, -1), ids, log_share, estimator="sampled")
    log_p = logits.log_softmax(-1)
    per_row = -log_p[draws].mean(1)
    torch.testing.assert_close(output.kl + output.teacher_entropy, per_row.sum())
    full_kl = (t * (t.log() - log_p)).sum()
    assert output.kl / 4000 > full_kl + 0.1  # too large by the entropy the draws lack
    cross_entropy = -(t * log_p).sum()
    assert (per_row.mean() - cross_entropy).abs() < 2.6 * per_row.std() / 4000**0.5


@pytest.mark.parametrize("student_tail", [0.5, 1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("teacher_tail", [0.3, 1e-4, 1e-7])
def test_bucket_gradient_is_p_minus_t_on_the_head_and_p_times_a_minus_P_over_1_minus_P_on_the_tail(
    student_tail: float, teacher_tail: float
) -> None:
    generator = torch.Generator().manual_seed(6)
    head = torch.randn(5, generator=generator, dtype=torch.float64).softmax(-1) * (1 - teacher_tail)
    logits = torch.cat(
        [
            torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1),
            torch.randn(1000, generator=generator, dtype=torch.float64).log_softmax(-1)
            + torch.tensor(student_tail / (1 - student_tail), dtype=torch.float64).log(),
        ]
    )
    logits = logits.float().double()  # what the float32 loss sees
    p = logits.softmax(-1)
    p_tail = p[5:].sum()
    a = 1 - teacher_tail
    expected_tail = p[5:] * (a - (1 - p_tail)) / p_tail
    tail_log_target = torch.tensor([teacher_tail], dtype=torch.float64).log()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-5)):
        output, gradient = loss_and_gradient(
            logits[None].to(dtype),
            torch.arange(5)[None],
            head.log()[None].to(dtype),
            estimator="bucket",
            tail_log_target=tail_log_target.to(dtype),
        )
        torch.testing.assert_close(gradient[0, :5].double(), p[:5] - head, rtol=tolerance, atol=2e-7)
        # Relative to the two terms that the tail gradient is the difference of.
        scale = p[5:] * max(1.0, teacher_tail / student_tail)
        assert ((gradient[0, 5:].double() - expected_tail).abs() <= tolerance * scale).all()
        assert (output.mass_outside.double() - p_tail).abs() <= tolerance * p_tail
        kl = (head * (head / p[:5]).log()).sum() + teacher_tail * (teacher_tail / p_tail).log()
        assert (output.kl.double() - kl).abs() <= max(1e-6, tolerance * kl.abs())


def test_bucket_stays_finite_and_pulls_where_the_student_has_no_tail_left() -> None:
    # 200 nats below the head: exp underflows float32, and 1 - P is exactly 0 in float64 too.
    logits = torch.zeros(1, 10)
    logits[:, 3:] = -200.0
    target = torch.tensor([[0.3, 0.3, 0.3]]).log()
    output, gradient = loss_and_gradient(
        logits, torch.tensor([[0, 1, 2]]), target, estimator="bucket", tail_log_target=torch.tensor([0.1]).log()
    )
    assert output.loss.isfinite() and output.loss > 0.1 * 190
    torch.testing.assert_close(gradient[0, 3:], torch.full((7,), -0.1 / 7))


def test_bucket_with_an_empty_teacher_tail_equals_topk() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    ids = torch.rand(4, 30, generator=torch.Generator().manual_seed(9)).argsort(-1)[:, :5]
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(10), dtype=torch.float64).log_softmax(-1)
    topk, topk_gradient = loss_and_gradient(logits, ids, target)
    bucket, bucket_gradient = loss_and_gradient(
        logits, ids, target, estimator="bucket", tail_log_target=torch.full((4,), -torch.inf)
    )
    torch.testing.assert_close(tuple(bucket), tuple(topk), equal_nan=True)
    torch.testing.assert_close(bucket_gradient, topk_gradient)
