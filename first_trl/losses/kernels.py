"""
Triton kernels for the point-wise half of the sparse KL: what is done to a tile of logits between the two matrix products.

Two visits to each logit, whatever the estimator: [`row_statistics`] reads it once, [`write_gradient`] reads it once more
and writes the gradient in its place. For bfloat16 logits that is 2 + 2 + 2 = 6 bytes a logit, besides what the matrix
products themselves move. Bias, scale and soft cap are applied in registers, in float32; everything per row or per kept
token stays in torch, where the estimators are written.

Runs on CUDA and ROCm, and on any CPU in Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported), where
the tests compare it with the torch path. Loads and stores are counted in `BYTES_PER_LOGIT`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import RowStatistics


# Of 16-bit logits: read by `row_statistics`, read and written by `write_gradient`
BYTES_PER_LOGIT = 2 + 2 + 2
_BLOCK = 4096


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # Triton's interpreter has no tanh of its own; this form does not overflow
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def _transformed(z, columns, mask, bias_ptr, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, ids_ptr, labels_ptr, bias_ptr, scale, softcap,
    kept_ptr, label_out_ptr, max_ptr, sum_ptr, weighted_ptr, vocab_size,
    K: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    ids_ptr += row * K
    for j in tl.static_range(K):
        column = tl.load(ids_ptr + j)
        z = _transformed(tl.load(logits_ptr + column), column, True, bias_ptr, scale, softcap, HAS_BIAS, HAS_CAP)
        tl.store(kept_ptr + row * K + j, z)
    if HAS_LABELS:
        column = tl.load(labels_ptr + row)
        z = _transformed(tl.load(logits_ptr + column), column, True, bias_ptr, scale, softcap, HAS_BIAS, HAS_CAP)
        tl.store(label_out_ptr + row, z)
    lowest = -3.4028234663852886e38
    tail_max = tl.full((), lowest, tl.float32)
    tail_sum = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(logits_ptr + columns, mask=inside, other=0.0)
        z = _transformed(z, columns, inside, bias_ptr, scale, softcap, HAS_BIAS, HAS_CAP)
        for j in tl.static_range(K):
            inside &= columns != tl.load(ids_ptr + j)
        # Finite values where the exponential is 0, so that the product below is 0 and not NaN
        z = tl.maximum(z, lowest)
        new_max = tl.maximum(tail_max, tl.max(tl.where(inside, z, lowest), 0))
        e = tl.where(inside, tl.exp(z - new_max), 0.0)
        shrink = tl.exp(tail_max - new_max)
        tail_sum = tail_sum * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(e * tl.where(inside, z, 0.0), 0)
        tail_max = new_max
    tl.store(max_ptr + row, tail_max)
    tl.store(sum_ptr + row, tail_sum)
    tl.store(weighted_ptr + row, weighted)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, gradient_ptr, gradient_stride, ids_ptr, labels_ptr, bias_ptr, scale, softcap,
    on_kept_ptr, on_tail_ptr, max_ptr, on_label, vocab_size,
    K: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    z = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0)
    z = _transformed(z, columns, inside, bias_ptr, scale, softcap, HAS_BIAS, HAS_CAP)
    # A kept logit may lie far above the tail's largest; its exponential is not used
    g = tl.exp(tl.minimum(z - tl.load(max_ptr + row), 0.0)) * tl.load(on_tail_ptr + row)
    for j in tl.static_range(K):
        g = tl.where(columns == tl.load(ids_ptr + row * K + j), tl.load(on_kept_ptr + row * K + j), g)
    if HAS_LABELS:
        g = tl.where(columns == tl.load(labels_ptr + row), g + on_label, g)
    if HAS_CAP:
        capped = z / softcap
        g *= 1.0 - capped * capped
    g *= scale
    tl.store(gradient_ptr + row * gradient_stride + columns, g.to(gradient_ptr.dtype.element_ty), mask=inside)


def row_statistics(
    logits: torch.Tensor,
    ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> RowStatistics:
    """
    One read of a tile of logits: what lies at the kept ids and the labels, and the sums over all else.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): Raw products of hidden states and head; any floating type.
        ids (`torch.Tensor` of shape `(n, k)`, int64): Kept ids, below `V`; repeated ids are harmless.
        labels (`torch.Tensor` of shape `(n,)`, int64, *optional*): Labels, below `V`.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Added first.
        scale (`float`): Multiplies next.
        softcap (`float`, *optional*): `softcap * tanh(z / softcap)` last.

    Returns:
        [`RowStatistics`]
    """
    n, vocab_size = logits.shape
    k = ids.shape[1]
    kept = torch.empty((n, k), dtype=torch.float32, device=logits.device)
    label_logits, tail_max, tail_sum, weighted = (
        torch.empty((n,), dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    if n:
        _statistics_kernel[(n,)](
            logits, logits.stride(0), ids.contiguous(), ids if labels is None else labels.contiguous(),
            logits if bias is None else bias, scale, 1.0 if softcap is None else softcap,
            kept, label_logits, tail_max, tail_sum, weighted, vocab_size,
            K=k, HAS_LABELS=labels is not None, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None,
            BLOCK=_block(vocab_size), **_warps(),
        )  # fmt: skip
    return RowStatistics(kept, None if labels is None else label_logits, tail_max, tail_sum, weighted)


def write_gradient(
    logits: torch.Tensor,
    gradient: torch.Tensor,
    ids: torch.Tensor,
    on_kept: torch.Tensor,
    on_tail: torch.Tensor,
    tail_max: torch.Tensor,
    labels: torch.Tensor | None = None,
    on_label: float = 0.0,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """
    The gradient of the raw logits: `on_kept` at the kept ids, `on_tail * exp(logit - tail_max)` elsewhere, `on_label` added
    at the label, times the derivative of soft cap and scale.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): As [`row_statistics`] read them.
        gradient (`torch.Tensor` of shape `(n, V)`): Where to write; may be `logits` itself.
        ids (`torch.Tensor` of shape `(n, k)`, int64): Kept ids; repeated ids must bring the same value.
        on_kept (`torch.Tensor` of shape `(n, k)`, float32), on_tail (`torch.Tensor` of shape `(n,)`, float32):
            Gradients by the transformed logits.
        tail_max (`torch.Tensor` of shape `(n,)`, float32): Of [`RowStatistics`].
        labels (`torch.Tensor` of shape `(n,)`, int64, *optional*), on_label (`float`): Added at the label.
        bias, scale, softcap: As in [`row_statistics`].
    """
    n, vocab_size = logits.shape
    if not n:
        return
    block = _block(vocab_size)
    _gradient_kernel[(n, triton.cdiv(vocab_size, block))](
        logits, logits.stride(0), gradient, gradient.stride(0), ids.contiguous(),
        ids if labels is None else labels.contiguous(), logits if bias is None else bias,
        scale, 1.0 if softcap is None else softcap,
        on_kept.float().contiguous(), on_tail.float().contiguous(), tail_max, on_label, vocab_size,
        K=ids.shape[1], HAS_LABELS=labels is not None, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None,
        BLOCK=block, **_warps(),
    )  # fmt: skip


class TritonTile:
    """A [`~first_trl.losses.tiles.Tile`] that the kernels read twice and write once."""

    def __init__(self, logits: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None) -> None:
        self.logits = logits
        self.head: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap}
        self.tail_max = logits

    def read(self, ids: torch.Tensor, labels: torch.Tensor | None, *, entropy: bool) -> RowStatistics:
        found = row_statistics(self.logits, ids, labels, **self.head)
        self.tail_max = found.tail_max
        return found

    def write(
        self,
        gradient: torch.Tensor,
        ids: torch.Tensor,
        on_kept: torch.Tensor,
        on_tail: torch.Tensor,
        labels: torch.Tensor | None,
        on_label: float,
    ) -> None:
        write_gradient(self.logits, gradient, ids, on_kept, on_tail, self.tail_max, labels, on_label, **self.head)


def _block(vocab_size: int) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(vocab_size)))


def _warps() -> dict[str, Any]:
    return {"num_warps": 8}
