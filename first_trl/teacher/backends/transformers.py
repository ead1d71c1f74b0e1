"""Teacher scoring with transformers: any causal language model, one forward a batch."""

import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from accelerate.utils import is_peft_model
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...losses.head import check_causal
from ...utils.adapters import adds_virtual_tokens
from ...utils.commits import hub_commit
from ...utils.processes import process_state
from .base import Scores
from .topk import draw_ids, top_k_and_tail


logger = logging.getLogger(__name__)

# Elements of the float32 blocks the logits are reduced in: a small share of the logits of the forward, so that peak
# memory stays the forward's, within bounds that keep the device busy (4 MB) and the block small (128 MB).
_BLOCK_SHARE = 32
_BLOCK_ELEMENTS = (2**20, 2**25)


class TransformersBackend:
    """
    Score rows with a transformers model.

    A batch that does not fit into memory is halved until it does, and later ones are cut to that size from the start:
    the values are those of a smaller `max_tokens_per_batch`, which can differ in the last bits of float32. On a GPU only the hidden states of the wanted positions go through the head.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder, or a model (PEFT models included) that is used where it is, in its dtype.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Weights' dtype when `model` is a name.
        **model_init_kwargs:
            Passed to `from_pretrained`: `revision`, `device_map`, `tp_plan`, `quantization_config`,
            `attn_implementation`, ... Under a `tp_plan` all processes hold one teacher together.
    """

    notes: list[str] = []

    def __init__(self, model: Any, dtype: Any = "auto", **model_init_kwargs: Any) -> None:
        self._named: tuple[str, str | None] | None = None
        if isinstance(model, str):
            self._named = model, hub_commit(model, **model_init_kwargs)
            placed = "device_map" in model_init_kwargs or "tp_plan" in model_init_kwargs
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **model_init_kwargs)
            if not placed:
                model.to(process_state().device)
        elif model_init_kwargs:
            raise ValueError(
                f"{sorted(model_init_kwargs)} only apply when the teacher is a name; this one is already loaded."
            )
        check_causal(model)
        self.model: Any = model
        self.head_size: int | None = self.model.get_output_embeddings().weight.shape[0]
        self.ranks_per_teacher = int(getattr(self.model, "tp_size", None) or 1)
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        base = self.model.get_base_model() if is_peft_model(model) else self.model
        behind_virtual = adds_virtual_tokens(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters and not behind_virtual
        # A CPU rounds a product of few rows otherwise than the same rows among many (float32, up to three rows were
        # seen): there the head keeps seeing whole columns, and caches stay equal byte for byte
        self._selects = self.model.get_output_embeddings().weight.device.type != "cpu" and not behind_virtual
        self._most_tokens: int | None = None  # of a forward, padding included, once one did not fit

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        config = self.model.config
        name = config.name_or_path or type(self.model).__name__
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        teacher = {
            # A local path is nobody else's business once the cache is shared
            "name": Path(name).name if os.path.isdir(name) else name,
            # Not of an adapter, whose model has its base's name
            "revision": self._named[1] if self._named and self._named[0] == name else None,
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

    def confirm(self, teacher: dict[str, Any]) -> None:
        """The weights' digest is part of a capture's identity, which is compared already."""

    def score(
        self,
        rows: list[np.ndarray],
        positions: list[np.ndarray],
        k: int,
        num_tokens: int,
        uniforms: list[np.ndarray] | None = None,
    ) -> list[Scores]:
        longest, half = max(len(row) for row in rows), -(-len(rows) // 2)
        if len(rows) == 1 or self._most_tokens is None or len(rows) * longest <= self._most_tokens:
            try:
                return self._score(rows, positions, k, num_tokens, uniforms)
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                # Not the error itself: its traceback holds the tensors of the forward
                problem = str(error).partition("\n")[0]
            clear_device_cache(garbage_collection=True)
            if len(rows) == 1:
                raise ValueError(
                    f"The teacher runs out of memory on a single row of {longest} tokens, and no `max_tokens_per_batch` "
                    "makes that smaller: set `max_length`, load the teacher in fewer bits, or spread it over devices "
                    f"with `device_map`. ({problem})"
                )
            if self.ranks_per_teacher > 1:
                raise ValueError(
                    f"The teacher runs out of memory on {len(rows)} rows of up to {longest} tokens. The processes that "
                    "hold it together cannot cut a batch alone: lower `max_tokens_per_batch` below "
                    f"{len(rows) * longest}. ({problem})"
                )
            self._most_tokens = half * longest
            logger.warning(
                "%d rows of up to %d tokens do not fit into memory: going on with at most %d tokens at a time. Set "
                "`max_tokens_per_batch=%d` to begin with that.",
                len(rows), longest, self._most_tokens, self._most_tokens,
            )  # fmt: skip
        scores = []
        for part in (slice(half), slice(half, None)):
            drawn = None if uniforms is None else uniforms[part]
            scores += self.score(rows[part], positions[part], k, num_tokens, drawn)
        return scores

    @torch.inference_mode()
    def _score(
        self,
        rows: list[np.ndarray],
        positions: list[np.ndarray],
        k: int,
        num_tokens: int,
        uniforms: list[np.ndarray] | None,
    ) -> list[Scores]:
        row_of = np.repeat(np.arange(len(rows)), [len(p) for p in positions])
        logits, row_index, columns, information = self._forward(rows, row_of, np.concatenate(positions) - 1)
        num_draws = uniforms[0].shape[1] if uniforms else 0
        flat_uniforms = torch.from_numpy(np.concatenate(uniforms)) if uniforms else None
        parts = []
        for chosen, block in blocks(logits, row_index, columns):
            drawn = torch.empty(len(block), 0, dtype=torch.int32)
            if flat_uniforms is not None:
                drawn = draw_ids(block, flat_uniforms[chosen], num_tokens)
            parts.append((*top_k_and_tail(block, k, num_tokens), drawn))
        ids, logprobs, tail, draws = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        broken = np.isnan(tail) | ~np.isfinite(logprobs[:, 0])
        if broken.any():
            row = rows[row_of[np.flatnonzero(broken)[0]]]
            raise ValueError(
                f"The teacher's logits are NaN or infinite on the row of {len(row)} tokens that starts with "
                f"{row[:8].tolist()}. Load it in bfloat16 or float32, and check its weights."
            )
        ends = np.cumsum([len(p) for p in positions])
        slices = [slice(end - len(p), end) for p, end in zip(positions, ends, strict=True)]
        return [
            Scores(
                ids[s], logprobs[s], tail[s], draws[s] if num_draws else None, None if information is None else information[s]
            )
            for s in slices
        ]  # fmt: skip

    def _forward(
        self, rows: list[np.ndarray], row_index: np.ndarray, columns: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray | None]:
        """
        Logits of shape `(., ., V)`, where in them those of each wanted `(row, column)` are, and what a committee adds: the
        mutual information of each.
        """
        device = self.model.get_input_embeddings().weight.device
        longest = max(len(row) for row in rows)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
            attention_mask[index, : len(row)] = 1
        inputs: dict[str, Any] = {
            "input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), "use_cache": False
        }  # fmt: skip
        training = self.model.training
        self.model.eval()
        try:
            if self._selects:
                logits = self._select(inputs, row_index, columns)
                if logits is not None:
                    return logits, np.zeros_like(row_index), np.arange(len(columns)), None
                self._selects = False
            if self._keeps_logits:
                needed, columns = np.unique(columns, return_inverse=True)
                inputs["logits_to_keep"] = torch.from_numpy(needed).to(device)
            logits = self.model(**inputs).logits
            return logits if self._keeps_logits else logits[:, -longest:], row_index, columns, None
        finally:
            self.model.train(training)

    def _select(self, inputs: dict[str, Any], row_index: np.ndarray, columns: np.ndarray) -> torch.Tensor | None:
        """
        Logits `(1, N, V)` of the wanted positions, which alone go through the head; what the model does to logits it
        does to these. `None` where the model calls its head in a way of its own.
        """
        rows, longest = inputs["input_ids"].shape

        def keep(module: Any, args: tuple[Any, ...]) -> Any:
            hook.remove()  # a second call would be for something else
            if not args or args[0].shape[:2] != (rows, longest):
                return None
            where = (torch.from_numpy(index).to(args[0].device) for index in (row_index, columns))
            return (args[0][tuple(where)][None], *args[1:])

        # Before the hooks of tensor parallelism, which split what the head gets
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep, prepend=True)
        try:
            logits = self.model(**inputs).logits
        finally:
            hook.remove()
        return logits if logits.shape[:2] == (1, len(columns)) else None


def blocks(logits: torch.Tensor, row_index: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits of the wanted positions as float32 copies `(n, V)`, a few at a time, with the positions that these are."""
    smallest, largest = _BLOCK_ELEMENTS
    step = max(1, min(largest, max(smallest, logits.numel() // _BLOCK_SHARE)) // logits.shape[-1])
    for start in range(0, len(columns), step):
        chosen = slice(start, start + step)
        where = (torch.from_numpy(index[chosen]).to(logits.device) for index in (row_index, columns))
        yield chosen, logits[tuple(where)].float()


# Bytes of a tensor that are copied from its device at once
_DIGEST_BYTES = 2**26
# Entries of a configuration that leave the logits as they are: where a model is from, how it is stored, generates, is
# trained; what a quantisation is stands in the manifest's `backend`
_NO_PART_OF_LOGITS = re.compile(
    r"_.*|.*_token_id|architectures|dtype|torch_dtype|transformers_version|use_cache|quantization_config|.*dropout|"
    r".*_pdrop|id2label|label2id|output_(attentions|hidden_states|router_logits|scores)|return_dict|problem_type|"
    r"task_specific_params|tie_word_embeddings|initializer_range|chunk_size_feed_forward|is_encoder_decoder|"
    r"pretraining_tp|attn_implementation|gradient_checkpointing"
)
# The same of an adapter's settings; what they say of its layers stands in the names and shapes of the weights
_NO_PART_OF_ADAPTER = re.compile(
    r"_.*|auto_mapping|peft_version|base_model_name_or_path|revision|task_type|inference_mode|runtime_config|"
    r".*dropout|init_.*|.*_init|loftq_config|eva_config|corda_config|lora_ga_config|save_projection|ensure_weight_tying|"
    r"target_modules|target_parameters|exclude_modules|modules_to_save|layers_to_transform|layers_pattern|bias"
)


def weights_digest(model: PreTrainedModel) -> str:
    """
    Digest of all that decides a model's logits: every byte of every weight, the configuration (another `rope_theta`
    is another model), buffers that are stored nowhere (rotary frequencies, which `model.bfloat16()` rounds and
    `from_pretrained` does not), and of adapters their settings, which ones are active and how strongly they are scaled.
    xxHash3 reads faster than weights are loaded; tied weights are read once.

    Raises:
        `ValueError`: A weight is not in memory.
    """
    digest = hashlib.blake2b(digest_size=8)
    state = sorted(model.state_dict().items())
    for name, tensor in state:
        if tensor.device.type == "meta":
            raise ValueError(
                f"The teacher's weight {name} is not in memory (offloaded, or never loaded), so the cache could not "
                "say which weights it comes from. Use a `device_map` that fits, or `quantization_config`."
            )
    # The hash lets other threads run, and one core alone does not use up the memory's bandwidth
    with ThreadPoolExecutor() as threads:
        resident = {_place(tensor): tensor for _, tensor in state if _place(tensor) is not None}
        found = dict(zip(resident, threads.map(_tensor_digest, resident.values()), strict=True))
    for name, tensor in state:
        place = _place(tensor)
        if place is None:  # a shard of tensor parallelism, or a tensor without a place: gathered, one at a time
            content = _tensor_digest(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
        else:
            content = found[place]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + content)
    for name, buffer in sorted(_unsaved_buffers(model, dict(state))):
        digest.update(f"{name}{tuple(buffer.shape)}{buffer.dtype}".encode() + _rounded_digest(buffer))
    adapters = {
        name: [
            module.disable_adapters,
            module.active_adapters,
            getattr(module, "merged_adapters", None),
            getattr(module, "scaling", None),
        ]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    settings = {
        name: _of_logits(config.to_dict(), _NO_PART_OF_ADAPTER)
        for name, config in getattr(model, "peft_config", {}).items()
    }
    decides = [_of_logits(model.config.to_dict()), adapters, settings]
    digest.update(json.dumps(decides, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _unsaved_buffers(model: PreTrainedModel, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Numbers that a model computes with and that are in no state: made from the configuration when it is loaded."""
    for path, module in model.named_modules():
        # Such frequencies follow the length of the text that was read last
        follows = any(word in str(getattr(module, "rope_type", "")) for word in ("dynamic", "longrope"))
        for name, buffer in module.named_buffers(path, recurse=False):
            if name in state or not buffer.is_floating_point() or buffer.device.type == "meta":
                continue
            if not (follows and name.endswith("inv_freq")):
                yield name, buffer


def _rounded_digest(tensor: torch.Tensor) -> bytes:
    """Of a few values to three digits: devices and versions compute frequencies that differ in their last bits."""
    flat = tensor.detach().reshape(-1)
    values = flat[:: max(1, len(flat) // 64)].cpu().double().tolist()
    return xxhash.xxh3_128(" ".join(f"{value:.2e}" for value in values).encode()).digest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _place(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies, which tied weights share."""
    if hasattr(tensor, "full_tensor") or not tensor.data_ptr():
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _of_logits(config: Any, no_part: re.Pattern[str] = _NO_PART_OF_LOGITS) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: _of_logits(value, no_part)
        for key, value in config.items()
        if not (isinstance(key, str) and no_part.fullmatch(key))
    }


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    hasher = xxhash.xxh3_128()
    flat = tensor.detach().reshape(-1)
    step = max(1, _DIGEST_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].contiguous().cpu()
        hasher.update(part.view(torch.uint8).numpy().data)
    return hasher.digest()
