"""
Time and memory of the fused sparse KL loss, forward and backward, in units of the bare matrix products of its shapes.

Compared on the same hidden states and head:

- `products`: the bare products in 256-row chunks into ready buffers: project, hidden gradient, and for a trainable head
  its gradient (3 products, 2 for a frozen head). The unit.
- `topk`, `bucket`, `sampled`, `renormalized`: `fused_sparse_kl`.
- `trl`: TRL's `ChunkedLogProbFunction` as `SFTTrainer` calls it (hard labels, entropy and top-1 reported).
- `full_log_softmax`: full logits, log-softmax, gather.
- `full_logsumexp`: full logits, logsumexp, gather, subtract (DistillKit's sparse KL).

Repeats are interleaved, so that a busy machine slows all variants alike. Run with the repository root as working
directory:

    python tests/benchmarks/fused_loss.py
    python tests/benchmarks/fused_loss.py --memory-tokens 1024 8192 32768 --json fused_loss.json
    python tests/benchmarks/fused_loss.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 1536
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from first_trl.losses import default_chunk_size, fused_sparse_kl


ESTIMATORS = ("topk", "bucket", "sampled", "renormalized")
BASELINES = ("trl", "full_log_softmax", "full_logsumexp")
PRODUCT_ROWS = 256
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Problem:
    """One set of inputs; `run(variant)` does a forward and a backward pass and drops the gradients."""

    def __init__(self, args: argparse.Namespace, tokens: int, trainable: bool) -> None:
        device, dtype = args.device, getattr(torch, args.dtype)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, args.hidden, generator=generator)
        weight = torch.randn(args.vocab, args.hidden, generator=generator).mul_(args.hidden**-0.5)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_(trainable)
        # Distinct ids per row: random offsets within k equal strides of the vocabulary.
        stride = args.vocab // args.k
        starts = torch.arange(args.k) * stride
        self.ids = (starts + torch.randint(stride, (tokens, args.k), generator=generator)).to(device)
        self.labels = self.ids[:, 0].clone()
        log_mass = torch.randn(tokens, args.k + 1, generator=generator).to(device)
        self.log_bucket = log_mass.log_softmax(-1)
        self.log_target = log_mass[:, :-1].log_softmax(-1)
        self.trainable = trainable
        self.chunk_size: int | None = args.chunk_size
        self.buffers: tuple[torch.Tensor, ...] = ()

    def run(self, variant: str) -> None:
        getattr(self, "_" + variant)()
        self.hidden.grad = self.weight.grad = None

    def _fused(self, estimator: str, log_target: torch.Tensor, **kwargs: Any) -> None:
        fused_sparse_kl(
            self.hidden,
            self.weight,
            self.ids,
            log_target,
            labels=self.labels,
            estimator=estimator,
            chunk_size=self.chunk_size,
            **kwargs,
        ).loss.backward()

    def _topk(self) -> None:
        self._fused("topk", self.log_target)

    def _sampled(self) -> None:
        self._fused("sampled", self.log_target)

    def _renormalized(self) -> None:
        self._fused("renormalized", self.log_target)

    def _bucket(self) -> None:
        self._fused("bucket", self.log_bucket[:, :-1], tail_log_target=self.log_bucket[:, -1])

    @torch.no_grad()
    def _products(self) -> None:
        hidden, weight = self.hidden, self.weight
        if not self.buffers:
            rows = min(PRODUCT_ROWS, hidden.shape[0])
            self.buffers = (hidden.new_zeros(rows, weight.shape[0]), torch.zeros_like(hidden))
            if self.trainable:
                self.buffers += (torch.zeros_like(weight),)
        logits, grad_hidden, *grad_weight = self.buffers
        for start in range(0, hidden.shape[0], PRODUCT_ROWS):
            chunk = hidden[start : start + PRODUCT_ROWS]
            tile = logits[: chunk.shape[0]]
            torch.mm(chunk, weight.t(), out=tile)
            torch.mm(tile, weight, out=grad_hidden[start : start + PRODUCT_ROWS])
            if grad_weight:
                grad_weight[0].addmm_(tile.t(), chunk)

    def _trl(self) -> None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        log_probs, *_ = ChunkedLogProbFunction.apply(
            self.hidden,
            self.weight,
            None,
            self.labels,
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("log_probs", "entropy", "is_top1"),
        )
        (-log_probs.sum()).backward()

    def _full_log_softmax(self) -> None:
        log_p = (self.hidden @ self.weight.t()).float().log_softmax(-1)
        (self.log_target.exp() * (self.log_target - log_p.gather(1, self.ids))).sum().backward()

    def _full_logsumexp(self) -> None:
        logits = (self.hidden @ self.weight.t()).float()
        log_p = logits.gather(1, self.ids) - logits.logsumexp(-1, keepdim=True)
        (self.log_target.exp() * (self.log_target - log_p)).sum().backward()


def time_variants(
    problem: Problem, variants: list[str], repeats: int, device: str, clock: Callable[[], float]
) -> dict[str, list[float]]:
    def timed(variant: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        problem.run(variant)
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for variant in variants:
        timed(variant)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            seconds[variant].append(timed(variant))
    return seconds


def _status_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _memory_worker(args: argparse.Namespace, tokens: int, trainable: bool, variant: str, queue: Any) -> None:
    warm = Problem(argparse.Namespace(**{**vars(args), "vocab": 1024}), 64, trainable)
    warm.run(variant)
    problem = Problem(args, tokens, trainable)
    gradients = problem.hidden.nbytes + (problem.weight.nbytes if trainable else 0)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(variant)
        extra = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
        before = _status_kib("VmRSS")
        problem.run(variant)
        extra = (_status_kib("VmHWM") - before) * 1024
    queue.put((extra - gradients) / 1e6)


def measure_memory(args: argparse.Namespace, tokens: int, trainable: bool, variant: str) -> float | None:
    """Peak MB of a forward and backward pass beyond its inputs and result gradients, in a process of its own."""
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory_worker, args=(args, tokens, trainable, variant, queue))
    process.start()
    process.join()
    return None if process.exitcode else queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5, help="0 leaves the timing out")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a busy machine")
    parser.add_argument("--variants", nargs="+", default=[*ESTIMATORS, *BASELINES], choices=[*ESTIMATORS, *BASELINES])
    parser.add_argument("--head", nargs="+", default=["trainable", "frozen"], choices=["trainable", "frozen"])
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[], help="token counts to measure memory at")
    parser.add_argument("--memory-variants", nargs="+", default=["topk", "bucket", "renormalized"])
    parser.add_argument("--json", type=Path, default=None, help="file to write the results to")
    args = parser.parse_args()

    device_name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "device_name": device_name}
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu times CPU runs only")
    settings["chunk_size"] = args.chunk_size or default_chunk_size(args.vocab, args.device)
    results: dict[str, Any] = {"settings": settings, "time": [], "memory": []}
    print(
        f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, k {args.k}, {args.dtype}, "
        f"{settings['chunk_size']} tokens a chunk, {device_name}, {settings['threads']} threads, {args.clock} clock, torch {torch.__version__}"
    )
    print(f"\n| head | variant | median s | min s | max s | x products | x trl | x topk |\n|{' --- |' * 8}")
    for head in args.head if args.repeats else []:
        problem = Problem(args, args.tokens, head == "trainable")
        seconds = time_variants(problem, ["products", *args.variants], args.repeats, args.device, CLOCKS[args.clock])
        medians = {variant: statistics.median(values) for variant, values in seconds.items()}
        for variant, values in seconds.items():
            row: dict[str, Any] = {"head": head, "variant": variant, "median": medians[variant]}
            row |= {"min": min(values), "max": max(values), "seconds": values}
            cells = []
            for unit in ("products", "trl", "topk"):
                row[f"ratio_{unit}"] = medians[variant] / medians[unit] if unit in medians else None
                cells.append("" if row[f"ratio_{unit}"] is None else f"{row[f'ratio_{unit}']:.3f}")
            results["time"].append(row)
            print(
                f"| {head} | {variant} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | "
                + " | ".join(cells)
                + " |",
                flush=True,
            )
    if args.memory_tokens:
        print(f"\n| head | variant | tokens | extra peak MB, result gradients aside |\n|{' --- |' * 4}")
        for head in args.head:
            for variant in args.memory_variants:
                for tokens in args.memory_tokens:
                    extra = measure_memory(args, tokens, head == "trainable", variant)
                    results["memory"].append({"head": head, "variant": variant, "tokens": tokens, "extra_mb": extra})
                    print(
                        f"| {head} | {variant} | {tokens} | {'' if extra is None else format(extra, '.0f')} |",
                        flush=True,
                    )
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
