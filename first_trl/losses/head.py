"""A causal language model's forward that returns the distillation loss instead of logits."""

import functools
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .._trl_compat import maybe_gather_lm_head_ctx
from ..vocabulary import IGNORE_INDEX
from .fused import fused_sparse_kl


# Sums over the supervised tokens of a batch, in the order of `DistillOutput.sums`
SUMS = ("kl", "cross_entropy", "teacher_entropy", "student_entropy", "mass_outside", "num_correct", "num_tokens")


@dataclass
class DistillOutput(ModelOutput):
    """
    Output of a model patched with [`add_distill_head`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`):
            `(1 - w) * KL + w * CE` summed over the supervised tokens of the batch.
        sums (`torch.Tensor` of shape `(7,)`):
            The statistics named in `SUMS`, without gradient.
        aux_loss (`torch.Tensor`, *optional*):
            Mixture-of-experts load-balancing loss.
    """

    loss: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def head_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """
    What a model does to its head's output before the softmax: `(scale, softcap)`, with
    `logits = softcap * tanh(scale * z / softcap)`. Model families name the scale differently: Cohere `logit_scale`,
    Muse `output_multiplier`, Falcon-H1 `lm_head_multiplier`; Granite and MiniCPM divide by `logits_scaling`,
    HyperCLOVA X multiplies by it.
    """
    text = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scale = float(getattr(text, name))
            break
    else:
        scaling = getattr(text, "logits_scaling", None)
        if scaling is None:
            scale = 1.0
        else:
            scale = float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling)
    return scale, getattr(text, "final_logit_softcapping", None)


def add_distill_head(
    model: PreTrainedModel,
    estimator: str,
    ce_weight: float,
    chunk_size: int | None,
    student_temperature: float | None = None,
) -> None:
    """
    Patch `model.forward`: called with `teacher_ids` and `teacher_log_target` it runs the backbone, takes the hidden
    states of the supervised positions and returns a [`DistillOutput`]; the `(batch, seq_len, vocab)` logits are never
    built. Called without, it is the forward it was. The loss runs *inside* the forward so that the hooks of DDP, FSDP
    and ZeRO-3 fire around it.
    """
    forward = model.forward
    scale, softcap = head_transform(model.config)
    text_config = model.config.get_text_config()

    # `generate` reads the signature of the model's own forward
    @functools.wraps(type(model).forward)
    def distill_forward(
        self: PreTrainedModel,
        *args: Any,
        teacher_ids: torch.Tensor | None = None,
        teacher_log_target: Any = None,
        teacher_tail_log_target: torch.Tensor | None = None,
        check_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if teacher_ids is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        # Looked up on each call: FSDP and PEFT replace the head after patching
        head = self.get_output_embeddings()
        weight: Any = _whole(head.weight)
        bias: Any = _whole(getattr(head, "bias", None))
        labels = labels[:, 1:].to(weight.device)
        mask = labels != IGNORE_INDEX
        hidden = outputs.last_hidden_state[:, :-1].to(weight.device)[mask]
        with maybe_gather_lm_head_ctx(weight, bias):
            result = fused_sparse_kl(
                hidden,
                weight,
                teacher_ids.to(weight.device),
                teacher_log_target.to(weight.device),
                tail_log_target=(
                    None if teacher_tail_log_target is None else teacher_tail_log_target.to(weight.device)
                ),
                labels=labels[mask],
                estimator="topk" if check_only else estimator,
                ce_weight=ce_weight,
                student_temperature=None if check_only else student_temperature,
                bias=bias,
                logit_scale=scale,
                final_logit_softcapping=softcap,
                chunk_size=chunk_size,
            )
        aux_loss: Any = None
        if kwargs.get("output_router_logits"):
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                text_config.num_experts,
                text_config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return DistillOutput(
            loss=result.loss.reshape(1),
            sums=torch.stack([getattr(result, name).float() for name in SUMS]),
            aux_loss=aux_loss,
        )

    model.forward = types.MethodType(distill_forward, model)


def _whole(parameter: Any) -> Any:
    """
    A head that FSDP2 wraps on its own reaches this forward as shards, because its module is never called. Gather it.
    Every rank then holds the gradient of its own tokens only: sum the gradients over the ranks when they are split
    again, and average like FSDP does. Ranks of a tensor-parallel group have seen the same tokens and sum nothing.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    whole = parameter.full_tensor(grad_placements=[Replicate() if name == "tp" else Partial() for name in names])
    ranks = math.prod(mesh.size(dim) for dim, name in enumerate(names) if name != "tp")
    if whole.requires_grad and ranks > 1:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


@torch.no_grad()
def check_distill_head(model: Any, input_ids: torch.Tensor, tolerance: float) -> None:
    """
    Compare the cross-entropy of a few tokens from the fused head and from the model's own logits. A model that does
    more after its backbone than `softcap(scale * (W h + b))` would be trained on logits that it never produces.

    Args:
        model (`torch.nn.Module`):
            Model patched with [`add_distill_head`], wrapped or not.
        input_ids (`torch.Tensor` of shape `(1, seq_len)`, int64):
            At least two tokens.
        tolerance (`float`):
            Relative difference that rounding explains.

    Raises:
        `ValueError`: The two differ by more than rounding.
    """
    training = model.training
    model.eval()
    labels = input_ids.clone()
    labels[:, 0] = IGNORE_INDEX
    targets = labels[:, 1:].reshape(-1, 1)
    logits = model(input_ids=input_ids, use_cache=False).logits
    sums = model(
        input_ids=input_ids,
        labels=labels,
        teacher_ids=targets,
        teacher_log_target=torch.zeros_like(targets, dtype=torch.float32),
        check_only=True,
    ).sums
    model.train(training)
    own = torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets[:, 0].to(logits.device))
    fused = sums[SUMS.index("cross_entropy")] / len(targets)
    if not abs(own - fused) <= tolerance * (1 + abs(own)):
        raise ValueError(
            f"{type(model).__name__}: the cross-entropy of {len(targets)} tokens is {own:.4f} by the model's logits "
            f"and {fused:.4f} by its backbone and output head alone. Its head does something this trainer does not "
            "know; it cannot be distilled with the fused loss. Please report the architecture."
        )
