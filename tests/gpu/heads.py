"""Time and memory of the loss, forward and backward, beside the bare products and the heads of TRL and Liger."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from first_trl.losses import fused_sparse_kl


# Name -> hidden size, vocabulary, soft cap; the published configurations
SHAPES = {
    "Qwen 0.5B": (896, 151_936, None),
    "Llama 1B": (2048, 128_256, None),
    "Llama 8B": (4096, 128_256, None),
    "Gemma 2B": (2304, 256_000, 30.0),
}
TOKENS = 8192
PRODUCT_ROWS = 2048
K = 5


def variants(
    hidden_size: int, vocab: int, softcap: float | None, tokens: int, device: str
) -> dict[str, Callable[[], Any]]:
    """Name -> one forward and backward pass; a peer that is not installed is left out."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator, device=device, dtype=dtype).mul_(hidden_size**-0.5)
    weight.requires_grad_()
    stride = vocab // K
    ids = torch.randint(stride, (tokens, K), generator=generator, device=device)
    ids = ids + torch.arange(K, device=device) * stride
    labels = ids[:, 0].clone()
    log_bucket = torch.randn(tokens, K + 1, generator=generator, device=device).log_softmax(-1)
    log_target = log_bucket[:, :-1].log_softmax(-1)

    def clear() -> None:
        hidden.grad = weight.grad = None

    def ours(target: torch.Tensor, **options: Any) -> None:
        output = fused_sparse_kl(
            hidden, weight, ids, target, labels=labels, final_logit_softcapping=softcap, check=False, **options
        )
        output.loss.backward()
        clear()

    @torch.no_grad()
    def products() -> None:
        grad_weight = torch.zeros_like(weight)
        for start in range(0, tokens, PRODUCT_ROWS):
            chunk = hidden[start : start + PRODUCT_ROWS]
            tile = chunk @ weight.T
            _ = tile @ weight
            grad_weight.addmm_(tile.T, chunk)

    found: dict[str, Callable[[], Any]] = {
        "bare products": products,
        "topk": lambda: ours(log_target),
        "bucket": lambda: ours(log_bucket[:, :-1], estimator="bucket", tail_log_target=log_bucket[:, -1]),
    }
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        def trl() -> None:
            wanted = ("log_probs", "entropy", "is_top1")
            log_probs, *_ = ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, 1.0, wanted
            )
            (-log_probs.sum()).backward()
            clear()

        found["TRL's head (hard labels)"] = trl
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger() -> None:
            liger_fused_linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction="sum").backward()
            clear()

        if device == "cuda":
            found["Liger's head (hard labels)"] = liger
    except ImportError:
        pass
    return found


def run(device: str, repeats: int = 5) -> list[dict[str, Any]]:
    """Medians over interleaved repeats; on a CPU at a size that takes seconds."""
    rows = []
    for name, (hidden_size, vocab, softcap) in SHAPES.items():
        tokens = TOKENS if device == "cuda" else 64
        if device != "cuda":
            hidden_size, vocab = hidden_size // 8, vocab // 8
        passes = variants(hidden_size, vocab, softcap, tokens, device)
        seconds: dict[str, list[float]] = {variant: [] for variant in passes}
        memory: dict[str, int | None] = {}
        for variant, one in passes.items():
            memory[variant] = _peak(one, device)
        for _ in range(repeats):
            for variant, one in passes.items():
                seconds[variant].append(_seconds(one, device))
        for variant, values in seconds.items():
            rows.append(
                {
                    "shape": name, "hidden": hidden_size, "vocab": vocab, "tokens": tokens, "variant": variant,
                    "ms": 1000 * statistics.median(values), "low": 1000 * min(values), "high": 1000 * max(values),
                    "peak_mb": None if memory[variant] is None else memory[variant] / 1e6,
                }
            )  # fmt: skip
        del passes
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _seconds(one: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    one()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(one: Callable[[], Any], device: str) -> int | None:
    """Bytes beyond what was allocated before; the first pass also compiles."""
    one()
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one()
    return int(torch.cuda.max_memory_allocated() - before)
