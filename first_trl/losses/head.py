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
SUMS = (
    "kl",
    "cross_entropy",
    "teacher_entropy",
    "student_entropy",
    "mass_outside",
    "num_correct",
    "choice_score",
    "num_tokens",
)


_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass
class DistillOutput(ModelOutput):
    """
    Output of a model patched with [`add_distill_head`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`):
            `(1 - w) * KL + w * CE + choice score` summed over the supervised tokens of the batch.
        sums (`torch.Tensor` of shape `(8,)`):
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
    HyperCLOVA X multiplies by it. The cap is `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap` or xLSTM's
    `output_logit_soft_cap`.

    Raises:
        `ValueError`: The scale is no number.
    """
    text = config.get_text_config()
    # MPT's configuration has a scale, as a number or as "inv_sqrt_d_model", that its model in transformers never reads
    names = () if text.model_type == "mpt" else ("logit_scale", "output_multiplier", "lm_head_multiplier")
    for name in names:
        if getattr(text, name, None) is not None:
            if not isinstance(getattr(text, name), int | float):
                raise ValueError(
                    f"{text.model_type}: `config.{name}` is {getattr(text, name)!r}, which says nothing about the "
                    "size of the logits. Set it to the number that the model multiplies its logits by."
                )
            scale = float(getattr(text, name))
            break
    else:
        scaling = getattr(text, "logits_scaling", None)
        if scaling is None:
            scale = 1.0
        else:
            scale = float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling)
    caps = (getattr(text, name, None) for name in _SOFT_CAPS)
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def backbone(model: Any) -> Any:
    """The model without its output head. Llama 4 calls it `model`, and names another attribute as its base."""
    return model.base_model if model.base_model is not model else model.model


def check_causal(model: Any) -> None:
    """
    Raises `ValueError` for encoder-decoders: their text has two parts, and a cache of rows has one.

    Args:
        model ([`~transformers.PreTrainedModel`]): Student or teacher.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: it reads a source and writes a target, and the rows of a "
            "teacher cache are one text. Use a causal language model (`AutoModelForCausalLM`)."
        )


def _router_loss(model: Any, outputs: Any, attention_mask: Any) -> Any:
    """Load-balancing loss of a mixture of experts; families name the number of experts differently."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = model.config.get_text_config()
    experts = _first(("num_experts", "num_local_experts", "n_routed_experts"), model, text)
    chosen = _first(("num_experts_per_tok", "top_k", "moe_top_k"), model, text)
    router_logits = getattr(outputs, "router_logits", None)
    if experts is None or chosen is None or not router_logits:
        raise ValueError(
            f"{type(model).__name__}: its load-balancing loss cannot be computed, since the model does not say how many "
            "experts it has or returns no router logits. Train without it: `router_aux_loss_coef=0`."
        )
    return load_balancing_loss_func(router_logits, experts, chosen, attention_mask)


