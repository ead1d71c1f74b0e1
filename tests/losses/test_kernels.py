"""The Triton kernels, in Triton's interpreter, against the definition in float64: loss, statistics and every gradient."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("triton", reason="triton is not installed")

from first_trl.losses import kernels
from first_trl.losses.tiles import TorchTile, kernel_of
from first_trl.plugins import ESTIMATORS
from tests.benchmarks.logit_traffic import torch_path, triton_path
from tests.support.sparse_kl import make_problem


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FIRST_TRL_KERNEL", "triton")
    # Several blocks a row, and a last one that is not full
    monkeypatch.setattr(kernels, "_BLOCK", 64)


def check(**options) -> None:
    problem = make_problem(**options)
    output = problem.fused()
    output.loss.backward()
    expected, gradients = problem.reference()
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    for name in ("cross_entropy", "student_entropy", "mass_outside", "num_correct"):
        value = getattr(output, name).double()
        if not torch.isnan(value):
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=1e-5)
    for parameter, reference in zip(problem.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.double(), reference, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 6),
    vocab_size=st.integers(7, 400),
    k=st.integers(1, 7),
    padding=st.integers(0, 2),
    estimator=st.sampled_from([name for name in ESTIMATORS.builtin if name != "renormalized"]),
    bias=st.booleans(),
    ce_weight=st.sampled_from([0.0, 0.4, 1.0]),
    logit_scale=st.sampled_from([1.0, 0.5]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_loss_and_gradients(**options):
    check(hidden_size=6, **options)


@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
def test_a_large_vocabulary(estimator, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 4096)
    check(seed=0, tokens=2, hidden_size=4, vocab_size=152_064, k=5, estimator=estimator, ce_weight=0.2, softcap=30.0)


def test_every_token_kept():
    check(seed=1, tokens=3, hidden_size=4, vocab_size=7, k=7, estimator="bucket", ce_weight=0.3)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tile_in_place_is_what_torch_makes_of_it(dtype, bias, softcap):
    generator = torch.Generator().manual_seed(0)
    n, vocab_size, k = 3, 1001, 4
    logits = (4 * torch.randn(n, vocab_size, generator=generator)).to(dtype)
    ids = torch.rand(n, vocab_size, generator=generator).argsort(-1)[:, :k]
    labels = torch.randint(vocab_size, (n,), generator=generator)
    head_bias = torch.randn(vocab_size, generator=generator) if bias else None
    plain = TorchTile(logits.float().clone(), torch.empty(n, vocab_size), head_bias, 0.7, softcap)
    expected = plain.read(ids, labels, entropy=True)
    found = kernels.row_statistics(logits, ids, labels, head_bias, 0.7, softcap)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    on_kept, on_tail = torch.randn(n, k, generator=generator), torch.rand(n, generator=generator)
    target = torch.empty(n, vocab_size)
    plain.write(target, ids, on_kept, on_tail, labels, -0.3)
    kernels.write_gradient(
        logits, logits, ids, on_kept, on_tail, found.tail_max, labels, -0.3, head_bias, 0.7, softcap
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.float(), target, rtol=tolerance, atol=tolerance)


def test_rows_of_a_larger_tile():
    tile = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    part, ids = tile[1:4, :90], torch.tensor([[3, 5]] * 3)
    found = kernels.row_statistics(part, ids)
    assert torch.equal(found.kept_logits, part.gather(1, ids))
    before = tile.clone()
    kernels.write_gradient(part, part, ids, torch.zeros(3, 2), torch.ones(3), found.tail_max)
    assert torch.equal(tile[0], before[0]) and torch.equal(tile[4:], before[4:])
    assert torch.equal(tile[1:4, 90:], before[1:4, 90:])


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="loads are counted in Triton's interpreter")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_logit_is_read_twice_and_written_once(softcap, monkeypatch):
    # A block reads the kept ids too, which the shorter blocks of the other tests would make count
    monkeypatch.setattr(kernels, "_BLOCK", 4096)
    assert triton_path(2, 4096, softcap) == pytest.approx(kernels.BYTES_PER_LOGIT, rel=0.02)
    assert torch_path(2, 4096, softcap) > 5 * kernels.BYTES_PER_LOGIT


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4, 0.0, 5.0], [-torch.inf, 1.0, 2.0, -torch.inf]])
    found = kernels.row_statistics(logits, torch.tensor([[0], [1]]))
    assert torch.isfinite(found.tail_sum).all() and found.tail_max.tolist() == [5.0, 2.0]
    assert torch.isfinite(found.tail_weighted).all()


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "found"),
    [
        ("", "cpu", torch.float32, "torch"),
        ("", "cuda", torch.float32, "triton"),
        ("", "cuda", torch.float64, "torch"),
        ("torch", "cuda", torch.float32, "torch"),
        ("triton", "cpu", torch.float32, "triton"),
    ],
)
def test_what_works_on_a_tile(monkeypatch, asked, device, dtype, found):
    monkeypatch.setenv("FIRST_TRL_KERNEL", asked)
    assert kernel_of(device, dtype) == found


def test_an_unknown_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("FIRST_TRL_KERNEL", "cuda")
    with pytest.raises(ValueError, match="torch or triton"):
        kernel_of("cpu", torch.float32)
