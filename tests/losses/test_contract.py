"""What the fused loss refuses, and what it promises about memory, grad modes, autocast and empty batches."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from first_trl.losses import ESTIMATORS, check_targets, default_chunk_size, fused_sparse_kl
from tests.support.sparse_kl import make_problem


@pytest.fixture
def arguments() -> dict[str, Any]:
    log_target = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]).log()
    return {
        "hidden": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
        "weight": torch.randn(11, 4, generator=torch.Generator().manual_seed(1)),
        "ids": torch.tensor([[3, 1, 7], [10, 0, 2]]),
        "log_target": log_target,
    }


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"estimator": "top_k"},
            r"Unknown estimator 'top_k'.*'topk', 'bucket', 'renormalized', 'sampled', 'probability_softmax'",
        ),
        ({"ce_weight": 1.5}, r"`ce_weight` must lie in \[0, 1\], got 1.5"),
        ({"ce_weight": NAN}, r"`ce_weight` must lie in \[0, 1\], got nan"),
        ({"ce_weight": 0.5}, r"pass `labels`, or set `ce_weight=0`"),
        ({"student_temperature": 0.3}, r"`student_temperature=0.3` has no effect with estimator='topk'"),
        (
            {"estimator": "probability_softmax", "student_temperature": 0.0},
            r"`student_temperature` must be finite and above 0, got 0.0",
        ),
        ({"estimator": "probability_softmax", "student_temperature": NAN}, r"must be finite and above 0, got nan"),
        ({"estimator": "bucket"}, r"'bucket' estimator needs `tail_log_target`"),
        ({"tail_log_target": torch.zeros(2)}, r"`tail_log_target` has no place in the 'topk' estimator"),
        ({"ids": torch.tensor([[3, 1, 7], [10, 0, 11]])}, r"Row 1: ids \[10, 0, 11\] leave the vocabulary \[0, 11\)"),
        ({"ids": torch.tensor([[3, -1, 7], [10, 0, 2]])}, r"Row 0: ids \[3, -1, 7\] leave the vocabulary"),
        ({"ids": torch.tensor([[3, 1, 7], [2, 0, 2]])}, r"Row 1: ids \[2, 0, 2\] hold a token twice"),
        ({"ids": torch.tensor([[3, 1], [2, 0]])}, r"must share one shape \(N, k\)"),
        ({"ids": torch.zeros(2, 0, dtype=torch.long), "log_target": torch.zeros(2, 0)}, r"with k >= 1"),
        ({"ids": torch.tensor([[3, 1, 7], [10, 0, 2]], dtype=torch.int32)}, r"`ids` must be int64"),
        ({"log_target": torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.2]]).log()}, r"Row 1: the target mass is 1.1"),
        ({"log_target": torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, NAN]]).log()}, r"Row 1: the target mass is nan"),
        ({"log_target": torch.full((2, 3), -torch.inf)}, r"Row 0: the target mass is 0 instead of 1"),
        ({"labels": torch.tensor([1, -100])}, r"Row 1: label -100 leaves the vocabulary .* supervised positions only"),
        ({"labels": torch.tensor([1, 11])}, r"Row 1: label 11 leaves the vocabulary"),
        ({"labels": torch.tensor([1])}, r"`labels` must have shape \(2,\)"),
        ({"labels": torch.tensor([1.0, 2.0])}, r"`labels` must be int64"),
        ({"hidden": torch.randn(3, 4)}, r"`hidden` has 3 rows and `ids` 2"),
        ({"hidden": torch.randn(1, 2, 4)}, r"`hidden` must be \(N, H\)"),
        ({"weight": torch.randn(11, 5)}, r"`hidden` must be \(N, H\) and `weight` \(V, H\)"),
        ({"weight": torch.randn(0)}, r"gather a sharded head"),
        ({"weight": torch.ones(11, 4, dtype=torch.uint8)}, r"`weight` has type torch.uint8: a quantised head"),
        ({"weight": torch.randn(11, 4).bfloat16()}, r"`weight` is torch.bfloat16 and `hidden` is torch.float32"),
        ({"weight": torch.randn(11, 4, device="meta")}, r"`weight` is on meta and `hidden` on cpu"),
        ({"bias": torch.randn(10)}, r"`bias` must have shape \(11,\)"),
        ({"final_logit_softcapping": 0.0}, r"`final_logit_softcapping` must be positive"),
        ({"chunk_size": 0}, r"`chunk_size` must be at least 1"),
    ],
)
def test_refusals(arguments: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_sparse_kl(**(arguments | change))


def test_a_tail_beside_a_complete_vocabulary_is_refused() -> None:
    log_target, tail = torch.tensor([[0.5, 0.4]]).log(), torch.tensor([0.1]).log()
    with pytest.raises(ValueError, match=r"Row 0: all 2 tokens are kept"):
        check_targets(torch.tensor([[1, 0]]), log_target, 2, tail_log_target=tail)


def test_padding_may_repeat_an_id_and_does_not_count_as_kept(arguments: dict[str, Any]) -> None:
    padded = arguments | {
        "ids": torch.tensor([[3, 1, 3, 3], [10, 0, 2, 10]]),
        "log_target": torch.tensor([[0.6, 0.4, 0, 0], [0.6, 0.3, 0.1, 0]]).log(),
    }
    short = fused_sparse_kl(
        arguments["hidden"][:1], arguments["weight"], padded["ids"][:1, :2], padded["log_target"][:1, :2]
    )
    full = fused_sparse_kl(
        arguments["hidden"][1:], arguments["weight"], padded["ids"][1:, :3], padded["log_target"][1:, :3]
    )
    output = fused_sparse_kl(**padded)
    torch.testing.assert_close(output.loss, short.loss + full.loss)
    torch.testing.assert_close(output.mass_outside, short.mass_outside + full.mass_outside)


def test_the_second_derivative_is_refused() -> None:
    problem = make_problem(0, 3, 4, 11, 3)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*sparse_kl_reference"):
        torch.autograd.grad(problem.fused().loss, problem.hidden, create_graph=True)


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice() -> None:
    loss = make_problem(0, 3, 4, 11, 3).fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass and keeps no copy"):
        loss.backward()


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_an_empty_batch_is_a_differentiable_zero(estimator: str, ce_weight: float) -> None:
    problem = make_problem(0, 0, 4, 11, 3, estimator, bias=True, ce_weight=ce_weight)
    output = problem.fused()
    (output.loss / 8).backward()
    assert [float(value) for value in output] == [0.0] * len(output)
    for parameter in problem.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


def test_statistics_are_detached_float32_scalars() -> None:
    output = make_problem(0, 3, 4, 11, 3, dtype=torch.bfloat16).fused()
    for value in output:
        assert value.dtype == torch.float32 and value.shape == ()
    assert [value.requires_grad for value in output] == [True] + [False] * 8
    assert output.num_tokens == 3


def test_metrics_can_be_left_out_and_labels_too(arguments: dict[str, Any]) -> None:
    output = fused_sparse_kl(**arguments, metrics=False)
    assert output.student_entropy.isnan() and output.cross_entropy.isnan() and output.num_correct.isnan()
    assert output.kl.isfinite() and output.mass_outside.isfinite()


def test_renormalized_projects_only_where_something_asks_for_it() -> None:
    problem = make_problem(0, 4, 8, 50, 3, "renormalized")
    training = problem.fused()
    assert training.cross_entropy.isnan() and training.mass_outside.isnan() and training.num_correct.isnan()
    with torch.no_grad():
        evaluation = problem.fused()
    torch.testing.assert_close(evaluation.loss, training.loss.detach())
    assert 0 < evaluation.mass_outside < 4 and evaluation.cross_entropy.isfinite()


class Recorder(TorchDispatchMode):
    """Largest new tensor, and whether one of a given shape was made, in everything that runs below."""

    def __init__(self, shape: torch.Size, known: set[int]) -> None:
        super().__init__()
        self.largest, self.shape, self.known, self.made = 0, shape, known, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
                self.made |= tensor.shape == self.shape
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
@pytest.mark.parametrize("mode", ["trainable", "frozen", "no_grad"])
def test_no_dense_logits_and_no_gradient_buffer_that_nobody_needs(
    estimator: str, mode: str, dtype: torch.dtype
) -> None:
    tokens, vocab_size, hidden_size, chunk_size = 100, 9000, 8, 16
    problem = make_problem(0, tokens, hidden_size, vocab_size, 4, estimator, dtype=dtype)
    problem.weight.requires_grad_(mode == "trainable")
    known = {x.untyped_storage().data_ptr() for x in (problem.hidden, problem.weight)}
    recorder = Recorder(problem.weight.shape, known)
    with recorder, torch.set_grad_enabled(mode != "no_grad"):
        output = problem.fused(chunk_size=chunk_size)
        if mode != "no_grad":
            output.loss.backward()
    assert 0 < recorder.largest <= max(chunk_size * vocab_size, tokens * 4 * hidden_size)
    assert recorder.made == (mode == "trainable")
    assert output.loss.requires_grad == (mode != "no_grad")


def test_frozen_hidden_states_still_train_the_head() -> None:
    problem = make_problem(0, 5, 8, 50, 3, bias=True)
    _, (_, *expected) = problem.reference()
    problem.hidden.requires_grad_(False)
    problem.fused().loss.backward()
    assert problem.hidden.grad is None
    for parameter, reference in zip(problem.parameters()[1:], expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_with_rounded_inputs_and_returns_full_gradients(dtype: torch.dtype, estimator: str) -> None:
    problem = make_problem(0, 5, 8, 50, 3, estimator, bias=True, ce_weight=0.3)
    with torch.autocast("cpu", dtype=dtype):
        output = problem.fused()
    output.loss.backward()
    expected, gradients = problem.reference()
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-2, atol=0)
    for parameter, reference in zip(problem.parameters(), gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert (parameter.grad - reference).norm() < 1e-2 * reference.norm()
    assert abs(output.loss.item() - expected.loss.item()) > 1e-6  # it did round


def test_float16_gradients_of_improbable_tokens_do_not_vanish() -> None:
    # Each tail token has a probability near 1e-9, below the smallest float16.
    hidden = torch.zeros(1, 4, dtype=torch.float16)
    hidden[0, 0] = 1.0
    weight = torch.zeros(500, 4, dtype=torch.float16)
    weight[0, 0], weight[1:, 0], weight[1:, 1] = 21.0, 0.0, 8.0
    hidden.requires_grad_()
    output = fused_sparse_kl(hidden, weight, torch.tensor([[0]]), torch.zeros(1, 1))
    (output.loss * 2.0**16).backward()  # as a gradient scaler does
    z = hidden.detach().double() @ weight.double().t()
    expected = (z.softmax(-1)[:, 1:].sum() * 8.0) * 2**16
    torch.testing.assert_close(hidden.grad[0, 1].double(), expected, rtol=2e-3, atol=0)


def test_default_chunk_size_follows_the_vocabulary() -> None:
    assert default_chunk_size(151_936) == 256
    assert default_chunk_size(151_936, "cuda") > 1000
    assert default_chunk_size(32_000) > 1000
    assert default_chunk_size(11) == 4096
    assert default_chunk_size(10**9) == 32


@pytest.mark.parametrize("estimator", ESTIMATORS.builtin)
def test_nan_hidden_states_give_a_nan_loss(estimator: str) -> None:
    problem = make_problem(0, 3, 4, 11, 3, estimator)
    with torch.no_grad():
        problem.hidden[1, 2] = NAN
    output = problem.fused()
    output.loss.backward()
    assert output.loss.isnan() and problem.hidden.grad[1].isnan().any() and problem.hidden.grad[0].isfinite().all()


def test_a_compiled_caller_gets_the_same_result() -> None:
    problem = make_problem(0, 5, 8, 50, 3)
    expected, (expected_gradient, _) = problem.reference()

    @torch.compile(backend="eager")
    def model(hidden: torch.Tensor) -> torch.Tensor:
        return 2 * fused_sparse_kl(hidden / 2 * 2, problem.weight, problem.ids, problem.log_target).loss

    hidden = problem.hidden.detach().clone().requires_grad_()
    loss = model(hidden)
    loss.backward()
    torch.testing.assert_close(loss.double(), 2 * expected.loss, rtol=1e-5, atol=0)
    assert (hidden.grad / 2 - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
