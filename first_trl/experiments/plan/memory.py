"""
Memory of a GPU, roughly.

With n weights, t of them trainable, p processes, d the bytes of a weight that is loaded and h those of the head's
weights. Trainable weights are float32 masters (4 bytes), unless the optimizer is one for 16-bit weights (then g = d):

| | weights | gradients | AdamW | copies | head |
| --- | --- | --- | --- | --- | --- |
| one process | g t + d (n - t) | g t | 2 g t | 2 t | 4 h |
| DDP | g t + d (n - t) | 2 g t (its buckets too) | 2 g t | 2 t | 4 h |
| FSDP2 | (4 t + d (n - t)) / p + 2 layers in bf16 | 4 t / p | 8 t / p | | 4 h + 4 h |
| ZeRO-3 | 2 n / p + 2 layers in bf16 | 4 t / p | 12 t / p (master weights too) | | 4 h + 2 h |

Copies: autocast keeps 16-bit copies of the trainable weights for a step. Head: the fused loss makes the gradient of a
trainable head in float32 before it becomes the parameter's, and gathers a head that is split over processes. With LoRA
the head is frozen: no gradient, and d h where it is gathered.

Activations of a
forward over T tokens, h wide, with m the width of the MLP: a layer holds T (10 h + 4 m) numbers. With gradient
checkpointing all layers keep T h and one of them is alive, without it all are. The head adds the logits of a chunk
(the losses never hold all of them), at capture those of the whole batch. Numbers are of 2 bytes in half precision,
else 4. Attention is taken to be of the kind that stores no T x T matrix; fragmentation and the CUDA context (1 to 2
GB) are left out.
"""

from typing import Any

from ...losses.chunks import default_chunk_size
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
) -> dict[str, float]:
    """
    Bytes on each GPU while a model is trained.

    Args:
        shape ([`Shape`]): The model.
        training (`dict`): Training arguments: `optim`, `gradient_checkpointing`, `bf16`, `fp16`.
        tokens (`int`, *optional*): Tokens of the largest forward on a GPU; no activations where unknown.
        trainable (`int`, *optional*): LoRA weights, which come on top; all weights of the model by default.
        processes (`int`), sharding (`str`): How it is trained.
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
            "copies": 2.0 * learned if size == 4.0 and _autocast(training) else 0.0,
            "head": head_gradient,
        }
    if tokens is not None:
        number = _number(shape, training)
        layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * number
        kept = tokens * shape.hidden * number * shape.layers + layer
        chunk = min(tokens, default_chunk_size(shape.vocabulary, "cuda")) * shape.vocabulary * 4.0
        checkpointed = training.get("gradient_checkpointing", True)
        parts["activations"] = (kept if checkpointed else layer * shape.layers) + chunk
    return parts


def capture_memory(shape: Shape, tokens: int, added: int = 0) -> dict[str, float]:
    """Bytes on each GPU while the teacher is run over `tokens` tokens at a time; every process holds all of it."""
    number = _number(shape, {})
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


def _number(shape: Shape, training: dict[str, Any]) -> float:
    half = _autocast(training) or shape.dtype in ("float16", "bfloat16")
    return 2.0 if half else 4.0
