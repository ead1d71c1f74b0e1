"""
How many supervised tokens a second the trainer's data loader delivers, and how many its training step consumes.

The loader is the trainer's own (`get_train_dataloader`): rows from an Arrow file, recalibrated targets, padding. It is
timed with no worker, in the training process, and with one worker. The step is `FirstDistillTrainer`'s, forward,
backward and optimizer. Run from the repository root:

    python -m tests.benchmarks.dataloader
    python -m tests.benchmarks.dataloader --device cuda --dtype bfloat16 --shape qwen2.5-1.5b --rows 8 --seq-len 1024
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from first_trl import FirstDistillConfig, FirstDistillTrainer
from tests.benchmarks.train_step import SHAPES, Step, build_model, build_rows
from tests.support.tiny import tiny_tokenizer


OBJECTIVES: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, probability temperature": {"recalibration": "probability_temperature", "recalibration_value": 0.3},
    "bucket, logit temperature": {
        "estimator": "bucket",
        "recalibration": "logit_temperature",
        "recalibration_value": 1.5,
    },
    "topk, packed": {"packing": True},
}


def delivered_per_second(
    args: argparse.Namespace, rows: Dataset, tokenizer: Any, workers: int, **options: Any
) -> float:
    """Median over the repeats of supervised tokens a second, once the first batch is there."""
    config = FirstDistillConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.rows,
        max_length=args.seq_len,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **options,
    )
    small = argparse.Namespace(**{**vars(args), "shape": "tiny", "device": "cpu", "dtype": "float32"})
    trainer = FirstDistillTrainer(build_model(small), config, rows, processing_class=tokenizer)
    rates = []
    for _ in range(args.repeats):
        batches = iter(trainer.get_train_dataloader())
        next(batches)
        tokens, start = 0, time.perf_counter()
        for batch in batches:
            tokens += len(batch["teacher_ids"])
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="file to write the results to")
    args = parser.parse_args()
    args.prompt, args.gradient_checkpointing = 0.0, False

    tokenizer = tiny_tokenizer(args.vocab)
    one_batch = build_rows(args, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        # A file, not memory: the loader of a real cache reads memory-mapped Arrow
        concatenate_datasets([one_batch] * args.batches).save_to_disk(folder)
        rows = Dataset.load_from_disk(folder)
        results: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "loader": []}
        step = Step(args, "topk", False, tokenizer, one_batch)
        seconds = []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            step.run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        consumed = len(step.batch["teacher_ids"]) / statistics.median(seconds[1:])
        results["consumed"] = consumed
        del step
        print(f"A {args.shape} step (full weights, topk, {args.device}) consumes {consumed:,.0f} supervised tokens/s.")
        print(f"\n| rows | workers | supervised tokens/s | x the step |\n|{' --- |' * 4}")
        for name, options in OBJECTIVES.items():
            for workers in (0, 1):
                rate = delivered_per_second(args, rows, tokenizer, workers, **options)
                results["loader"].append({"rows": name, "workers": workers, "rate": rate, "ratio": rate / consumed})
                print(f"| {name} | {workers} | {rate:,.0f} | {rate / consumed:.1f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
