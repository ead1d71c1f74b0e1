"""
Memory of a GPU: what is held for a whole step exactly, activations as a Llama has them.

With n weights, t of them trainable, p processes, d the bytes of a weight that is loaded and h those of the head's
weights. Trainable weights are float32 masters (4 bytes), unless the optimizer is one for 16-bit weights (then g = d):

| | weights | gradients | AdamW | copies | head |
| --- | --- | --- | --- | --- | --- |
| one process | g t + d (n - t) | g t | 2 g t | 2 t | 4 h |
| DDP | g t + d (n - t) | 2 g t (its buckets too) | 2 g t | 2 t | 4 h |
| FSDP2 | (4 t + d (n - t)) / p + 2 layers in bf16 | 4 t / p | 8 t / p | | 4 h + 4 h |
| ZeRO-3 | 2 n / p + 2 layers in bf16 | 4 t / p | 12 t / p (master weights too) | | 4 h + 2 h |

Copies: autocast keeps 16-bit copies of the trainable weights for a step, and of frozen ones that are float32. Head: the
fused loss makes the gradient of a trainable head in float32 before it becomes the parameter's, gathers a head that is
split over processes, and holds the tiles of [`~first_trl.losses.chunks.tile_bytes`] (no loss holds all logits). With LoRA
the head is frozen: no gradient, and d h where it is gathered.

Activations of a forward over T tokens, H wide, with M the width of the MLP, are what a layer keeps for its gradient:
T (10 H + 4 M) numbers without autocast, T (34 H + 8 M) bytes under it: products read 16 bits, norms float32. The last
norm and the loss keep 5 T H float32 numbers more. With gradient checkpointing all layers keep T H numbers, and one is
alive in the backward pass, with the gradients of its widest parts, when the tiles of the loss are gone. At capture a layer
is alive, and all logits of the batch are.

The total is the sum: what a step holds that accumulates gradients, and a little more than one that does not, since
activations leave as gradients come. Attention is taken to be of the kind that stores no T x T matrix; fragmentation and
the CUDA context (1 to 2 GB) are left out.
"""

from typing import Any

import torch

from ...losses.chunks import tile_bytes
from ...training.precision import BIT16_OPTIMIZERS
from .models import Shape


SHARDINGS = ("none", "fsdp2", "zero3")
# Bytes of optimiser state for each byte of a trainable weight
_STATES = {"adamw": 2.0, "adafactor": 0.0, "sgd": 0.0, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}


def training_memory(
    shape: Shape,
    training: dict[str, Any],
    *,
    tokens: int | None,
    trainable: int | None = None,
    processes: int = 1,
    sharding: str = "none",
    device: str = "cuda",
) -> dict[str, float]:
    """
    Bytes on each GPU while a model is trained.

    Args:
        shape ([`Shape`]): The model.
        training (`dict`): Training arguments: `optim`, `gradient_checkpointing`, `bf16`, `fp16`.
        tokens (`int`, *optional*): Tokens of the largest forward on a GPU; no activations where unknown.
        trainable (`int`, *optional*): LoRA weights, which come on top; all weights of the model by default.
        processes (`int`), sharding (`str`): How it is trained.
        device (`str`, *optional*, defaults to `"cuda"`): Kind of device.
    """
    added = trainable or 0
    size = shape.weight_bytes if _name(training) in BIT16_OPTIMIZERS and trainable is None else 4.0
    learned = shape.parameters if trainable is None else trainable
    frozen = shape.parameters - (0 if trainable is not None else learned)
    states = _states(_name(training))
    gathered = 2 * 2.0 * shape.largest_layer
    head = shape.vocabulary * shape.hidden
    head_gradient = 4.0 * head if trainable is None else 0.0
    if sharding == "fsdp2":
        parts = {
            "weights": (4.0 * learned + shape.weight_bytes * frozen) / processes + gathered,
            "gradients": 4.0 * learned / processes,
            "optimizer": 4.0 * states * learned / processes,
            "head": head_gradient + (4.0 if trainable is None else shape.weight_bytes) * head,
        }
    elif sharding == "zero3":
        parts = {
            "weights": 2.0 * (frozen + learned) / processes + gathered,
            "gradients": 4.0 * learned / processes,
            "optimizer": (4.0 + 4.0 * states) * learned / processes,
            "head": head_gradient + 2.0 * head,
        }
    else:
        parts = {
            "weights": size * (learned - added) + shape.weight_bytes * frozen + 4.0 * added,
            "gradients": size * learned * (2 if processes > 1 else 1),
            "optimizer": size * states * learned,
            "copies": 2.0 * _copied(shape, learned, frozen, size) if _autocast(training) else 0.0,
            "head": head_gradient,
        }
    if tokens is not None:
        masters = trainable is None and size == 4.0
        compute = torch.bfloat16 if _autocast(training) or _half(shape, masters) else torch.float32
        tiles = tile_bytes(tokens, shape.vocabulary, device, compute)
        parts["head"] += tiles
        parts["activations"] = _activations(shape, training, tokens, masters, tiles)
    return parts


def _copied(shape: Shape, learned: float, frozen: float, size: float) -> float:
    """Weights that autocast copies: float32 ones."""
    return (learned if size == 4.0 else 0.0) + (frozen if shape.weight_bytes == 4.0 else 0.0)


def _activations(shape: Shape, training: dict[str, Any], tokens: int, masters: bool, tiles: float) -> float:
    number = 2.0 if _half(shape, masters) else 4.0
    if _autocast(training):
        layer = tokens * (34.0 * shape.hidden + 8.0 * shape.intermediate)
    else:
        layer = tokens * number * (10 * shape.hidden + 4 * shape.intermediate)
    last = 5 * tokens * 4.0 * shape.hidden
    if not _checkpoints(training):
        return layer * shape.layers + last
    alive = layer + 2 * tokens * number * shape.intermediate
    return tokens * number * shape.hidden * shape.layers + last + max(alive - tiles, 0.0)


def capture_memory(shape: Shape, tokens: int, added: int = 0) -> dict[str, float]:
    """Bytes on each GPU while the teacher is run over `tokens` tokens at a time; every process holds all of it."""
    number = 2.0 if _half(shape, masters=False) else 4.0
    layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * number
    return {
        "weights": shape.weight_bytes * shape.parameters + 4.0 * added,
        "activations": layer + tokens * shape.vocabulary * number,
    }


def _name(training: dict[str, Any]) -> str:
    return str(training.get("optim", "adamw"))


def _autocast(training: dict[str, Any]) -> bool:
    # bf16 is the default of training arguments on GPUs that have it
    return bool(training.get("bf16", True) or training.get("fp16", False))


def _states(optimizer: str) -> float:
    if "8bit" in optimizer:
        return 0.5
    return next((states for name, states in _STATES.items() if name in optimizer), 2.0)


def _checkpoints(training: dict[str, Any]) -> bool:
    # Newer transformers call it activation checkpointing; TRL turns it on
    return bool(training.get("activation_checkpointing", training.get("gradient_checkpointing", True)))


def _half(shape: Shape, masters: bool) -> bool:
    """Whether the numbers between layers are of 16 bits, as the weights are that make them."""
    return shape.dtype in ("float16", "bfloat16") and not masters
