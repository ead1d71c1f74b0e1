"""Teacher scoring with transformers: any causal language model, one forward a batch."""

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from .base import Scores


# Elements of the float32 block that top-k and logsumexp work on (128 MB): large enough to keep the device busy, small
# beside the logits of the forward itself.
_BLOCK_ELEMENTS = 2**25


class TransformersBackend:
    """
    Score rows with a transformers model.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder, or a model (PEFT models included) that is used where it is, in its dtype.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Weights' dtype when `model` is a name.
        **model_init_kwargs:
            Passed to `from_pretrained`: `revision`, `device_map`, `tp_plan`, `quantization_config`,
            `attn_implementation`, ...
    """

    def __init__(self, model: Any, dtype: Any = "auto", **model_init_kwargs: Any) -> None:
        if isinstance(model, str):
            placed = "device_map" in model_init_kwargs or "tp_plan" in model_init_kwargs
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **model_init_kwargs)
            if not placed:
                model.to(PartialState().device)
        elif model_init_kwargs:
            raise ValueError(
                f"{sorted(model_init_kwargs)} only apply when the teacher is a name; this one is already loaded."
            )
        self.model: Any = model
        self.head_size = self.model.get_output_embeddings().weight.shape[0]
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        base = self.model.get_base_model() if is_peft_model(model) else self.model
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        config = self.model.config
        name = config.name_or_path or type(self.model).__name__
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        teacher = {
            # A local path is nobody else's business once the cache is shared
            "name": Path(name).name if os.path.isdir(name) else name,
            "revision": getattr(config, "_commit_hash", None),
            "weights_digest": weights_digest(self.model),
            "parameters": self.model.num_parameters(),
        }
        backend = {
            "name": "transformers",
            "version": transformers.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": quantization,
        }
        return teacher, backend

    @torch.inference_mode()
    def score(self, rows: list[np.ndarray], positions: list[np.ndarray], k: int, num_tokens: int) -> list[Scores]:
        device = self.model.get_input_embeddings().weight.device
        longest = max(len(row) for row in rows)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
            attention_mask[index, : len(row)] = 1
        # The logits that predict token t are those of position t - 1
        needed = np.unique(np.concatenate(positions)) - 1
        kwargs: dict[str, Any] = {}
        if self._keeps_logits:
            kwargs["logits_to_keep"] = torch.from_numpy(needed).to(device)
            column_of = {int(position): column for column, position in enumerate(needed)}
        training = self.model.training
        self.model.eval()
        try:
            logits = self.model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False, **kwargs
            ).logits
        finally:
            self.model.train(training)
        row_index = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(p) for p in positions]))
        flat = np.concatenate(positions) - 1
        columns = torch.from_numpy(np.array([column_of[int(p)] for p in flat]) if self._keeps_logits else flat)
        parts = []
        step = max(1, _BLOCK_ELEMENTS // logits.shape[-1])
        for start in range(0, len(flat), step):
            block = logits[row_index[start : start + step], columns[start : start + step]].float()
            parts.append(top_k_and_tail(block, k, num_tokens))
        ids, logprobs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        if np.isnan(tail).any() or not np.isfinite(logprobs[:, 0]).all():
            bad = int(row_index[np.flatnonzero(np.isnan(tail) | ~np.isfinite(logprobs[:, 0]))[0]])
            raise ValueError(
                f"The teacher's logits are NaN or infinite on row {bad} of a batch (tokens {rows[bad][:8].tolist()}...). "
                "Load it in bfloat16 or float32, and check its weights."
            )
        ends = np.cumsum([len(p) for p in positions])
        return [
            Scores(ids[end - len(p) : end], logprobs[end - len(p) : end], tail[end - len(p) : end])
            for p, end in zip(positions, ends, strict=True)
        ]


def top_k_and_tail(logits: torch.Tensor, k: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The k most likely ids, their log-probabilities and the log-mass of all others. `logits` is overwritten: the kept
    entries are taken out of it, so that the tail comes from the logits themselves and not from `1 - sum`, which is
    rounding noise when the tail is small.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): float32 or float64.
        k (`int`): Entries to keep.
        num_tokens (`int`): Ids that may be kept; the rest of the vocabulary counts as tail.

    Returns:
        `tuple`: ids `(N, k)` int32, log-probabilities `(N, k)`, tail log-mass `(N,)`.
    """
    total = logits.logsumexp(-1)
    allowed = logits[:, :num_tokens]
    values, ids = allowed.topk(k, dim=-1)
    # `topk` orders equal values as it likes; the cache orders them by id. Rows where the k-th value also occurs
    # outside the kept ones need a stable sort, the others only a reordering of what they hold.
    tied = (allowed >= values[:, -1:]).sum(-1) > k
    if tied.any():
        order = allowed[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = order.values[:, :k], order.indices[:, :k]
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(-1, by_id), ids.gather(-1, by_id)
    by_value = values.argsort(dim=-1, descending=True, stable=True)
    values, ids = values.gather(-1, by_value), ids.gather(-1, by_value)
    tail = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1) - total
    # Rounding can leave a log-probability or a tail of 1 + 1e-7
    return ids.int(), (values - total[:, None]).clamp(max=0), tail.clamp(max=0)


def weights_digest(model: PreTrainedModel, samples: int = 1024) -> str:
    """
    Digest of a model's weights from up to `samples` evenly spaced values of every tensor: cheap for large models, and
    no fine-tuning leaves all of them as they were.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "meta":
            raise ValueError(f"The teacher's weight {name} is not loaded (meta device): load the model fully first.")
        picked = flat[:: max(1, flat.numel() // samples)][:samples]
        values = picked.float().cpu().numpy() if picked.is_floating_point() else picked.cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
