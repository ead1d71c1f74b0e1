"""
The sparse KL estimators fused with the head's projection: time and memory of the matrix products, little else.

Tokens are visited once, a chunk at a time: project, normalise, turn the logits into their gradient in place, multiply
back. Nothing of size `[N, V]` exists at any moment and nothing is computed twice.
"""

from typing import Any

import torch

from .choice_scores import ChoiceScores
from .chunks import FusedOptions, gather_chunks, project_chunks
from .estimator import Target
from .inputs import SparseKLOutput, check_options, check_targets, get_estimator


# The gradients are made by hand and tensors are reused in place: nothing here for a compiler to trace.
@torch.compiler.disable
def fused_sparse_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    log_target: torch.Tensor,
    *,
    tail_log_target: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    estimator: str = "topk",
    ce_weight: float = 0.0,
    student_temperature: float | None = None,
    brier_weight: float = 0.0,
    rps_weight: float = 0.0,
    position_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    chunk_size: int | None = None,
    metrics: bool = True,
    check: bool = True,
) -> SparseKLOutput:
    r"""
    [`sparse_kl_reference`] of `softcap(logit_scale * (hidden @ weight.T + bias))`, without the `[N, V]` logits.

    The gradients are made during the forward pass and only multiplied by the incoming gradient in the backward pass,
    once: a second backward pass through the same output, and second derivatives, are refused. Inputs that need no
    gradient (a frozen head, `torch.no_grad()`) cost neither time nor memory for one. Sums over chunks are kept in
    float32 (float64 for float64 inputs). Under autocast the products run in the autocast type.

    `"renormalized"` reads `k` rows of the head per token and skips the vocabulary: `cross_entropy`, `mass_outside` and
    `num_correct` are then NaN. It does project, and reports them, where `ce_weight > 0`, or where no gradient is asked
    for (evaluation) and `metrics=True`.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states of the supervised positions. `N` may be 0: the loss is then a differentiable 0.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head, whole (gathered, where it is sharded).
        ids (`torch.Tensor` of shape `(N, k)`, int64):
            Kept token ids.
        log_target (`torch.Tensor` of shape `(N, k)`):
            Recalibrated target log-probabilities in nats. An entry of `-inf` is padding: its id is ignored and counts
            as not kept. For `"sampled"`, the distinct draws with the log of their share of the draws.
        tail_log_target (`torch.Tensor` of shape `(N,)`, *optional*):
            Log of the target's mass outside the kept ids; required by, and only for, `"bucket"`.
        labels (`torch.Tensor` of shape `(N,)`, int64, *optional*):
            Hard labels, for `ce_weight > 0` and for the statistics.
        estimator (`str`, *optional*, defaults to `"topk"`):
            `"topk"`, `"bucket"`, `"renormalized"`, `"sampled"`, `"probability_softmax"`, or one that was added with
            [`register_estimator`].
        ce_weight (`float`, *optional*, defaults to `0.0`):
            `w` in `(1 - w) * KL + w * CE`.
        student_temperature (`float`, *optional*):
            Divides the student's probabilities, for `"probability_softmax"` only. Defaults to 1.
        brier_weight (`float`, *optional*, defaults to `0.0`), rps_weight (`float`, *optional*, defaults to `0.0`):
            Factors of the Brier and the ranked probability score among the kept ids, which are added to the loss; see
            [`ChoiceScores`].
        position_weight (`torch.Tensor` of shape `(N,)`, *optional*):
            Factor of each token's divergence in the loss, at least 0. `kl` and the other sums are those of all tokens alike.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the head.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits, before soft-capping.
        final_logit_softcapping (`float`, *optional*):
            `c` in `c * tanh(z / c)`.
        chunk_size (`int`, *optional*):
            Tokens per chunk. Defaults to [`default_chunk_size`].
        metrics (`bool`, *optional*, defaults to `True`):
            Whether to compute `student_entropy`, the only statistic that costs a pass over the logits.
        check (`bool`, *optional*, defaults to `True`):
            Whether to run [`check_targets`]; on a GPU it costs one synchronisation.

    Returns:
        [`SparseKLOutput`]

    Raises:
        `ValueError`: on shapes, types or devices that do not fit, and on what [`check_targets`] refuses.
    """
    divergence = get_estimator(estimator, student_temperature)
    check_options(estimator, ce_weight, tail_log_target, labels)
    _check_head(
        hidden, weight, bias, ids, log_target, tail_log_target, labels, position_weight, final_logit_softcapping, chunk_size
    )  # fmt: skip
    if check:
        check_targets(
            ids, log_target, weight.shape[0], tail_log_target=tail_log_target, labels=labels, position_weight=position_weight
        )  # fmt: skip
    need_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
    options = FusedOptions(
        estimator=divergence,
        ce_weight=ce_weight,
        scores=ChoiceScores(brier_weight, rps_weight),
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
        chunk_size=chunk_size,
        metrics=metrics,
        project=not divergence.over_kept or ce_weight > 0 or (metrics and not need_grad),
        need_grad=need_grad,
        compute_dtype=torch.get_autocast_dtype(device_type) if autocast else hidden.dtype,
    )
    loss, statistics = _FusedSparseKL.apply(
        hidden, weight, bias, ids, log_target, tail_log_target, labels, position_weight, options
    )
    return SparseKLOutput(loss, *statistics.unbind())


