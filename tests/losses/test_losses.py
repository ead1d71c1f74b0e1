"""The fused sparse KL against the float64 reference: value, statistics and every gradient, over random problems."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from first_trl.losses import ESTIMATORS, SparseKLOutput, chunks, fused_sparse_kl, sparse_kl_reference
from tests.support.sparse_kl import Problem, make_problem


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_agrees(problem: Problem, chunk_size: int | None = None, grad_output: float = 0.37) -> None:
    tolerance = TOLERANCE[problem.hidden.dtype]
    output = problem.fused(chunk_size=chunk_size)
    gradients = torch.autograd.grad(output.loss * grad_output, problem.parameters())
    expected, expected_gradients = problem.reference()
    # A divergence is a difference of two entropies: its rounding is relative to those, not to a small remainder.
    magnitude = expected.kl + expected.teacher_entropy + expected.cross_entropy
    for name, value, reference in zip(SparseKLOutput._fields, output, expected, strict=True):
        if value.isnan():
            assert problem.estimator == "renormalized", name
            assert problem.ce_weight == 0 and name in ("cross_entropy", "mass_outside", "num_correct"), name
        elif name == "num_correct" and problem.hidden.dtype == torch.bfloat16:
            assert 0 <= value <= len(problem.ids)  # logits rounded to bfloat16 tie and swap
        else:
            assert (value.double() - reference).abs() <= tolerance * max(reference.abs(), magnitude), name
    for name, gradient, reference in zip(("hidden", "weight", "bias"), gradients, expected_gradients, strict=False):
        assert gradient.isfinite().all(), name
        error = (gradient.double() / grad_output - reference).norm()
        assert error <= tolerance * reference.norm(), (name, float(error / reference.norm()))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, int | None]:
    vocab_size = draw(st.sampled_from([11, 12, 33, 257, 1000, 4099]))
    k = draw(st.integers(1, min(64, vocab_size)))
    estimator = draw(st.sampled_from(ESTIMATORS.builtin))
    problem = make_problem(
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, 6)),
        draw(st.integers(1, 24)),
        vocab_size,
        k,
        estimator,
        padding=draw(st.integers(0, 3)),
        bias=draw(st.booleans()),
        ce_weight=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.125, 1.7])),
        softcap=draw(st.sampled_from([None, 3.0, 30.0])),
        student_temperature=(
            draw(st.sampled_from([None, 0.05, 0.28, 2.0])) if estimator == "probability_softmax" else None
        ),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )
    return problem, draw(st.sampled_from([None, 1, 2, 4]))


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_value_statistics_and_gradients_equal_the_reference(case: tuple[Problem, int | None]) -> None:
    assert_agrees(*case)


@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
@pytest.mark.parametrize("vocab_size", [32_000, 151_936, 152_064])
def test_large_vocabularies(estimator: str, vocab_size: int) -> None:
    assert_agrees(make_problem(0, 3, 8, vocab_size, 64, estimator, ce_weight=0.2, bias=True), chunk_size=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_more_tokens_than_a_chunk_and_than_a_block(
    estimator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of 3 rows within chunks of 32, so that neither divides the number of tokens.
    monkeypatch.setitem(chunks._BLOCK_BYTES, "cpu", 3 * 500 * 4)
    assert_agrees(make_problem(1, 70, 16, 500, 5, estimator, softcap=5.0, dtype=dtype), chunk_size=32)


@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_chunk_size_does_not_change_the_result(estimator: str) -> None:
    problem = make_problem(2, 13, 16, 300, 5, estimator, ce_weight=0.5, dtype=torch.float64)
    whole = problem.fused(chunk_size=13)
    for chunk_size in (1, 4, 12, 100):
        torch.testing.assert_close(tuple(problem.fused(chunk_size=chunk_size)), tuple(whole), rtol=1e-13, atol=1e-13)


# The reference itself, against PyTorch's own dense divergence.


def dense_target(problem: Problem) -> torch.Tensor:
    target = torch.zeros(len(problem.ids), problem.weight.shape[0], dtype=torch.float64)
    return target.scatter_add(1, problem.ids, problem.log_target.double().exp())


@pytest.mark.parametrize("estimator", ["topk", "sampled"])
def test_reference_equals_dense_kl_div(estimator: str) -> None:
    problem = make_problem(3, 6, 8, 40, 7, estimator, padding=2, dtype=torch.float64)
    log_p = (problem.hidden @ problem.weight.t()).log_softmax(-1)
    expected = F.kl_div(log_p, dense_target(problem), reduction="sum")
    torch.testing.assert_close(problem.reference()[0].loss, expected)


def test_reference_bucket_equals_kl_of_k_plus_one_events() -> None:
    problem = make_problem(4, 6, 8, 40, 7, "bucket", dtype=torch.float64)
    assert problem.tail_log_target is not None
    p = (problem.hidden @ problem.weight.t()).softmax(-1)
    kept = p.gather(1, problem.ids)
    events = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], 1)
    target = torch.cat([problem.log_target, problem.tail_log_target[:, None]], 1).double().exp()
    torch.testing.assert_close(problem.reference()[0].loss, F.kl_div(events.log(), target, reduction="sum"))


def test_reference_renormalized_equals_kl_of_the_selected_logits() -> None:
    problem = make_problem(5, 6, 8, 40, 7, "renormalized", dtype=torch.float64)
    log_q = (problem.hidden @ problem.weight.t()).gather(1, problem.ids).log_softmax(-1)
    expected = F.kl_div(log_q, problem.log_target.double(), reduction="sum", log_target=True)
    torch.testing.assert_close(problem.reference()[0].loss, expected)


@pytest.mark.parametrize("temperature", [None, 0.28])
def test_reference_probability_softmax_equals_kl_of_the_softmax_of_probabilities(temperature: float | None) -> None:
    problem = make_problem(5, 6, 8, 40, 7, "probability_softmax", student_temperature=temperature, dtype=torch.float64)
    p = (problem.hidden @ problem.weight.t()).softmax(-1).gather(1, problem.ids)
    log_r = (p / (temperature or 1.0)).log_softmax(-1)
    expected = F.kl_div(log_r, problem.log_target.double(), reduction="sum", log_target=True)
    torch.testing.assert_close(problem.reference()[0].loss, expected)


def test_probability_softmax_by_hand() -> None:
    # p = (.5, .3, .2); softmax of (.5, .3) / .2 is (e, 1) / (e + 1); d loss / d p_1 = (e / (e + 1) - .7) / .2 = .15529,
    # d loss / d p_2 is its negative, and the mean of both under p is .2 * .15529.
    hidden = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    loss = fused_sparse_kl(
        hidden,
        torch.eye(3, dtype=torch.float64),
        torch.tensor([[0, 1]]),
        torch.tensor([[0.7, 0.3]], dtype=torch.float64).log(),
        estimator="probability_softmax",
        student_temperature=0.2,
    ).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.7 * math.log(0.7 / 0.7310586) + 0.3 * math.log(0.3 / 0.2689414), abs=1e-7)
    pull = (0.7310586 - 0.7) / 0.2
    expected = [0.5 * (pull - 0.2 * pull), 0.3 * (-pull - 0.2 * pull), 0.2 * -0.2 * pull]
    assert hidden.grad[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_label_terms_equal_torch_cross_entropy() -> None:
    problem = make_problem(6, 6, 8, 40, 7, ce_weight=1.0, dtype=torch.float64)
    logits = problem.hidden @ problem.weight.t()
    output = problem.fused()
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, problem.labels, reduction="sum"))
    assert output.num_correct == (logits.argmax(-1) == problem.labels).sum()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(output.student_entropy, entropy.detach())


def test_reference_has_second_derivatives() -> None:
    problem = make_problem(7, 2, 4, 11, 3, "bucket", dtype=torch.float64)
    logits = (problem.hidden @ problem.weight.t()).detach().requires_grad_()
    target, tail = problem.log_target.double(), problem.tail_log_target
    assert torch.autograd.gradgradcheck(
        lambda z: sparse_kl_reference(z, problem.ids, target, tail_log_target=tail, estimator="bucket").loss, logits
    )
