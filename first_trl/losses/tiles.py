"""The point-wise half of the sparse KL on a tile of logits, in torch or by Triton kernels: read the rows, write the gradient."""

import os
from typing import NamedTuple, Protocol

import torch


class RowStatistics(NamedTuple):
    """
    What the rows of a tile say, after bias, scale and soft cap.

    Attributes:
        kept_logits (`torch.Tensor` of shape `(n, k)`): Logits at the kept ids.
        label_logits (`torch.Tensor` of shape `(n,)` or `None`): Logits at the labels.
        tail_max (`torch.Tensor` of shape `(n,)`): Largest logit outside the kept ids; the smallest number when there is
            none.
        tail_sum (`torch.Tensor` of shape `(n,)`): Sum over the tail of `exp(logit - tail_max)`.
        tail_weighted (`torch.Tensor` of shape `(n,)` or `None`): Sum over the tail of `exp(logit - tail_max) * logit`.
    """

    kept_logits: torch.Tensor
    label_logits: torch.Tensor | None
    tail_max: torch.Tensor
    tail_sum: torch.Tensor
    tail_weighted: torch.Tensor | None


class Tile(Protocol):
    """Some rows of raw logits."""

    def read(self, ids: torch.Tensor, labels: torch.Tensor | None, *, entropy: bool) -> RowStatistics:
        """
        Statistics of the rows; the kept ids are taken out before the maximum and the sum: what remains is the tail, so its
        logsumexp is exact however small the tail is, where `log(1 - P)` would be noise.
        """
        ...

    def write(
        self,
        gradient: torch.Tensor,
        ids: torch.Tensor,
        on_kept: torch.Tensor,
        on_tail: torch.Tensor,
        labels: torch.Tensor | None,
        on_label: float,
    ) -> None:
        """
        The gradient of the raw logits: `on_kept` at the kept ids, `on_tail * exp(logit - tail_max)` elsewhere, `on_label`
        added at the label, times the derivative of soft cap and scale. `gradient` may be the tile itself.
        """
        ...


def kernel_of(device_type: str, dtype: torch.dtype) -> str:
    """
    `"triton"` or `"torch"`: what works on the tiles. Triton on GPUs that have it, torch elsewhere and for float64; the
    environment variable `FIRST_TRL_KERNEL` overrides.

    Raises:
        `ValueError`: `FIRST_TRL_KERNEL` is neither, or asks for Triton where it is not installed.
    """
    asked = os.environ.get("FIRST_TRL_KERNEL", "")
    if asked not in ("", "torch", "triton"):
        raise ValueError(f"FIRST_TRL_KERNEL must be torch or triton, got {asked!r}.")
    if dtype == torch.float64 or asked == "torch" or (not asked and device_type != "cuda"):
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        if asked:
            raise ValueError("FIRST_TRL_KERNEL=triton, and triton is not installed: pip install triton.") from None
        return "torch"
    return "triton"


class TorchTile:
    """
    Args:
        logits (`torch.Tensor` of shape `(n, V)`): Overwritten.
        work (`torch.Tensor` of shape `(n, V)`): Room for as many numbers.
        bias, scale, softcap: Of the head.
    """

    def __init__(
        self, logits: torch.Tensor, work: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
    ) -> None:
        self.logits, self.work = logits, work
        self.bias, self.scale, self.softcap = bias, scale, softcap
        self.kept_logits = logits

    def read(self, ids: torch.Tensor, labels: torch.Tensor | None, *, entropy: bool) -> RowStatistics:
        logits = self.logits
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        self.kept_logits = logits.gather(1, ids)
        label_logits = None if labels is None else logits.gather(1, labels[:, None])[:, 0]
        logits.scatter_(1, ids, -torch.inf)
        # The clamp is for rows without a tail (every token kept), whose maximum is -inf
        tail_max = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        exponentials = torch.sub(logits, tail_max[:, None], out=self.work).exp_()
        tail_sum, weighted = exponentials.sum(-1), None
        if entropy:
            # Finite values where the exponential is 0, so that the product is 0 and not NaN
            logits.scatter_(1, ids, self.kept_logits)
            product = logits * self.work if self.softcap is not None else logits.mul_(self.work)
            weighted = product.sum(-1)
        return RowStatistics(self.kept_logits, label_logits, tail_max, tail_sum, weighted)

    def write(
        self,
        gradient: torch.Tensor,
        ids: torch.Tensor,
        on_kept: torch.Tensor,
        on_tail: torch.Tensor,
        labels: torch.Tensor | None,
        on_label: float,
    ) -> None:
        exponentials = self.work
        exponentials.mul_(on_tail[:, None])
        exponentials.scatter_(1, ids, on_kept)
        if labels is not None:
            exponentials.scatter_add_(1, labels[:, None], exponentials.new_full((), on_label).expand(ids.shape[0], 1))
        if self.softcap is not None:
            self.logits.scatter_(1, ids, self.kept_logits)
            exponentials.mul_(self.logits.div_(self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            exponentials.mul_(self.scale)
        gradient.copy_(exponentials)
