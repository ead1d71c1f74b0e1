"""
Time and memory of a whole training step: forward, backward and optimizer, on one ready batch.

Compared on models of one shape, on the same rows:

- `sft`: TRL's `SFTTrainer` on the hard labels. The unit.
- `topk`, `bucket`, `renormalized`: `FirstDistillTrainer` from a cache.
- `gkd`: TRL's `GKDTrainer` with `lmbda=0` (no generation) and `beta=0` (forward KL), with a resident teacher of the
  student's own shape: the smallest teacher one would distil from.

Steps are interleaved, so that a busy machine slows all variants alike. On a CPU the peak of the resident memory is
taken in a process of its own, beyond what was resident before the model was built. Run from the repository root:

    python -m tests.benchmarks.train_step
    python -m tests.benchmarks.train_step --device cuda --dtype bfloat16 --shape qwen2.5-1.5b --rows 8 --seq-len 1024
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from first_trl import FirstDistillConfig, FirstDistillTrainer
from first_trl.cache.manifest import tokenizer_fingerprint
from first_trl.cache.schema import cache_features
from tests.support.tiny import tiny_tokenizer, with_digests


ESTIMATORS = ("topk", "bucket", "renormalized")
VARIANTS = ("sft", *ESTIMATORS, "gkd")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab, pad_token_id=0, eos_token_id=1, bos_token_id=None, **SHAPES[args.shape]
    )
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(getattr(torch, args.dtype))


def build_rows(args: argparse.Namespace, tokenizer: Any) -> Dataset:
    """A cache of random tokens: what a step costs does not depend on what is in it."""
    rng = np.random.default_rng(0)
    prompt = max(1, round(args.seq_len * args.prompt))
    positions = args.seq_len - prompt
    rows = []
    for _ in range(args.rows):
        ids = rng.integers(3, args.vocab, args.seq_len)
        mass = -np.sort(-rng.dirichlet(np.ones(args.k + 1) / 2, positions), axis=1)
        logprobs = np.log(np.maximum(mass, 1e-6)).astype(np.float32)
        topk = rng.integers(0, args.vocab // args.k, (positions, args.k)) + np.arange(args.k) * (args.vocab // args.k)
        rows.append(
            {
                "input_ids": ids.tolist(),
                "labels": [-100] * prompt + ids[prompt:].tolist(),
                "teacher_topk_ids": topk.tolist(),
                "teacher_topk_logprobs": logprobs[:, : args.k].tolist(),
                "teacher_tail_logprob": logprobs[:, args.k].tolist(),
                "teacher_cache": f"0123456789abcdef:{tokenizer_fingerprint(tokenizer)}",
                "teacher_row_digest": 0,
            }
        )
    return with_digests(Dataset.from_list(rows, features=cache_features("float32")))


class Step:
    """A trainer with one batch on its device; `run()` does a full optimizer step on it."""

    def __init__(self, args: argparse.Namespace, variant: str, lora: bool, tokenizer: Any, rows: Dataset) -> None:
        options: dict[str, Any] = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": args.rows,
            "max_length": args.seq_len,
            "max_steps": 1,
            "learning_rate": 1e-5,
            "report_to": "none",
            "use_cpu": args.device == "cpu",
            "bf16": args.dtype == "bfloat16",
            "gradient_checkpointing": args.gradient_checkpointing,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        datasets.disable_progress_bars()
        peft_config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if lora else None
        shared: dict[str, Any] = {"processing_class": tokenizer, "peft_config": peft_config}
        plain = rows.select_columns(["input_ids", "labels"])
        trainer: Any
        if variant == "sft":
            trainer = SFTTrainer(build_model(args), SFTConfig(**options), train_dataset=plain, **shared)
        elif variant == "gkd":
            from trl.experimental.gkd import GKDConfig, GKDTrainer
            from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

            trainer = GKDTrainer(
                build_model(args),
                build_model(args),
                GKDConfig(**options, lmbda=0.0, beta=0.0),
                DataCollatorForLanguageModeling(pad_token_id=0),
                train_dataset=plain,
                **shared,
            )
            trainer.lmbda = -1.0  # `random() <= 0.0` can still be true
        else:
            config = FirstDistillConfig(**options, estimator=variant)
            trainer = FirstDistillTrainer(build_model(args), config, rows, **shared)
        trainer.create_optimizer()
        self.trainer = trainer
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.num_items = trainer._get_num_items_in_batch([self.batch], trainer.args.device)

    def run(self) -> None:
        self.trainer.training_step(self.model, dict(self.batch), self.num_items)
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_steps(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, list[float]]:
    clock = CLOCKS[args.clock]

    def timed(step: Step) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        step.run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for step in steps.values():
        timed(step)
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(args.repeats):
        for variant, step in steps.items():
            seconds[variant].append(timed(step))
    return seconds


def _status_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def _memory_worker(args: argparse.Namespace, variant: str, lora: bool, queue: Any) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = tiny_tokenizer(args.vocab)
    rows = build_rows(args, tokenizer)
    gc.collect()
    if args.device == "cuda":
        step = Step(args, variant, lora, tokenizer, rows)
        step.run()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        queue.put(torch.cuda.max_memory_allocated() / 1e6)
        return
    before = _status_kib("VmRSS")
    step = Step(args, variant, lora, tokenizer, rows)
    step.run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    step.run()
    queue.put((_status_kib("VmHWM") - before) * 1024 / 1e6)


def measure_memory(args: argparse.Namespace, variant: str, lora: bool) -> float | None:
    """Peak MB of a step: weights, gradients, optimizer state, activations, and what the loss adds."""
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory_worker, args=(args, variant, lora, queue))
    process.start()
    process.join()
    return None if process.exitcode else queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--prompt", type=float, default=0.0, help="share of each row that is masked")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a busy machine")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--weights", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, default=None, help="file to write the results to")
    args = parser.parse_args()
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu times CPU runs only")

    torch.set_num_threads(args.threads)
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings |= {"torch": torch.__version__, "device_name": device_name, "model": SHAPES[args.shape]}
    results: dict[str, Any] = {"settings": settings, "steps": []}
    tokenizer = tiny_tokenizer(args.vocab)
    rows = build_rows(args, tokenizer)
    print(
        f"{args.rows} rows of {args.seq_len} tokens, {args.shape} model, vocabulary {args.vocab}, {args.dtype}, "
        f"{device_name}, {args.threads} threads, {args.clock} clock, torch {torch.__version__}"
    )
    print(
        f"\n| weights | variant | median s | min s | max s | x sft | x gkd | peak MB | x sft | x gkd |\n|{' --- |' * 10}"
    )
    for weights in args.weights:
        lora = weights == "lora"
        memory = {name: None if args.no_memory else measure_memory(args, name, lora) for name in args.variants}
        steps = {name: Step(args, name, lora, tokenizer, rows) for name in args.variants}
        seconds = time_steps(steps, args)
        del steps
        gc.collect()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            row: dict[str, Any] = {"weights": weights, "variant": name, "median": medians[name], "seconds": values}
            row |= {"min": min(values), "max": max(values), "peak_mb": memory[name]}
            for unit in ("sft", "gkd"):
                row[f"time_{unit}"] = medians[name] / medians[unit] if unit in medians else None
                peaks = memory[name], memory.get(unit)
                row[f"memory_{unit}"] = None if peaks[0] is None or peaks[1] is None else peaks[0] / peaks[1]
            results["steps"].append(row)
            cells = ("median", "min", "max", "time_sft", "time_gkd", "peak_mb", "memory_sft", "memory_gkd")
            text = ["" if row[cell] is None else f"{row[cell]:.{0 if cell == 'peak_mb' else 3}f}" for cell in cells]
            print(f"| {weights} | {name} | " + " | ".join(text) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