def _first(names: tuple[str, ...], *places: Any) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def add_distill_head(
    model: PreTrainedModel,
    estimator: str,
    ce_weight: float,
    chunk_size: int | None,
    student_temperature: float | None = None,
    brier_weight: float = 0.0,
    rps_weight: float = 0.0,
) -> None:
    """
    Patch `model.forward`: called with `teacher_ids` and `teacher_log_target` it runs the backbone, takes the hidden
    states of the supervised positions and returns a [`DistillOutput`]; the `(batch, seq_len, vocab)` logits are never
    built. Without `teacher_positions`, the positions are found and the targets checked on the model's device, which
    waits for both. Called without, it is the forward it was. The loss runs *inside* the forward so that the hooks of DDP, FSDP
    and ZeRO-3 fire around it.
    """
    forward = model.forward
    scale, softcap = head_transform(model.config)

    # `generate` reads the signature of the model's own forward
    @functools.wraps(type(model).forward)
    def distill_forward(
        self: PreTrainedModel,
        *args: Any,
        teacher_ids: torch.Tensor | None = None,
        teacher_log_target: Any = None,
        teacher_tail_log_target: torch.Tensor | None = None,
        teacher_positions: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        check_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if teacher_ids is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        outputs = backbone(self)(*args, **kwargs)
        # Looked up on each call: FSDP and PEFT replace the head after patching
        head = self.get_output_embeddings()
        weight: Any = _whole(head.weight)
        bias: Any = _whole(getattr(head, "bias", None))
        checked = teacher_positions is not None
        if teacher_positions is None:
            rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
            teacher_positions = rows * labels.shape[1] + columns
        positions = teacher_positions.to(weight.device)
        # By their places: a mask would make the host wait for the number of its true entries
        hidden = outputs.last_hidden_state.to(weight.device).flatten(0, 1).index_select(0, positions)
        # Before DeepSpeed has split a model there is nothing to gather
        split = [parameter for parameter in (weight, bias) if hasattr(parameter, "ds_status")]
        with maybe_gather_lm_head_ctx(*split):
            result = fused_sparse_kl(
                hidden,
                weight,
                teacher_ids.to(weight.device),
                teacher_log_target.to(weight.device),
                tail_log_target=(
                    None if teacher_tail_log_target is None else teacher_tail_log_target.to(weight.device)
                ),
                labels=labels.to(weight.device).flatten().index_select(0, positions + 1),
                estimator="topk" if check_only else estimator,
                ce_weight=ce_weight,
                student_temperature=None if check_only else student_temperature,
                brier_weight=brier_weight,
                rps_weight=rps_weight,
                position_weight=None if teacher_weight is None else teacher_weight.to(weight.device),
                bias=bias,
                logit_scale=scale,
                final_logit_softcapping=softcap,
                chunk_size=chunk_size,
                check=not checked,
            )
        aux_loss: Any = None
        if kwargs.get("output_router_logits"):
            aux_loss = _router_loss(self, outputs, kwargs.get("attention_mask"))
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
        `ValueError`: The two differ by more than rounding, or a token's logits depend on the tokens after it.
    """
    training = model.training
    model.eval()
    labels = input_ids.clone()
    labels[:, 0] = IGNORE_INDEX
    targets = labels[:, 1:].reshape(-1, 1)
    logits = model(input_ids=input_ids, use_cache=False).logits
    other = input_ids.clone()
    other[:, -1] = (other[:, -1] + 1) % logits.shape[-1]
    changed = model(input_ids=other, use_cache=False).logits
    sums = model(
        input_ids=input_ids,
        labels=labels,
        teacher_ids=targets,
        teacher_log_target=torch.zeros_like(targets, dtype=torch.float32),
        check_only=True,
    ).sums
    model.train(training)
    moved = float((logits[0, :-1] - changed[0, :-1]).float().abs().max())
    if moved > tolerance * float(logits.float().abs().max()):
        raise ValueError(
            f"{type(model).__name__}: another last token changes the logits before it. The model sees the tokens that it "
            "is to predict; use a causal language model (for BERT and the like, `is_decoder=True`)."
        )
    own = torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets[:, 0].to(logits.device))
    fused = sums[SUMS.index("cross_entropy")] / len(targets)
    if not abs(own - fused) <= tolerance * (1 + abs(own)):
        raise ValueError(
            f"{type(model).__name__}: the cross-entropy of {len(targets)} tokens is {own:.4f} by the model's logits "
            f"and {fused:.4f} by its backbone and output head alone. Its head does something this trainer does not "
            "know; it cannot be distilled with the fused loss. Please report the architecture."
        )


@torch.no_grad()
def check_rows_apart(model: Any, input_ids: torch.Tensor, tolerance: float) -> None:
    """
    Compare the logits of a text alone with those behind another one in a batch without padding. Some models take no
    notice of `position_ids` where they make their mask or carry a state, and would read rows into one another.

    Args:
        model (`torch.nn.Module`):
            Causal language model, wrapped or not.
        input_ids (`torch.Tensor` of shape `(1, seq_len)`, int64):
            At least two tokens, which are cut in the middle.
        tolerance (`float`):
            Difference that rounding explains, relative to the largest logit.

    Raises:
        `ValueError`: The two differ by more than rounding.
    """
    length = input_ids.shape[1] // 2
    input_ids, device = input_ids[:, : 2 * length], input_ids.device
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
    positions = torch.arange(length, device=device).repeat(2)[None]
    texts = torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(length)[None]
    training = model.training
    model.eval()
    together = model(
        input_ids=input_ids, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
        max_length_q=length, max_length_k=length, seq_idx=texts,
    ).logits[0, length:].float()  # fmt: skip
    alone = model(input_ids=input_ids[:, length:], position_ids=positions[:, length:], use_cache=False)
    model.train(training)
    expected = alone.logits[0].float()
    difference = float((together - expected).abs().max())
    if difference > tolerance * float(expected.abs().max()):
        attention = getattr(getattr(model, "config", None), "_attn_implementation", "its")
        raise ValueError(
            f"{type(model).__name__} with {attention} attention lets the rows of a batch without padding see each other. "
            "Set `padding_free=False` and `packing=False`, or load it with `attn_implementation='flash_attention_2'`."
        )
