"""The sparse KL estimators on dense logits: short, differentiable by autograd to any order, exact in float64."""

import torch

from .choice_scores import ChoiceScores
from .estimator import Student, Target
from .inputs import SparseKLOutput, check_options, check_targets, get_estimator


def sparse_kl_reference(
    logits: torch.Tensor,
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
) -> SparseKLOutput:
    r"""
    KL(target || student) for a target known on a few token ids, from the full student logits.

    With `t` the target on the kept ids, `b` its tail mass and `p = softmax(logits)`:

    - `"topk"`, `"sampled"`: `sum_i t_i log(t_i / p_i)`, `p` over the full vocabulary.
    - `"bucket"`: the same plus `b log(b / p_tail)`, where `p_tail` is the student's mass outside the kept ids.
    - `"renormalized"`: `sum_i t_i log(t_i / q_i)`, `q` the student's softmax over the kept ids only.
    - `"probability_softmax"`: `sum_i t_i log(t_i / r_i)`, `r` the softmax over the kept ids of the *probabilities*
      `p_i / student_temperature`. For replication: it is how the authors' code of FIRST reads its temperature. Against
      a target `softmax(q_i / c)` it is 0 where `p_i / student_temperature` and the teacher's raw `q_i / c` differ by one
      constant: at equal temperatures the student learns the raw teacher up to a constant, nothing is recalibrated,
      and at `student_temperature > c` it is sharper than the teacher. The mass outside the kept ids is free.

    This is what [`fused_sparse_kl`] computes without ever holding `[N, V]`; use it to check, to differentiate twice,
    or where memory does not matter.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Student logits, after scale and soft-capping. Computed in float32 at least, in float64 for float64 logits.
        ids (`torch.Tensor` of shape `(N, k)`, int64):
            Kept token ids.
        log_target (`torch.Tensor` of shape `(N, k)`):
            Recalibrated target log-probabilities in nats. An entry of `-inf` is padding: its id is ignored and counts
            as not kept.
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

    Returns:
        [`SparseKLOutput`]

    Raises:
        `ValueError`: on ids or labels outside the vocabulary, repeated ids, or a target whose mass is not 1.
    """
    divergence = get_estimator(estimator, student_temperature)
    scores = ChoiceScores(brier_weight, rps_weight)
    check_options(estimator, ce_weight, tail_log_target, labels)
    check_targets(
        ids, log_target, logits.shape[1], tail_log_target=tail_log_target, labels=labels, position_weight=position_weight
    )  # fmt: skip
    if logits.dtype != torch.float64:
        logits = logits.float()
    target = Target.build(ids, log_target, tail_log_target, labels, logits.dtype, position_weight)

    log_p = logits.log_softmax(-1)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target.ids, True)
    # The smallest finite number instead of -inf: gradients of a row without any outside token stay finite.
    log_tail = log_p.masked_fill(inside, torch.finfo(logits.dtype).min).logsumexp(-1)
    log_kept = log_p.gather(1, target.ids)
    log_q = log_kept.masked_fill(~target.kept, -torch.inf).log_softmax(-1).masked_fill(~target.kept, 0.0)
    student = Student(log_kept, log_q, log_tail)
    divergences = divergence.divergence(student, target)
    kl, weighted = divergences.sum(), target.weighted(divergences).sum()

    nan = logits.new_full((), torch.nan)
    loss, cross_entropy, num_correct = weighted, nan, nan
    if labels is not None:
        cross_entropy = -log_p.gather(1, labels[:, None]).sum()
        num_correct = (logits.gather(1, labels[:, None])[:, 0] >= logits.amax(-1)).sum().to(logits.dtype)
        if ce_weight > 0:
            loss = (1 - ce_weight) * weighted + ce_weight * cross_entropy
    choice_score = scores.value(log_q, target).sum()
    loss = loss + choice_score
    if divergence.over_kept:
        student_entropy = -(log_q.exp() * target.kept * log_q).sum()
    else:
        student_entropy = torch.special.entr(log_p.exp()).sum()
    return SparseKLOutput(
        loss=loss,
        kl=kl.detach(),
        cross_entropy=cross_entropy.detach(),
        teacher_entropy=target.entropy.sum().detach(),
        student_entropy=student_entropy.detach(),
        mass_outside=log_tail.exp().sum().detach(),
        num_correct=num_correct.detach(),
        choice_score=choice_score.detach(),
        num_tokens=logits.new_tensor(float(logits.shape[0])),
    )
