"""
Speed and memory of the capture against the bare teacher forward on the same batches.

    python -m tests.benchmarks.capture --json capture.json

Three arms, interleaved and summarised by medians: `add_teacher_topk` (top-k, tail, journal, shards, manifest, the
final check of every row), the teacher's forward on the very same batches and nothing else, and the loop of the
original implementation (one row at a time, one position after the other, `softmax` and `topk` of each, JSON lines).
Peak memory is measured in processes of their own.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from first_trl import add_teacher_topk
from first_trl.teacher.backends import TransformersBackend
from first_trl.teacher.rows import batches_by_length
from tests.support.tiny import tiny_tokenizer


def build(args: argparse.Namespace) -> tuple[Any, Dataset, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = GPT2Config(
        vocab_size=args.vocab, n_embd=args.width, n_layer=args.layers, n_head=max(1, args.width // 64),
        n_positions=1024, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(args.device, getattr(torch, args.dtype))
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(args.rows):
        length = int(rng.integers(args.length // 2, args.length + 1))
        ids = rng.integers(3, args.vocab, length).tolist()
        prompt = length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return model, Dataset.from_list(rows), tiny_tokenizer(args.vocab)


def capture(model: Any, rows: Dataset, tokenizer: Any, args: argparse.Namespace) -> None:
    folder = tempfile.mkdtemp()
    try:
        add_teacher_topk(
            rows, model, tokenizer, k=args.k, output_dir=folder, max_tokens_per_batch=args.batch_tokens,
            shard_size=args.shard_size, disable_tqdm=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)


def bare_forward(model: Any, rows: Dataset, tokenizer: Any, args: argparse.Namespace) -> None:
    """The forwards of the capture, logits of the same positions included, without any use of them."""
    backend = TransformersBackend(model)
    for start in range(0, len(rows), args.shard_size):
        shard = rows[start : start + args.shard_size]
        input_ids = [np.asarray(ids, np.int32) for ids in shard["input_ids"]]
        positions = [np.flatnonzero(np.asarray(labels)[1:] != -100) + 1 for labels in shard["labels"]]
        for batch in batches_by_length(input_ids, args.batch_tokens, 64):
            with torch.inference_mode():
                row_index = np.repeat(np.arange(len(batch)), [len(positions[i]) for i in batch])
                columns = np.concatenate([positions[i] for i in batch]) - 1
                logits, *_ = backend._forward([input_ids[i] for i in batch], row_index, columns)
            if logits.device.type == "cuda":
                torch.cuda.synchronize()
            del logits  # else two batches' logits would be alive at once, and the baseline too high


def token_loop(model: Any, rows: Dataset, tokenizer: Any, args: argparse.Namespace) -> None:
    """The shape of the original implementation: batch 1, the prefix of every position through the model again."""
    with tempfile.TemporaryFile("w") as file, torch.inference_mode():
        for row in rows:
            entries = []
            for t in range(1, len(row["input_ids"])):
                if row["labels"][t] == -100:
                    continue
                logits = model(torch.tensor([row["input_ids"][:t]], device=model.device), use_cache=False).logits
                values, ids = logits[0, -1].float().softmax(-1).topk(args.k)
                entries.append({str(int(i)): float(v.log()) for i, v in zip(ids, values, strict=True)})
            file.write(json.dumps(entries) + "\n")


ARMS = {"capture": capture, "bare_forward": bare_forward, "token_loop": token_loop}


def peak_memory(arm: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of one arm in a process of its own: resident on a CPU, allocated on a GPU."""
    command = [sys.executable, "-m", "tests.benchmarks.capture", "--only", arm]
    for name in ("rows", "length", "width", "layers", "vocab", "k", "threads", "device", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--batch-tokens", str(args.batch_tokens), "--shard-size", str(args.shard_size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident_peak() -> int:
    # `ru_maxrss` would not do: a child starts with its parent's
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def run_alone(args: argparse.Namespace) -> None:
    model, rows, tokenizer = build(args)
    small = rows.select(range(2))
    # Both arms' processes hold the same libraries
    capture(model, small, tokenizer, args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ARMS[args.only](model, rows, tokenizer, args)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(resident_peak())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-rows", type=int, default=2, help="rows of the per-token loop, which is slow")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of all threads, for a busy machine"
    )
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return run_alone(args)

    model, rows, tokenizer = build(args)
    few = rows.select(range(args.loop_rows))
    tokens = sum(len(ids) for ids in rows["input_ids"])
    few_tokens = sum(len(ids) for ids in few["input_ids"])
    capture(model, few, tokenizer, args)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(args.repeats):
        for name, arm in ARMS.items():
            dataset, count = (few, few_tokens) if name == "token_loop" else (rows, tokens)
            started = clock()
            arm(model, dataset, tokenizer, args)
            rates[name].append(count / (clock() - started))
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["capture"], rates["bare_forward"], strict=True)]
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "tokens_per_second": {name: round(value, 1) for name, value in median.items()},
        "capture_over_bare_forward": round(statistics.median(ratios), 3),
        "capture_over_bare_forward_each": [round(ratio, 3) for ratio in ratios],
        "capture_over_token_loop": round(median["capture"] / median["token_loop"], 1),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    }
    if not args.skip_memory:
        del model
        peaks = {name: peak_memory(name, args) for name in ("capture", "bare_forward")}
        result["peak_bytes"] = peaks
        result["peak_over_bare_forward"] = round(peaks["capture"] / peaks["bare_forward"], 3)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
