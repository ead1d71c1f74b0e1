"""What the sparse KL losses take and return, and the checks both implementations share."""

import math
from dataclasses import fields, is_dataclass, replace
from typing import NamedTuple

import torch

from ..plugins import ESTIMATORS, estimator_target, one
from ..utils.names import nearest
from ..vocabulary import IGNORE_INDEX
from .estimator import Estimator


# Recalibrated targets are normalised in float32; storage precision is lost before that, not after.
_MASS_TOLERANCE = 1e-3


class SparseKLOutput(NamedTuple):
    r"""
    Loss and statistics of a batch. Every field is a scalar **sum over the supervised tokens**, in nats where it is a
    divergence or an entropy: divide by the global number of tokens to get a mean. All but `loss` are detached. They
    are float32, or float64 where the inputs are float64.

    Fields:
        loss (`torch.Tensor`):
            `(1 - ce_weight) * kl + ce_weight * cross_entropy + choice_score`; differentiable with respect to the hidden
            states, the head and its bias.
        kl (`torch.Tensor`):
            KL(target || student), teacher-entropy term included, so that it is 0 when both agree. For the `"sampled"`
            estimator the target is the *empirical* distribution of the draws: its gradient is unbiased for the full
            KL, but its value is too large by the entropy that a finite sample lacks. `kl + teacher_entropy`, the
            cross-entropy against the draws, is the unbiased value to report there.
        cross_entropy (`torch.Tensor`):
            Cross-entropy of the hard labels over the full vocabulary. NaN without `labels`.
        teacher_entropy (`torch.Tensor`):
            Entropy of the target over its `k` entries (`k + 1` for `"bucket"`).
        student_entropy (`torch.Tensor`):
            Entropy of the student over the full vocabulary; for `"renormalized"`, over the `k` ids. NaN with
            `metrics=False`.
        mass_outside (`torch.Tensor`):
            Student probability outside the kept ids. NaN where `"renormalized"` skips the vocabulary projection.
        num_correct (`torch.Tensor`):
            Number of tokens whose label has the largest logit (a tie counts). NaN without `labels`.
        choice_score (`torch.Tensor`):
            Weighted sum of Brier and ranked probability score, see [`ChoiceScores`]; 0 where neither has a weight.
        num_tokens (`torch.Tensor`):
            Number of supervised tokens.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor
    mass_outside: torch.Tensor
    num_correct: torch.Tensor
    choice_score: torch.Tensor
    num_tokens: torch.Tensor


def get_estimator(name: str, student_temperature: float | None = None) -> Estimator:
    """
    Finds an estimator by name, with its options.

    Args:
        name (`str`):
            `"topk"`, `"bucket"`, `"renormalized"`, `"sampled"`, `"probability_softmax"`, or one of a plugin.
        student_temperature (`float`, *optional*):
            Option of estimators that have a field of that name, such as `"probability_softmax"`.

    Raises:
        `ValueError`: The name is unknown, or the option is not one of that estimator or not above 0.
    """
    if name not in ESTIMATORS:
        raise ValueError(
            f"Unknown estimator {name!r}: choose one of {', '.join(map(repr, ESTIMATORS))}."
            + nearest(name, ESTIMATORS, list_known=False)
        )
    estimator = one(ESTIMATORS[name])
    if not isinstance(estimator, Estimator):
        raise ValueError(
            f"The estimator {name!r} is {type(estimator).__name__}: register a subclass of "
            "`first_trl.losses.Estimator`, or an instance of one."
        )
    if student_temperature is None:
        return estimator
    if not (is_dataclass(estimator) and "student_temperature" in {field.name for field in fields(estimator)}):
        raise ValueError(
            f"`student_temperature={student_temperature}` has no effect with estimator={name!r}, which leaves the "
            "student's probabilities as they are. Leave it unset, or use estimator='probability_softmax'."
        )
    if not (student_temperature > 0.0 and math.isfinite(student_temperature)):
        raise ValueError(f"`student_temperature` must be finite and above 0, got {student_temperature}.")
    return replace(estimator, student_temperature=float(student_temperature))


def check_options(
    estimator: str, ce_weight: float, tail_log_target: torch.Tensor | None, labels: torch.Tensor | None
) -> None:
    """Refuse option combinations without a meaning. Raises `ValueError`."""
    if not 0.0 <= ce_weight <= 1.0:
        raise ValueError(f"`ce_weight` must lie in [0, 1], got {ce_weight}.")
    if ce_weight > 0 and labels is None:
        raise ValueError(f"`ce_weight={ce_weight}` mixes in hard labels: pass `labels`, or set `ce_weight=0`.")
    has_tail = estimator_target(estimator) == "tail"
    if has_tail and tail_log_target is None:
        raise ValueError(
            f"The {estimator!r} estimator needs `tail_log_target`, the target's log-mass outside the kept ids. A cache "
            "without `teacher_tail_logprob` can only be used with 'topk' or 'renormalized'."
        )
    if not has_tail and tail_log_target is not None:
        raise ValueError(
            f"`tail_log_target` has no place in the {estimator!r} estimator, whose target sums to 1 over the kept "
            "ids: drop it, or use estimator='bucket'."
        )


def check_targets(
    ids: torch.Tensor,
    log_target: torch.Tensor,
    vocab_size: int,
    *,
    tail_log_target: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
) -> None:
    """
    Refuse a sparse target that would give a silent wrong number.

    Checked: shapes and types, ids and labels within `[0, vocab_size)`, no id twice among the entries of a row that
    carry mass, and target mass of 1 per row (tail included), which also catches NaN. Costs one sort of `[N, k]` and
    one device synchronisation.

    Args:
        ids (`torch.Tensor` of shape `(N, k)`, int64):
            Kept token ids.
        log_target (`torch.Tensor` of shape `(N, k)`, floating point):
            Log-probabilities of the target; `-inf` marks padding.
        vocab_size (`int`):
            Rows of the head, padded ones included.
        tail_log_target (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-mass of the target outside the kept ids.
        labels (`torch.Tensor` of shape `(N,)`, int64, *optional*):
            Hard labels.
        position_weight (`torch.Tensor` of shape `(N,)`, *optional*):
            Factors of the rows' divergences: finite and at least 0.

    Raises:
        `ValueError`: naming the first offending row.
    """
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.shape != log_target.shape:
        raise ValueError(
            f"`ids` and `log_target` must share one shape (N, k) with k >= 1, got {tuple(ids.shape)} and "
            f"{tuple(log_target.shape)}."
        )
    if ids.dtype != torch.int64 or not log_target.is_floating_point():
        raise ValueError(f"`ids` must be int64 and `log_target` floating, got {ids.dtype} and {log_target.dtype}.")
    vectors = {"tail_log_target": tail_log_target, "labels": labels, "position_weight": position_weight}
    for name, tensor in vectors.items():
        if tensor is not None and tensor.shape != ids.shape[:1]:
            raise ValueError(f"`{name}` must have shape ({ids.shape[0]},), got {tuple(tensor.shape)}.")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"`labels` must be int64, got {labels.dtype}.")
    if ids.shape[0] == 0:
        return

    kept = log_target > -torch.inf
    # Padding may repeat any id: give each padded slot a negative id of its own before looking for repeats.
    slots = -1 - torch.arange(ids.shape[1], device=ids.device)
    ordered = torch.where(kept, ids, slots).sort(-1).values
    mass = log_target.detach().float().exp().sum(-1)
    full = kept.sum(-1) >= vocab_size
    overfull = torch.zeros_like(full)
    if tail_log_target is not None:
        mass = mass + tail_log_target.detach().float().exp()
        overfull = full & (tail_log_target > -torch.inf)
    problems = {
        "id out of range": ((ids < 0) | (ids >= vocab_size)).any(-1),
        "repeated id": (ordered[:, 1:] == ordered[:, :-1]).any(-1),
        "mass": ~((mass - 1).abs() <= _MASS_TOLERANCE),
        "tail without tokens": overfull,
    }
    if labels is not None:
        problems["label out of range"] = (labels < 0) | (labels >= vocab_size)
    if position_weight is not None:
        problems["weight"] = ~((position_weight >= 0) & position_weight.isfinite())
    found = torch.stack([rows.any() for rows in problems.values()]).tolist()
    if not any(found):
        return

    name = list(problems)[found.index(True)]
    row = int(problems[name].int().argmax())
    if name == "id out of range":
        raise ValueError(
            f"Row {row}: ids {ids[row].tolist()} leave the vocabulary [0, {vocab_size}). The cache was made with "
            "another vocabulary than the student's head has."
        )
    if name == "weight":
        assert position_weight is not None
        raise ValueError(f"Row {row}: the weight {float(position_weight[row])} must be finite and at least 0.")
    if name == "repeated id":
        raise ValueError(f"Row {row}: ids {ids[row].tolist()} hold a token twice; a target has one entry per token.")
    if name == "mass":
        raise ValueError(
            f"Row {row}: the target mass is {mass[row].item():.6g} instead of 1. Pass recalibrated log-probabilities "
            "(normalised over the kept ids, or together with `tail_log_target` for 'bucket')."
        )
    if name == "tail without tokens":
        raise ValueError(f"Row {row}: all {vocab_size} tokens are kept, so `tail_log_target` must be -inf there.")
    raise ValueError(
        f"Row {row}: label {int(labels[row]) if labels is not None else None} leaves the vocabulary [0, {vocab_size})."
        f" Pass supervised positions only (no {IGNORE_INDEX})."
    )