class _FusedSparseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        log_target: torch.Tensor,
        tail_log_target: torch.Tensor | None,
        labels: torch.Tensor | None,
        position_weight: torch.Tensor | None,
        options: FusedOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        dtype = torch.float64 if options.compute_dtype == torch.float64 else torch.float32
        wanted = [options.need_grad and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            targets = Target.build(ids, log_target, tail_log_target, labels, dtype, position_weight)
            visit = project_chunks if options.project else gather_chunks
            columns, gradients, scale = visit(hidden, weight, bias, targets, options, wanted, dtype)
        # A statistic that was not computed is NaN; the sum over no token is 0.
        absent = targets.total.new_full((), torch.nan if ids.shape[0] else 0.0)
        sums = {name: columns[name].sum() if name in columns else absent for name in SparseKLOutput._fields[1:]}
        sums["teacher_entropy"] = targets.entropy.sum()
        if not options.scores:
            sums["choice_score"] = absent.new_zeros(())
        sums["num_tokens"] = absent.new_full((), float(ids.shape[0]))
        kl = targets.weighted(columns["kl"]).sum() if "kl" in columns else absent
        loss = kl.clone()
        if options.ce_weight > 0:
            loss = (1 - options.ce_weight) * kl + options.ce_weight * sums["cross_entropy"]
        loss = loss + sums["choice_score"]
        statistics = torch.stack(list(sums.values()))
        ctx.gradients = gradients
        ctx.scale = scale
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None, _: None = None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_sparse_kl makes its gradients in the forward pass and has no second derivatives "
                "(`create_graph=True`): use sparse_kl_reference for those."
            )
        if grad_loss is None:
            return (None,) * 9
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_sparse_kl hands its gradients over in the first backward pass and keeps no copy: call it "
                "again instead of going backward twice (`retain_graph=True`)."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_loss / ctx.scale
        results = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*results, None, None, None, None, None, None)


def _check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    log_target: torch.Tensor,
    tail_log_target: torch.Tensor | None,
    labels: torch.Tensor | None,
    position_weight: torch.Tensor | None,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`hidden` must be (N, H) and `weight` (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}. Select "
            "the supervised positions first, and gather a sharded head."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must have shape ({weight.shape[0]},), got {tuple(bias.shape)}.")
    if ids.shape[:1] != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` has {hidden.shape[0]} rows and `ids` {ids.shape[0]}: there must be one row of teacher ids per "
            "supervised position."
        )
    floating = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in floating.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` has type {tensor.dtype}: a quantised head must be dequantised first.")
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(
                f"`{name}` is {tensor.dtype} and `hidden` is {hidden.dtype}: cast one of them, or use autocast."
            )
    optional = {
        "bias": bias, "tail_log_target": tail_log_target, "labels": labels, "position_weight": position_weight
    }  # fmt: skip
    for name, other in {"weight": weight, "ids": ids, "log_target": log_target, **optional}.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(f"`{name}` is on {other.device} and `hidden` on {hidden.device}: move it there.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`final_logit_softcapping` must be positive, got {softcap}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
