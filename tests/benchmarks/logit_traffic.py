"""
Bytes that the point-wise half of the sparse KL moves for each logit: what decides its speed on a GPU.

A tracer counts, for one tile, what every operation between the two matrix products reads and writes: in torch by the sizes
of the tensors that the operations take and return (those of the size of the tile), in Triton's interpreter by the elements
that loads and stores touch. TRL's chunked head is counted in the same way. The estimate for an H100 divides by its memory
bandwidth (3.35 TB/s, data sheet) and is marked as what it is until someone measures.

    python tests/benchmarks/logit_traffic.py
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


BANDWIDTH = 3.35e12
# Matrix products move the tile too, in every variant alike
_PRODUCTS = ("mm", "addmm", "bmm", "matmul", "linear")
# Views and allocations move nothing
_FREE = (
    "slice",
    "view",
    "empty",
    "select",
    "t",
    "detach",
    "alias",
    "expand",
    "unsqueeze",
    "transpose",
    "_unsafe_view",
)


class Traffic(TorchDispatchMode):
    """Bytes of tensors of at least `size` elements that point-wise operations read and write."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes, self.by_operation = size, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0].rstrip("_")
        if name in _PRODUCTS or name in _FREE:
            return result
        flat = [*args, *(kwargs or {}).values()]
        tensors = [x for part in flat for x in (part if isinstance(part, list | tuple) else [part])]
        outputs = result if isinstance(result, list | tuple) else [result]
        written = (kwargs or {}).get("out")
        in_place = func.__name__.split(".")[0].endswith("_")
        moved = 0
        # Gather and scatter touch a few numbers a row
        for tensor in tensors if name not in ("gather", "scatter", "scatter_add") else []:
            only_written = tensor is written or (name in ("copy", "fill", "zero") and tensor is tensors[0])
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size and not only_written:
                moved += tensor.numel() * tensor.element_size()
        for tensor in outputs if not (name in ("scatter", "scatter_add") and in_place) else []:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                moved += tensor.numel() * tensor.element_size()
        self.bytes += moved
        self.by_operation[name] = self.by_operation.get(name, 0) + moved
        return result


@contextmanager
def interpreter_traffic() -> Iterator[list[int]]:
    """Bytes that loads and stores of kernels touch while it is active; needs Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = [0]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found = load(self, ptrs, mask, *rest)
        counted[0] += int(mask.data.sum()) * found.data.itemsize
        return found

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted[0] += int(mask.data.sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def torch_path(n: int, vocab: int, softcap: float | None) -> float:
    """Bytes a logit of the torch path with float32 tiles, and the bfloat16 copy of the gradient that a GPU's products read."""
    from first_trl.losses.tiles import TorchTile

    logits, work = torch.randn(n, vocab), torch.empty(n, vocab)
    gradient = torch.empty(n, vocab, dtype=torch.bfloat16)
    ids = torch.randint(vocab, (n, 5))
    tile = TorchTile(logits, work, None, 1.0, softcap)
    with Traffic(n * vocab) as traffic:
        tile.read(ids, None, entropy=True)
        tile.write(gradient, ids, torch.zeros(n, 5), torch.ones(n), None, 0.0)
    # The products write float32 logits where bfloat16 would do
    return traffic.bytes / (n * vocab)


def triton_path(n: int, vocab: int, softcap: float | None) -> float:
    """Bytes a logit of the kernels on a bfloat16 tile, ids and row values included."""
    from first_trl.losses.kernels import row_statistics, write_gradient

    logits = torch.randn(n, vocab).bfloat16()
    ids = torch.randint(vocab, (n, 5))
    with interpreter_traffic() as counted:
        rows = row_statistics(logits, ids, None, None, 1.0, softcap)
        write_gradient(
            logits, logits, ids, torch.zeros(n, 5), torch.ones(n), rows.tail_max, None, 0.0, None, 1.0, softcap
        )
    return counted[0] / (n * vocab)


def trl_path(n: int, vocab: int) -> float:
    """Bytes a logit of TRL's head: it reads the tile once forward, reads and writes it once backward."""
    return 2.0 + 2.0 + 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32_003)
    parser.add_argument("--tokens", type=int, default=8192, help="of the estimate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for softcap in (None, 30.0):
        for name, count in (("torch", torch_path), ("triton", triton_path)):
            rows.append({"path": name, "softcap": softcap, "bytes": count(args.rows, args.vocab, softcap)})
    rows.append({"path": "TRL's head (from its kernels' source)", "softcap": None, "bytes": trl_path(0, 0)})
    print(
        "| path | soft cap | bytes a logit | estimate on an H100, ms for 8,192 tokens of V = 151,936 (not measured) |"
    )
    print("| --- | --- | --- | --- |")
    for row in rows:
        row["estimate_ms"] = 1000 * row["bytes"] * args.tokens * 151_936 / BANDWIDTH
        cap = "" if row["softcap"] is None else f"{row['softcap']:g}"
        print(f"| {row['path']} | {cap} | {row['bytes']:.1f} | {row['estimate_ms']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main()
