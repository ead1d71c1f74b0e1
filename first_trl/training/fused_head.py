"""A causal language model's forward that returns the distillation loss instead of logits."""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .losses import fused_sparse_kl


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


def add_distill_head(model: PreTrainedModel, estimator: str, ce_weight: float, chunk_size: int | None) -> None:
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
        **kwargs: Any,
    ) -> Any:
        if teacher_ids is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        # Looked up on each call: FSDP and PEFT replace the head after patching
        head = self.get_output_embeddings()
        weight: Any = head.weight
        bias: Any = getattr(head, "bias", None)
        # Gathered before the tokens are split, since the backbone's output is a regular tensor
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = bias.full_tensor() if bias is not None else None
        labels = labels[:, 1:].to(weight.device)
        mask = labels != -100
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
                estimator=estimator,
                ce_weight=ce_weight,
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
