"""The three matrix products with the head, each accumulated in float32 (float64 for float64 inputs)."""

import torch


# Outside CUDA there is no product of half types into float32: the head is widened this many rows at a time.
_WIDENED_ROWS = 8192
# CPU kernels for few rows add up the vocabulary one token after another, which costs two digits at V = 151,936. Below
# this many rows it is summed in pieces.
_FEW_ROWS = 64
_PIECE = 1024


class HeadProducts:
    """
    Products of a chunk of tokens with a head.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head.
        compute_dtype (`torch.dtype`):
            Type that hidden states and head are rounded to, as the model's own projection rounds them.
        dtype (`torch.dtype`):
            Type of the results.

    Attributes:
        operand_dtype (`torch.dtype`):
            Type that the products take their left-hand side in: `compute_dtype` on a GPU, whose products of half types
            have float32 results; `dtype` elsewhere.
    """

    def __init__(self, weight: torch.Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> None:
        on_cuda = weight.device.type == "cuda"
        self.compute_dtype = compute_dtype
        self.dtype = dtype
        self.operand_dtype = compute_dtype if on_cuda else dtype
        self.weight = weight.to(compute_dtype) if on_cuda else weight
        self.few_rows = 0 if on_cuda else _FEW_ROWS
        self.widen = not on_cuda and not weight.dtype == compute_dtype == dtype

    def _head(self, start: int, end: int) -> torch.Tensor:
        return self.weight[start:end].to(self.compute_dtype).to(self.dtype)

    def _pieces(self, size: int) -> list[tuple[int, int]]:
        vocab_size = self.weight.shape[0]
        return [(start, min(start + size, vocab_size)) for start in range(0, vocab_size, size)]

    def project(self, chunk: torch.Tensor, out: torch.Tensor) -> None:
        """`out = chunk @ weight.T`, in the type of `out`: that of the results, or that of the operands."""
        if self.widen:
            for start, end in self._pieces(_WIDENED_ROWS):
                torch.mm(chunk, self._head(start, end).t(), out=out[:, start:end])
        elif self.operand_dtype == out.dtype:
            torch.mm(chunk, self.weight.t(), out=out)
        else:
            torch.mm(chunk, self.weight.t(), out_dtype=self.dtype, out=out)

    def back_to_hidden(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """`out = gradient @ weight`"""
        if self.widen or gradient.shape[0] < self.few_rows:
            out.zero_()
            for start, end in self._pieces(_PIECE if gradient.shape[0] < self.few_rows else _WIDENED_ROWS):
                out.add_(gradient[:, start:end] @ self._head(start, end))
        elif self.operand_dtype == self.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            torch.mm(gradient, self.weight, out_dtype=self.dtype, out=out)

    def back_to_weight(
        self, gradient: torch.Tensor, chunk: torch.Tensor, out: torch.Tensor, *, accumulate: bool
    ) -> None:
        """`out = gradient.T @ chunk`, or `+=`"""
        if self.operand_dtype == self.dtype:
            torch.addmm(out, gradient.t(), chunk, beta=1.0 if accumulate else 0.0, out=out)
        elif accumulate:
            torch.addmm(out, gradient.t(), chunk, out_dtype=self.dtype, out=out)
        else:
            torch.mm(gradient.t(), chunk, out_dtype=self.dtype, out=out)
