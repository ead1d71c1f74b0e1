"""
Memory of a GPU, roughly.

With n weights, t of them trainable, p processes, d the bytes of a weight and g = d (4 for LoRA weights, which PEFT
keeps in float32 over a half-precision base):

| | weights | gradients | AdamW |
| --- | --- | --- | --- |
| one process | d n | g t | 2 g t |
| DDP | d n | 2 g t (its buckets too) | 2 g t |
| FSDP2 | (4 t + d (n - t)) / p + 2 layers in bf16 | 4 t / p | 8 t / p |
| ZeRO-3 | 2 n / p + 2 layers in bf16 | 4 t / p | 12 t / p (master weights too) |

Accelerate keeps the trainable weights in float32 under FSDP2 with mixed precision, hence the 4. Activations of a
forward over T tokens, h wide, with m the width of the MLP: a layer holds T (10 h + 4 m) numbers. With gradient
checkpointing all layers keep T h and one of them is alive, without it all are. The head adds the logits of a chunk
(the losses never hold all of them), at capture those of the whole batch. Numbers are of 2 bytes in half precision,
else 4. Attention is taken to be of the kind that stores no T x T matrix; fragmentation and the CUDA context (1 to 2
GB) are left out.
"""

from typing import Any

from ...losses.chunks import default_chunk_size
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
    size = 4.0 if trainable is not None else shape.weight_bytes
    learned = shape.parameters if trainable is None else trainable
    frozen = shape.parameters - (0 if trainable is not None else learned)
    states = _states(str(training.get("optim", "adamw")))
    gathered = 2 * 2.0 * shape.largest_layer
    if sharding == "fsdp2":
        parts = {
            "weights": (4.0 * learned + shape.weight_bytes * frozen) / processes + gathered,
            "gradients": 4.0 * learned / processes,
            "optimizer": 4.0 * states * learned / processes,
        }
    elif sharding == "zero3":
        parts = {
            "weights": 2.0 * (frozen + learned) / processes + gathered,
            "gradients": 4.0 * learned / processes,
            "optimizer": (4.0 + 4.0 * states) * learned / processes,
        }
    else:
        parts = {
            "weights": shape.weight_bytes * shape.parameters + 4.0 * added,
            "gradients": size * learned * (2 if processes > 1 else 1),
            "optimizer": size * states * learned,
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


def _states(optimizer: str) -> float:
    if "8bit" in optimizer:
        return 0.5
    return next((states for name, states in _STATES.items() if name in optimizer), 2.0)


def _number(shape: Shape, training: dict[str, Any]) -> float:
    # bf16 is the default of training arguments on GPUs that have it
    half = training.get("bf16", True) or training.get("fp16", False) or shape.dtype in ("float16", "bfloat16")
    return 2.0 if half else 4.0
